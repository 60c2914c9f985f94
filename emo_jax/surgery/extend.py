"""New experts for a trained model: appended to the routed ones of every layer, for text that it did not see."""

from __future__ import annotations

import dataclasses

import numpy as np

from emo_jax.checkpoints.checkpoint import Checkpoint
from emo_jax.checkpoints.rewrite import ROUTER, TABLES, store_of, write_checkpoint
from emo_jax.checkpoints.store import Leaf
from emo_jax.checkpoints.subset import Subset, require_experts, require_of
from emo_jax.config import Config
from emo_jax.errors import InputError
from emo_jax.files import AnyPath

INITS = ("copy", "jitter", "fresh", "most_used")


def extended_config(config: Config, count: int, forced: bool) -> Config:
    """`count` more routed experts; `forced`: they are in every document's pool, on top of its size."""
    require_experts(config)
    m, r = config.model, config.router
    if count < 1:
        raise InputError(f"--experts {count} must be at least 1")
    if m.experts_per_layer:
        raise InputError(f"{config.name} has different numbers of experts in its layers; it cannot be extended")
    pools = {"pool_max": r.pool_max + count if r.pool_max >= m.num_routed_experts else r.pool_max,
             "forced_experts": count if forced and config.uses_pools else 0}
    return dataclasses.replace(config, name=f"{config.name}-plus{count}", router=dataclasses.replace(r, **pools),
                               model=dataclasses.replace(m, num_experts=m.num_experts + count))


def extended_subset(subset: Subset, count: int) -> Subset:
    """The subset and `count` appended experts, in the extended model."""
    new = tuple(range(subset.num_routed, subset.num_routed + count))
    return dataclasses.replace(subset, kept=tuple(ids + new for ids in subset.kept), num_routed=subset.num_routed + count,
                               scores=None, model={})


def extend(found: Checkpoint, count: int, out: str | AnyPath, *, init: str = "jitter", noise: float = 0.1,
           forced: bool = True, seed: int = 0, subset: Subset | None = None) -> AnyPath:
    """Writes the larger checkpoint; returns the step folder. The old experts keep their ids.

    `init`: `copy` (of a routed expert of the same layer, with its router column; each at most once while they last),
    `jitter` (the copy plus noise of `noise` x its standard deviation), `fresh` (as in a new model), `most_used` (the average of
    the two experts that have the highest scores in `subset`, with that noise).
    """
    if init not in INITS:
        raise InputError(f"--init {init!r} must be one of {', '.join(INITS)}")
    config, m = extended_config(found.config, count, forced), found.config.model
    store, routed = store_of(found), m.num_routed_experts
    order = np.stack([np.random.default_rng((seed, layer)).permutation(routed) for layer in range(m.num_layers)])
    sources = np.take(order, np.arange(count) % routed, axis=1)[..., None]  # [L, N, 1]: experts that a new one is made of
    if init == "most_used":
        if subset is None:
            raise InputError("--init most_used needs --subset: the scores of the experts")
        require_of(subset, found)
        best = np.argsort(-subset.score_array(), axis=1, kind="stable")[:, :2]
        sources = np.tile(best[:, None], (1, count, 1))

    def new(old: np.ndarray, *key: int) -> np.ndarray:
        draw = np.random.default_rng((seed, *key))
        if init == "fresh":
            return np.clip(draw.standard_normal(old.shape), -3, 3).astype(np.float32) * m.init_std
        if init in ("jitter", "most_used"):
            return old + noise * old.std() * draw.standard_normal(old.shape).astype(np.float32)
        return old

    def values(leaf: Leaf, index: tuple[int, ...]) -> np.ndarray:
        if leaf in TABLES:
            layer, row = index
            if row < routed or row >= routed + count:
                return store.read(leaf, (layer, row if row < routed else row - count))
            copied = [store.read(leaf, (layer, int(source))) for source in sources[layer, row - routed]]
            return new(np.mean(copied, axis=0), TABLES.index(leaf), layer, row)
        part = store.read(leaf, index)
        if leaf == ROUTER:
            layer = index[0]
            return np.concatenate([part, new(part[:, sources[layer]].mean(axis=2), len(TABLES), layer)], axis=1)
        return part

    made = {"extended": {"experts": count, "init": init, "copied": sources.tolist() if init != "fresh" else None}}
    return write_checkpoint(out, config, values, found, made)
