"""Attention on GPU without tokamax: the flash kernels (Pallas, Triton) that ship with JAX, which mask by segment and skip
the blocks above the diagonal; the backward kernel recomputes the probabilities. Off GPU they run interpreted, for the
parity tests.

JAX 0.12 deprecates these kernels, and their backward function is private: this file goes when Python 3.11 does, in October
2027. Their blocks were chosen by what the compiler makes of them for sm_90 and sm_80 (registers, spills, shared memory):
they have never run on a GPU.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.gpu import attention as pallas_gpu

BLOCK = 64  # keys, and queries of the backward pass; the forward pass takes twice as many queries
BLOCK_ROW_BYTES = 256  # a query or key; wider ones get smaller blocks, to fit registers and shared memory
WARPS, STAGES = 8, 2


def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, interpret: bool) -> jax.Array:
    """q [B, T, H, K], k and v [B, T, G, K], segments [B, T] -> [B, T, H, K]"""
    length, heads = q.shape[1:3]
    missing = -length % (2 * BLOCK)  # to a whole number of blocks
    k, v = (jnp.repeat(a, heads // k.shape[2], axis=2) for a in (k, v))  # the kernels know no groups of heads
    q, k, v = (jnp.pad(a, ((0, 0), (0, missing), (0, 0), (0, 0))) for a in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, missing)), constant_values=-1)
    return _flash(q, k, v, segments, interpret)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, segments, interpret):
    return _forward(q, k, v, segments, interpret)[0]


def _forward(q, k, v, segments, interpret):
    """The kernels' own rule does not name what it saves: rematerialisation would run the forward kernel again."""
    out, lse = pallas_gpu.mha(q, k, v, segments, **_arguments(q), interpret=interpret, return_residuals=True)
    out, lse = (checkpoint_name(a, "attention") for a in (out, lse))
    return out, (q, k, v, segments, out, lse)


def _backward(interpret, saved, d_out):
    return pallas_gpu._mha_backward(**_arguments(saved[0]), backward_pass_impl="triton", grid=None, interpret=interpret,
                                    debug=False, return_residuals=False, res=saved, do=d_out)


_flash.defvjp(_forward, _backward)


def _arguments(q):
    width = q.shape[-1]
    row_bytes = (1 << (width - 1).bit_length()) * q.dtype.itemsize
    block = max(16, BLOCK * BLOCK_ROW_BYTES // max(BLOCK_ROW_BYTES, row_bytes))
    sizes = pallas_gpu.BlockSizes(block_q=2 * block, block_k=block, block_q_dkv=block, block_kv_dkv=block,
                                  block_q_dq=block, block_kv_dq=block)
    return dict(sm_scale=1 / math.sqrt(width), causal=True, block_sizes=sizes, num_warps=WARPS, num_stages=STAGES)
