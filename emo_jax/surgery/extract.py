"""A smaller model from a subset: its config, and where each of its experts is in the whole model.

Layers that keep different numbers of experts share one table: the smaller ones are filled up with experts of zeros that
never run (`model.experts_per_layer`).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from emo_jax.checkpoints.checkpoint import Checkpoint, open_checkpoint
from emo_jax.checkpoints.rewrite import ROUTER, TABLES, Values, store_of, write_checkpoint
from emo_jax.checkpoints.store import Leaf
from emo_jax.checkpoints.subset import Subset, open_subset, require_fits
from emo_jax.config import Config
from emo_jax.files import AnyPath, given_path


def subset_config(config: Config, subset: Subset) -> Config:
    """The config of the smaller model; pools and the experts of a token shrink to what is left."""
    require_fits(subset, config, "the subset")
    keep, m, r = subset.experts_per_layer, config.model, config.router
    top_k = min(m.top_k, min(keep))
    least = top_k - m.num_shared_experts
    model = dataclasses.replace(m, num_experts=max(keep), top_k=top_k,
                                experts_per_layer=() if min(keep) == max(keep) else tuple(keep))
    pools = {}
    if config.uses_pools:
        pools = {"pool_min": max(least, min(r.pool_min, min(keep) - m.num_shared_experts)),
                 "pool_eval": r.pool_eval and max(least, min(r.pool_eval, max(keep)))}
        pools["pool_max"] = max(pools["pool_min"], min(r.pool_max, max(keep)))
    return dataclasses.replace(config, name=f"{config.name}-{subset.method}-{max(keep)}", model=model,
                               router=dataclasses.replace(r, **pools))


def row_of(subset: Subset, layer: int, row: int) -> int | None:
    """The row in the whole table of a row of the smaller one; None for a row that was only filled up."""
    routed = max(map(len, subset.kept))
    if row >= routed:
        return subset.num_routed + row - routed  # a shared expert
    return subset.kept[layer][row] if row < len(subset.kept[layer]) else None


def router_columns(router: np.ndarray, subset: Subset, layer: int) -> np.ndarray:
    """[D, R] -> [D, kept], with zeros where a layer was filled up."""
    columns = router[:, list(subset.kept[layer])]
    missing = max(map(len, subset.kept)) - columns.shape[1]
    return np.pad(columns, ((0, 0), (0, missing)))


def kept_values(found: Checkpoint, subset: Subset) -> Values:
    """The parts of the smaller model, read from the whole one."""
    store = store_of(found)

    def values(leaf: Leaf, index: tuple[int, ...]) -> np.ndarray:
        if leaf in TABLES:
            layer, row = index
            source = row_of(subset, layer, row)
            if source is None:
                return np.zeros_like(store.read(leaf, (layer, found.config.model.num_experts - 1)))
            return store.read(leaf, (layer, source))
        part = store.read(leaf, index)
        return router_columns(part, subset, index[0]) if leaf == ROUTER else part

    return values


def extract(checkpoint: Checkpoint | str | AnyPath, subset: Subset | str | AnyPath, out: str | AnyPath) -> AnyPath:
    """Writes the smaller checkpoint and config into `out`; returns the step folder. Raises `InputError`, `RunError`."""
    found = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    subset = open_subset(subset, found)
    made = {"subset": {"keep": subset.experts_per_layer, "kept": subset.kept, "method": subset.method}}
    path = write_checkpoint(out, subset_config(found.config, subset), kept_values(found, subset), found, made)
    subset.save(given_path(out, "--out") / "subset.json")
    return path
