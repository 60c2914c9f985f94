"""Mesh axes, and where every array lives on them.

The mesh has five axes (size 1 where unused). All of them are Explicit: the sharding of an array is part of its type, and a
wrong layout is an error while tracing. The batch is sharded over `data`, `fsdp` and `expert` (and `sequence` along T);
parameters over `fsdp`, experts over `expert`, hidden widths and heads over `tensor`.

Several TPU slices are the outer part of `data`: every slice holds all parameters, and what crosses the network between them is
one reduction of the gradients (and sums of the router's probabilities).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emo_jax import compat
from emo_jax.config import Config, mesh_shape
from emo_jax.errors import InputError

AXES = ("data", "fsdp", "expert", "tensor", "sequence")
BATCH = ("data", "fsdp", "expert")
TOKENS = P(BATCH, "sequence")  # [B, T]
ACTIVATIONS = P(BATCH, "sequence", None)  # [B, T, D]

# Where a parameter lives, by the last part of its name; the leading layer axis of stacked parameters is never sharded.
# Parameters outside the expert table are sharded over `expert` as well, which only their batch uses.
_FSDP = ("fsdp", "expert")
PARAMETER_SPECS = {
    "embedding": P(None, _FSDP),  # [V, D]
    "head": P(_FSDP, "tensor"),  # [D, V]
    "q": P(_FSDP, "tensor", None), "k": P(_FSDP, "tensor", None), "v": P(_FSDP, "tensor", None),  # [D, H, W]
    "o": P("tensor", None, _FSDP),  # [H, W, D]
    "router": P(_FSDP, None),  # [D, R]
    "attention_norm": P(None), "mlp_norm": P(None), "final_norm": P(None),  # [D]
    # Expert tables whose experts do not divide into fsdp x expert; else see `parameter_spec`.
    "moe.gate": P("expert", "fsdp", "tensor"), "moe.up": P("expert", "fsdp", "tensor"),  # [E, D, F]
    "moe.down": P("expert", ("tensor", "fsdp"), None),  # [E, F, D]
    "mlp.gate": P(_FSDP, "tensor"), "mlp.up": P(_FSDP, "tensor"), "mlp.down": P("tensor", _FSDP),  # [D, F], [F, D]
}


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all devices of all processes). Raises `InputError` if the mesh
    does not divide the devices, the batch or the model."""
    slices = slices_of(jax.devices() if devices is None else devices)
    sizes = mesh_shape(config, sum(map(len, slices)), len(slices))
    types = (AxisType.Explicit,) * len(AXES)
    sizes["data"] //= len(slices)
    within = [device_mesh([sizes[axis] for axis in AXES], devices) for devices in slices]
    return Mesh(np.concatenate(within, axis=AXES.index("data")), AXES, axis_types=types)


