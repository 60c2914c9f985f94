"""Putting what a subset has learnt back into the whole model.

That is a task vector times a coefficient: whole + alpha (trained - whole), where what was not trained stays bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from emo_jax.checkpoints.checkpoint import Checkpoint
from emo_jax.checkpoints.rewrite import ROUTER, TABLES, store_of, write_checkpoint
from emo_jax.checkpoints.store import Leaf
from emo_jax.checkpoints.subset import Subset, require_fits
from emo_jax.errors import InputError
from emo_jax.files import AnyPath


def merge(whole: Checkpoint, part: Checkpoint, subset: Subset, out: str | AnyPath, *, alpha: float = 1.0,
          router: bool = False, shared: bool = False) -> AnyPath:
    """Writes `whole` + alpha (part - whole) for the kept experts; returns the step folder.

    `router`: their router columns likewise. `shared`: also everything that is not a routed expert or the router: shared
    experts, attention, norms, embedding, head. A part that is a whole model, in which the subset was trained, is taken with all
    that it has. Raises `InputError` if the three do not belong together.
    """
    inside = is_whole(whole, part)
    if not inside:
        require_part(whole, part, subset)
    if alpha <= 0:
        raise InputError(f"--alpha {alpha} must be more than 0")
    full_store, part_store, m = store_of(whole), store_of(part), whole.config.model
    routed_rows = part.config.model.num_routed_experts
    position = [{expert: row for row, expert in enumerate(ids)} for ids in subset.kept]

    def blend(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        return new if alpha == 1 else (old + alpha * (new - old)).astype(np.float32)

    def values(leaf: Leaf, index: tuple[int, ...]) -> np.ndarray:
        old = full_store.read(leaf, index)
        if inside:
            return blend(old, part_store.read(leaf, index))
        if leaf in TABLES:
            layer, row = index
            if row >= m.num_routed_experts:
                source = routed_rows + row - m.num_routed_experts if shared else None
            else:
                source = position[layer].get(row)
            return old if source is None else blend(old, part_store.read(leaf, (layer, source)))
        if leaf == ROUTER:
            if router:
                kept = list(subset.kept[index[0]])
                old[:, kept] = blend(old[:, kept], part_store.read(leaf, index)[:, :len(kept)])
            return old
        return blend(old, part_store.read(leaf, index)) if shared else old

    made: dict[str, Any] = {
        "merged": {"alpha": alpha, "router": router or inside, "shared": shared or inside, "kept": subset.kept,
                   "part": str(part.path)}}
    return write_checkpoint(out, whole.config, values, whole, made)


def is_whole(whole: Checkpoint, part: Checkpoint) -> bool:
    """Whether `part` is `whole`, trained on with a subset in every pool."""
    return bool(part.config.router.module) and part.config.model == whole.config.model


def require_part(whole: Checkpoint, part: Checkpoint, subset: Subset) -> None:
    """Raises `InputError` unless `part` is a model of the kept experts of `whole`."""
    require_fits(subset, whole.config, "the subset")
    w, p = whole.config.model, part.config.model
    for name in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff",
                 "num_shared_experts"):
        if getattr(w, name) != getattr(p, name):
            raise InputError(f"{part.path} has model.{name}={getattr(p, name)}, {whole.path} {getattr(w, name)}: it is "
                             f"no part of it")
    have = list(p.experts_per_layer or [p.num_experts] * p.num_layers)
    if have != subset.experts_per_layer:
        raise InputError(f"{part.path} has {have} experts in its layers, the subset keeps {subset.experts_per_layer}; give the "
                         f"subset that it was extracted by (subset.json beside it)")
