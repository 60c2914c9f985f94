"""The expert part of a MoE layer: SwiGLU experts, applied to the tokens that chose them, on any mesh.

Routing is decided outside, in the global view; here, inside `jax.shard_map`, every device only moves its tokens' rows,
multiplies them, and combines. Strategies (`kernels.dispatch`):

    local  every device holds all experts (gathered over `fsdp`, and `expert` where it is a second axis to shard them over)
           and serves its own tokens.
    ring   experts are sharded over `expert`: all-gather the tokens of that axis, serve the local experts, reduce-scatter.
           Moves (expert - 1) x T x D a device and direction, whatever k is.
    all_to_all  experts are sharded over `expert`: every row goes to the device of its expert and its result comes back.
           Moves k x T x D x (1 - 1 / expert): less than ring where the axis is longer than k.
    dense  every local expert on every token, exchanged as in ring: the oracle, E / k times the FLOPs.

All are dropless. Buffers hold any routing, but for all_to_all's receive buffer: that holds `kernels.buffer_factor` times
the balanced load, and a layer whose load exceeds it in any step is computed by ring instead, source by source. `few_tokens`
is not a choice of `kernels.dispatch` but what decoding uses on CPU, on the same meshes as ring and local.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from emo_jax import compat
from emo_jax.errors import InputError
from emo_jax.kernels import grouped_matmul as gmm
from emo_jax.kernels import rings
from emo_jax.kernels.grouped_matmul import swiglu
from emo_jax.moe import dispatch, few_tokens
from emo_jax.moe import dispatch_all_to_all as a2a
from emo_jax.rounding import round_up
from emo_jax.sharding import ACTIVATIONS, AXES, TOKENS, fsdp_dimension

log = logging.getLogger(__name__)


class BufferLoad(NamedTuple):
    """Of one layer with the all_to_all strategy, the largest over the mesh."""

    required_capacity_factor: Float[Array, ""]  # rows of the busiest device / rows of each at balanced load
    fallback: Float[Array, ""]  # 1 if that was too much for the buffer


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
    buffer_factor: float = 0.0,
) -> tuple[Float[Array, "B T D"], BufferLoad | None]:
    """(y, load); y is sum_j weights_j * expert_j(x) over the chosen routed experts, plus the shared experts (the last rows
    of the table) with weight 1. `table`: gate, up [E, D, F] and down [E, F, D], fp32 masters. Padding tokens (`valid`
    False) use none of the routed experts. `load` and `buffer_factor` (0: room for any routing) are all_to_all's."""
    local = functools.partial(_device_experts, num_shared=num_shared, strategy=strategy, kernel=kernel,
                              buffer_factor=buffer_factor)
    if strategy == "few_tokens":
        local = lambda *args, **axes: (few_tokens.device_experts(*args, num_shared=num_shared, **axes), None)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(table, x, expert_ids, weights, valid, axes=None, fsdp=None)
    load_specs = BufferLoad(P(), P()) if strategy.startswith("all_to_all") else None
    specs = {name: jax.typeof(w).sharding.spec for name, w in table.items()}
    fsdp = {name: fsdp_dimension(spec) for name, spec in specs.items()}
    return compat.shard_map(
        functools.partial(local, axes=dict(mesh.shape), fsdp=fsdp),
        in_specs=(specs, ACTIVATIONS, ACTIVATIONS, ACTIVATIONS, TOKENS), out_specs=(ACTIVATIONS, load_specs),
        check_vma=kernel not in gmm.PALLAS,
    )(table, x, expert_ids, weights, valid)


