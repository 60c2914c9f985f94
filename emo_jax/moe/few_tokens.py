"""Experts for a few tokens, as in decoding: a loop over the experts that any token chose, each applied to all tokens.

Moves every used weight once and nothing else; there is no buffer of rows, which for a few tokens would be mostly
padding. Used on CPU; on accelerators a loop of small matmuls waits for its launches, and the grouped matmul is better.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from emo_jax import compat
from emo_jax.sharding import AXES


def device_experts(table, x, expert_ids, weights, valid, *, axes, num_shared, fsdp):
    """The body of one device, as `experts.moe_experts` describes it. `axes`: sizes of the mesh axes, None without a
    mesh; `fsdp`: the dimension of each table that this axis shards."""
    batch_shape, width = x.shape[:2], x.shape[2]
    x, expert_ids, weights, valid = (a.reshape(-1, *a.shape[2:]) for a in (x, expert_ids, weights, valid))
    expert_axis = 1
    if axes:
        expert_axis = axes["expert"]
        if axes["fsdp"] > 1:
            table = {name: jax.lax.all_gather(w, "fsdp", axis=fsdp[name], tiled=True) for name, w in table.items()}
    local = table["gate"].shape[0]
    shared = local * expert_axis - num_shared + jnp.arange(num_shared)  # chosen by all, with weight 1
    expert_ids = jnp.concatenate([expert_ids, jnp.broadcast_to(shared, (len(x), num_shared))], axis=1)
    weights = jnp.concatenate([jnp.where(valid[:, None], weights, 0), jnp.ones((len(x), num_shared))], axis=1)
    first = 0
    if axes:
        table = {name: compat.vary(w, AXES) for name, w in table.items()}
        x, expert_ids, weights = (compat.vary(a, AXES) for a in (x, expert_ids, weights))
        first = jax.lax.axis_index("expert") * local
    tokens = (x, expert_ids, weights)
    if expert_axis > 1:
        tokens = [jax.lax.all_gather(a, "expert", tiled=True) for a in tokens]
    y = _used_experts(table, *tokens, first)
    if expert_axis > 1:
        y = jax.lax.psum_scatter(y, "expert", tiled=True)
    if axes:
        y = jax.lax.psum(y, "tensor")
    return y.astype(x.dtype).reshape(*batch_shape, width)


def _used_experts(table, x, expert_ids, weights, first):
    chosen = expert_ids[..., None] == first + jnp.arange(table["gate"].shape[0])
    mixture = jnp.sum(jnp.where(chosen, weights[..., None], 0.0), axis=1)  # [T, e]
    used = jnp.any(mixture != 0, axis=0)
    used_first = jnp.argsort(~used, stable=True)

    def body(i, y):
        gate, up, down = (jax.lax.dynamic_index_in_dim(table[name], used_first[i], keepdims=False).astype(x.dtype)
                          for name in ("gate", "up", "down"))
        weight = jax.lax.dynamic_index_in_dim(mixture, used_first[i], axis=1).astype(x.dtype)
        return y + (jax.nn.silu(x @ gate) * (x @ up) * weight) @ down

    return jax.lax.fori_loop(0, jnp.sum(used), body, compat.vary_like(jnp.zeros_like(x), x, table["gate"]))
