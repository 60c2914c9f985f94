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

Letters are those of `emo_jax.model`; inside `shard_map` T are the tokens of a device, flat, and s the shared experts.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from emo_jax import compat
from emo_jax.errors import InputError
from emo_jax.kernels import Kernel, rings
from emo_jax.kernels import grouped_matmul as gmm
from emo_jax.kernels.grouped_matmul import swiglu
from emo_jax.moe import dispatch, few_tokens
from emo_jax.moe import dispatch_all_to_all as a2a
from emo_jax.rounding import round_up
from emo_jax.sharding import ACTIVATIONS, AXES, TOKENS, fsdp_dimension

log = logging.getLogger(__name__)


class Dispatch(NamedTuple):
    """How the tokens of one layer meet their experts."""

    strategy: str
    portable: bool = False  # all_to_all over all-gathers, where XLA has no ragged one
    rings: bool = False  # local over two axes: gathers the second by `kernels.rings`


class ExpertLayer(NamedTuple):
    """Static choices of one layer.

    `see_rows` is a hook: it gets every output row weight * expert(x) before they are summed, [..., D], as whole rows, and
    returns a number for each, [...]. Without it nothing is added to the program.
    """

    num_shared: int
    dispatch: Dispatch
    kernel: Kernel
    buffer_factor: float = 0.0  # all_to_all's; 0: room for any routing
    see_rows: Callable[[Array], Array] | None = None

    def seen(self, out_QD: Array) -> Any:
        """What the hook says of rows of which every device of `tensor` has a part."""
        return None if self.see_rows is None else self.see_rows(jax.lax.psum(out_QD, "tensor"))


class BufferLoad(NamedTuple):
    """What one layer asked of all_to_all's receive buffers: the largest over the mesh."""

    required_capacity_factor: Float[Array, ""]  # rows of the busiest device / rows of each at balanced load
    fallback: Float[Array, ""]  # 1 if that was too much for the buffer


class Table(NamedTuple):
    """The experts that one device serves, in the compute dtype."""

    gate_up: Float[Array, "e D two_F"]
    down: Float[Array, "e F D"]
    first: Int[Array, ""] | int  # id of the first


