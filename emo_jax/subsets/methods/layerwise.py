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
from emo_jax.progress import track
from emo_jax.sharding import BATCH, P, place
from emo_jax.subsets.budget import Budget, pick
from emo_jax.subsets.calibration import Calibration
from emo_jax.subsets.methods import Method, Options, router
from emo_jax.subsets.sweep import Totals, batches, block_of, layer_at, one_sweep


def masks(loaded: LoadedModel, calibration: Calibration, budget: Budget, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """(masks bool, average router probabilities) [G, L, R]. A total over all layers is shared out by one more sweep."""
    scores = one_sweep(loaded, calibration, "router") if budget.needs_scores else [None] * len(calibration.names)
    routed = np.stack([budget.routed(loaded.config, s) for s in scores])
    return layerwise(loaded, calibration, routed, options.layer_group, options.on_host)


def layerwise(loaded: LoadedModel, calibration: Calibration, routed: np.ndarray, layer_group: int = 0,
              on_host: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(masks bool, average router probabilities) [G, L, R] for `routed` [G, L] experts kept in every group and layer.

    `layer_group`: 0 caches activations (one sweep; `on_host` keeps them in host memory), g > 0 recomputes them for
    every g layers ((L/g + 1) / 2 sweeps).
    """
    if layer_group:
        return _recomputed(loaded, calibration, routed, layer_group)
    return _streamed(loaded, calibration, routed, on_host)


def _streamed(loaded: LoadedModel, calibration: Calibration, routed: np.ndarray, on_host: bool):
    totals = Totals(loaded, calibration, router.METHOD.statistic)
    first, advance = _layer_steps(loaded.execution)
    store, restore = (_to_host, _to_devices) if on_host else (lambda x: x, lambda x: x)
    masks = np.zeros(totals.score.shape, bool)
    with compat.set_mesh(loaded.mesh):
        text, cached = list(batches(loaded, calibration)), []
        for batch, groups in track(text, "choosing experts of layer 0", "batches"):
            h, statistics = first(loaded.params, batch)
            totals.add(0, groups, statistics)
            cached.append(store(h))
        for layer in range(loaded.config.model.num_layers):
            scores = totals.ranking()[:, layer]
            masks[:, layer] = [pick(s, n) for s, n in zip(scores, routed[:, layer])]
            if layer + 1 == loaded.config.model.num_layers:
                break
            for i, (batch, groups) in enumerate(track(text, f"choosing experts of layer {layer + 1}", "batches")):
                allowed = _row_masks(loaded, masks[:, layer], groups)
                h, statistics = advance(loaded.params, layer, restore(cached[i]), batch, allowed)
                totals.add(layer + 1, groups, statistics)
                cached[i] = store(h)
    return masks, totals.ranking()


def _recomputed(loaded: LoadedModel, calibration: Calibration, routed: np.ndarray, layer_group: int):
    L = loaded.config.model.num_layers
    masks = np.ones((len(calibration.names), L, loaded.config.model.num_routed_experts), bool)
    scores = np.zeros(masks.shape)
    for start in range(0, L, layer_group):
        group = slice(start, min(start + layer_group, L))
        scores[:, group] = one_sweep(loaded, calibration, "router", masks, group.stop)[:, group]
        for layer in range(group.start, group.stop):
            masks[:, layer] = [pick(s, n) for s, n in zip(scores[:, layer], routed[:, layer])]
    return masks, scores


def _row_masks(loaded: LoadedModel, masks: np.ndarray, groups: np.ndarray) -> jax.Array:
    """bool [B, 1, R] from one layer's masks [G, R]; padding rows may use everything."""
    rows = np.where((groups >= 0)[:, None], masks[groups], True)
    return place(rows[:, None], loaded.mesh, P(BATCH))


@functools.cache
def _layer_steps(execution: model.Execution):
    """(params, batch) -> h and statistics of layer 0; (params, layer, h, batch, mask) -> those of the next layer."""

    def enter(params, layer, x, rows):
        layer_params, present = layer_at(params, layer), model.allowed_experts(execution.config.model, None)
        block = block_of(layer_params, execution)
        h, normed, _ = block.attend(x, rows, execution)
        route = block.moe.route(normed, rows, None, None if present is None else present[layer], execution)
        return h, router.probabilities(route, rows)

    @jax.jit
    def first(params, batch):
        rows = model.row_context(batch, execution)
        return enter(params, 0, model.embed(params["embedding"], batch["tokens"], execution.dtype), rows)

    @functools.partial(jax.jit, donate_argnums=2)
    def advance(params, layer, h, batch, allowed):
        rows = model.row_context(batch, execution)
        layer_params = layer_at(params, layer)
        normed = model.rms_norm(h, layer_params["mlp_norm"], execution.config.model.norm_eps)
        y, _ = block_of(layer_params, execution).moe(normed, rows, None, allowed, execution)
        return enter(params, layer + 1, h + y, rows)

    return first, advance


def _to_host(x: jax.Array):
    return x.sharding, x.shape, [(shard.device, np.asarray(shard.data)) for shard in x.addressable_shards]


def _to_devices(stored) -> jax.Array:
    sharding, shape, shards = stored
    return jax.make_array_from_single_device_arrays(shape, sharding, [jax.device_put(a, d) for d, a in shards])


METHOD = Method(masks=masks)
