"""Causal document attention over blocks of queries in plain XLA, with the backward pass of FlashAttention (arXiv 2205.14135):
probabilities are recomputed from the saved logsumexp, so that neither pass keeps a [T, T] array.

A block of queries sees the keys up to its own end: about half the FLOPs of the whole square. Under sequence sharding, where
a device has a part of a row's queries (`start` is the position of the first), a block sees all keys.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emo_jax.rounding import ceil_div


@jax.custom_vjp
def blocked_attention(
    q: Float[Array, "B T H W"], k: Float[Array, "B S G W"], v: Float[Array, "B S G W"],
    q_segments: Int[Array, "B T"], k_segments: Int[Array, "B S"], start: Int[Array, ""],
) -> Float[Array, "B T H W"]:
    return _forward(q, k, v, q_segments, k_segments, start)[0]


def _forward(q, k, v, *where):
    """(output [B, T, H, W], logsumexp of every query's logits [B, G, H/G, T, 1])"""
    groups = k.shape[2]
    qs, ks, vs = _queries(q, groups), _keys(k), _keys(v)
    outs, lses = [], []
    for i, j, seen in _blocks(q, k):
        logits = _logits(qs[..., i:j, :], ks[:, :, :seen], *where, i)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum("bgmts,bgsw->bgmtw", weights.astype(v.dtype), vs[:, :, :seen], preferred_element_type=jnp.float32)
        outs.append((out / total).astype(q.dtype))
        lses.append(top + jnp.log(total))
    return _from_queries(jnp.concatenate(outs, axis=3)), jnp.concatenate(lses, axis=3)


def _forward_saved(*args):
    out, lse = _forward(*args)
    return out, (*args, out, lse)


def _backward(saved, d_out):
    q, k, v, *where, out, lse = saved
    groups, dtype = k.shape[2], q.dtype
    qs, ks, vs, ds = _queries(q, groups), _keys(k), _keys(v), _split_heads(d_out, groups)
    delta = jnp.sum(ds.astype(jnp.float32) * _split_heads(out, groups), axis=-1, keepdims=True)
    d_q, d_k, d_v = [], jnp.zeros_like(ks, jnp.float32), jnp.zeros_like(vs, jnp.float32)
    for i, j, seen in _blocks(q, k):
        at, keys = (slice(None),) * 3 + (slice(i, j),), (slice(None), slice(None), slice(0, seen))
        # Keys by queries: two of the three products below then need no transposed copy of a block.
        logits = _logits(qs[at], ks[keys], *where, i, by_key=True)
        probs = jnp.exp(logits - jnp.swapaxes(lse[at], -1, -2))
        d_probs = jnp.einsum("bgsw,bgmtw->bgmst", vs[keys], ds[at], preferred_element_type=jnp.float32)
        d_logits = (probs * (d_probs - jnp.swapaxes(delta[at], -1, -2))).astype(dtype)
        d_q.append(jnp.einsum("bgmst,bgsw->bgmtw", d_logits, ks[keys]))
        d_k = d_k.at[keys].add(jnp.einsum("bgmst,bgmtw->bgsw", d_logits, qs[at], preferred_element_type=jnp.float32))
        d_v = d_v.at[keys].add(jnp.einsum("bgmst,bgmtw->bgsw", probs.astype(dtype), ds[at],
                                          preferred_element_type=jnp.float32))
    d_q = _from_queries(jnp.concatenate(d_q, axis=3)) / math.sqrt(q.shape[-1])
    return d_q.astype(dtype), *(a.transpose(0, 2, 1, 3).astype(dtype) for a in (d_k, d_v)), None, None, None


blocked_attention.defvjp(_forward_saved, _backward)


def _blocks(q, k) -> list[tuple[int, int, int]]:
    """(first query, end of the queries, end of the keys that they may see)"""
    length, keys = q.shape[1], k.shape[1]
    block = max(64, ceil_div(length, 16))  # at most 16 blocks are unrolled
    ends = [(i, min(i + block, length)) for i in range(0, length, block)]
    return [(i, j, j if length == keys else keys) for i, j in ends]


def _logits(q_block, keys, q_segments, k_segments, start, i, by_key=False):
    """[..., queries, keys], or [..., keys, queries]"""
    t, s = q_block.shape[-2], keys.shape[-2]
    operands = ("bgsw,bgmtw->bgmst", keys, q_block) if by_key else ("bgmtw,bgsw->bgmts", q_block, keys)
    logits = jnp.einsum(*operands, preferred_element_type=jnp.float32)
    causal = start + i + jnp.arange(t)[:, None] >= jnp.arange(s)
    visible = causal & (q_segments[:, i : i + t, None] == k_segments[:, None, :s])
    visible = jnp.swapaxes(visible, -1, -2) if by_key else visible
    return jnp.where(visible[:, None, None], logits, -1e30)


def _split_heads(x, groups):  # [B, T, H, W] -> [B, G, H/G, T, W]
    B, T, H, W = x.shape
    return x.reshape(B, T, groups, H // groups, W).transpose(0, 2, 3, 1, 4)


def _queries(q, groups):
    return _split_heads(q * (1 / math.sqrt(q.shape[-1])), groups)


def _keys(k):  # [B, T, G, W] -> [B, G, T, W]
    return k.transpose(0, 2, 1, 3)


def _from_queries(x):  # the inverse of _split_heads
    B, G, share, T, W = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, G * share, W)
