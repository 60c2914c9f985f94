"""Grouped matmul: rows sorted by expert times each expert's own matrix.

`grouped_matmul(rows [Q, D], weights [E, D, F], group_sizes [E]) -> [Q, F]`: the first `group_sizes[0]` rows are multiplied
by `weights[0]`, and so on. Groups may be empty. Rows past the last group come out as zeros and get zero gradients. Every
group size is a multiple of the kernel's `ROW_ALIGNMENT` (the dispatch plan pads groups with zero rows). These are functions
of one device; E are its experts, Q the rows of its buffer.

Kernels (`kernels.grouped_matmul`); auto takes the first of the platform:
    fused     TPU: the whole SwiGLU of the experts in five Pallas kernels (`expert_mlp_tpu`)
    megablox  TPU: the Pallas kernels that ship with JAX, one matmul each
    batched   GPU: batched matmuls of row blocks (`batched_matmul`)
    blocked   CPU: a loop over row blocks, each one dense matmul
    reference every expert on every row, masked: the oracle
`jax.lax.ragged_dot` is not one of them: its weight gradient is dense on TPU (E times the FLOPs), and all of it is dense on
CPU and GPU.
"""

from __future__ import annotations

import functools
import logging
import typing

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from emo_jax.compat import vary_like
from emo_jax.config import GroupedMatmul
from emo_jax.errors import InputError
from emo_jax.kernels import Kernel

log = logging.getLogger(__name__)

KERNELS = typing.get_args(GroupedMatmul)[1:]  # without auto
# Pallas kernels of TPU. They do not say over which mesh axes their results vary, so `shard_map` cannot check it.
PALLAS = ("fused", "megablox")
ROW_ALIGNMENT = {"fused": 1, "megablox": 1, "batched": 128, "blocked": 64, "reference": 1}  # divides every group's size


def buffer_alignment(kernel: Kernel) -> int:
    """What the number of rows Q is a multiple of."""
    return (8 if kernel.interpret else 512) if kernel.name in PALLAS else ROW_ALIGNMENT[kernel.name]


@functools.cache
def choose(kernel: str, platform: str) -> Kernel:
    """The kernel for "auto"; logged once."""
    if kernel not in ("auto", *KERNELS):
        raise InputError(f"kernels.grouped_matmul={kernel!r} must be auto or one of {', '.join(KERNELS)}")
    name = {"tpu": "fused", "cpu": "blocked"}.get(platform, "batched") if kernel == "auto" else kernel
    chosen = Kernel(name, interpret=name in PALLAS and platform != "tpu")
    log.info("grouped matmul: %s", chosen)
    return chosen


def expert_mlp(
    rows: Float[Array, "Q D"], gate_up: Float[Array, "E D two_F"], down: Float[Array, "E F D"],
    weights: Float[Array, "Q"], group_sizes: Int[Array, "E"], kernel: Kernel,
) -> Float[Array, "Q D"]:
    """weights[q] * (silu(row @ gate) * (row @ up)) @ down of each row's own expert."""
    if kernel.name == "fused":
        from emo_jax.kernels import expert_mlp_tpu

        return expert_mlp_tpu.expert_mlp(rows, gate_up, down, weights, group_sizes, kernel.interpret)
    hidden = checkpoint_name(grouped_matmul(rows, gate_up, group_sizes, kernel), "moe_hidden")
    return grouped_matmul(swiglu(hidden) * weights[:, None].astype(rows.dtype), down, group_sizes, kernel)


def swiglu(gate_up: Float[Array, "*rows two_F"]) -> Float[Array, "*rows F"]:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def grouped_matmul(
    rows: Float[Array, "Q D"], weights: Float[Array, "E D F"], group_sizes: Int[Array, "E"], kernel: Kernel
) -> Float[Array, "Q F"]:
    if kernel.name == "blocked":
        return _blocked(rows, weights, group_sizes)
    if kernel.name in PALLAS:
        from emo_jax.kernels.megablox import megablox

        return megablox(rows, weights, group_sizes, kernel.interpret)
    if kernel.name == "batched":
        from emo_jax.kernels.batched_matmul import batched

        return batched(rows, weights, group_sizes)
    return reference(rows, weights, group_sizes)


def reference(rows: Float[Array, "Q D"], weights: Float[Array, "E D F"], group_sizes: Int[Array, "E"]) -> Float[Array, "Q F"]:
    """Every expert on every row, masked: the plain form, E times the FLOPs."""
    ends = jnp.cumsum(group_sizes)
    index = jnp.arange(rows.shape[0])[:, None]
    member = ((index >= ends - group_sizes) & (index < ends)).astype(rows.dtype)
    return jnp.einsum("qd,edf,qe->qf", rows, weights, member)


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
    """rows [Q, D] @ weights [E, D, F] -> [Q, F]; transposed: rows [Q, F] @ weights^T -> [Q, D]."""
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
    """rows^T [D, Q] @ d_out [Q, F] within each group -> [E, D, F], fp32."""
    experts, used = _block_experts(group_sizes, rows.shape[0])

    def body(i, d_weights):
        block = jax.lax.dynamic_slice_in_dim(rows, i * _BLOCK, _BLOCK)
        d_block = jax.lax.dynamic_slice_in_dim(d_out, i * _BLOCK, _BLOCK)
        product = jax.lax.dot_general(block, d_block, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return d_weights.at[experts[i]].add(product)

    shape = (group_sizes.shape[0], rows.shape[1], d_out.shape[1])
    return jax.lax.fori_loop(0, used, body, vary_like(jnp.zeros(shape, jnp.float32), rows, d_out, group_sizes))