def moe_experts(
    table: dict[str, Float[Array, "E _ _"]],
    x: Float[Array, "B T D"],
    expert_ids: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    valid: Bool[Array, "B T"],
    layer: ExpertLayer,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T k"] | None, BufferLoad | None]:
    """(y, seen, load); y is sum_j weights_j * expert_j(x) over the chosen routed experts, plus the shared experts (the last
    rows of the table) with weight 1. `table`: gate, up [E, D, F] and down [E, F, D], fp32 masters. Padding tokens (`valid`
    False) use none of the routed experts. `seen`: what `layer.see_rows` said of every choice, 0 for padding. `load` is
    all_to_all's. few_tokens has no hook."""
    device = few_tokens.device_experts if layer.dispatch.strategy == "few_tokens" else _device_experts
    specs = {name: jax.typeof(w).sharding.spec for name, w in table.items()}
    fsdp = {name: fsdp_dimension(spec) for name, spec in specs.items()}
    load_specs = P() if layer.dispatch.strategy == "all_to_all" else None
    rows = dispatch.Tokens(ACTIVATIONS, ACTIVATIONS, ACTIVATIONS, TOKENS)  # ty: ignore[invalid-argument-type]
    return compat.shard_map(
        functools.partial(device, layer=layer, fsdp=fsdp),
        in_specs=(specs, rows),
        out_specs=(ACTIVATIONS, None if layer.see_rows is None else ACTIVATIONS, load_specs),
        check_vma=layer.kernel.name not in gmm.UNCHECKED,
    )(table, dispatch.Tokens(x, expert_ids, weights, valid))


def _device_experts(table, tokens: dispatch.Tokens, *, layer: ExpertLayer, fsdp):
    """The body of one device. `fsdp`: the dimension of each table that this axis shards."""
    batch_shape, peers = tokens.x.shape[:2], jax.lax.axis_size("expert")
    tokens = dispatch.Tokens(*(a.reshape(-1, *a.shape[2:]) for a in tokens))
    here = layer.dispatch.strategy == "local" or peers == 1  # this device has all experts
    gate_up_eDF, down_eFD = _gather_table(table, tokens.x.dtype, fsdp, here and peers > 1, layer.dispatch.rings)
    # From here on every device does its own work on every axis; the adjoints of these casts sum the gradients.
    *varied, gate_up_eDF, down_eFD = (compat.vary(a, AXES) for a in (*tokens, gate_up_eDF, down_eFD))
    tokens, count = dispatch.Tokens(*varied), gate_up_eDF.shape[0]
    if layer.num_shared:
        (gate_up_eDF, shared_gate_up), (down_eFD, shared_down) = (
            _split_shared(w, layer.num_shared) for w in (gate_up_eDF, down_eFD))
    served = Table(gate_up_eDF, down_eFD, 0 if here else jax.lax.axis_index("expert") * count)
    load = None
    if layer.dispatch.strategy == "all_to_all":
        (y_TD, seen_Tk), load = _all_to_all(tokens, served, layer)
    else:
        compute = _every_expert if layer.dispatch.strategy == "dense" else _grouped_experts
        y_TD, seen_Tk = (compute if here else functools.partial(_ring, compute))(tokens, served, layer)
    if layer.num_shared:
        y_TD = y_TD + _shared_experts(tokens.x, shared_gate_up, shared_down, here)
    y_TD = jax.lax.psum(y_TD, "tensor")  # each device of that axis held a part of the hidden width
    if seen_Tk is not None:
        seen_Tk = jax.lax.pmean(seen_Tk, "tensor").reshape(*batch_shape, -1)  # the same on each
    return y_TD.reshape(*batch_shape, -1), seen_Tk, load


def _ring(compute, tokens: dispatch.Tokens, table: Table, layer: ExpertLayer):
    """`compute` on the tokens of the whole `expert` axis, and the sums of what its devices found."""
    everyone = (checkpoint_name(jax.lax.all_gather(a, "expert", tiled=True), "moe_exchanged") for a in tokens)
    found = compute(dispatch.Tokens(*everyone), table, layer)
    return jax.tree.map(lambda a: jax.lax.psum_scatter(a, "expert", tiled=True), found)


def _gather_table(table, dtype, fsdp, over_experts, by_rings):
    """gate and up side by side [E, D, 2F], and down [E, F, D], whole along `fsdp` (and `expert`), in the compute dtype. They
    are cast and joined while still sharded: one gather of half the bytes, and one grouped matmul for both.

    Over two axes they are gathered one axis at a time, down in the other order where it can be: then the second gathers,
    which move nearly all the bytes, use the links of both torus axes, and the adjoints are reduce-scatters over one axis
    each, where XLA:TPU makes all-reduces of those over both."""
    # Before they are gathered: the adjoint then sums over `data` what `fsdp` has scattered, the least that can travel there.
    gate_up_EDF = compat.vary(jnp.concatenate([table["gate"], table["up"]], axis=-1).astype(dtype), ("data", "sequence"))
    down_EFD = compat.vary(table["down"].astype(dtype), ("data", "sequence"))
    gather = functools.partial(jax.lax.all_gather, tiled=True)
    if not over_experts:
        return gather(gate_up_EDF, "fsdp", axis=fsdp["gate"]), gather(down_EFD, "fsdp", axis=fsdp["down"])
    second = rings.all_gather if by_rings else gather
    gate_up_EDF = second(gather(gate_up_EDF, "fsdp", axis=fsdp["gate"]), "expert", axis=0)
    if fsdp["down"] == 0:  # both axes shard the experts, `expert` in the larger blocks
        return gate_up_EDF, second(gather(down_EFD, "fsdp", axis=0), "expert", axis=0)
    return gate_up_EDF, second(gather(down_EFD, "expert", axis=0), "fsdp", axis=fsdp["down"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _split_shared(table, num_shared):
    """(the table, its last `num_shared` experts). The adjoint adds their gradient in place: no pass over the table."""
    return table, table[-num_shared:]


_split_shared.defvjp(lambda table, n: (_split_shared(table, n), None),
                     lambda n, _, d: (d[0].at[-n:].add(d[1]),))


def _grouped_experts(tokens: dispatch.Tokens, table: Table, layer: ExpertLayer):
    """(y [T, D], seen [T, k])"""
    alignment = gmm.ROW_ALIGNMENT[layer.kernel.name]
    fill = alignment > 1  # padding inside the groups must be zeros; after the last group nobody looks
    with jax.named_scope("dispatch"):
        plan = dispatch.plan_dispatch(tokens.expert_ids, tokens.valid, (table.first, table.gate_up.shape[0]), alignment,
                                      gmm.buffer_alignment(layer.kernel))
        plan = jax.tree.map(lambda a: checkpoint_name(a, "routing"), plan)
        rows_QD = checkpoint_name(dispatch.gather_tokens(tokens.x, plan, fill), "moe_rows")
    # The router weight is applied before the down projection: one multiplication of width F instead of D, and the
    # backward pass needs no second down projection for its gradient.
    with jax.named_scope("experts"):
        out_QD = gmm.expert_mlp(rows_QD, table.gate_up, table.down, dispatch.slots_to_rows(tokens.weights, plan),
                                plan.group_sizes, layer.kernel)
    seen_Q = layer.seen(out_QD)
    with jax.named_scope("dispatch"):
        return dispatch.combine(out_QD, plan, fill), None if seen_Q is None else dispatch.rows_to_slots(seen_Q, plan)


def _all_to_all(tokens: dispatch.Tokens, table: Table, layer: ExpertLayer):
    """((y, seen), `BufferLoad`) by exchanging rows, or by ring where they do not fit the buffer."""
    X, count, (T, k) = jax.lax.axis_size("expert"), table.gate_up.shape[0], tokens.expert_ids.shape
    alignment, portable = gmm.ROW_ALIGNMENT[layer.kernel.name], layer.dispatch.portable
    with jax.named_scope("dispatch"):
        here = dispatch.plan_dispatch(tokens.expert_ids, tokens.valid, (0, X * count), 1)
        counts_XE = jax.lax.all_gather(here.group_sizes, "expert")
        plan = a2a.plan_exchange(counts_XE, jax.lax.axis_index("expert"), alignment)
        here, plan = jax.tree.map(lambda a: checkpoint_name(a, "routing"), (here, plan))
    multiple = max(alignment, gmm.buffer_alignment(layer.kernel))
    largest = dispatch.buffer_rows(X * T, k, count, alignment, multiple)
    room = min(largest, round_up(int(layer.buffer_factor * T * k + count * (alignment - 1)), multiple))
    num_rows = room if layer.buffer_factor else largest

    def exchanged(x, weights, gate_up, down):
        with jax.named_scope("dispatch"):
            rows_QD = a2a.send(dispatch.gather_tokens(x, here), plan, num_rows, portable)
            weights_Q = a2a.send(dispatch.slots_to_rows(weights, here), plan, num_rows, portable)
            rows_QD, weights_Q = (checkpoint_name(a, "moe_exchanged") for a in (rows_QD, weights_Q))
        with jax.named_scope("experts"):
            out_QD = gmm.expert_mlp(rows_QD, gate_up, down, weights_Q, plan.group_sizes, layer.kernel)
        seen_Q = layer.seen(out_QD)
        with jax.named_scope("dispatch"):
            y_TD = dispatch.combine(a2a.send_back(out_QD, plan, T * k, portable), here)
            return y_TD, None if seen_Q is None else dispatch.rows_to_slots(a2a.send_back(seen_Q, plan, T * k, portable), here)

    def ring(x, weights, gate_up, down):
        """Source by source, so that it needs no larger buffers either."""
        sources = [jax.lax.all_gather(a, "expert") for a in (x, tokens.expert_ids, weights, tokens.valid)]
        served = Table(gate_up, down, table.first)
        one = jax.checkpoint(lambda source: _grouped_experts(dispatch.Tokens(*source), served, layer), prevent_cse=False)
        return jax.tree.map(lambda a: jax.lax.psum_scatter(a, "expert"), jax.lax.map(one, sources))

    # All devices of the mesh decide alike: collectives of the two branches must not meet.
    needed = jax.lax.pmax(compat.vary(plan.rows_needed, AXES), AXES)
    args = tokens.x, tokens.weights, table.gate_up, table.down
    if num_rows == largest:
        found, fallback = exchanged(*args), jnp.zeros_like(needed)
    else:
        fallback = (needed > num_rows).astype(needed.dtype)
        found = jax.lax.cond(fallback > 0, ring, exchanged, *args)
    return found, BufferLoad(needed / (T * k), fallback.astype(jnp.float32))


def _every_expert(tokens: dispatch.Tokens, table: Table, layer: ExpertLayer):
    """(y [T, D], seen [T, k]), every local expert on every token."""
    x_TD = tokens.x
    chosen_Tke = tokens.expert_ids[..., None] == table.first + jnp.arange(table.gate_up.shape[0])
    chosen_Tke = chosen_Tke & tokens.valid[:, None, None]
    mixture_Te = jnp.sum(jnp.where(chosen_Tke, tokens.weights[..., None], 0.0), axis=1)
    with jax.named_scope("experts"):
        hidden_TeF = swiglu(jnp.einsum("td,edf->tef", x_TD, table.gate_up)) * mixture_Te[..., None].astype(x_TD.dtype)
        y_TD = jnp.einsum("tef,efd->td", hidden_TeF, table.down)
    if layer.see_rows is None:
        return y_TD, None
    seen_Te = layer.seen(jnp.einsum("tef,efd->ted", hidden_TeF, table.down))
    return y_TD, jnp.sum(jnp.where(chosen_Tke, seen_Te[:, None], 0.0), axis=-1)


def _shared_experts(x_TD, gate_up_sDF, down_sFD, here: bool):
    """Always active, weight 1. They are the last rows of the table, so that where a device has not all experts the last one
    of the axis hands them to the others."""
    if not here:
        last = jax.lax.axis_index("expert") == jax.lax.axis_size("expert") - 1
        gate_up_sDF, down_sFD = (compat.vary(jax.lax.psum(jnp.where(last, w, 0), "expert"), AXES)
                                 for w in (gate_up_sDF, down_sFD))
    with jax.named_scope("experts"):
        hidden_TsF = swiglu(jnp.einsum("td,sdf->tsf", x_TD, gate_up_sDF))
        return jnp.einsum("tsf,sfd->td", hidden_TsF, down_sFD)


@functools.cache
def choose_strategy(strategy: str, expert_axis: int, top_k: int, platform: str, sparse_cores: bool = True) -> Dispatch:
    """The strategy for "auto": local without expert parallelism; ring while the axis is at most top-k, all_to_all above,
    whichever moves fewer bytes; logged once. local over two axes takes rings where no SparseCores run collectives beside
    the computation."""
    if strategy == "all_to_all" and expert_axis == 1:
        raise InputError("kernels.dispatch=all_to_all needs mesh.expert of 2 or more; use local or auto")
    if strategy == "auto":
        strategy = "local" if expert_axis == 1 else "ring" if expert_axis <= top_k else "all_to_all"
    log.info("MoE dispatch: %s (mesh.expert=%d, top-k %d)", strategy, expert_axis, top_k)
    return Dispatch(strategy, portable=strategy == "all_to_all" and platform == "cpu",
                    rings=strategy == "local" and expert_axis > 1 and platform == "tpu" and not sparse_cores)


@functools.cache
def say_where_experts_are_split(num_experts: int, shards: int, platform: str) -> None:
    """Logged once, with the mesh that keeps them whole, if that is a few times `data`. `shards`: fsdp x expert."""
    times = shards // math.gcd(num_experts, shards)
    if platform == "tpu" and 1 < times <= 8:
        log.warning("MoE: %d devices hold parts of %d experts: their weights are gathered with a copy, and reductions of their "
                    "gradients become all-reduces; %d times mesh.data keeps experts whole", shards, num_experts, times)
