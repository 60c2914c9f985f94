"""Silent corruption: devices that should hold the same bits, and computations that should give the same bits twice.

What is compared are hashes, of 4 bytes a parameter array, layer and device: only these leave the devices.
"""

from __future__ import annotations

import socket
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt32

from emo_jax import compat, processes
from emo_jax.config import Config
from emo_jax.errors import RunError
from emo_jax.sharding import AXES, reshard
from emo_jax.train.apart import ROWS, take_apart, to_compare
from emo_jax.train.step import Batch, TrainState

HASHES_IN_FLIGHT = 4  # steps after which the hashes of a step are looked at: until then nobody waits for them
ADVICE = "take the device or its host out of the run: what it computes is wrong without a sign"


class Part(NamedTuple):
    """What one hash is of."""

    leaf: str  # e.g. "layers.moe.gate"
    layer: int | None

    def __str__(self) -> str:
        return self.leaf if self.layer is None else f"{self.leaf} of layer {self.layer}"


def parts(tree: Any) -> list[Part]:
    """Of what `hashes` hashes, in its order."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = ".".join(str(getattr(k, "key", k)) for k in path)
        found += [Part(name, layer) for layer in range(leaf.shape[0])] if _is_stacked(path) else [Part(name, None)]
    return found


def hashes(tree: Any) -> UInt32[Array, "devices parts"]:
    """Of what every device of the mesh holds of every part: the wrapping sum of the bits. Inside jit, under a mesh; whole on
    every device."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)

    def device(*shards):
        return jnp.concatenate([_sum_of_bits(shard, _is_stacked(path)) for (path, _), shard in zip(leaves, shards)])[None]

    rows = compat.shard_map(device, in_specs=tuple(jax.typeof(leaf).sharding.spec for _, leaf in leaves),
                            out_specs=P(AXES, None), check_vma=False)(*(leaf for _, leaf in leaves))
    return reshard(rows, None, None)


def _is_stacked(path: tuple) -> bool:
    return getattr(path[0], "key", None) == "layers"


def _sum_of_bits(x: Array, by_layer: bool) -> UInt32[Array, "n"]:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    return jnp.sum(bits, axis=tuple(range(1, x.ndim)) if by_layer else None, dtype=jnp.uint32).reshape(-1)


# ---- replicas -------------------------------------------------------------------------------------------------------


class Different(NamedTuple):
    """Devices, as indices of `mesh.devices.flat`, that hold other bits of a part than the rest of those that hold it."""

    part: Part
    devices: tuple[int, ...]
    of: int  # devices that hold it
    outvoted: bool  # whether most of the others agree; otherwise it may be any of them


