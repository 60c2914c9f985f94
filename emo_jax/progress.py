"""What a person sees on standard error while work goes on, once for all processes of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")


def is_primary() -> bool:
    """Whether this process writes logs, metrics and results. Asks JAX only where several processes were started: asking
    would start the devices."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def say(message: str) -> None:
    if is_primary():
        print(message, file=sys.stderr, flush=True)


class Progress:
    """A line every few seconds; nothing for work that is done before the first. what: the work, for the line. total: in units;
    None where nobody knows. every: seconds between two lines. first: units that were done before."""

    def __init__(self, what: str, total: int | None, unit: str = "bytes", every: float = 3.0, first: int = 0):
        self.what, self.total, self.unit, self.every, self.first = what, total, unit, every, first
        self._start = self._last = time.monotonic()

    def update(self, done: int, tokens: int = 0) -> None:
        """`done`: units so far, since the beginning. tokens: what came out, where that has a rate of its own."""
        now = time.monotonic()
        if now >= self._last + self.every:
            self._last = now
            line = self._line(done, now - self._start)
            say(line + f", {tokens / (now - self._start):,.0f} tokens a second" * (tokens > 0))

    def _line(self, done: int, seconds: float) -> str:
        rate = (done - self.first) / seconds
        speed = f"{rate:,.0f} a second" if rate >= 10 else f"{rate:.2g} a second"
        if self.total is None:
            return f"{self.what}: {done:,} {self.unit}, {speed}"
        left = f", {duration((self.total - done) / rate)} left" if rate else ""
        share = 100 * done / max(self.total, 1)
        return f"{self.what}: {done:,} of {self.total:,} {self.unit} ({share:.0f} %), {speed}{left}"


def track(items: Iterable[Item], what: str, unit: str, every: float = 3.0, total: int | None = None) -> Iterator[Item]:
    """The items, with a line of progress while they are worked on. total: their number, where they do not say it."""
    progress = Progress(what, len(items) if isinstance(items, Sized) else total, unit, every)
    for done, item in enumerate(items, 1):
        yield item
        progress.update(done)


def duration(seconds: float) -> str:
    """h:mm:ss"""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"

