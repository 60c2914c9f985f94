"""Grouped matmul on TPU: the megablox Pallas kernels that ship with JAX. See `grouped_matmul._functions`.

`tgmm` zeroes the gradients of empty groups. Rows past the last group are never written by `gmm`; the dispatch plan never
reads them. Off TPU the kernels run in interpret mode, for the parity tests.
"""

from __future__ import annotations

import math

import jax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

TILE_ROWS = 512
TILE_WIDTH = 1024  # both matrix dimensions: 2 MB a bf16 tile, several of which fit the vector memory


def multiply(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, transpose: bool, interpret: bool) -> jax.Array:
    Q, contract = rows.shape
    width = weights.shape[1] if transpose else weights.shape[2]
    return gmm(rows, weights, group_sizes, rows.dtype, tiles(Q, contract, width), transpose_rhs=transpose,
               interpret=interpret)


def weight_gradient(rows: jax.Array, d_out: jax.Array, weights: jax.Array, group_sizes: jax.Array, *,
                    interpret: bool) -> jax.Array:
    Q, D = rows.shape
    return tgmm(rows.T, d_out, group_sizes, weights.dtype, tiles(Q, D, d_out.shape[1]), interpret=interpret)


def tiles(rows: int, contract: int, width: int) -> tuple[int, int, int]:
    """(rows, contracted, output) sizes of a tile. The kernel needs a row tile that divides the rows."""
    return math.gcd(rows, TILE_ROWS), min(contract, TILE_WIDTH), min(width, TILE_WIDTH)
