"""Experts for a few tokens, as in decoding: a loop over the experts that any token chose, each applied to all tokens.

Moves every used weight once and nothing else; there is no buffer of rows, which for a few tokens would be mostly
padding. Used on CPU; on accelerators a loop of small matmuls waits for its launches, and the grouped matmul is better.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from emo_jax import compat
from emo_jax.moe.dispatch import Tokens
from emo_jax.sharding import AXES


def device_experts(table: dict[str, jax.Array], tokens: Tokens, *, layer: Any,
                   fsdp: dict[str, int]) -> tuple[jax.Array, None, None]:
    """The body of one device, as `experts.moe_experts` describes it. `fsdp`: the dimension of each table that this axis
    shards."""
    batch_shape, peers = tokens.x.shape[:2], jax.lax.axis_size("expert")
    x_TD, ids_Tk, weights_Tk, valid_T = (a.reshape(-1, *a.shape[2:]) for a in tokens)
    if jax.lax.axis_size("fsdp") > 1:
        table = {name: jax.lax.all_gather(w, "fsdp", axis=fsdp[name], tiled=True) for name, w in table.items()}
    count = table["gate"].shape[0]
    shared = count * peers - layer.num_shared + jnp.arange(layer.num_shared)  # chosen by all, with weight 1
    ids_Tk = jnp.concatenate([ids_Tk, jnp.broadcast_to(shared, (len(x_TD), layer.num_shared))], axis=1)
    weights_Tk = jnp.concatenate([jnp.where(valid_T[:, None], weights_Tk, 0), jnp.ones((len(x_TD), layer.num_shared))],
                                 axis=1)
    table = {name: compat.vary(w, AXES) for name, w in table.items()}
    chosen = [compat.vary(a, AXES) for a in (x_TD, ids_Tk, weights_Tk)]
    if peers > 1:
        chosen = [jax.lax.all_gather(a, "expert", tiled=True) for a in chosen]
    y_TD = _used_experts(table, *chosen, jax.lax.axis_index("expert") * count)
    if peers > 1:
        y_TD = jax.lax.psum_scatter(y_TD, "expert", tiled=True)
    y_TD = jax.lax.psum(y_TD, "tensor")
    return y_TD.astype(x_TD.dtype).reshape(*batch_shape, -1), None, None


def _used_experts(table, x_TD, ids_Tk, weights_Tk, first):
    chosen_Tke = ids_Tk[..., None] == first + jnp.arange(table["gate"].shape[0])
    mixture_Te = jnp.sum(jnp.where(chosen_Tke, weights_Tk[..., None], 0.0), axis=1)
    used_e = jnp.any(mixture_Te != 0, axis=0)
    used_first = jnp.argsort(~used_e, stable=True)

    def body(i, y_TD):
        gate_DF, up_DF, down_FD = (
            jax.lax.dynamic_index_in_dim(table[name], used_first[i], keepdims=False).astype(x_TD.dtype)
            for name in ("gate", "up", "down"))
        weight_T1 = jax.lax.dynamic_index_in_dim(mixture_Te, used_first[i], axis=1).astype(x_TD.dtype)
        return y_TD + (jax.nn.silu(x_TD @ gate_DF) * (x_TD @ up_DF) * weight_T1) @ down_FD

    start_TD = compat.vary_like(jnp.zeros_like(x_TD), x_TD, table["gate"])
    with jax.named_scope("experts"):
        return jax.lax.fori_loop(0, jnp.sum(used_e), body, start_TD)
