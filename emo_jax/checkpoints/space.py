"""Room for checkpoints on the disk of a local folder. Buckets have no end: nothing here applies to them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax

from emo_jax.files import AnyPath

MARGIN = 1.02  # of a checkpoint on disk to its arrays: indices and the description


class Room:
    """The disk of `folder`, as seen by checkpoints of `items`. least_gb: see `checkpoint.min_free_gb`."""

    def __init__(self, folder: AnyPath, items: dict[str, Any], least_gb: float):
        self._folder = folder
        self.need = int(MARGIN * sum(x.nbytes for x in jax.tree.leaves(items))) + (1 << 20)  # bytes of a checkpoint
        self._least, self._is_given = (least_gb * 1e9, True) if least_gb else (2 * self.need, False)

    def lacks(self) -> str | None:
        """A clause, if there is no room for a checkpoint."""
        free = self._free()
        return None if free >= self.need else f"{self._describe(free)}, and a checkpoint takes {_gb(self.need)}"

    def is_low(self) -> str | None:
        """A clause, if there is less room than a run should go on with."""
        free = self._free()
        if free >= self._least:
            return None
        why = (f"less than checkpoint.min_free_gb={self._least / 1e9:g}" if self._is_given else
               f"too little for two more checkpoints of {_gb(self.need)} (checkpoint.min_free_gb=0)")
        return f"{self._describe(free)}, {why}"

    def _free(self) -> float:
        """Bytes."""
        if not isinstance(self._folder, Path):
            return float("inf")
        there = next(p for p in (self._folder, *self._folder.parents) if p.exists())
        return float(shutil.disk_usage(there).free)

    def _describe(self, free: float) -> str:
        return f"the disk of {self._folder} has {_gb(free)} free"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
