"""The expert part of a MoE layer: SwiGLU experts, applied to the tokens that chose them, on any mesh.

Routing is decided outside, in the global view; here, inside `jax.shard_map`, every device only moves its tokens' rows,
multiplies them, and combines. Strategies (`kernels.dispatch`):

    local  every device holds all experts (gathered over `fsdp`) and serves its own tokens. mesh.expert = 1.
    ring   experts are sharded over `expert`: all-gather the tokens of that axis, serve the local experts, reduce-scatter.
           Moves (expert - 1) x T x D a device and direction, whatever k is.
    dense  every local expert on every token, exchanged as in ring: the oracle, E / k times the FLOPs.

All are dropless: buffers hold any routing.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from emo_jax import compat
from emo_jax.errors import InputError
from emo_jax.kernels import grouped_matmul as gmm
from emo_jax.moe import dispatch
from emo_jax.sharding import ACTIVATIONS, AXES, TOKENS, parameter_spec

log = logging.getLogger(__name__)


def moe_experts(
    table: dict[str, Float[Array, "E _ _"]],
    x: Float[Array, "B T D"],
    expert_ids: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    valid: Bool[Array, "B T"],
    *,
    num_shared: int,
    strategy: str,
    kernel: str,
) -> Float[Array, "B T D"]:
    """sum_j weights_j * expert_j(x) over the chosen routed experts, plus the shared experts (the last rows of the table)
    with weight 1. `table`: gate, up [E, D, F] and down [E, F, D], fp32 masters. Padding tokens (`valid` False) use none of
    the routed experts."""
    local = functools.partial(_device_experts, num_shared=num_shared, strategy=strategy, kernel=kernel)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(table, x, expert_ids, weights, valid, axes=None)
    specs = {name: parameter_spec(("moe", name)) for name in table}
    return compat.shard_map(
        functools.partial(local, axes=dict(mesh.shape)),
        in_specs=(specs, ACTIVATIONS, ACTIVATIONS, ACTIVATIONS, TOKENS), out_specs=ACTIVATIONS,
        check_vma=kernel not in gmm.UNCHECKED,
    )(table, x, expert_ids, weights, valid)


def _device_experts(table, x, expert_ids, weights, valid, *, axes, num_shared, strategy, kernel):
    """The body of one device. `axes`: sizes of the mesh axes, None without a mesh."""
    batch_shape, width = x.shape[:2], x.shape[2]
    x, expert_ids, weights, valid = (a.reshape(-1, *a.shape[2:]) for a in (x, expert_ids, weights, valid))
    gate_up, down = _gather_table(table, x.dtype, axes)
    count, first = gate_up.shape[0], 0
    if axes:
        # From here on every device does its own work on every axis; the adjoints of these casts sum the gradients.
        x, expert_ids, weights, valid, gate_up, down = (
            compat.vary(a, AXES) for a in (x, expert_ids, weights, valid, gate_up, down))
        first = jax.lax.axis_index("expert") * count
    exchange = axes is not None and axes["expert"] > 1
    tokens = (x, expert_ids, weights, valid)
    if exchange:
        tokens = [jax.lax.all_gather(a, "expert", tiled=True) for a in tokens]
    compute = _every_expert if strategy == "dense" else _grouped_experts
    y = compute(*tokens, gate_up, down, first, kernel)
    if exchange:
        y = jax.lax.psum_scatter(y, "expert", tiled=True)
    if num_shared:
        y = y + _shared_experts(x, gate_up[-num_shared:], down[-num_shared:], axes)
    if axes:
        y = jax.lax.psum(y, "tensor")  # each device of that axis held a part of the hidden width
    return y.reshape(*batch_shape, width)


def _gather_table(table, dtype, axes):
    """gate and up side by side [E, D, 2F], and down [E, F, D], whole along `fsdp`, in the compute dtype. They are cast and
    joined while still sharded: one gather of half the bytes, and one grouped matmul for both."""
    gate_up = jnp.concatenate([table["gate"], table["up"]], axis=-1).astype(dtype)
    down = table["down"].astype(dtype)
    if axes:
        gate_up = jax.lax.all_gather(gate_up, "fsdp", axis=1, tiled=True)
        down = jax.lax.all_gather(down, "fsdp", axis=2, tiled=True)
    return gate_up, down


def _grouped_experts(x, expert_ids, weights, valid, gate_up, down, first, kernel):
    plan = dispatch.plan_dispatch(expert_ids, valid, (first, gate_up.shape[0]), gmm.ROW_ALIGNMENT[kernel],
                                  gmm.BUFFER_ALIGNMENT.get(kernel, 1))
    rows = checkpoint_name(dispatch.gather_tokens(x, plan), "moe_rows")
    hidden = gmm.grouped_matmul(rows, gate_up, plan.group_sizes, kernel)
    # The router weight is applied before the down projection: one multiplication of width F instead of D, and the
    # backward pass needs no second down projection for its gradient.
    hidden = swiglu(hidden) * dispatch.slots_to_rows(weights, plan)[:, None].astype(x.dtype)
    return dispatch.combine(gmm.grouped_matmul(hidden, down, plan.group_sizes, kernel), plan)


def _every_expert(x, expert_ids, weights, valid, gate_up, down, first, kernel):
    chosen = expert_ids[..., None] == first + jnp.arange(gate_up.shape[0])
    mixture = jnp.sum(jnp.where(chosen & valid[:, None, None], weights[..., None], 0.0), axis=1)  # [T, e]
    hidden = swiglu(jnp.einsum("td,edf->tef", x, gate_up)) * mixture[..., None].astype(x.dtype)
    return jnp.einsum("tef,efd->td", hidden, down)


def _shared_experts(x, gate_up, down, axes):
    """Always active, weight 1. They are the last rows of the table, so under expert parallelism the last device of the axis
    hands them to the others."""
    if axes and axes["expert"] > 1:
        last = jax.lax.axis_index("expert") == axes["expert"] - 1
        gate_up, down = (compat.vary(jax.lax.psum(jnp.where(last, w, 0), "expert"), AXES) for w in (gate_up, down))
    hidden = swiglu(jnp.einsum("td,sdf->tsf", x, gate_up))
    return jnp.einsum("tsf,sfd->td", hidden, down)


def swiglu(gate_up: Float[Array, "*rows two_F"]) -> Float[Array, "*rows F"]:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


@functools.cache
def choose_strategy(strategy: str, expert_axis: int) -> str:
    """The strategy for "auto": local without expert parallelism, ring with it; logged once."""
    if strategy == "local" and expert_axis > 1:
        raise InputError(f"kernels.dispatch=local needs mesh.expert=1, not {expert_axis}; use ring or auto")
    if strategy == "auto":
        strategy = "local" if expert_axis == 1 else "ring"
        log.info("MoE dispatch: %s (mesh.expert=%d)", strategy, expert_axis)
    return strategy