def compare_replicas(tree: Any, mesh: Mesh, table: np.ndarray) -> list[Different]:
    """table: the `hashes` of `tree`."""
    order = {device: i for i, device in enumerate(mesh.devices.flat)}
    found, column = [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        holders = defaultdict(list)
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            holders[str(index)].append(order[device])
        for part in parts_of_leaf(path, leaf):
            for devices in holders.values():
                found += _outvoted(part, sorted(devices), table[:, column])
            column += 1
    return found


def parts_of_leaf(path: tuple, leaf: Any) -> list[Part]:
    tree = leaf
    for k in reversed(path):
        tree = {k.key: tree}
    return parts(tree)


def _outvoted(part: Part, devices: list[int], values: np.ndarray) -> list[Different]:
    counts = Counter(values[devices].tolist())
    if len(counts) == 1:
        return []
    (most, votes), *_ = counts.most_common()
    clear = 2 * votes > len(devices)
    wrong = tuple(i for i in devices if not clear or values[i] != most)
    return [Different(part, wrong, len(devices), clear)]


class ReplicaCheck:
    """Compares what the devices hold of the parameters, some steps later than asked for, so that no step waits."""

    def __init__(self, mesh: Mesh, every: int):
        self._mesh, self._every = mesh, every
        self._pending: tuple[int, Any, Any] | None = None  # step, shapes and shardings, hashes
        self._hashes = jax.jit(hashes)

    def after_step(self, step: int, params: Any) -> None:
        """Raises `RunError` if the replicas of an earlier step differ."""
        if self._pending and step >= self._pending[0] + HASHES_IN_FLIGHT:
            self._look()
        if self._every and step % self._every == 0:
            self._begin(step, params)

    def before_save(self, step: int, params: Any) -> None:
        """Waits: what is saved is right. Raises `RunError`."""
        if self._every:
            self._begin(step, params)
            self._look()

    def _begin(self, step: int, params: Any) -> None:
        if self._pending:
            self._look()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        if all(x.sharding.num_devices == 1 for x in jax.tree.leaves(shapes)):
            return
        with jax.set_mesh(self._mesh):
            self._pending = step, shapes, self._hashes(params)

    def _look(self) -> None:
        if self._pending is None:
            return
        (step, shapes, table), self._pending = self._pending, None
        if found := compare_replicas(shapes, self._mesh, np.asarray(table)):
            raise RunError(f"silent corruption: after step {step} devices that should hold the same parameters do not: "
                           + describe(found, self._mesh), ADVICE)


def describe(found: list[Different], mesh: Mesh) -> str:
    """The devices, with their hosts, and what differs there. Every process asks."""
    outvoted = [d for d in found if d.outvoted] or found
    devices = sorted({i for d in outvoted for i in d.devices})
    some = ", ".join(str(d.part) for d in outvoted[:3]) + (f" and {len(outvoted) - 3} more" if len(outvoted) > 3 else "")
    verb = "differs from the others in" if found[0].outvoted else "one of them is wrong, in"
    return f"{device_names(devices, mesh)} {verb} {some}"


def device_names(devices: list[int], mesh: Mesh) -> str:
    padded = np.frombuffer(socket.gethostname().encode()[:64].ljust(64), np.uint8)
    hosts = [row.tobytes().decode(errors="replace").strip() for row in processes.gather(padded)]
    flat = list(mesh.devices.flat)
    return ", ".join(f"device {flat[i].id} ({flat[i].device_kind}, process {flat[i].process_index} on "
                     f"{hosts[flat[i].process_index]})" for i in devices)


# ---- the same twice -------------------------------------------------------------------------------------------------


def compare_repeats(first: np.ndarray, again: np.ndarray, names: list[Part]) -> list[Different]:
    """Parts whose hashes [devices, parts] are not those of the first time, and on which devices. A wrong gradient has been
    summed over devices, and differs on many; so if the loss of a device's own rows differs, only that counts."""
    differs = first != again
    found = [Different(part, tuple(np.flatnonzero(differs[:, i]).tolist()), len(first), True)
             for i, part in enumerate(names) if differs[:, i].any()]
    return [d for d in found if d.part.leaf == ROWS] or found


class RepeatCheck:
    """Computes the gradients of a step twice and compares them, bit for bit, device by device."""

    def __init__(self, config: Config, mesh: Mesh, eos_id: int = -1):
        self._mesh, self._every, apart = mesh, config.faults.repeat_step_every, take_apart(config, mesh, eos_id)
        self.hashes = jax.jit(lambda *args: hashes(to_compare(apart(*args))))
        self.parts = lambda *args: parts(jax.eval_shape(lambda *xs: to_compare(apart(*xs)), *args))

    def before_step(self, step: int, state: TrainState, batch: Batch) -> None:
        """step: the one that is next. Raises `RunError`."""
        if self._every and step % self._every == 0 and (different := self.different(2, state, batch)):
            raise RunError(f"silent corruption: the gradients of step {step}, computed twice, are not the same: {different}",
                           ADVICE)

    def different(self, times: int, state: TrainState, batch: Batch) -> str:
        """Which devices, and where, if they are not the same every time."""
        with jax.set_mesh(self._mesh):
            args = state.params, batch, state.step
            first = np.asarray(self.hashes(*args))
            for _ in range(times - 1):
                if ((again := np.asarray(self.hashes(*args))) != first).any():
                    return describe(compare_repeats(first, again, self.parts(*args)), self._mesh)
        return ""
