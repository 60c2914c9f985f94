"""What the routers do with text, token by token: probabilities and choices of every layer, and losses.

In memory for little text, and memory-mapped in a folder for much: 2 L R + L k + 4 bytes a token. What was interrupted in a
folder goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from emo_jax import compat, model
from emo_jax.analysis.text import Text
from emo_jax.files import write_json
from emo_jax.loaded import LoadedModel
from emo_jax.processes import gather_global
from emo_jax.progress import Progress
from emo_jax.rounding import round_up
from emo_jax.sharding import BATCH, TOKENS, batch_shards, place, reshard

BATCH_TOKENS = 1 << 14
FLUSH_SECONDS = 5.0


@dataclass(frozen=True)
class Activations:
    """Of n tokens; from one forward pass without pools."""

    text: Text
    probabilities: Float[np.ndarray, "n L R"]  # the routers', over all routed experts; float16
    expert_ids: Integer[np.ndarray, "n L k"]
    nats: Float[np.ndarray, "n"]  # loss of the next token; 0 at a document's end

    @property
    def layers(self) -> int:
        return self.probabilities.shape[1]

    @property
    def experts(self) -> int:
        return self.probabilities.shape[2]

    @cached_property
    def probability_sums(self) -> Float[np.ndarray, "D L R"]:
        return self.text.sums(self.probabilities)

    @cached_property
    def choices(self) -> Float[np.ndarray, "D L R"]:
        """How often each document chose each expert."""
        counts = np.zeros((len(self.text.labels), self.layers, self.experts))
        for layer in range(self.layers):
            np.add.at(counts[:, layer], (self.text.documents[:, None], self.expert_ids[:, layer]), 1)
        return counts

    def thinned(self, tokens: int) -> Activations:
        """About so many tokens, in memory, whole rows evenly."""
        text = self.text.thinned(tokens)
        where = np.isin(self.text.numbers, text.numbers)[self.text.documents]
        return Activations(text, *(np.asarray(a[where]) for a in (self.probabilities, self.expert_ids, self.nats)))


def collect(loaded: LoadedModel, text: Text, folder: Path | None = None) -> Activations:
    """The activations of `text`; memory-mapped in `folder` (a local one) if that is given."""
    arrays, done = _arrays(loaded, text, folder)
    step, what = _routing_step(loaded.execution), f"{loaded.config.name}: activations of the routers"
    progress, flushed = Progress(what, len(text.tokens), "tokens", first=int(text.row_starts[done])), time.monotonic()
    for row, batch, use in _batches(loaded, text, done):
        made = step(loaded.params, batch)
        at = slice(text.row_starts[row], text.row_starts[min(row + len(use), len(text.row_starts) - 1)])
        for array, values in zip(arrays, made):
            array[at] = gather_global(values)[use]
        progress.update(int(at.stop))
        if folder and (at.stop == len(text.tokens) or time.monotonic() - flushed > FLUSH_SECONDS):
            for array in arrays:
                array.flush()
            write_json(folder / "state.json", _identity(loaded, text) | {"rows": min(row + len(use), len(text.rows["tokens"]))})
            flushed = time.monotonic()
    return Activations(text, *arrays)


def expert_ids(loaded: LoadedModel, text: Text) -> Integer[np.ndarray, "n L k"]:
    """The choices alone: L k bytes a token."""
    m = loaded.config.model
    made = np.zeros((len(text.tokens), m.num_layers, m.routed_top_k), _id_type(m.num_routed_experts))
    step, what = _routing_step(loaded.execution), f"{loaded.config.name}: choices of the routers"
    progress = Progress(what, len(made), "tokens")
    for row, batch, use in _batches(loaded, text):
        at = slice(text.row_starts[row], text.row_starts[min(row + len(use), len(text.row_starts) - 1)])
        made[at] = gather_global(step(loaded.params, batch)[1])[use]
        progress.update(int(at.stop))
    return made


def losses(loaded: LoadedModel, text: Text, pool_size: int | None = None, allowed: Bool[np.ndarray, "L R"] | None = None,
           what: str = "") -> Float[np.ndarray, "n"]:
    """nats of the next token of every token, 0 at documents' ends: with pools of `pool_size` routed experts for every document
    and layer, chosen by the document's own votes (None: all experts), among those that are `allowed`."""
    m, nats = loaded.config.model, np.zeros(len(text.tokens), np.float32)
    step, progress = _loss_step(loaded.execution), Progress(what, len(text.tokens), "tokens")
    size = np.int32(m.num_routed_experts if pool_size is None else max(pool_size, m.routed_top_k))
    mask = np.ones((m.num_layers, m.num_routed_experts), bool) if allowed is None else allowed
    for row, batch, use in _batches(loaded, text):
        at = slice(text.row_starts[row], text.row_starts[min(row + len(use), len(text.row_starts) - 1)])
        nats[at] = gather_global(step(loaded.params, batch, size, mask))[use]
        if what:
            progress.update(int(at.stop))
    return nats


