"""Greedy choice: each layer's experts are ranked on what the kept experts of the layers before it produce.

Published as L partial forward passes. Here the text passes each layer once: the activations of all rows wait between
the layers (tokens x D x the bytes of the compute dtype, on the devices or in host memory). Where that is too much, the
activations are recomputed for every group of layers instead, with the layers inside a group ranked together.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from emo_jax import compat, model
from emo_jax.loaded import LoadedModel
from emo_jax.sharding import BATCH, P, place
from emo_jax.subsets import layers
from emo_jax.subsets.budget import pick
from emo_jax.subsets.calibration import Calibration
from emo_jax.subsets.sweep import Totals, batch_size, layer_at, one_sweep


def layerwise(opened: LoadedModel, calibration: Calibration, routed: np.ndarray, layer_group: int = 0,
              on_host: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(masks bool, average router probabilities) [G, L, R] for `routed` [G, L] experts kept in every group and layer.

    `layer_group`: 0 caches activations (one sweep; `on_host` keeps them in host memory), g > 0 recomputes them for
    every g layers ((L/g + 1) / 2 sweeps).
    """
    if layer_group:
        return _recomputed(opened, calibration, routed, layer_group)
    return _streamed(opened, calibration, routed, on_host)


def _streamed(opened: LoadedModel, calibration: Calibration, routed: np.ndarray, on_host: bool):
    totals = Totals(opened, calibration)
    first, advance = _layer_steps(opened.execution)
    store, restore = (_to_host, _to_devices) if on_host else (lambda x: x, lambda x: x)
    masks = np.zeros(totals.score.shape, bool)
    with compat.set_mesh(opened.mesh):
        batches = list(calibration.batches(opened.mesh, batch_size(opened)))
        cached = []
        for batch, groups in batches:
            h, statistics = first(opened.params, batch)
            totals.add(0, groups, statistics)
            cached.append(store(h))
        for layer in range(opened.config.model.num_layers):
            scores = totals.finish("router")[:, layer]
            masks[:, layer] = [pick(s, n) for s, n in zip(scores, routed[:, layer])]
            if layer + 1 == opened.config.model.num_layers:
                break
            for i, (batch, groups) in enumerate(batches):
                allowed = _row_masks(opened, masks[:, layer], groups)
                h, statistics = advance(opened.params, layer, restore(cached[i]), batch, allowed)
                totals.add(layer + 1, groups, statistics)
                cached[i] = store(h)
    return masks, totals.finish("router")


def _recomputed(opened: LoadedModel, calibration: Calibration, routed: np.ndarray, layer_group: int):
    L = opened.config.model.num_layers
    masks = np.ones((len(calibration.names), L, opened.config.model.num_routed_experts), bool)
    scores = np.zeros(masks.shape)
    for start in range(0, L, layer_group):
        group = slice(start, min(start + layer_group, L))
        scores[:, group] = one_sweep(opened, calibration, "router", masks, group.stop)[:, group]
        for layer in range(group.start, group.stop):
            masks[:, layer] = [pick(s, n) for s, n in zip(scores[:, layer], routed[:, layer])]
    return masks, scores


def _row_masks(opened: LoadedModel, masks: np.ndarray, groups: np.ndarray) -> jax.Array:
    """bool [B, 1, R] from one layer's masks [G, R]; padding rows may use everything."""
    rows = np.where((groups >= 0)[:, None], masks[groups], True)
    return place(rows[:, None], opened.mesh, P(BATCH))


@functools.cache
def _layer_steps(execution: model.Execution):
    """(params, batch) -> h and statistics of layer 0; (params, layer, h, batch, mask) -> those of the next layer."""

    def enter(params, layer, x, rows):
        layer_params, present = layer_at(params, layer), model.allowed_experts(execution.config.model, None)
        h, normed = layers.attend(layer_params, x, rows, execution)
        return h, layers.routing_of(layer_params, normed, rows, None if present is None else present[layer], execution)

    @jax.jit
    def first(params, batch):
        rows = model.row_context(batch, execution)
        return enter(params, 0, model.embed(params["embedding"], batch["tokens"], execution.dtype), rows)

    @functools.partial(jax.jit, donate_argnums=2)
    def advance(params, layer, h, batch, allowed):
        rows = model.row_context(batch, execution)
        layer_params = layer_at(params, layer)
        normed = model.rms_norm(h, layer_params["mlp_norm"], execution.config.model.norm_eps)
        y, _ = layers.block_of(layer_params, execution).moe(normed, rows, None, allowed, execution)
        return enter(params, layer + 1, h + y, rows)

    return first, advance


def _to_host(x: jax.Array):
    return x.sharding, x.shape, [(shard.device, np.asarray(shard.data)) for shard in x.addressable_shards]


def _to_devices(stored) -> jax.Array:
    sharding, shape, shards = stored
    return jax.make_array_from_single_device_arrays(shape, sharding, [jax.device_put(a, d) for d, a in shards])
