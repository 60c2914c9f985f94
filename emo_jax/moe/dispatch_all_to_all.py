"""Exchange of rows between the devices of the `expert` axis, each row going straight to the device of its expert.

One update of `jax.lax.ragged_all_to_all` for every (peer, local expert): the sender reads each expert's rows in place from
its send buffer, which is grouped by expert, and they arrive grouped by expert: no second sort. Every device knows all
counts (P x E numbers, all-gathered), so that the plan of the way back, which is also that of both adjoints, needs no
exchange of its own.

XLA:CPU has no ragged all-to-all; there `portable=True` runs the same plan over an all-gather.

Shapes: P devices of the axis, e experts of each, N slots of a device (the send buffer), S rows of the receive buffer.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from emo_jax.compat import vary_like
from emo_jax.rounding import round_up


class Updates(NamedTuple):
    """What `ragged_all_to_all` wants: entry i * e + j is the update with peer i of (that side's) local expert j."""

    input_offsets: Int[Array, "P*e"]
    send_sizes: Int[Array, "P*e"]
    output_offsets: Int[Array, "P*e"]
    recv_sizes: Int[Array, "P*e"]


class Exchange(NamedTuple):
    there: Updates
    back: Updates
    group_sizes: Int[Array, "e"]  # rows of each local expert in the receive buffer, padded to the alignment
    rows_needed: Int[Array, ""]  # of the receive buffer, by the device of the axis that needs most


def plan_exchange(counts: Int[Array, "P P*e"], me: Int[Array, ""], alignment: int) -> Exchange:
    """`counts[i]`: rows that device i has for every expert; `me`: the index of this device."""
    P = counts.shape[0]
    counts = counts.reshape(P, P, -1).astype(jnp.int32)  # [source, destination, local expert]
    groups = round_up(jnp.sum(counts, axis=0), alignment)  # [destination, local expert]
    starts = jnp.cumsum(groups, axis=1) - groups
    received_at = starts + jnp.cumsum(counts, axis=0) - counts  # by source inside a group
    flat = counts.reshape(P, -1)
    sent_from = (jnp.cumsum(flat, axis=1) - flat).reshape(counts.shape)
    mine = functools.partial(lax.dynamic_index_in_dim, index=me, keepdims=False)
    there = (mine(a, axis=0) for a in (sent_from, counts, received_at)), mine(counts, axis=1)
    back = (mine(a, axis=1) for a in (received_at, counts, sent_from)), mine(counts, axis=0)
    there, back = (Updates(*(a.reshape(-1) for a in (*first, last))) for first, last in (there, back))
    return Exchange(there, back, mine(groups, axis=0), jnp.max(jnp.sum(groups, axis=1)))


def send(rows: Float[Array, "N *w"], plan: Exchange, num_rows: int, portable: bool) -> Float[Array, "S *w"]:
    """Rows of the send buffer to their experts; padding rows are zeros."""
    return _exchange(rows, plan.there, plan.back, num_rows, portable)


def send_back(rows: Float[Array, "S *w"], plan: Exchange, num_slots: int, portable: bool) -> Float[Array, "N *w"]:
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
    gathered = lax.all_gather(operand, axis_name)  # [P, N, ...]
    P, me = gathered.shape[0], lax.axis_index(axis_name)
    from_offsets, sizes, to_offsets = (  # [P, e]: the updates that each peer has for this device
        lax.dynamic_index_in_dim(lax.all_gather(a, axis_name).reshape(P, P, -1), me, axis=1, keepdims=False)
        for a in (input_offsets, send_sizes, output_offsets))
    row = jnp.arange(output.shape[0])[:, None, None]
    inside = (row >= to_offsets) & (row < to_offsets + sizes)  # [S, P, e]; at most one update writes a row
    peer = jnp.sum(jnp.where(inside, jnp.arange(P)[:, None], 0), axis=(1, 2))
    source = jnp.sum(jnp.where(inside, from_offsets + row - to_offsets, 0), axis=(1, 2))
    written = jnp.any(inside, axis=(1, 2)).reshape(-1, *[1] * (output.ndim - 1))
    return jnp.where(written, gathered[peer, source], output)
