"""The same model with its routed experts in another order, e.g. so that experts which work together lie on one shard."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from emo_jax.checkpoints.checkpoint import Checkpoint, open_checkpoint
from emo_jax.checkpoints.rewrite import ROUTER, TABLES, Values, store_of, write_checkpoint
from emo_jax.checkpoints.store import Leaf
from emo_jax.errors import InputError
from emo_jax.files import AnyPath


def require_movable(found: Checkpoint) -> None:
    """Raises `InputError` for a model whose experts have fixed places."""
    if found.config.model.experts_per_layer or found.config.router.forced_experts:
        raise InputError(f"{found.path}: the experts of a model whose layers have different numbers of them, or of one with "
                         f"router.forced_experts, have fixed places")


def permuted_values(found: Checkpoint, order: Int[np.ndarray, "L R"]) -> Values:
    store, routed = store_of(found), found.config.model.num_routed_experts

    def values(leaf: Leaf, index: tuple[int, ...]) -> np.ndarray:
        if leaf in TABLES and index[1] < routed:
            return store.read(leaf, (index[0], int(order[index])))
        part = store.read(leaf, index)
        return part[:, order[index[0]]] if leaf == ROUTER else part

    return values


def permute(checkpoint: Checkpoint | str | AnyPath, order: Int[np.ndarray, "L R"], out: str | AnyPath) -> AnyPath:
    """Writes a checkpoint of the same function into `out`, in which expert `order[l, i]` of layer l is number i; returns the
    step folder. (Of experts with equal logits a token takes the lowest new number.) It holds parameters only, no state of the
    optimizer, and is another model to subsets. Raises `InputError`, `RunError`."""
    found = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    m = found.config.model
    require_movable(found)
    if not np.array_equal(np.sort(order, axis=1), np.tile(np.arange(m.num_routed_experts), (m.num_layers, 1))):
        raise InputError(f"an order must have each of the {m.num_routed_experts} routed experts once in each of "
                         f"{m.num_layers} layers")
    return write_checkpoint(out, found.config, permuted_values(found, order), found, {"order": order.tolist()})
