"""Causal attention inside documents.

H query heads share G key/value heads. A query sees the keys of its own segment at or before its own position in the row.
Letters are those of `emo_jax.model`.
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
from emo_jax.kernels import Kernel
from emo_jax.kernels.blocked_attention import blocked_attention
from emo_jax.sharding import BATCH, TOKENS

log = logging.getLogger(__name__)

KERNELS = typing.get_args(Attention)[1:]  # without auto
PALLAS = {"splash": "tpu", "flash": "gpu"}  # where they run; elsewhere they are interpreted


@functools.cache
def choose(kernel: str, platform: str, head_dim: int = 128, sequence: int = 1) -> Kernel:
    """The kernel for "auto": splash on TPU, flash on GPU, blocked elsewhere; logged once, and if it is slow there."""
    if kernel not in ("auto", *KERNELS):
        raise InputError(f"kernels.attention={kernel!r} must be auto or one of {', '.join(KERNELS)}")
    name = {"tpu": "splash", "gpu": "flash"}.get(platform, "blocked") if kernel == "auto" else kernel
    if name == "flash" and (missing := _flash_needs(head_dim, sequence)):
        log.warning("attention: blocked in place of flash, which needs %s", missing)
        name = "blocked"
    chosen = Kernel(name, interpret=name in PALLAS and platform != PALLAS[name])
    log.info("attention: %s", chosen)
    if platform != "cpu" and (name not in PALLAS or chosen.interpret):
        log.warning("attention: %s is slow on %s", chosen, platform)
    return chosen


def _flash_needs(head_dim: int, sequence: int) -> str:
    """What keeps flash from running, if anything."""
    if sequence > 1:
        return f"mesh.sequence=1, not {sequence}"
    if head_dim < 16:
        return f"model.head_dim of 16 or more, not {head_dim}"
    here = any(map(importlib.util.find_spec, ("tokamax", "jax.experimental.pallas.ops.gpu.attention")))
    return "" if here else "tokamax, or a JAX that still has jax.experimental.pallas.ops.gpu.attention"


def attention(
    q: Float[Array, "B T H W"], k: Float[Array, "B S G W"], v: Float[Array, "B S G W"],
    q_segments: Int[Array, "B T"], k_segments: Int[Array, "B S"], kernel: Kernel,
) -> Float[Array, "B T H W"]:
    """Self-attention of whole rows: every device works on its rows, heads, and (`sequence`) queries."""
    heads = P(BATCH, None, "tensor", None)
    return compat.shard_map(
        functools.partial(_device_attention, kernel=kernel),
        in_specs=(P(BATCH, "sequence", "tensor", None), heads, heads, TOKENS, P(BATCH, None)),
        out_specs=P(BATCH, "sequence", "tensor", None),
        check_vma=kernel.name not in PALLAS,  # Pallas kernels do not say over which axes their results vary
    )(q, k, v, q_segments, k_segments)


def _device_attention(q, k, v, q_segments, k_segments, *, kernel: Kernel):
    length, shards = q.shape[1], jax.lax.axis_size("sequence")
    if kernel.name == "splash":
        from emo_jax.kernels.attention_tpu import splash_attention

        return splash_attention(q, k, v, q_segments, k_segments, kernel.interpret, shards)
    if kernel.name == "flash":
        from emo_jax.kernels.attention_gpu import flash_attention

        return flash_attention(q, k, v, q_segments, kernel.interpret)
    start = jax.lax.axis_index("sequence") * length if shards > 1 else jnp.int32(0)
    if kernel.name == "reference":
        return masked_attention(q, k, v, q_segments, k_segments, start + jnp.arange(length))
    k, v, k_segments, start = (compat.vary_like(a, q) for a in (k, v, k_segments, start))
    return blocked_attention(q, k, v, q_segments, k_segments, start)


def masked_attention(
    q: Float[Array, "B T H W"], k: Float[Array, "B S G W"], v: Float[Array, "B S G W"],
    q_segments: Int[Array, "B T"], k_segments: Int[Array, "B S"], q_positions: Int[Array, "T"],
) -> Float[Array, "B T H W"]:
    """The plain form; softmax in fp32. Key s sits at position s of the row, query t at `q_positions[t]`."""
    B, T, H, W = q.shape
    G = k.shape[2]
    q = q.reshape(B, T, G, H // G, W) * (1 / math.sqrt(W))
    logits = jnp.einsum("btghw,bsgw->bghts", q, k, preferred_element_type=jnp.float32)
    causal = q_positions[:, None] >= jnp.arange(k.shape[1])
    visible = causal & (q_segments[:, :, None] == k_segments[:, None, :])
    logits = jnp.where(visible[:, None, None], logits, -1e30)
    probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bghts,bsgw->btghw", probs, v).reshape(B, T, H, W)
