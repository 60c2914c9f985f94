"""Which experts each document of some text uses, and how few: from one forward pass without pools."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from emo_jax import compat, model
from emo_jax.moe import routing
from emo_jax.processes import gather_global
from emo_jax.sharding import BATCH, P
from emo_jax.subsets.calibration import Calibration

ROWS = 64  # of a batch: what is gathered of them is [L, ROWS, N, R]
LEAST_TOKENS = 64  # of a document whose experts are counted


class Use(NamedTuple):
    """Sums over the tokens of D documents. R: routed experts."""

    groups: Int[np.ndarray, "D"]  # of the calibration
    tokens: Float[np.ndarray, "D"]
    probabilities: Float[np.ndarray, "D L R"]  # the routers', over all routed experts
    choices: Float[np.ndarray, "D L R"]  # tokens that chose the expert

    def of_groups(self, sums: Float[np.ndarray, "D *any"], groups: Int[np.ndarray, "D"] | None = None,
                  ) -> Float[np.ndarray, "G *any"]:
        """Summed over the documents of each group; `groups`: in place of the documents' own."""
        groups = self.groups if groups is None else groups
        return np.tensordot(np.eye(groups.max() + 1)[groups].T, sums, 1)

    def long_enough(self) -> np.ndarray:
        """Documents of `LEAST_TOKENS` or more; the longest ones, if none has as many."""
        return self.tokens >= min(LEAST_TOKENS, self.tokens.max())


def use_of_documents(params: model.Params, mesh: Mesh, execution: model.Execution, text: Calibration) -> Use:
    """Every document (or part of one, where it is longer than a row) of `text`."""
    parts = []
    with compat.set_mesh(mesh):
        for batch, groups in text.batches(mesh, ROWS):
            tokens_BN, *sums = (gather_global(x).astype(np.float64) for x in _step(execution)(params, batch))
            there = tokens_BN > 0
            parts.append((np.broadcast_to(groups[:, None], there.shape)[there], tokens_BN[there],
                          *(np.moveaxis(x_LBNR, 0, 2)[there] for x_LBNR in sums)))
    return Use(*map(np.concatenate, zip(*parts)))


@functools.cache
def _step(execution: model.Execution):
    """A jitted (params, batch) -> (tokens [B, N], probabilities and choices [L, B, N, R])."""
    R, N = execution.config.model.num_routed_experts, execution.config.data.max_documents_per_row

    @jax.jit
    def step(params, batch):
        documents_BTN = routing.one_hot_documents(batch["segment_ids"], N)

        def of_documents(x_BTR):
            return jnp.einsum("btn,btr->bnr", documents_BTN, x_BTR, precision=jax.lax.Precision.HIGHEST,
                              out_sharding=P(BATCH, None, None))

        def per_layer(x_BTD, route, rows):
            chosen_BTR = jnp.swapaxes(routing.is_chosen(route.expert_ids, R), 1, 2).astype(jnp.float32)
            return of_documents(route.scores), of_documents(chosen_BTR)

        _, (probabilities_LBNR, choices_LBNR) = model.forward(params, batch, execution, per_layer=per_layer)
        return jnp.sum(documents_BTN, axis=1), probabilities_LBNR, choices_LBNR

    return step


def effective(counts: Float[np.ndarray, "*any R"]) -> Float[np.ndarray, "*any"]:
    """exp(entropy): the number of equally used experts that would be as spread."""
    share = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1e-30)
    return np.exp(-np.sum(np.where(share > 0, share * np.log(np.maximum(share, 1e-30)), 0.0), axis=-1))


def top_share(probabilities: Float[np.ndarray, "*any R"], share: float) -> Float[np.ndarray, "*any"]:
    """The part that the strongest experts have, `share` of all. Where none is preferred it is about `share`."""
    top = max(1, round(share * probabilities.shape[-1]))
    ranked = np.sort(probabilities, axis=-1)[..., ::-1]
    return ranked[..., :top].sum(axis=-1) / ranked.sum(axis=-1)
