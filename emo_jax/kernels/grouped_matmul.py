"""Grouped matmul: rows sorted by expert times each expert's own matrix.

`grouped_matmul(rows [Q, D], weights [E, D, F], group_sizes [E]) -> [Q, F]`: the first `group_sizes[0]` rows are multiplied
by `weights[0]`, and so on. Groups may be empty. Rows past the last group come out as zeros and get zero gradients. Every
group size is a multiple of the kernel's `ROW_ALIGNMENT` (the dispatch plan pads groups with zero rows). These are functions
of one device; E are its experts, Q the rows of its buffer.

Kernels (`kernels.grouped_matmul`); auto takes the first of the platform:
    fused     TPU: the whole SwiGLU of the experts in five Pallas kernels (`expert_mlp_tpu`)
    megablox  TPU: the Pallas kernels that ship with JAX, one matmul each
    mosaic    GPU (Hopper, with tokamax): its ragged matmul in bfloat16 (`mosaic_matmul`)
    batched   GPU: batched matmuls of row blocks (`batched_matmul`)
    blocked   CPU: a loop over row blocks, each one dense matmul (`blocked_matmul`)
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

from emo_jax.config import GroupedMatmul
from emo_jax.errors import InputError
from emo_jax.kernels import Kernel, batched_matmul, blocked_matmul, mosaic_matmul

log = logging.getLogger(__name__)

KERNELS = typing.get_args(GroupedMatmul)[1:]  # without auto
PALLAS = ("fused", "megablox")  # of TPU; interpreted elsewhere
UNCHECKED = (*PALLAS, "mosaic")  # do not say over which mesh axes their results vary, so `shard_map` cannot check it
ROW_ALIGNMENT = {"fused": 1, "megablox": 1, "mosaic": mosaic_matmul.BLOCK, "batched": batched_matmul.BLOCK,
                 "blocked": blocked_matmul.BLOCK, "reference": 1}  # divides every group's size


def buffer_alignment(kernel: Kernel) -> int:
    """What the number of rows Q is a multiple of."""
    return (8 if kernel.interpret else 512) if kernel.name in PALLAS else ROW_ALIGNMENT[kernel.name]


@functools.cache
def choose(kernel: str, platform: str) -> Kernel:
    """The kernel for "auto"; logged once."""
    if kernel not in ("auto", *KERNELS):
        raise InputError(f"kernels.grouped_matmul={kernel!r} must be auto or one of {', '.join(KERNELS)}")
    gpu = "mosaic" if platform == "gpu" and mosaic_matmul.available() else "batched"
    name = {"tpu": "fused", "cpu": "blocked"}.get(platform, gpu) if kernel == "auto" else kernel
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
    if kernel.name == "reference":
        return reference(rows, weights, group_sizes)
    return _grouped_matmul(rows, weights, group_sizes, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(rows, weights, group_sizes, kernel):
    return _functions(kernel)[0](rows, weights, group_sizes, transpose=False)


def _adjoint(kernel, saved, d_out):
    rows, weights, group_sizes = saved
    multiply, weight_gradient = _functions(kernel)
    d_rows = multiply(d_out, weights, group_sizes, transpose=True)
    return d_rows, weight_gradient(rows, d_out, weights, group_sizes).astype(weights.dtype), None


_grouped_matmul.defvjp(lambda *args: (_grouped_matmul(*args), args[:3]), _adjoint)


def _functions(kernel: Kernel):
    """What a kernel is made of:
    multiply(rows, weights, group_sizes, transpose): [Q, D] @ [E, D, F] -> [Q, F]; transposed [Q, F] @ [E, D, F]^T -> [Q, D]
    weight_gradient(rows, d_out, weights, group_sizes): [D, Q] @ [Q, F] within each group -> [E, D, F]"""
    if kernel.name in PALLAS:
        from emo_jax.kernels import megablox

        return (functools.partial(megablox.multiply, interpret=kernel.interpret),
                functools.partial(megablox.weight_gradient, interpret=kernel.interpret))
    module = {"mosaic": mosaic_matmul, "batched": batched_matmul, "blocked": blocked_matmul}[kernel.name]
    return module.multiply, module.weight_gradient


def reference(rows: Float[Array, "Q D"], weights: Float[Array, "E D F"], group_sizes: Int[Array, "E"]) -> Float[Array, "Q F"]:
    """Every expert on every row, masked: the plain form, E times the FLOPs."""
    ends = jnp.cumsum(group_sizes)
    index = jnp.arange(rows.shape[0])[:, None]
    member = ((index >= ends - group_sizes) & (index < ends)).astype(rows.dtype)
    return jnp.einsum("qd,edf,qe->qf", rows, weights, member)