def device_mesh(sizes: list[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of a slice, each mesh axis along whole axes of the torus where it can be."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # as 2 x 128 on a torus of 16 x 16
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def slices_of(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices of every TPU slice. EMO_JAX_SLICES: CPU devices count as so many."""
    if devices[0].platform == "cpu" and (pretended := int(os.environ.get("EMO_JAX_SLICES", "1"))) > 1:
        if len(devices) % pretended:
            raise InputError(f"EMO_JAX_SLICES={pretended} does not divide the {len(devices)} devices")
        return np.reshape(np.asarray(devices, object), (pretended, -1)).tolist()
    if devices[0].platform != "tpu":
        return [list(devices)]
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if len(sizes := set(map(len, slices.values()))) > 1:
        raise InputError(f"the slices have {', '.join(map(str, sorted(sizes)))} devices; all must have as many")
    return [slices[index] for index in sorted(slices)]


def single_device_mesh(device: Any = None) -> Mesh:
    return Mesh(np.asarray([device or jax.local_devices()[0]]).reshape((1,) * len(AXES)), AXES,
                axis_types=(AxisType.Explicit,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, TOKENS)


_WHOLE_EXPERTS = {
    "moe.gate": P(("expert", "fsdp"), None, "tensor"), "moe.up": P(("expert", "fsdp"), None, "tensor"),
    "moe.down": P(("expert", "fsdp"), "tensor", None),
}


def parameter_spec(path: tuple[str, ...], shape: tuple[int, ...] = (), mesh: Mesh | None = None) -> P:
    """The sharding of the parameter with this path in the tree, e.g. ("layers", "moe", "gate").

    With its `shape` and the `mesh`, an expert table is sharded by whole experts over `fsdp` as well where they divide
    evenly: gathering along the leading axis needs no change of layout, which for these arrays is a copy of gigabytes."""
    name = path[-1] if path[-1] in PARAMETER_SPECS else ".".join(path[-2:])
    spec = PARAMETER_SPECS[name]
    if mesh is not None and name in _WHOLE_EXPERTS and shape[-3] % (mesh.shape["expert"] * mesh.shape["fsdp"]) == 0:
        spec = _WHOLE_EXPERTS[name]
    return P(None, *spec) if path[0] == "layers" else spec


def fsdp_dimension(spec: P) -> int:
    """The dimension of an array that `fsdp` shards."""
    return next(i for i, axes in enumerate(spec) if axes == "fsdp" or (isinstance(axes, tuple) and "fsdp" in axes))


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of parameters, or for any tree whose leaves lie under parameter names, such as the
    optimizer's moments (leaves without a parameter name, such as its step count, are replicated)."""

    def sharding(path, leaf):
        names = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        shape = getattr(leaf, "shape", ())
        return NamedSharding(mesh, parameter_spec(names, shape, mesh) if names and shape else P())

    return jax.tree_util.tree_map_with_path(sharding, params)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """`jax.ShapeDtypeStruct`s of such a tree, with its shardings."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree,
                        parameter_shardings(tree, mesh))


def spread(target: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct` with no copies, where a dimension divides: axes of the mesh over which an array is the
    same shard its first dimension that they divide. Files read that way are read once by all processes together."""

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        mesh, spec = leaf.sharding.mesh, [*leaf.sharding.spec, *(None,) * (leaf.ndim - len(leaf.sharding.spec))]
        held = [() if axes is None else axes if isinstance(axes, tuple) else (axes,) for axes in spec]
        copies = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in sum(held, ()))
        for i, axes in enumerate(held):
            if copies and leaf.shape[i] % math.prod(mesh.shape[axis] for axis in (*axes, *copies)) == 0:
                spec[i] = (*axes, *copies)
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P(*spec)))
        return leaf

    return jax.tree.map(one, target)


def lay_out(tree: Any, target: Any) -> Any:
    """Arrays as `target` asks, one after the other: beside the arrays themselves there is room for one."""
    return jax.tree.map(lambda x, leaf: x if x.sharding == leaf.sharding else jax.device_put(x, leaf.sharding, donate=True),
                        tree, target)


def place(x: np.ndarray, mesh: Mesh, where: P) -> jax.Array:
    """A global array of what every process holds whole."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, where), lambda index: x[index])


def global_batch(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays [B, T] from this process's rows [B / processes, T] of each field."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in local.items()}


# ---- inside the step ------------------------------------------------------------------------------------------------


def spec(*axes) -> P | None:
    """`P(*axes)` as an `out_sharding`, or None where no mesh is set: the router's functions and losses, and they
    alone, serve plain arrays too."""
    return None if jax.sharding.get_abstract_mesh().empty else P(*axes)


def reshard(x: jax.Array, *axes) -> jax.Array:
    return compat.reshard(x, P(*axes))


def gather_weight(w: jax.Array, dtype: Any, *axes: Any) -> jax.Array:
    """The whole of a weight for its use in a layer, in the compute dtype: cast first, then gather over the FSDP axes
    (half the bytes); `axes` is what stays sharded. The adjoint reduces the gradient back to its shards."""
    return reshard(w.astype(dtype), *axes)
