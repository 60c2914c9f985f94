"""Grouped matmul on CPU: loops over blocks of rows, each one dense matmul. See `grouped_matmul._functions`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from emo_jax.compat import vary_like
from emo_jax.rounding import ceil_div

BLOCK = 64  # rows
LARGE = 2**23  # multiplications of a large block: XLA's matmul takes several cores from about there (measured)


def multiply(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, transpose: bool) -> jax.Array:
    """What fills large blocks by those, the rest of every group by small ones; a row's result is the same in both."""
    contract, width = (1, weights.shape[1]) if transpose else (0, weights.shape[2])

    def put(out, expert, start, size):
        weight = jax.lax.dynamic_index_in_dim(weights, expert, keepdims=False)
        product = jax.lax.dot_general(_rows(rows, start, size), weight, (((1,), (contract,)), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), start, 0)

    out = vary_like(jnp.zeros((rows.shape[0], width), rows.dtype), rows, weights, group_sizes)
    large = min(BLOCK * ceil_div(LARGE, BLOCK * weights[0].size), rows.shape[0])
    starts, rest = jnp.cumsum(group_sizes) - group_sizes, group_sizes % large
    out = _over_blocks(put, out, rows, large, starts, group_sizes - rest)
    return _over_blocks(put, out, rows, BLOCK, starts + group_sizes - rest, rest)


def weight_gradient(rows: jax.Array, d_out: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    def add(d_weights, expert, start, size):
        product = jax.lax.dot_general(_rows(rows, start, size), _rows(d_out, start, size), (((0,), (0,)), ((), ())),
                                      preferred_element_type=jnp.float32)
        return d_weights.at[expert].add(product)

    zeros = vary_like(jnp.zeros(weights.shape, jnp.float32), rows, d_out, group_sizes)
    return _over_blocks(add, zeros, rows, BLOCK, jnp.cumsum(group_sizes) - group_sizes, group_sizes)


def _over_blocks(function: Callable, total: jax.Array, rows: jax.Array, size: int, starts: jax.Array,
                 sizes: jax.Array) -> jax.Array:
    """`function(total, expert, first row, size)` for every block of `size` rows of the experts' rows, which are `sizes` from
    `starts` on."""
    ends, blocks = jnp.cumsum(sizes // size), jnp.arange(rows.shape[0] // size)
    experts = jnp.searchsorted(ends, blocks, side="right")
    first_rows = (starts + sizes - ends * size)[experts] + blocks * size
    return jax.lax.fori_loop(0, ends[-1], lambda i, total: function(total, experts[i], first_rows[i], size), total)


def _rows(array: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, size)
