"""Moving tokens to their experts and back: the plan, and the two gathers that follow it.

A *slot* is one of the k choices of a token; slot t * k + j is choice j of token t. A *row* is a line of the buffer that the
experts work on, grouped by expert. Rows and slots correspond one to one, so that every movement, and the adjoint of every
movement, is a gather: none scatters, and `gather_tokens` and `combine` are each other's transpose.

Letters are those of `emo_jax.model`; T are the tokens of this device (or of its group), flat.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from emo_jax.moe.routing import is_chosen
from emo_jax.rounding import round_up


class Tokens(NamedTuple):
    """The tokens of one device, [B, T, ...] or flat, and what the router decided for them."""

    x: Float[Array, "*tokens D"]
    expert_ids: Int[Array, "*tokens k"]
    weights: Float[Array, "*tokens k"]
    valid: Bool[Array, "*tokens"]  # False for padding


class Plan(NamedTuple):
    slot_of_row: Int[Array, "Q"]  # T * k where the row is padding
    row_of_slot: Int[Array, "T k"]  # Q where the slot's expert is not here, or the token is padding
    group_sizes: Int[Array, "e"]  # rows of each local expert, padded to the kernel's alignment


def plan_dispatch(
    expert_ids: Int[Array, "T k"], valid: Bool[Array, "T"], experts: tuple[Array | int, int], alignment: int,
    buffer_alignment: int = 1,
) -> Plan:
    """Groups the slots by local expert, in token order, without a sort. `experts`: (first id, number) of the local
    experts. The buffer is large enough for any routing: dropless by construction."""
    first, count = experts
    T, k = expert_ids.shape
    Q = buffer_rows(T, k, count, alignment, buffer_alignment)
    local_Tk = expert_ids - first
    member_Te = is_chosen(local_Tk, count).T & valid[:, None]  # a token's choices differ
    seen_Te = jnp.cumsum(member_Te.astype(jnp.int32), axis=0)
    sizes_e = round_up(seen_Te[-1], alignment)
    row_Te = jnp.cumsum(sizes_e) - sizes_e + seen_Te - 1
    here_Tk = (local_Tk >= 0) & (local_Tk < count) & valid[:, None]
    row_Tk = jnp.take_along_axis(row_Te, jnp.clip(local_Tk, 0, count - 1), axis=1)
    row_of_slot_Tk = jnp.where(here_Tk, row_Tk, Q)
    slots = jnp.arange(T * k, dtype=jnp.int32)
    slot_of_row_Q = jnp.full(Q, T * k, jnp.int32).at[row_of_slot_Tk.reshape(-1)].set(slots, mode="drop")
    return Plan(slot_of_row_Q, row_of_slot_Tk, sizes_e)


def buffer_rows(tokens: int, k: int, experts: int, alignment: int, buffer_alignment: int = 1) -> int:
    """Rows that hold any routing of `tokens` tokens: min(k, experts) choices each, and the padding of the groups. A multiple
    of both alignments."""
    multiple = max(alignment, buffer_alignment)
    return round_up(tokens * min(k, experts) + experts * (alignment - 1), multiple)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather_tokens(x: Float[Array, "T D"], plan: Plan, fill: bool = True) -> Float[Array, "Q D"]:
    """The token of every row; padding rows are zeros with `fill`, else anything (one pass over the rows fewer)."""
    k = plan.row_of_slot.shape[1]
    if fill:
        return x.at[plan.slot_of_row // k].get(mode="fill", fill_value=0)
    return x.at[jnp.minimum(plan.slot_of_row // k, x.shape[0] - 1)].get(mode="promise_in_bounds")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def combine(rows: Float[Array, "Q D"], plan: Plan, fill: bool = True) -> Float[Array, "T D"]:
    """The sum of every token's rows, accumulated in fp32. `fill` is that of the adjoint."""
    row_kT, Q = plan.row_of_slot.T, rows.shape[0]
    take = lambda row: rows.at[jnp.minimum(row, Q - 1)].get(mode="promise_in_bounds")
    # CPU and GPU: choice by choice, so that there is no array of all choices. TPU: one gather, kept apart from the cast, which
    # would make it write twice the bytes.
    parts = map(take, row_kT) if fill else jax.lax.optimization_barrier(take(row_kT))
    # Choices are added one by one: by the compiler's cycles a sum over their axis takes four times as long on TPU.
    return functools.reduce(jnp.add, [jnp.where((row_T < Q)[:, None], part_TD.astype(jnp.float32), 0.0)
                                      for row_T, part_TD in zip(row_kT, parts)]).astype(rows.dtype)


gather_tokens.defvjp(lambda x, plan, fill: (gather_tokens(x, plan, fill), plan),
                     lambda fill, plan, d: (combine(d, plan, fill), _zero(plan)))
combine.defvjp(lambda rows, plan, fill: (combine(rows, plan, fill), plan),
               lambda fill, plan, d: (gather_tokens(d, plan, fill), _zero(plan)))


@jax.custom_vjp
def slots_to_rows(values: Float[Array, "T k"], plan: Plan) -> Float[Array, "Q"]:
    """A number of every slot, e.g. its router weight, by row; 0 in padding rows."""
    return values.reshape(-1).at[plan.slot_of_row].get(mode="fill", fill_value=0)


def rows_to_slots(values: Float[Array, "Q"], plan: Plan) -> Float[Array, "T k"]:
    """A number of every row, by slot; 0 where the slot has no row here."""
    return values.at[plan.row_of_slot].get(mode="fill", fill_value=0)


slots_to_rows.defvjp(lambda values, plan: (slots_to_rows(values, plan), plan),
                     lambda plan, d: (rows_to_slots(d, plan), _zero(plan)))


def _zero(plan: Plan) -> Plan:
    return jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), plan)
