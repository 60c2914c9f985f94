"""Everything that differs between the supported JAX versions (0.10.2 for Python 3.11, the newest for 3.12 and later)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax

reshard = jax.sharding.reshard
set_mesh = jax.set_mesh
shard_map = jax.shard_map


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which `x` may differ between devices inside `shard_map`."""
    return jax.typeof(x).manual_axis_type.varying


def vary(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Marks `x` as varying over `axes` inside `shard_map`; the adjoint sums the cotangent over the newly added ones."""
    missing = tuple(a for a in axes if a not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_like(x: jax.Array, *others: jax.Array) -> jax.Array:
    """`x` varying over all the axes that any of `others` varies over (for loop carries)."""
    return vary(x, sorted(frozenset().union(*(varying_axes(o) for o in others))))
