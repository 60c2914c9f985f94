"""Moving tokens to their experts and back: the plan, and the two gathers that follow it.

A *slot* is one of the k choices of a token; slot t * k + j is choice j of token t. A *row* is a line of the buffer that the
experts work on, grouped by expert. Rows and slots correspond one to one, so that every movement, and the adjoint of every
movement, is a gather: none scatters, and `gather_tokens` and `combine` are each other's transpose.

Shapes: T tokens of this device (or group), k choices, S rows of the buffer, e local experts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from emo_jax.rounding import round_up


class Plan(NamedTuple):
    slot_of_row: Int[Array, "S"]  # T * k where the row is padding
    row_of_slot: Int[Array, "T k"]  # S where the slot's expert is not here, or the token is padding
    group_sizes: Int[Array, "e"]  # rows of each local expert, padded to the kernel's alignment


def plan_dispatch(
    expert_ids: Int[Array, "T k"], valid: Bool[Array, "T"], experts: tuple[Array | int, int], alignment: int,
    buffer_alignment: int = 1,
) -> Plan:
    """Groups the slots by local expert, in token order, without a sort. `experts`: (first id, number) of the local
    experts. The buffer is large enough for any routing: dropless by construction."""
    first, count = experts
    tokens, k = expert_ids.shape
    num_rows = buffer_rows(tokens, k, count, alignment, buffer_alignment)
    local = expert_ids - first
    member = jnp.any(local[..., None] == jnp.arange(count), axis=1) & valid[:, None]  # [T, e]; a token's choices differ
    seen = jnp.cumsum(member.astype(jnp.int32), axis=0)
    sizes = round_up(seen[-1], alignment)
    row = jnp.cumsum(sizes) - sizes + seen - 1  # [T, e]
    here = (local >= 0) & (local < count) & valid[:, None]
    rows = jnp.take_along_axis(row, jnp.clip(local, 0, count - 1), axis=1)
    row_of_slot = jnp.where(here, rows, num_rows)
    slots = jnp.arange(tokens * k, dtype=jnp.int32)
    slot_of_row = jnp.full(num_rows, tokens * k, jnp.int32).at[row_of_slot.reshape(-1)].set(slots, mode="drop")
    return Plan(slot_of_row, row_of_slot, sizes)


def buffer_rows(tokens: int, k: int, experts: int, alignment: int, buffer_alignment: int = 1) -> int:
    """Rows that hold any routing of `tokens` tokens: min(k, experts) choices each, and the padding of the groups. A multiple
    of both alignments."""
    multiple = max(alignment, buffer_alignment)
    return round_up(tokens * min(k, experts) + experts * (alignment - 1), multiple)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather_tokens(x: Float[Array, "T D"], plan: Plan, fill: bool = True) -> Float[Array, "S D"]:
    """The token of every row; padding rows are zeros with `fill`, else anything (one pass over the rows fewer)."""
    k = plan.row_of_slot.shape[1]
    if fill:
        return x.at[plan.slot_of_row // k].get(mode="fill", fill_value=0)
    return x.at[jnp.minimum(plan.slot_of_row // k, x.shape[0] - 1)].get(mode="promise_in_bounds")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def combine(rows: Float[Array, "S D"], plan: Plan, fill: bool = True) -> Float[Array, "T D"]:
    """The sum of every token's rows, accumulated in fp32. `fill` is that of the adjoint."""
    row_of_slot = plan.row_of_slot.T  # [k, T]: then the sum is over the leading axis, which needs no change of layout
    parts = rows.at[jnp.minimum(row_of_slot, rows.shape[0] - 1)].get(mode="promise_in_bounds")
    if not fill:  # TPU: else the cast is fused into the gather, which then writes twice the bytes
        parts = jax.lax.optimization_barrier(parts)
    parts = jnp.where((row_of_slot < rows.shape[0])[..., None], parts.astype(jnp.float32), 0.0)
    return jnp.sum(parts, axis=0).astype(rows.dtype)


gather_tokens.defvjp(lambda x, plan, fill: (gather_tokens(x, plan, fill), plan),
                     lambda fill, plan, d: (combine(d, plan, fill), _zero(plan)))
combine.defvjp(lambda rows, plan, fill: (combine(rows, plan, fill), plan),
               lambda fill, plan, d: (gather_tokens(d, plan, fill), _zero(plan)))


@jax.custom_vjp
def slots_to_rows(values: Float[Array, "T k"], plan: Plan) -> Float[Array, "S"]:
    """A number of every slot, e.g. its router weight, by row; 0 in padding rows."""
    return values.reshape(-1).at[plan.slot_of_row].get(mode="fill", fill_value=0)


slots_to_rows.defvjp(
    lambda values, plan: (slots_to_rows(values, plan), plan),
    lambda plan, d: (d.at[plan.row_of_slot].get(mode="fill", fill_value=0), _zero(plan)),
)


def _zero(plan: Plan) -> Plan:
    return jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), plan)
