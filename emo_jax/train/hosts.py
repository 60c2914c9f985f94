"""Which process of several holds the others up. In one program all wait for each other, so that a step takes as long on each;
what differs is how much of it a process was busy itself: waiting for its rows, taking them to its devices, anything but
dispatching steps and waiting for the devices. Told with the signs of life (`emo_jax.liveness`); a slow chip is not seen here,
but in a profile."""

from __future__ import annotations

import json
import socket
import statistics
import time
from typing import Any, NamedTuple

import jax

from emo_jax import liveness

SLOWER = 0.1  # of a step's time more than the others, and a process is named
SAY_EVERY_S = 300.0


class Pace(NamedTuple):
    """Of a process, between two records."""

    step_seconds: float  # of a step, in which it was busy itself
    data_wait: float  # the share of the time in which it waited for data


class Hosts:
    """What the processes of a run tell each other at every record; with one process nothing."""

    def __init__(self):
        self._index, self._count = jax.process_index(), jax.process_count()
        self._said = -SAY_EVERY_S

    def record(self, own: Pace, step_seconds: float) -> dict[str, Any]:
        """What a record of the first process says of all: of the others what they have told last. step_seconds: as the clock on
        the wall has it."""
        if self._count == 1:
            return {}
        liveness.share(json.dumps([round(x, 4) for x in own]))
        told = liveness.shared() if self._index == 0 else {}
        if len(told) < self._count - 1:
            return {}
        paces = {self._index: own} | {index: Pace(*json.loads(text)) for index, (_, text) in sorted(told.items())}
        record: dict[str, Any] = {"host_step_seconds": {str(i): pace.step_seconds for i, pace in paces.items()},
                                  "host_data_wait_fraction": {str(i): pace.data_wait for i, pace in paces.items()}}
        slowest = max(paces, key=lambda i: paces[i].step_seconds)
        others = statistics.median(pace.step_seconds for i, pace in paces.items() if i != slowest)
        if paces[slowest].step_seconds > others + SLOWER * step_seconds:
            host = told[slowest][0] if slowest else socket.gethostname()
            record["slowest_host"] = f"process {slowest} of {self._count} on {host}"
        return record

    def complaint(self, record: dict[str, Any]) -> str | None:
        """Who is slow, once in SAY_EVERY_S."""
        if "slowest_host" not in record or time.monotonic() < self._said + SAY_EVERY_S:
            return None
        self._said = time.monotonic()
        index, seconds = record["slowest_host"].split()[1], record["host_step_seconds"]
        others = statistics.median(s for i, s in seconds.items() if i != index)
        return (f"{record['slowest_host']} holds the others up: it was busy for {seconds[index]:.3f} s of every step, they for "
                f"{others:.3f} s; it waited for data for {record['host_data_wait_fraction'][index]:.0%} of the time")
