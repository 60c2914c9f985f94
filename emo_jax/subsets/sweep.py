"""Forward sweeps over calibration text that add up a statistic of every layer and routed expert.

A statistic sees the experts of each layer at work and gives sums over the tokens of every row, fp32; padding never counts.
Shapes as in `emo_jax.model`; G groups of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from emo_jax import compat, model
from emo_jax.loaded import LoadedModel
from emo_jax.moe import routing
from emo_jax.processes import gather_global
from emo_jax.progress import track
from emo_jax.rounding import ceil_div
from emo_jax.sharding import BATCH, P, place
from emo_jax.subsets import methods
from emo_jax.subsets.calibration import Calibration


class Sums(NamedTuple):
    """What one layer adds up, by row."""

    score: Float[Array, "B R"]
    count: Float[Array, "B R"]  # tokens that the score is a sum over


class Statistic(NamedTuple):
    """collect: (experts, their normed input [B, T, D], rows, allowed, execution) -> (their output [B, T, D], `Sums`). rank:
    what experts are ranked by, from the sums over all rows."""

    collect: Callable[..., tuple[Array, Sums]]
    rank: Callable[[np.ndarray, np.ndarray], np.ndarray]


def mean(score: np.ndarray, count: np.ndarray) -> np.ndarray:
    return score / count.clip(1)


def total(score: np.ndarray, count: np.ndarray) -> np.ndarray:
    return score


def norm(rows_D: Float[Array, "*rows D"]) -> Float[Array, "*rows"]:
    """Length of every row, fp32; also where the squares would underflow, as of a row with a tiny router weight."""
    rows_D = rows_D.astype(jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(rows_D), axis=-1), jnp.finfo(jnp.float32).tiny)
    return largest * jnp.linalg.norm(rows_D / largest[..., None], axis=-1)


def by_expert(route: routing.Routing, rows: model.RowContext, values_BTk: Float[Array, "B T k"],
              execution: model.Execution) -> Sums:
    """Sums of a value of every choice, and the number of choices."""
    R = execution.config.model.num_routed_experts
    valid = (rows.router_segments > 0)[..., None, None]
    chosen_BTkR = (route.expert_ids[..., None] == jnp.arange(R)) & (route.weights > 0)[..., None] & valid
    return Sums(jnp.sum(jnp.where(chosen_BTkR, values_BTk[..., None], 0.0), axis=(1, 2)),
                jnp.sum(chosen_BTkR, axis=(1, 2), dtype=jnp.float32))


class Totals:
    """Sums of every group, float64 [G, L, R]."""

    def __init__(self, loaded: LoadedModel, calibration: Calibration, statistic: Statistic):
        m, self._rank = loaded.config.model, statistic.rank
        self.score, self.count = np.zeros((2, len(calibration.names), m.num_layers, m.num_routed_experts))

    def add(self, layer: int | slice, groups: np.ndarray, sums: Sums) -> None:
        """Rows [B, R], or [L, B, R] with `layer` a slice, to the groups of the rows (-1: none)."""
        for so_far, rows in zip((self.score, self.count), sums):
            rows = gather_global(rows).astype(np.float64)
            for group in np.unique(groups[groups >= 0]):
                so_far[group, layer] += rows[..., groups == group, :].sum(axis=-2)

    def ranking(self) -> Float[np.ndarray, "G L R"]:
        return self._rank(self.score, self.count)


def one_sweep(loaded: LoadedModel, calibration: Calibration, method: str, masks: np.ndarray | None = None,
              depth: int | None = None) -> np.ndarray:
    """Scores [G, L, R] of all layers from one forward pass over the text; layers past `depth` are not run (0).

    `masks` bool [G, L, R]: experts that the rows of a group may use, by default all.
    """
    statistic = methods.get(method).statistic
    totals, depth = Totals(loaded, calibration, statistic), loaded.config.model.num_layers if depth is None else depth
    step = _sweep_step(loaded.execution, statistic)
    with compat.set_mesh(loaded.mesh):
        for batch, groups in batches(loaded, calibration, f"choosing experts by {method}"):
            allowed = row_masks(loaded, masks, groups)
            totals.add(slice(None), groups, step(loaded.params, batch, allowed, depth))
    return totals.ranking()


def row_masks(loaded: LoadedModel, masks: np.ndarray | None, groups: np.ndarray) -> jax.Array:
    """bool [L, B, 1, R] on the mesh: the mask of each row's group."""
    m = loaded.config.model
    rows = np.ones((m.num_layers, len(groups), 1, m.num_routed_experts), bool)
    if masks is not None:
        rows[:, groups >= 0, 0] = masks[groups[groups >= 0]].swapaxes(0, 1)
    return place(rows, loaded.mesh, P(None, BATCH))


def batches(loaded: LoadedModel, calibration: Calibration, what: str = "") -> Iterator[tuple[dict[str, Array], np.ndarray]]:
    """Those of `calibration`, of the size of training; `what`: the work, for a line of progress."""
    size = loaded.config.train.batch_size // loaded.config.train.microbatches
    found = calibration.batches(loaded.mesh, size)
    return track(found, what, "batches", total=ceil_div(len(calibration.groups), size)) if what else found


def layer_at(params: model.Params, layer: Array | int) -> model.Params:
    """The parameters of one layer, from the stack."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), params["layers"])


def block_of(layer_params: model.Params, execution: model.Execution) -> model.Block:
    c = execution.config.model
    structure, _ = nnx.split(nnx.eval_shape(lambda: model.Block(c, model.Init(c, 0))))
    return nnx.merge(structure, layer_params)


@functools.cache
def _sweep_step(execution: model.Execution, statistic: Statistic):
    m = execution.config.model

    @jax.jit
    def step(params, batch, allowed, depth):
        rows = model.row_context(batch, execution)
        x_BTD = model.embed(params["embedding"], batch["tokens"], execution.dtype)
        allowed = model.allowed_experts(m, allowed)
        zeros_LBR = jnp.zeros((m.num_layers, x_BTD.shape[0], m.num_routed_experts), jnp.float32,
                              out_sharding=P(None, BATCH, None))

        def layer(i, carry):
            x_BTD, sums = carry
            layer_params = layer_at(params, i)
            block = block_of(layer_params, execution)
            h_BTD, normed_BTD, _ = block.attend(x_BTD, rows, execution)
            mask = jax.lax.dynamic_index_in_dim(allowed, i, keepdims=False)
            y_BTD, new = statistic.collect(block.moe, normed_BTD, rows, mask, execution)
            sums = jax.tree.map(lambda s, n: jax.lax.dynamic_update_index_in_dim(s, n, i, 0), sums, new)
            return h_BTD + y_BTD, sums

        return jax.lax.fori_loop(0, depth, layer, (x_BTD, Sums(zeros_LBR, zeros_LBR)))[1]

    return step