def with_random_routers(loaded: LoadedModel, seed: int = 0) -> LoadedModel:
    """The same network with routers as they are before training: what figures are compared with."""
    m = loaded.config.model
    drawn = model.Init(m, seed, "random.", m.num_layers).weight("router", m.d_model, m.num_routed_experts)[...]

    def replaced(path, value):
        return jax.device_put(drawn, value.sharding) if "router" in jax.tree_util.keystr(path) else value

    return dataclasses.replace(loaded, params=jax.tree_util.tree_map_with_path(replaced, loaded.params))


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _identity(loaded: LoadedModel, text: Text) -> dict[str, Any]:
    return {"model": loaded.identity(), "text": text.fingerprint}


def _id_type(experts: int) -> type[np.unsignedinteger]:
    return np.uint8 if experts <= 256 else np.uint16


def _arrays(loaded: LoadedModel, text: Text, folder: Path | None) -> tuple[list[Any], int]:
    """(probabilities, expert ids and losses to fill in, rows that are filled in already)."""
    m, n = loaded.config.model, len(text.tokens)
    made = {"probabilities": ((n, m.num_layers, m.num_routed_experts), np.float16),
            "expert_ids": ((n, m.num_layers, m.routed_top_k), _id_type(m.num_routed_experts)), "nats": ((n,), np.float32)}
    if folder is None:
        return [np.zeros(*of) for of in made.values()], 0
    folder.mkdir(parents=True, exist_ok=True)
    state, files = folder / "state.json", [folder / f"{name}.npy" for name in made]
    found = json.loads(state.read_text()) if state.is_file() else {}
    rows = found.pop("rows", 0)
    if json.loads(json.dumps(_identity(loaded, text))) == found and all(f.is_file() for f in files):
        return [np.load(f, mmap_mode="r+") for f in files], rows
    state.unlink(missing_ok=True)
    return [np.lib.format.open_memmap(f, "w+", dtype, shape) for f, (shape, dtype) in zip(files, made.values())], 0


def _batches(loaded: LoadedModel, text: Text, first: int = 0) -> Iterator[tuple[int, dict[str, jax.Array], np.ndarray]]:
    """(number of the first row, fields on the mesh [B, T], bool [B, T]: what is a token of the text) from row `first` on."""
    rows, length = text.rows["tokens"].shape
    shards = batch_shards(loaded.mesh)
    size = round_up(max(1, min(BATCH_TOKENS // length, rows)), shards)
    with compat.set_mesh(loaded.mesh):
        for start in range(first, rows, size):
            part = {name: x[start:start + size] for name, x in text.rows.items()}
            filled = {name: np.concatenate([x, np.zeros((size - len(x), length), x.dtype)]) for name, x in part.items()}
            yield start, {name: place(x, loaded.mesh, TOKENS) for name, x in filled.items()}, filled["segment_ids"] > 0


@functools.cache
def _routing_step(execution: model.Execution):
    """A jitted (params, batch) -> (probabilities [B, T, L, R] float16, expert ids [B, T, L, k], nats [B, T])."""

    @jax.jit
    def step(params, batch):
        x_BTD, (scores_LBTR, ids_LBTk) = model.forward(
            params, batch, execution, per_layer=lambda x, route, rows: (route.scores.astype(jnp.float16), route.expert_ids))
        nll_BT, _ = model.token_losses(params, x_BTD, batch["targets"], execution)
        return jnp.moveaxis(scores_LBTR, 0, 2), jnp.moveaxis(ids_LBTk, 0, 2), nll_BT * batch["loss_weights"]

    return step


@functools.cache
def _loss_step(execution: model.Execution):
    """A jitted (params, batch, pool size, allowed [L, R]) -> nats [B, T]; another size compiles nothing anew."""
    layers = execution.config.model.num_layers

    @jax.jit
    def step(params, batch, pool_size, allowed):
        shape = (layers, batch["tokens"].shape[0], execution.documents_per_row)
        sizes_LBN = reshard(jnp.full(shape, pool_size, jnp.int32), None, BATCH, None)
        x_BTD, _ = model.forward(params, batch, execution, pool_sizes=sizes_LBN, allowed=allowed)
        return model.token_losses(params, x_BTD, batch["targets"], execution)[0] * batch["loss_weights"]

    return step
