"""Grouped matmul as batched matmuls, for GPUs: blocks of BLOCK rows of one expert, each with a copy of its expert's matrix.

cuBLAS runs them at its full rate; the price is the traffic of the copies, D x F for every BLOCK rows, and the padding of
every group to BLOCK rows. A few blocks at a time bound the memory. The cost grows with the rows, not with the experts.
See `grouped_matmul._functions`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from emo_jax.compat import vary_like
from emo_jax.rounding import ceil_div, equal_parts

BLOCK = 128  # rows
CHUNK_BYTES = 2**29  # the copies that exist at a time


def multiply(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, transpose: bool) -> jax.Array:
    """Groups are multiples of BLOCK."""

    def chunk(inputs):
        blocks, experts = inputs
        return jnp.einsum("cbf,cdf->cbd" if transpose else "cbd,cdf->cbf", blocks, weights[experts])

    out = jax.lax.map(chunk, (_chunks(rows, weights), _experts(rows, weights, group_sizes)))
    return out.reshape(rows.shape[0], -1)


def weight_gradient(rows: jax.Array, d_out: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    def add(total, inputs):
        blocks, d_blocks, experts = inputs
        products = jnp.einsum("cbd,cbf->cdf", blocks, d_blocks, preferred_element_type=jnp.float32)
        return total.at[experts].add(products, indices_are_sorted=True), None

    start = vary_like(jnp.zeros(weights.shape, jnp.float32), rows, d_out, weights, group_sizes)
    inputs = (_chunks(rows, weights), _chunks(d_out, weights), _experts(rows, weights, group_sizes))
    return jax.lax.scan(add, start, inputs)[0]


def _num_chunks(num_rows: int, weights) -> int:
    blocks = num_rows // BLOCK
    at_once = max(1, CHUNK_BYTES // (weights[0].size * 4))
    return equal_parts(blocks, ceil_div(blocks, at_once))


def _chunks(rows, weights):
    """[Q, D] -> [chunks, blocks of a chunk, BLOCK, D]"""
    return rows.reshape(_num_chunks(rows.shape[0], weights), -1, BLOCK, rows.shape[1])


def _experts(rows, weights, group_sizes):
    """The expert of every block; the last one for blocks of nobody, whose rows are zeros."""
    block = jnp.arange(rows.shape[0] // BLOCK) * BLOCK
    experts = jnp.sum(block[:, None] >= jnp.cumsum(group_sizes), axis=1)
    return jnp.minimum(experts, weights.shape[0] - 1).reshape(_num_chunks(rows.shape[0], weights), -1)
