"""The expert part of a MoE layer: SwiGLU experts, applied to the tokens that chose them, on any mesh.

Routing is decided outside, in the global view; here, inside `jax.shard_map`, every device only moves its tokens' rows,
multiplies them, and combines. Strategies (`kernels.dispatch`):

    local  every device holds all experts (gathered over `fsdp`) and serves its own tokens. mesh.expert = 1.
    ring   experts are sharded over `expert`: all-gather the tokens of that axis, serve the local experts, reduce-scatter.
           Moves (expert - 1) x T x D a device and direction, whatever k is.
    dense  every local expert on every token, exchanged as in ring: the oracle, E / k times the FLOPs.

All are dropless: buffers hold any routing. `few_tokens` is not a choice of `kernels.dispatch` but what decoding uses on CPU,
on the same meshes as ring and local.
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
from emo_jax.moe import dispatch, few_tokens
from emo_jax.kernels.grouped_matmul import swiglu
from emo_jax.sharding import ACTIVATIONS, AXES, TOKENS, fsdp_dimension

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
    if strategy == "few_tokens":
        local = functools.partial(few_tokens.device_experts, num_shared=num_shared)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(table, x, expert_ids, weights, valid, axes=None, fsdp=None)
    specs = {name: jax.typeof(w).sharding.spec for name, w in table.items()}
    fsdp = {name: fsdp_dimension(spec) for name, spec in specs.items()}
    return compat.shard_map(
        functools.partial(local, axes=dict(mesh.shape), fsdp=fsdp),
        in_specs=(specs, ACTIVATIONS, ACTIVATIONS, ACTIVATIONS, TOKENS), out_specs=ACTIVATIONS,
        check_vma=kernel not in gmm.UNCHECKED,
    )(table, x, expert_ids, weights, valid)


def _device_experts(table, x, expert_ids, weights, valid, *, axes, fsdp, num_shared, strategy, kernel):
    """The body of one device. `axes`: sizes of the mesh axes, None without a mesh; `fsdp`: the dimension of each table
    that this axis shards."""
    batch_shape, width = x.shape[:2], x.shape[2]
    x, expert_ids, weights, valid = (a.reshape(-1, *a.shape[2:]) for a in (x, expert_ids, weights, valid))
    gate_up, down = _gather_table(table, x.dtype, fsdp)
    count, first = gate_up.shape[0], 0
    if axes:
        # From here on every device does its own work on every axis; the adjoints of these casts sum the gradients.
        x, expert_ids, weights, valid, gate_up, down = (
            compat.vary(a, AXES) for a in (x, expert_ids, weights, valid, gate_up, down))
        first = jax.lax.axis_index("expert") * count
    if num_shared:
        (gate_up, shared_gate_up), (down, shared_down) = (_split_shared(w, num_shared) for w in (gate_up, down))
    exchange = axes is not None and axes["expert"] > 1
    tokens = (x, expert_ids, weights, valid)
    if exchange:
        tokens = [jax.lax.all_gather(a, "expert", tiled=True) for a in tokens]
    compute = _every_expert if strategy == "dense" else _grouped_experts
    y = compute(*tokens, gate_up, down, first, kernel)
    if exchange:
        y = jax.lax.psum_scatter(y, "expert", tiled=True)
    if num_shared:
        y = y + _shared_experts(x, shared_gate_up, shared_down, axes)
    if axes:
        y = jax.lax.psum(y, "tensor")  # each device of that axis held a part of the hidden width
    return y.reshape(*batch_shape, width)


def _gather_table(table, dtype, fsdp):
    """gate and up side by side [E, D, 2F], and down [E, F, D], whole along `fsdp`, in the compute dtype. They are cast and
    joined while still sharded: one gather of half the bytes, and one grouped matmul for both."""
    gate_up = jnp.concatenate([table["gate"], table["up"]], axis=-1).astype(dtype)
    down = table["down"].astype(dtype)
    if fsdp:
        gate_up = jax.lax.all_gather(gate_up, "fsdp", axis=fsdp["gate"], tiled=True)
        down = jax.lax.all_gather(down, "fsdp", axis=fsdp["down"], tiled=True)
    return gate_up, down


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _split_shared(table, num_shared):
    """(the table, its last `num_shared` experts). The adjoint adds their gradient in place, without a pass over the table."""
    return table, table[-num_shared:]


_split_shared.defvjp(lambda table, n: (_split_shared(table, n), None),
                     lambda n, _, d: (d[0].at[-n:].add(d[1]),))


def _grouped_experts(x, expert_ids, weights, valid, gate_up, down, first, kernel):
    plan = dispatch.plan_dispatch(expert_ids, valid, (first, gate_up.shape[0]), gmm.ROW_ALIGNMENT[kernel],
                                  gmm.BUFFER_ALIGNMENT.get(kernel, 1))
    plan = jax.tree.map(lambda a: checkpoint_name(a, "routing"), plan)
    fill = gmm.ROW_ALIGNMENT[kernel] > 1  # padding inside the groups must be zeros; after the last group nobody looks
    rows = checkpoint_name(dispatch.gather_tokens(x, plan, fill), "moe_rows")
    # The router weight is applied before the down projection: one multiplication of width F instead of D, and the
    # backward pass needs no second down projection for its gradient.
    out = gmm.expert_mlp(rows, gate_up, down, dispatch.slots_to_rows(weights, plan), plan.group_sizes, kernel)
    return dispatch.combine(out, plan, fill)


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


@functools.cache
def choose_strategy(strategy: str, expert_axis: int) -> str:
    """The strategy for "auto": local without expert parallelism, ring with it; logged once."""
    if strategy == "local" and expert_axis > 1:
        raise InputError(f"kernels.dispatch=local needs mesh.expert=1, not {expert_axis}; use ring or auto")
    if strategy == "auto":
        strategy = "local" if expert_axis == 1 else "ring"
        log.info("MoE dispatch: %s (mesh.expert=%d)", strategy, expert_axis)
    return strategy
