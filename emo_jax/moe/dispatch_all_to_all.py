"""Exchange of rows between the devices of the `expert` axis, each row going straight to the device of its expert.

One update of `jax.lax.ragged_all_to_all` for every (peer, local expert): the sender reads each expert's rows in place from
its send buffer, which is grouped by expert, and they arrive grouped by expert: no second sort. Every device knows all
counts (X x E numbers, all-gathered), so that the plan of the way back, which is also that of both adjoints, needs no
exchange of its own.

XLA:CPU has no ragged all-to-all; there `portable=True` runs the same plan over an all-gather.

Letters are those of `emo_jax.model`: X devices of the axis, e experts of each, Q rows of the receive buffer. The send buffer
has a row for each of the T * k slots of a device.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Num

from emo_jax.compat import vary_like
from emo_jax.rounding import round_up


class Updates(NamedTuple):
    """What `ragged_all_to_all` wants: entry i * e + j of E is the update with peer i of (that side's) local expert
    j."""

    input_offsets: Int[Array, "E"]
    send_sizes: Int[Array, "E"]
    output_offsets: Int[Array, "E"]
    recv_sizes: Int[Array, "E"]


class Exchange(NamedTuple):
    there: Updates
    back: Updates
    group_sizes: Int[Array, "e"]  # rows of each local expert in the receive buffer, padded to the alignment
    rows_needed: Int[Array, ""]  # in the receive buffer of the device of the axis that needs most


def plan_exchange(counts: Int[Array, "X E"], me: Int[Array, ""], alignment: int) -> Exchange:
    """`counts[i]`: rows that device i has for every expert; `me`: the index of this device."""
    X = counts.shape[0]
    counts_XXe = counts.reshape(X, X, -1).astype(jnp.int32)  # source, destination, local expert
    groups_Xe = round_up(jnp.sum(counts_XXe, axis=0), alignment)  # destination, local expert
    starts_Xe = jnp.cumsum(groups_Xe, axis=1) - groups_Xe
    received_at_XXe = starts_Xe + jnp.cumsum(counts_XXe, axis=0) - counts_XXe  # by source inside a group
    counts_XE = counts_XXe.reshape(X, -1)
    sent_from_XXe = (jnp.cumsum(counts_XE, axis=1) - counts_XE).reshape(counts_XXe.shape)
    mine = functools.partial(lax.dynamic_index_in_dim, index=me, keepdims=False)
    there = (mine(a, axis=0) for a in (sent_from_XXe, counts_XXe, received_at_XXe)), mine(counts_XXe, axis=1)
    back = (mine(a, axis=1) for a in (received_at_XXe, counts_XXe, sent_from_XXe)), mine(counts_XXe, axis=0)
    there, back = (Updates(*(a.reshape(-1) for a in (*first, last))) for first, last in (there, back))
    return Exchange(there, back, mine(groups_Xe, axis=0), jnp.max(jnp.sum(groups_Xe, axis=1)))


def send(rows: Num[Array, "slots *w"], plan: Exchange, num_rows: int, portable: bool) -> Num[Array, "Q *w"]:
    """Rows of the send buffer to their experts; padding rows are zeros."""
    return _exchange(rows, plan.there, plan.back, num_rows, portable)


def send_back(rows: Num[Array, "Q *w"], plan: Exchange, num_slots: int, portable: bool) -> Num[Array, "slots *w"]:
    """The inverse of `send`."""
    return _exchange(rows, plan.back, plan.there, num_slots, portable)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _exchange(rows, forward, backward, num_rows, portable):
    out = vary_like(jnp.zeros((num_rows, *rows.shape[1:]), rows.dtype), rows, *forward)
    move = _portable if portable else lax.ragged_all_to_all
    return move(rows, out, *forward, axis_name="expert")


def _exchange_forward(rows, forward, backward, num_rows, portable):
    return _exchange(rows, forward, backward, num_rows, portable), (forward, backward, rows.shape[0])


def _exchange_backward(num_rows, portable, saved, d):
    forward, backward, num_slots = saved
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), (forward, backward))
    return _exchange(d, backward, forward, num_slots, portable), *zeros


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _portable(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`lax.ragged_all_to_all` over all-gathers, row by row of the output."""
    gathered = lax.all_gather(operand, axis_name)  # [X, rows of the operand, ...]
    X, me = gathered.shape[0], lax.axis_index(axis_name)
    from_Xe, sizes_Xe, to_Xe = (  # the updates that each peer has for this device
        lax.dynamic_index_in_dim(lax.all_gather(a, axis_name).reshape(X, X, -1), me, axis=1, keepdims=False)
        for a in (input_offsets, send_sizes, output_offsets))
    row = jnp.arange(output.shape[0])[:, None, None]
    inside_QXe = (row >= to_Xe) & (row < to_Xe + sizes_Xe)  # at most one update writes a row
    peer_Q = jnp.sum(jnp.where(inside_QXe, jnp.arange(X)[:, None], 0), axis=(1, 2))
    source_Q = jnp.sum(jnp.where(inside_QXe, from_Xe + row - to_Xe, 0), axis=(1, 2))
    written = jnp.any(inside_QXe, axis=(1, 2)).reshape(-1, *[1] * (output.ndim - 1))
    return jnp.where(written, gathered[peer_Q, source_Q], output)
