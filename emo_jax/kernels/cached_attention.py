"""Attention of new tokens to themselves and to the cached keys of the tokens before them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from emo_jax import compat
from emo_jax.sharding import BATCH, TOKENS


def cached_attention(
    q: Float[Array, "B T H W"], k: Float[Array, "B T G W"], v: Float[Array, "B T G W"],
    past_k: Float[Array, "B G S W"], past_v: Float[Array, "B G S W"],
    segments: Int[Array, "B T"], past_segments: Int[Array, "B S"],
) -> Float[Array, "B T H W"]:
    """A token sees the cached tokens of its segment, and the new ones at or before it; softmax in fp32. Slots of the
    cache that are not in use have segment 0. Heads lead in the cache, so that its matmuls move no data. Every device works
    on its rows and heads; mesh.sequence must be 1."""
    queries, new = P(BATCH, "sequence", "tensor", None), P(BATCH, None, "tensor", None)
    past = P(BATCH, "tensor", None, None)
    return compat.shard_map(_device_attention, in_specs=(queries, new, new, past, past, TOKENS, P(BATCH, None)),
                            out_specs=queries)(q, k, v, past_k, past_v, segments, past_segments)


def _device_attention(q, k, v, past_k, past_v, segments, past_segments):
    B, T, H, W = q.shape
    G, S = past_k.shape[1:3]
    q = (q * (1 / math.sqrt(W))).reshape(B, T, G, H // G, W).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, W)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def logits(keys, visible):  # -> [B, G, H / G, T, keys]
        products = jnp.einsum("bgqw,bgsw->bgqs", q, keys, preferred_element_type=jnp.float32)
        return jnp.where(visible[:, None, None], products.reshape(B, G, H // G, T, -1), -1e30)

    causal = jnp.arange(T)[:, None] >= jnp.arange(T)
    new = logits(k, causal & (segments[:, :, None] == segments[:, None, :]))
    past = logits(past_k, segments[:, :, None] == past_segments[:, None, :])
    probs = jax.nn.softmax(jnp.concatenate([past, new], axis=-1), axis=-1).astype(v.dtype).reshape(B, G, -1, S + T)
    out = jnp.einsum("bgqs,bgsw->bgqw", probs[..., :S], past_v) + jnp.einsum("bgqs,bgsw->bgqw", probs[..., S:], v)
    return out.reshape(B, G, H // G, T, W).transpose(0, 3, 1, 2, 4).reshape(B, T, H, W)
