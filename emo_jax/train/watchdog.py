"""A run that stands still ends, so that it is started again: a thread knows what the loop is doing, and for how long.

Before, it writes down what every thread and every data worker is doing. Nothing is saved: what the devices hold cannot be read.
"""

from __future__ import annotations

import faulthandler
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np

from emo_jax import ending
from emo_jax.data import waiting
from emo_jax.files import AnyPath
from emo_jax.progress import say

FOLDER = "hangs"
LONG_S = 3600.0  # for compiling, evaluating and saving, and for what is before the first step
TIMES_MEDIAN = 20
RECENT = 64  # steps
TICK_S = 1.0
NAMED_S, KILLED_S = 20.0, 60.0  # of waiting for rows, after which a stopped worker is named, and killed


class Watchdog:
    """limit_s: for a step, and for the rows of one, if that is more than TIMES_MEDIAN times the median of the last steps; 0:
    nothing is too long. The loop says what it does (`at`), and `close` at its end. Only seconds in which this process ran
    count: not those in which it was stopped itself."""

    def __init__(self, out: AnyPath, process: int, limit_s: float):
        self._out, self._process, self._limit_s = out, process, limit_s
        self._doing, self._long, self._since = "starting", True, time.monotonic()
        self._durations: deque[float] = deque(maxlen=RECENT)
        self._changes, self._closed = 0, threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def at(self, doing: str, long: bool = False) -> None:
        """The loop begins to do something else. long: what takes longer than steps."""
        self._doing, self._long = doing, long
        self._changes += 1

    def stepped(self, began: float) -> None:
        """A step is over that began at this `time.monotonic`."""
        self._durations.append(time.monotonic() - began)

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        seen, seconds, before, named = -1, 0.0, time.monotonic(), False
        while not self._closed.wait(TICK_S):
            now = time.monotonic()
            seconds, before = seconds + min(now - before, 2 * TICK_S), now
            if seen != self._changes:
                seen, seconds, named = self._changes, 0.0, False
            elif self._limit_s and seconds > self._limit():
                self._end(seconds)
            elif self._doing == DATA and seconds > NAMED_S and (stopped := waiting.stopped()):
                if not named:
                    say(f"waiting for rows for {seconds:.0f} s: data worker(s) stopped: process {_join(stopped)}")
                named = True
                if seconds > KILLED_S:
                    say(f"killing the stopped data worker(s): process {_join(stopped)}")
                    waiting.kill_stopped()

    def _limit(self) -> float:
        if self._long:
            return max(LONG_S, self._limit_s)
        median = float(np.median(list(self._durations))) if self._durations else 0.0
        return max(self._limit_s, TIMES_MEDIAN * median)

    def _end(self, seconds: float) -> None:
        try:
            where = self._write_stacks()
        except Exception as e:  # a full disk, a worker that ends just now: this process ends all the same
            where = f" ({e})"
        ending.end(f"it stands still: {self._doing} takes more than {seconds:.0f} s (faults.hang_seconds={self._limit_s:g}); "
                   f"what its threads are doing is above{where}")

    def _write_stacks(self) -> str:
        """Where they are, besides standard error."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read() + waiting.stacks()
        print(stacks, file=sys.stderr, flush=True)
        if not isinstance(self._out, Path):
            return ""
        path = self._out / FOLDER / f"{time.strftime('%Y%m%dT%H%M%S')}-{self._process}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(stacks)
        return f", and in {path}"


DATA = "waiting for rows"
EVALUATION, SAVING = "an evaluation", "a checkpoint"


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