def _device_experts(table, x, expert_ids, weights, valid, *, axes, fsdp, num_shared, strategy, kernel, buffer_factor):
    """The body of one device. `axes`: sizes of the mesh axes, None without a mesh; `fsdp`: the dimension of each table
    that this axis shards."""
    batch_shape, width = x.shape[:2], x.shape[2]
    x, expert_ids, weights, valid = (a.reshape(-1, *a.shape[2:]) for a in (x, expert_ids, weights, valid))
    everywhere = strategy.startswith("local") and axes is not None and axes["expert"] > 1
    gate_up, down = _gather_table(table, x.dtype, fsdp, everywhere, ring=strategy == "local_rings")
    if everywhere:
        axes = axes | {"expert": 1}
    count, first = gate_up.shape[0], 0
    if axes:
        # From here on every device does its own work on every axis; the adjoints of these casts sum the gradients.
        x, expert_ids, weights, valid, gate_up, down = (
            compat.vary(a, AXES) for a in (x, expert_ids, weights, valid, gate_up, down))
        first = jax.lax.axis_index("expert") * count if axes["expert"] > 1 else 0
    if num_shared:
        (gate_up, shared_gate_up), (down, shared_down) = (_split_shared(w, num_shared) for w in (gate_up, down))
    tokens, experts, load = (x, expert_ids, weights, valid), (gate_up, down, first, kernel), None
    if strategy.startswith("all_to_all"):
        y, load = _all_to_all(*tokens, *experts, buffer_factor, portable=strategy.endswith("portable"))
    elif strategy == "dense":
        y = _ring(_every_expert, tokens, experts, axes)
    else:
        y = _ring(_grouped_experts, tokens, experts, axes)
    if num_shared:
        y = y + _shared_experts(x, shared_gate_up, shared_down, axes)
    if axes:
        y = jax.lax.psum(y, "tensor")  # each device of that axis held a part of the hidden width
    return y.reshape(*batch_shape, width), load


def _ring(compute, tokens, experts, axes):
    """`compute` on the tokens of the whole `expert` axis, if there is one, and the sums of what its devices found."""
    if not axes or axes["expert"] == 1:
        return compute(*tokens, *experts)
    tokens = [checkpoint_name(jax.lax.all_gather(a, "expert", tiled=True), "moe_exchanged") for a in tokens]
    return jax.lax.psum_scatter(compute(*tokens, *experts), "expert", tiled=True)


