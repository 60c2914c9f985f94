"""Grouped matmul on CPU: a loop over the row blocks that are in use, each one dense matmul. See `grouped_matmul._functions`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from emo_jax.compat import vary_like

BLOCK = 64  # rows


def multiply(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, transpose: bool) -> jax.Array:
    experts, used = _experts(group_sizes, rows.shape[0])
    contract, width = (1, weights.shape[1]) if transpose else (0, weights.shape[2])

    def body(i, out):
        block = jax.lax.dynamic_slice_in_dim(rows, i * BLOCK, BLOCK)
        weight = jax.lax.dynamic_index_in_dim(weights, experts[i], keepdims=False)
        product = jax.lax.dot_general(block, weight, (((1,), (contract,)), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), i * BLOCK, 0)

    out = vary_like(jnp.zeros((rows.shape[0], width), rows.dtype), rows, weights, group_sizes)
    return jax.lax.fori_loop(0, used, body, out)


def weight_gradient(rows: jax.Array, d_out: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    experts, used = _experts(group_sizes, rows.shape[0])

    def body(i, d_weights):
        block = jax.lax.dynamic_slice_in_dim(rows, i * BLOCK, BLOCK)
        d_block = jax.lax.dynamic_slice_in_dim(d_out, i * BLOCK, BLOCK)
        product = jax.lax.dot_general(block, d_block, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return d_weights.at[experts[i]].add(product)

    zeros = vary_like(jnp.zeros(weights.shape, jnp.float32), rows, d_out, group_sizes)
    return jax.lax.fori_loop(0, used, body, zeros)


def _experts(group_sizes, num_rows):
    """The expert of every row block, and how many blocks are in use."""
    ends = jnp.cumsum(group_sizes) // BLOCK
    return jnp.searchsorted(ends, jnp.arange(num_rows // BLOCK), side="right"), ends[-1]
