"""Forward sweeps over calibration text that collect a method's statistics of every layer and routed expert."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from emo_jax import compat, model
from emo_jax.loaded import LoadedModel
from emo_jax.processes import gather_global
from emo_jax.sharding import BATCH, P, place
from emo_jax.subsets import layers
from emo_jax.subsets.calibration import Calibration


class Totals:
    """Statistics of every group, float64 [G, L, R]."""

    def __init__(self, opened: LoadedModel, calibration: Calibration):
        m = opened.config.model
        self.score, self.count = np.zeros((2, len(calibration.names), m.num_layers, m.num_routed_experts))

    def add(self, layer, groups: np.ndarray, statistics: layers.Statistics) -> None:
        """Rows [B, R], or [L, B, R] with `layer` a slice, to the groups of the rows (-1: none)."""
        for total, rows in zip((self.score, self.count), statistics):
            rows = gather_global(rows).astype(np.float64)
            for group in np.unique(groups[groups >= 0]):
                total[group, layer] += rows[..., groups == group, :].sum(axis=-2)

    def finish(self, method: str) -> np.ndarray:
        return layers.finish(method, self.score, self.count)


def one_sweep(opened: LoadedModel, calibration: Calibration, method: str, masks: np.ndarray | None = None,
              depth: int | None = None) -> np.ndarray:
    """Scores [G, L, R] of all layers from one forward pass over the text; layers past `depth` are not run (0).

    `masks` bool [G, L, R]: experts that the rows of a group may use, by default all.
    """
    totals, m = Totals(opened, calibration), opened.config.model
    depth = m.num_layers if depth is None else depth
    step = _sweep_step(opened.execution, method)
    with compat.set_mesh(opened.mesh):
        for batch, groups in calibration.batches(opened.mesh, batch_size(opened)):
            allowed = row_masks(opened, masks, groups)
            totals.add(slice(None), groups, step(opened.params, batch, allowed, depth))
    return totals.finish(method)


def row_masks(opened: LoadedModel, masks: np.ndarray | None, groups: np.ndarray) -> jax.Array:
    """bool [L, B, 1, R] on the mesh: the mask of each row's group."""
    m = opened.config.model
    rows = np.ones((m.num_layers, len(groups), 1, m.num_routed_experts), bool)
    if masks is not None:
        rows[:, groups >= 0, 0] = masks[groups[groups >= 0]].swapaxes(0, 1)
    return place(rows, opened.mesh, P(None, BATCH))


def batch_size(opened: LoadedModel) -> int:
    return opened.config.train.batch_size // opened.config.train.microbatches


def layer_at(params: model.Params, layer) -> model.Params:
    """The parameters of one layer, from the stack."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), params["layers"])


@functools.cache
def _sweep_step(execution: model.Execution, method: str):
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
            h_BTD, normed_BTD = layers.attend(layer_params, x_BTD, rows, execution)
            mask = jax.lax.dynamic_index_in_dim(allowed, i, keepdims=False)
            y_BTD, new = layers.mix(layer_params, normed_BTD, rows, mask, execution, method)
            sums = jax.tree.map(lambda s, n: jax.lax.dynamic_update_index_in_dim(s, n, i, 0), sums, new)
            return h_BTD + y_BTD, sums

        return jax.lax.fori_loop(0, depth, layer, (x_BTD, layers.Statistics(zeros_LBR, zeros_LBR)))[1]

    return step