def _gather_table(table, dtype, fsdp, over_experts, ring):
    """gate and up side by side [E, D, 2F], and down [E, F, D], whole along `fsdp` (and `expert`), in the compute dtype. They
    are cast and joined while still sharded: one gather of half the bytes, and one grouped matmul for both.

    Over two axes they are gathered one axis at a time, down in the other order where it can be: then the second gathers,
    which move nearly all the bytes, use the links of both torus axes, and the adjoints are reduce-scatters over one axis
    each, where XLA:TPU makes all-reduces of those over both."""
    gate_up = jnp.concatenate([table["gate"], table["up"]], axis=-1).astype(dtype)
    down = table["down"].astype(dtype)
    if not fsdp:
        return gate_up, down
    gather = functools.partial(jax.lax.all_gather, tiled=True)
    if not over_experts:
        return gather(gate_up, "fsdp", axis=fsdp["gate"]), gather(down, "fsdp", axis=fsdp["down"])
    second = rings.all_gather if ring else gather
    gate_up = second(gather(gate_up, "fsdp", axis=fsdp["gate"]), "expert", axis=0)
    if fsdp["down"] == 0:  # both axes shard the experts, `expert` in the larger blocks
        return gate_up, second(gather(down, "fsdp", axis=0), "expert", axis=0)
    return gate_up, second(gather(down, "expert", axis=0), "fsdp", axis=fsdp["down"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _split_shared(table, num_shared):
    """(the table, its last `num_shared` experts). The adjoint adds their gradient in place: no pass over the table."""
    return table, table[-num_shared:]


_split_shared.defvjp(lambda table, n: (_split_shared(table, n), None),
                     lambda n, _, d: (d[0].at[-n:].add(d[1]),))


def _grouped_experts(x, expert_ids, weights, valid, gate_up, down, first, kernel):
    plan = dispatch.plan_dispatch(expert_ids, valid, (first, gate_up.shape[0]), gmm.ROW_ALIGNMENT[kernel],
                                  gmm.BUFFER_ALIGNMENT[kernel])
    plan = jax.tree.map(lambda a: checkpoint_name(a, "routing"), plan)
    fill = gmm.ROW_ALIGNMENT[kernel] > 1  # padding inside the groups must be zeros; after the last group nobody looks
    rows = checkpoint_name(dispatch.gather_tokens(x, plan, fill), "moe_rows")
    # The router weight is applied before the down projection: one multiplication of width F instead of D, and the
    # backward pass needs no second down projection for its gradient.
    out = gmm.expert_mlp(rows, gate_up, down, dispatch.slots_to_rows(weights, plan), plan.group_sizes, kernel)
    return dispatch.combine(out, plan, fill)


def _all_to_all(x, expert_ids, weights, valid, gate_up, down, first, kernel, buffer_factor, portable):
    """(y, `BufferLoad`) by exchanging rows, or by ring where they do not fit the buffer."""
    peers, count, (tokens, k) = jax.lax.axis_size("expert"), gate_up.shape[0], expert_ids.shape
    alignment = gmm.ROW_ALIGNMENT[kernel]
    here = dispatch.plan_dispatch(expert_ids, valid, (0, peers * count), 1)
    counts = jax.lax.all_gather(here.group_sizes, "expert")
    plan = a2a.plan_exchange(counts, jax.lax.axis_index("expert"), alignment)
    here, plan = jax.tree.map(lambda a: checkpoint_name(a, "routing"), (here, plan))
    multiple = max(alignment, gmm.BUFFER_ALIGNMENT[kernel])
    largest = dispatch.buffer_rows(peers * tokens, k, count, alignment, multiple)
    room = min(largest, round_up(int(buffer_factor * tokens * k + count * (alignment - 1)), multiple))
    num_rows = room if buffer_factor else largest

    def exchanged(x, weights, gate_up, down):
        rows = a2a.send(dispatch.gather_tokens(x, here), plan, num_rows, portable)
        row_weights = a2a.send(dispatch.slots_to_rows(weights, here), plan, num_rows, portable)
        rows, row_weights = (checkpoint_name(a, "moe_exchanged") for a in (rows, row_weights))
        out = gmm.expert_mlp(rows, gate_up, down, row_weights, plan.group_sizes, kernel)
        return dispatch.combine(a2a.send_back(out, plan, tokens * k, portable), here)

    def ring(x, weights, gate_up, down):
        """Source by source, so that it needs no larger buffers either."""
        inputs = [jax.lax.all_gather(a, "expert") for a in (x, expert_ids, weights, valid)]
        one = jax.checkpoint(lambda source: _grouped_experts(*source, gate_up, down, first, kernel), prevent_cse=False)
        return jax.lax.psum_scatter(jax.lax.map(one, inputs), "expert")

    # All devices of the mesh decide alike: collectives of the two branches must not meet.
    needed = jax.lax.pmax(compat.vary(plan.rows_needed, AXES), AXES)
    if num_rows == largest:
        y, fallback = exchanged(x, weights, gate_up, down), jnp.zeros_like(needed)
    else:
        fallback = (needed > num_rows).astype(needed.dtype)
        y = jax.lax.cond(fallback > 0, ring, exchanged, x, weights, gate_up, down)
    return y, BufferLoad(needed / (tokens * k), fallback.astype(jnp.float32))


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
def choose_strategy(strategy: str, expert_axis: int, top_k: int, platform: str, sparse_cores: bool = True) -> str:
    """The strategy for "auto": local without expert parallelism; ring while the axis is at most top-k, all_to_all above,
    whichever moves fewer bytes; logged once. all_to_all is "all_to_all_portable" where XLA has no ragged one; local over
    two axes is "local_rings" where no SparseCores run collectives beside the computation."""
    if strategy == "all_to_all" and expert_axis == 1:
        raise InputError("kernels.dispatch=all_to_all needs mesh.expert of 2 or more; use local or auto")
    if strategy == "auto":
        strategy = "local" if expert_axis == 1 else "ring" if expert_axis <= top_k else "all_to_all"
    log.info("MoE dispatch: %s (mesh.expert=%d, top-k %d)", strategy, expert_axis, top_k)
    if strategy == "local" and expert_axis > 1 and platform == "tpu" and not sparse_cores:
        return "local_rings"
    return f"{strategy}_portable" if strategy == "all_to_all" and platform == "cpu" else strategy
