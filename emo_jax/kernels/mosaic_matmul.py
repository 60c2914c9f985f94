"""Grouped matmul on Hopper GPUs in bfloat16: tokamax's kernels (Pallas, Mosaic). What they do not compute (fp32, other GPUs, a
width that is no multiple of their blocks) is computed by `batched_matmul`. See `grouped_matmul._functions`.

Rows past the last group are never written by the kernels; the dispatch plan never reads them.
"""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp

from emo_jax.kernels import batched_matmul

BLOCK = batched_matmul.BLOCK  # rows
# Rows, columns and the contracted width of a block, and the blocks that are on their way: of those that were right on an H200
# (tokamax 0.0.17 computes wrong gradients with 128 rows in a block), the fastest at the shapes of emo_1b14b and emo_small.
MULTIPLY = dict(block_m=128, block_n=128, block_k=64, num_stages=4, grid_minor_dim=0, grid_tile_width=8)
GRADIENT = dict(block_m=64, block_n=64, block_k=128, num_stages=4)


def available() -> bool:
    """Whether this machine has such a GPU, and tokamax."""
    if importlib.util.find_spec("tokamax") is None or jax.default_backend() != "gpu":
        return False
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def multiply(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, transpose: bool) -> jax.Array:
    """Groups are multiples of BLOCK."""
    if not _computes(rows, weights, MULTIPLY):
        return batched_matmul.multiply(rows, weights, group_sizes, transpose=transpose)
    return _kernel("multiply")(rows, weights.mT if transpose else weights, group_sizes=group_sizes)


def weight_gradient(rows: jax.Array, d_out: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    if not _computes(rows, weights, GRADIENT):
        return batched_matmul.weight_gradient(rows, d_out, weights, group_sizes)
    from tokamax._src.ops.ragged_dot import base

    return _kernel("gradient")(rows, d_out, group_sizes=group_sizes,
                               ragged_dot_dimension_numbers=base.RAGGED_CONTRACTING_DOT_DIM_NUMS)


def _computes(rows, weights, config) -> bool:
    widths = weights.shape[1:]
    blocks = max(config[name] for name in ("block_m", "block_n", "block_k"))
    return rows.dtype == weights.dtype == jnp.bfloat16 and available() and all(width % blocks == 0 for width in widths)


@functools.cache
def _kernel(what: str):
    from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu

    config = {"multiply": MULTIPLY, "gradient": GRADIENT}[what]
    return pallas_mosaic_gpu.PallasMosaicGpuRaggedDot(
        config=pallas_mosaic_gpu.Config(split_k=1, persistent=False, **config), bypass_device_check=True)
