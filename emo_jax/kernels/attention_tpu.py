"""Attention on TPU: the splash kernels that ship with JAX, which skip the blocks above the diagonal and mask by segment.

The backward pass is one fused kernel for dq, dk and dv. Off TPU they run in interpret mode, for the parity tests.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

BLOCK, COMPUTE_BLOCK = 1024, 512


def splash_attention(q, k, v, q_segments, k_segments, interpret: bool):
    """q [B, T, H, K], k and v [B, T, G, K], segments [B, T] -> [B, T, H, K]; whole rows only."""
    length, heads = q.shape[1], q.shape[2]
    kernel = _kernel(length, heads, interpret)
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * (1 / math.sqrt(q.shape[-1])), k, v))
    out = jax.vmap(kernel)(q.astype(k.dtype), k, v, splash.SegmentIds(q_segments, k_segments))
    return jnp.swapaxes(out, 1, 2)


def _kernel(length: int, heads: int, interpret: bool):
    block, compute = (math.gcd(length, b) for b in (BLOCK, COMPUTE_BLOCK))
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=compute, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=compute, use_fused_bwd_kernel=True)
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1,
                                  residual_checkpoint_name="attention", interpret=interpret)
