"""All-gather of weights and reduce-scatter of their gradients as rings of collective permutes, along one mesh axis.

A permute is asynchronous on every chip and runs beside any computation, Pallas kernels included, and rings along two torus
axes run at the same time. The compiler's own collectives do neither on TPU v5e, which has no SparseCores to run them. Both
directions of the axis carry half of the shards each.
"""

from __future__ import annotations

import functools

import jax
from jax import lax

from emo_jax import compat


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def all_gather(x: jax.Array, name: str, axis: int) -> jax.Array:
    """`lax.all_gather(x, name, axis=axis, tiled=True)`; the adjoint is `reduce_scatter`. Inside `shard_map`."""
    devices, here, size = lax.axis_size(name), lax.axis_index(name), x.shape[axis]
    shape = (*x.shape[:axis], devices * size, *x.shape[axis + 1:])
    out = compat.vary_like(lax.empty(shape, x.dtype), x, here)

    def put(out, shard, owner):
        return lax.dynamic_update_slice_in_dim(out, shard, owner % devices * size, axis)

    out, up, down = put(out, x, here), x, x
    for step in range(1, devices // 2 + 1):
        up = _shift(up, name, 1)
        out = put(out, up, here - step)
        if 2 * step < devices:  # else it is the same shard
            down = _shift(down, name, -1)
            out = put(out, down, here + step)
    return out


def reduce_scatter(x: jax.Array, name: str, axis: int) -> jax.Array:
    """`lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)`. Inside `shard_map`."""
    devices, here = lax.axis_size(name), lax.axis_index(name)
    size = x.shape[axis] // devices

    def part(owner):
        return lax.dynamic_slice_in_dim(x, owner % devices * size, size, axis)

    total = part(here)
    for direction, far in ((1, devices // 2), (-1, (devices - 1) // 2)):
        if not far:
            continue
        moving = part(here + direction * far)  # the sum so far of what its owner, `far` devices on, is to get
        for step in reversed(range(far)):
            moving = _shift(moving, name, direction)
            moving = moving + part(here + direction * step) if step else moving
        total = total + moving
    return total


def _shift(x, name, by):
    devices = lax.axis_size(name)
    return lax.ppermute(x, name, [(i, (i + by) % devices) for i in range(devices)])


all_gather.defvjp(lambda x, name, axis: (all_gather(x, name, axis), None),
                  lambda name, axis, _, d: (reduce_scatter(d, name, axis),))
