"""How long training waits for its data, and for which part of making them."""

from __future__ import annotations

import time
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from emo_jax import sharding
from emo_jax.data.row_clock import PARTS

TOO_MUCH = 0.05  # a share of the time that is worth a line in the log,
TOO_LONG_S = 0.2  # if it is more than that, too
SAY_EVERY_S = 300.0
ADVICE = {
    "read": "more data.workers, or files nearer to this machine, make it faster",
    "tokenize": "more data.workers make it faster; `emo-jax data tokenize` leaves it out of training",
    "pack": "more data.workers make it faster",
    "transfer": "rows go from this host to its devices",
}


@runtime_checkable
class Batches(Protocol):
    """What a loop takes rows from."""

    workers: int  # processes that make rows

    def __next__(self) -> dict[str, Any]: ...

    def timings(self) -> np.ndarray: ...


class DataWait:
    """Seconds between two records that the loop waited for rows, and for their way to the devices."""

    def __init__(self):
        self.fraction = 0.0  # of the time between the last two records
        self._said, self._waited = -SAY_EVERY_S, 0.0
        self._parts: dict[str, float] = {}
        self._made = self._made_before = np.zeros(len(PARTS))
        self._workers = 1
        self.restart()

    def restart(self) -> None:
        self._rows = self._transfer = 0.0
        self._made_before = self._made

    def next_batch(self, batches: Batches, mesh: Mesh) -> dict[str, jax.Array]:
        began = time.monotonic()
        rows = next(batches)
        arrived = time.monotonic()
        batch = sharding.global_batch(mesh, rows)
        self._rows += arrived - began
        self._transfer += time.monotonic() - arrived
        self._made, self._workers = batches.timings(), max(batches.workers, 1)
        return batch

    def mark(self, seconds: float) -> None:
        """`seconds` have passed between two records."""
        self._waited = self._rows + self._transfer
        self.fraction = min(self._waited / seconds, 1.0)
        made = (self._made - self._made_before) / self._workers
        self._parts = dict(zip(PARTS, made.tolist())) | {"transfer": self._transfer}

    def complaint(self) -> str | None:
        """What is slow, if the wait is too long, once in SAY_EVERY_S."""
        now = time.monotonic()
        if self.fraction <= TOO_MUCH or self._waited <= TOO_LONG_S or now < self._said + SAY_EVERY_S:
            return None
        self._said = now
        slow = max(self._parts, key=self._parts.__getitem__)
        parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self._parts.items())
        return (f"{self.fraction:.0%} of the time since the last record went into waiting for data; the slow part is {slow} "
                f"({parts}; {self._workers} at a time): {ADVICE[slow]}")
