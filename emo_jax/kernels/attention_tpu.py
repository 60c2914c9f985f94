"""Attention on TPU: the splash kernels that ship with JAX, which skip the blocks above the diagonal and mask by segment.

The backward pass is one fused kernel for dq, dk and dv. Under sequence sharding a device has a part of the queries and the
keys of the whole row; its kernel gets that part of the plan of blocks. Off TPU they run interpreted, for the parity tests.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

BLOCK, COMPUTE_BLOCK = 1024, 512


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array, interpret: bool,
                     shards: int = 1) -> jax.Array:
    """q [B, T, H, W], k and v [B, S, G, W], segments [B, T] and [B, S] -> [B, T, H, W], where S = shards * T: `shards` is
    the size of the mesh axis `sequence`."""
    kernel = _kernel(q.shape[1], k.shape[1], q.shape[2], shards, interpret)
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * (1 / math.sqrt(q.shape[-1])), k, v))
    out = jax.vmap(kernel)(q.astype(k.dtype), k, v, splash.SegmentIds(q_segments, k_segments))
    return jnp.swapaxes(out, 1, 2)


def _kernel(queries: int, keys: int, heads: int, shards: int, interpret: bool):
    q, kv, kv_compute = math.gcd(queries, BLOCK), math.gcd(keys, BLOCK), math.gcd(keys, COMPUTE_BLOCK)
    sizes = splash.BlockSizes(block_q=q, block_kv=kv, block_kv_compute=kv_compute, block_q_dkv=q, block_kv_dkv=kv,
                              block_kv_dkv_compute=kv_compute, use_fused_bwd_kernel=True)
    mask = masks.MultiHeadMask([masks.CausalMask((queries * shards, keys))] * heads)
    # "attention" names the output and its logsumexp for rematerialisation policies.
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=shards,
                                    residual_checkpoint_name="attention", interpret=interpret)
    return kernel if shards == 1 else _part(kernel, shards, jax.lax.axis_index("sequence"))


def _part(kernel, shards: int, index):
    """The kernel of the device's queries: its plan holds those of all shards, side by side along the query blocks."""

    def cut(a, axis):
        size = a.shape[axis] // shards
        return jax.lax.dynamic_slice_in_dim(a, index * size, size, axis)

    def cut_info(info):
        fields = {name: cut(getattr(info, name), axis) for name, axis in
                  (("data_next", 1), ("mask_next", 1), ("block_mask", 1), ("q_sequence", 0))
                  if getattr(info, name) is not None}
        return info._replace(**fields)

    (forward, dq, dkv), static = kernel.tree_flatten()
    return kernel.tree_unflatten(static, (cut_info(forward), dq, cut_info(dkv)))
