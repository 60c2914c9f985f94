"""What the routers do with text, token by token: probabilities and choices of every layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Int

from emo_jax import compat, model
from emo_jax.loaded import LoadedModel
from emo_jax.processes import gather_global
from emo_jax.subsets.calibration import Calibration
from emo_jax.subsets.sweep import batches

MAX_TOKENS = 1 << 16  # whose probabilities are kept: 4 x L x R bytes each


@dataclass(frozen=True)
class Activations:
    """What the routers did with n tokens, without padding. A piece is a document, or the part of one that is in a row."""

    probabilities: Float[np.ndarray, "n L R"]  # the router's, over all routed experts
    expert_ids: Int[np.ndarray, "n L k"]
    tokens: Int[np.ndarray, "n"]  # token ids
    pieces: Int[np.ndarray, "n"]  # 0, 1, ...
    labels: Int[np.ndarray, "n"]  # the number of the token's label in `names`
    names: tuple[str, ...]


def collect(loaded: LoadedModel, text: Calibration, max_tokens: int = MAX_TOKENS) -> Activations:
    """The activations of `text`, whose groups are the labels, from one forward pass without pools. Of more than
    `max_tokens` tokens whole rows are left out, evenly over the text."""
    step = _routing_step(loaded.execution)
    rows_kept = _spread(text, max_tokens)
    parts, first_piece, first_row = [], 0, 0
    with compat.set_mesh(loaded.mesh):
        for batch, groups in batches(loaded, text, "activations of the routers"):
            probabilities, expert_ids = (gather_global(x) for x in step(loaded.params, batch))  # [L, B, T, .]
            tokens, segments = (gather_global(batch[name]) for name in ("tokens", "segment_ids"))
            rows = np.arange(first_row, first_row + len(groups))
            use = (segments > 0) & (groups >= 0)[:, None] & np.isin(rows, rows_kept)[:, None]
            row_of_token = np.broadcast_to(np.arange(len(groups))[:, None], use.shape)[use]
            piece = np.unique(row_of_token * segments.shape[1] + segments[use], return_inverse=True)[1]
            parts.append((np.moveaxis(probabilities, 0, 2)[use], np.moveaxis(expert_ids, 0, 2)[use], tokens[use],
                          first_piece + piece, groups[row_of_token]))
            first_piece, first_row = first_piece + len(np.unique(piece)), first_row + len(groups)
    return Activations(*(np.concatenate(arrays) for arrays in zip(*parts)), text.names)


def _spread(text: Calibration, max_tokens: int) -> np.ndarray:
    """Rows, evenly over the text, with about `max_tokens` tokens."""
    rows, tokens = len(text.groups), int((text.fields["segment_ids"] > 0).sum())
    return np.unique(np.linspace(0, rows - 1, max(1, round(rows * min(1.0, max_tokens / max(tokens, 1))))).astype(int))


@functools.cache
def _routing_step(execution: model.Execution):
    @jax.jit
    def step(params, batch):
        return model.forward(params, batch, execution,
                             per_layer=lambda x, route, rows: (route.scores, route.expert_ids))[1]

    return step
