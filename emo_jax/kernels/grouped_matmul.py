"""Grouped matmul: rows sorted by expert times each expert's own matrix.

`grouped_matmul(rows [S, D], weights [E, D, F], group_sizes [E]) -> [S, F]`: the first `group_sizes[0]` rows are multiplied
by `weights[0]`, and so on. Groups may be empty. Rows past the last group come out as zeros and get zero gradients. Every
group size is a multiple of the kernel's `ROW_ALIGNMENT` (the dispatch plan pads groups with zero rows).

`jax.lax.ragged_dot` is not one of the choices for training: its weight gradient is dense on TPU (E times the FLOPs), and
all of it is dense on CPU and GPU.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emo_jax.compat import vary_like
from emo_jax.errors import InputError

log = logging.getLogger(__name__)

KERNELS = ("blocked", "megablox", "ragged_dot", "reference")
ROW_ALIGNMENT = {"blocked": 64, "megablox": 1, "megablox_interpret": 1, "ragged_dot": 1, "reference": 1}
BUFFER_ALIGNMENT = {"megablox": 512, "megablox_interpret": 8}  # of the number of rows S; else that of a group
# Pallas kernels do not say over which mesh axes their results vary, so `shard_map` cannot check it around them.
UNCHECKED = ("megablox", "megablox_interpret")


@functools.cache
def choose(kernel: str, platform: str) -> str:
    """The kernel for "auto"; logged once. Pallas kernels of another platform run interpreted (slow, for tests)."""
    if kernel not in ("auto", *KERNELS):
        raise InputError(f"kernels.grouped_matmul={kernel!r} must be auto or one of {', '.join(KERNELS)}")
    chosen = {"tpu": "megablox", "cpu": "blocked"}.get(platform, "ragged_dot") if kernel == "auto" else kernel
    if chosen == "megablox" and platform != "tpu":
        chosen = "megablox_interpret"
    log.info("grouped matmul: %s", chosen)
    if chosen == "ragged_dot":
        log.warning("grouped matmul: ragged_dot computes every expert for every row in the weight gradient on %s", platform)
    return chosen


def grouped_matmul(
    rows: Float[Array, "S D"], weights: Float[Array, "E D F"], group_sizes: Int[Array, "E"], kernel: str
) -> Float[Array, "S F"]:
    if kernel == "blocked":
        return _blocked(rows, weights, group_sizes)
    if kernel.startswith("megablox"):
        from emo_jax.kernels.grouped_matmul_tpu import megablox

        return megablox(rows, weights, group_sizes, kernel.endswith("interpret"))
    if kernel == "ragged_dot":
        return jax.lax.ragged_dot(rows, weights, group_sizes)
    return reference(rows, weights, group_sizes)


def reference(rows, weights, group_sizes):
    """Every expert on every row, masked: the plain form, E times the FLOPs."""
    ends = jnp.cumsum(group_sizes)
    index = jnp.arange(rows.shape[0])[:, None]
    member = ((index >= ends - group_sizes) & (index < ends)).astype(rows.dtype)
    return jnp.einsum("sd,edf,se->sf", rows, weights, member)


# ---- blocked: a loop over the row blocks that are in use, each one dense matmul ------------------------------------


@jax.custom_vjp
def _blocked(rows, weights, group_sizes):
    return _rows_times_weights(rows, weights, group_sizes, transpose=False)


def _blocked_fwd(rows, weights, group_sizes):
    return _blocked(rows, weights, group_sizes), (rows, weights, group_sizes)


def _blocked_bwd(saved, d_out):
    rows, weights, group_sizes = saved
    d_rows = _rows_times_weights(d_out, weights, group_sizes, transpose=True)
    return d_rows, _weight_gradient(rows, d_out, group_sizes).astype(weights.dtype), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)

_BLOCK = ROW_ALIGNMENT["blocked"]


def _block_experts(group_sizes, num_rows):
    """The expert of every row block, and how many blocks are in use."""
    ends = jnp.cumsum(group_sizes) // _BLOCK
    return jnp.searchsorted(ends, jnp.arange(num_rows // _BLOCK), side="right"), ends[-1]


def _rows_times_weights(rows, weights, group_sizes, *, transpose):
    """rows [S, D] @ weights [E, D, F] -> [S, F]; transposed: rows [S, F] @ weights^T -> [S, D]."""
    experts, used = _block_experts(group_sizes, rows.shape[0])
    contract, width = (1, weights.shape[1]) if transpose else (0, weights.shape[2])

    def body(i, out):
        block = jax.lax.dynamic_slice_in_dim(rows, i * _BLOCK, _BLOCK)
        weight = jax.lax.dynamic_index_in_dim(weights, experts[i], keepdims=False)
        product = jax.lax.dot_general(block, weight, (((1,), (contract,)), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), i * _BLOCK, 0)

    out = vary_like(jnp.zeros((rows.shape[0], width), rows.dtype), rows, weights, group_sizes)
    return jax.lax.fori_loop(0, used, body, out)


def _weight_gradient(rows, d_out, group_sizes):
    """rows^T [D, S] @ d_out [S, F] within each group -> [E, D, F], fp32."""
    experts, used = _block_experts(group_sizes, rows.shape[0])

    def body(i, d_weights):
        block = jax.lax.dynamic_slice_in_dim(rows, i * _BLOCK, _BLOCK)
        d_block = jax.lax.dynamic_slice_in_dim(d_out, i * _BLOCK, _BLOCK)
        product = jax.lax.dot_general(block, d_block, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return d_weights.at[experts[i]].add(product)

    shape = (group_sizes.shape[0], rows.shape[1], d_out.shape[1])
    return jax.lax.fori_loop(0, used, body, vary_like(jnp.zeros(shape, jnp.float32), rows, d_out, group_sizes))
