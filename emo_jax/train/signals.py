"""SIGTERM and SIGINT ask a run to finish its step, save and leave; a second SIGINT interrupts at once."""

from __future__ import annotations

import os
import signal

import jax

from emo_jax import processes
from emo_jax.data import waiting


class StopSignals:
    """A context in which the first signal only sets `requested`, and ends a wait for rows.

    Of several processes SIGTERM is JAX's own: with it, or a notice of the cloud, JAX has all of them leave after the same step.
    SIGINT is passed on to it.
    """

    def __init__(self):
        self.requested: str | None = None  # name of the signal
        self._alone = jax.process_count() == 1
        self._signals = (signal.SIGTERM, signal.SIGINT) if self._alone else (signal.SIGINT,)

    def __enter__(self):
        self._previous = {s: signal.signal(s, self._handle) for s in self._signals}
        return self

    def _handle(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        if self._alone:
            waiting.interrupt()
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested_after(self, step: int) -> bool:
        """Whether the run leaves after this step: alone at once, with others after the one they have agreed on. Every process
        asks after every step."""
        if self._alone:
            return self.requested is not None
        if processes.asked_to_stop(step):
            self.requested = self.requested or "SIGTERM, or a notice, to one of the processes"
            return True
        return False

    def __exit__(self, *_):
        for s, handler in self._previous.items():
            signal.signal(s, handler)
