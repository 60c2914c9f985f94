"""What the processes of one run tell each other outside the training step: who reads which rows, where everybody's
data stands, and whether somebody was asked to stop. With one process nothing here communicates."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from emo_jax import sharding


def wait_for_all(name: str) -> None:
    """Returns when every process has come to the place of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(x: np.ndarray) -> np.ndarray:
    """[processes, ...]: `x` of every process, on every process (same shape everywhere)."""
    return np.asarray(multihost_utils.process_allgather(x)) if jax.process_count() > 1 else np.asarray(x)[None]


def any_process(flag: bool) -> bool:
    return bool(gather(np.asarray(flag)).any())


def gather_global(x: jax.Array) -> np.ndarray:
    """All of a sharded array, on every process."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def row_group(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """(index, count): the rows of a batch are split into `count` equal groups and this process reads group `index`.

    Processes that hold the same rows (an axis of the mesh other than the batch axes spans them) read the same group.
    """
    slices: dict[int, set[int]] = {}
    for device, (rows, _) in sharding.batch_sharding(mesh).devices_indices_map((batch_size, 1 << 20)).items():
        slices.setdefault(device.process_index, set()).add(rows.start or 0)
    groups = sorted({tuple(sorted(starts)) for starts in slices.values()})
    return groups.index(tuple(sorted(slices[jax.process_index()]))), len(groups)


def gather_groups(local: np.ndarray, group: tuple[int, int]) -> np.ndarray:
    """[B, W] int64 from the [B / count, W] of every row group."""
    index, count = group
    # int64 would be cut to int32 on its way through the devices, so its halves travel.
    halves = gather(np.ascontiguousarray(local, np.int64).view(np.int32))
    by_group = {int(i): np.ascontiguousarray(x).view(np.int64) for i, x in zip(gather(np.array(index)), halves)}
    return np.concatenate([by_group[i] for i in range(count)])
