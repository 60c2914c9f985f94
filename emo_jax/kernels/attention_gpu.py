"""Attention on GPU: tokamax's flash kernels (Pallas, Triton) where it is installed (Python 3.12 or later), else those of
`attention_gpu_py311`.

A query sees the keys from the start of its document to itself: a range of keys, which the forward kernel skips to, not a
mask of T x T; the backward kernel reads that range as such a mask, a byte for each pair of a row. cuDNN through
`jax.nn.dot_product_attention` would want it in fp32 and compute its gradient. Off GPU tokamax's plain form runs.
"""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

TOKAMAX = importlib.util.find_spec("tokamax") is not None


def flash_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], v: Float[Array, "B T G K"], segments: Int[Array, "B T"],
    interpret: bool,
) -> Float[Array, "B T H K"]:
    """`interpret`: not on a GPU. A segment is one run of its row."""
    if TOKAMAX:
        return _flash(q, k, v, document_starts(segments), interpret)
    from emo_jax.kernels import attention_gpu_py311

    return attention_gpu_py311.flash_attention(q, k, v, segments, interpret)


def document_starts(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Where the document of each token starts in its row."""
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(first, jnp.arange(segments.shape[1]), 0), axis=1)


@functools.cache
def _operation(interpret: bool):
    """The public names of these classes (`tokamax.ops.gpu`) need Triton itself; `Mask` has none."""
    from tokamax._src.ops.attention import base, pallas_triton, pallas_triton_vjp

    if interpret:
        return base.DotProductAttention(vjp=base.DotProductAttentionVjp())
    return pallas_triton.PallasTritonFlashAttention(  # the devices of a mesh that is only described cannot be asked
        bypass_device_check=True, vjp=pallas_triton_vjp.PallasTritonFlashAttentionVjp(bypass_device_check=True))


def _mask(starts):
    from tokamax._src.ops.attention.base import Mask

    return Mask(k_start=starts[:, None], is_causal=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, starts, interpret):
    return _forward(q, k, v, starts, interpret)[0]


def _forward(q, k, v, starts, interpret):
    """tokamax's own rule does not name what it saves: rematerialisation would run the forward kernel again."""
    out, softmax = _operation(interpret)(q, k, v, mask=_mask(starts), return_residuals=True)
    out, *softmax = (checkpoint_name(a, "attention") for a in (out, *softmax))
    return out, (q, k, v, starts, out, tuple(softmax))


def _backward(interpret, saved, d_out):
    q, k, v, starts, out, softmax = saved
    operation = _operation(interpret)
    bound = operation.bind(q, k, v, mask=_mask(starts))
    given = {name: value for name, value in bound.kwargs.items() if name != "return_residuals"}
    grads = operation.vjp(softmax, out, d_out, *bound.args, **given)
    return grads["q"], grads["k"], grads["v"], None


_flash.defvjp(_forward, _backward)
