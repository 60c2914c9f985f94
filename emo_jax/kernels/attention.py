"""Causal attention inside documents.

H query heads share G key/value heads. A query sees the keys of its own segment at or before its own position in the row.
"""

from __future__ import annotations

import functools
import logging
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from emo_jax import compat
from emo_jax.errors import InputError
from emo_jax.sharding import BATCH, TOKENS

log = logging.getLogger(__name__)

KERNELS = ("blocked", "reference")
BLOCK = 256  # queries of one block


@functools.cache
def choose(kernel: str, platform: str) -> str:
    """The kernel for "auto"; logged once."""
    if kernel not in ("auto", *KERNELS):
        raise InputError(f"kernels.attention={kernel!r} must be auto or one of {', '.join(KERNELS)}")
    chosen = "blocked" if kernel == "auto" else kernel
    log.info("attention: %s", chosen)
    if platform != "cpu":
        log.warning("attention: %s is plain XLA and slow on %s", chosen, platform)
    return chosen


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
    )(q, k, v, q_segments, k_segments)


def _device_attention(q, k, v, q_segments, k_segments, *, kernel, shards):
    length = q.shape[1]
    if shards > 1:
        positions = jax.lax.axis_index("sequence") * length + jnp.arange(length)
        return masked_attention(q, k, v, q_segments, k_segments, positions)
    if kernel == "reference" or length <= BLOCK or length % BLOCK:
        return masked_attention(q, k, v, q_segments, k_segments, jnp.arange(length))
    # Query blocks, each with the keys up to its end: half the FLOPs and memory of the whole square.
    blocks = [
        masked_attention(q[:, i : i + BLOCK], k[:, : i + BLOCK], v[:, : i + BLOCK], q_segments[:, i : i + BLOCK],
                         k_segments[:, : i + BLOCK], i + jnp.arange(BLOCK))
        for i in range(0, length, BLOCK)
    ]
    return jnp.concatenate(blocks, axis=1)


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
