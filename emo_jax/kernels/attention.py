"""Causal attention inside documents.

H query heads share G key/value heads. A query sees the keys of its own segment at or before its own position in the row.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from emo_jax import compat
from emo_jax.config import Attention
from emo_jax.errors import InputError
from emo_jax.kernels.blocked_attention import blocked_attention
from emo_jax.sharding import BATCH, TOKENS

log = logging.getLogger(__name__)

KERNELS = typing.get_args(Attention)[1:]  # without auto
PALLAS = {"splash": "tpu", "flash": "gpu"}  # where they run; elsewhere they are interpreted, their names end in _interpret


@functools.cache
def choose(kernel: str, platform: str, head_dim: int = 128, sequence: int = 1) -> str:
    """The kernel for "auto": splash on TPU, flash on GPU, blocked elsewhere; logged once, and if it is slow there."""
    if kernel not in ("auto", *KERNELS):
        raise InputError(f"kernels.attention={kernel!r} must be auto or one of {', '.join(KERNELS)}")
    chosen = {"tpu": "splash", "gpu": "flash"}.get(platform, "blocked") if kernel == "auto" else kernel
    if chosen == "flash" and (missing := _flash_needs(head_dim, sequence)):
        log.warning("attention: blocked in place of flash, which needs %s", missing)
        chosen = "blocked"
    if chosen in PALLAS and platform != PALLAS[chosen]:
        chosen += "_interpret"
    log.info("attention: %s", chosen)
    if platform != "cpu" and chosen not in PALLAS:
        log.warning("attention: %s is slow on %s", chosen, platform)
    return chosen


def _flash_needs(head_dim: int, sequence: int) -> str:
    """What keeps flash from running, if anything."""
    if sequence > 1:
        return f"mesh.sequence=1, not {sequence}"
    if head_dim < 16:
        return f"model.head_dim of 16 or more, not {head_dim}"
    here = importlib.util.find_spec("jax.experimental.pallas.ops.gpu.attention")
    return "" if here else "a JAX that still has jax.experimental.pallas.ops.gpu.attention"


def attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], v: Float[Array, "B S G K"],
    q_segments: Int[Array, "B T"], k_segments: Int[Array, "B S"], kernel: str,
) -> Float[Array, "B T H K"]:
    """Self-attention of whole rows. On a mesh every device works on its rows, heads, and (`sequence`) queries."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _device_attention(q, k, v, q_segments, k_segments, kernel=kernel, shards=1)
    heads = P(BATCH, None, "tensor", None)
    return compat.shard_map(
        functools.partial(_device_attention, kernel=kernel, shards=mesh.shape["sequence"]),
        in_specs=(P(BATCH, "sequence", "tensor", None), heads, heads, TOKENS, P(BATCH, None)),
        out_specs=P(BATCH, "sequence", "tensor", None),
        check_vma=not kernel.startswith(tuple(PALLAS)),  # Pallas kernels do not say over which axes their results vary
    )(q, k, v, q_segments, k_segments)


def _device_attention(q, k, v, q_segments, k_segments, *, kernel, shards):
    length = q.shape[1]
    if kernel.startswith("splash"):
        from emo_jax.kernels.attention_tpu import splash_attention

        return splash_attention(q, k, v, q_segments, k_segments, kernel.endswith("interpret"), shards)
    if kernel.startswith("flash"):
        from emo_jax.kernels.attention_gpu import flash_attention

        return flash_attention(q, k, v, q_segments, kernel.endswith("interpret"))
    start = jax.lax.axis_index("sequence") * length if shards > 1 else jnp.int32(0)
    if kernel == "reference":
        return masked_attention(q, k, v, q_segments, k_segments, start + jnp.arange(length))
    k, v, k_segments, start = (compat.vary_like(a, q) for a in (k, v, k_segments, start))
    return blocked_attention(q, k, v, q_segments, k_segments, start)


def masked_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], v: Float[Array, "B S G K"],
    q_segments: Int[Array, "B T"], k_segments: Int[Array, "B S"], q_positions: Int[Array, "T"],
) -> Float[Array, "B T H K"]:
    """The plain form; softmax in fp32. Key s sits at position s of the row, query t at `q_positions[t]`."""
    B, T, H, K = q.shape
    G = k.shape[2]
    q = q.reshape(B, T, G, H // G, K) * (1 / math.sqrt(K))
    logits = jnp.einsum("btghk,bsgk->bghts", q, k, preferred_element_type=jnp.float32)
    causal = q_positions[:, None] >= jnp.arange(k.shape[1])
    visible = causal & (q_segments[:, :, None] == k_segments[:, None, :])
    logits = jnp.where(visible[:, None, None], logits, -1e30)
    probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bghts,bsgk->btghk", probs, v).reshape(B, T, H, K)
