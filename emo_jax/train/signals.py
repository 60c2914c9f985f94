"""SIGTERM and SIGINT ask a run to finish its step, save and leave; a second SIGINT interrupts at once."""

from __future__ import annotations

import signal


class StopSignals:
    """A context in which the first signal only sets `requested`."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.requested: str | None = None  # name of the signal

    def __enter__(self):
        self._previous = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def _handle(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def __exit__(self, *_):
        for s, handler in self._previous.items():
            signal.signal(s, handler)
