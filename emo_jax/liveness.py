"""Which processes of a run are alive: none waits for one that has died, was stopped, or has failed.

Every process shows a sign of life in the key-value store of JAX's coordinator, in the first process, which watches all of
them; the others watch the first. Who misses one ends the process (`emo_jax.ending`) with a line that names it. A process that
fails leaves a mark there, and the others end with its message and status.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from typing import Any

import jax

from emo_jax import ending
from emo_jax.relay import Relay

BEAT_S = 2.0  # between two signs of life
LOST_S = 18.0  # without one, after which a process is lost
LEAVE_S = 4.0  # in which a process that has failed is noticed by the others, and may notice that they failed alike
_TICK_S = 0.5
_ALIVE, _ENDED = "emo_jax/alive/", "emo_jax/ended/"


def store() -> Any:
    """JAX's client of the coordinator, which has the key-value store and the barriers; None where nothing was started. The
    only place that knows where JAX keeps it."""
    from jax._src import distributed

    return getattr(getattr(distributed, "global_state", None), "client", None)


class Liveness:
    """Watches the others in threads of its own. relay: the way to the coordinator, None in the first process."""

    _done: int | None = None  # the status of a good end

    def __init__(self, index: int, count: int, relay: Relay | None):
        self._index, self._count, self._relay, self._store = index, count, relay, store()
        self._watched = [i for i in range(count) if i != index] if index == 0 else [0]
        self.hosts = dict.fromkeys(self._watched, "")
        self.own, self.told = "", dict[int, str]()  # what this process shares, and those that it watches
        self._beats: dict[int, str] = {}
        self._clock = 0.0  # seconds in which this process ran: a stop of its own says nothing about others
        self._changed = dict.fromkeys(self._watched, 0.0)
        self._marks: dict[int, tuple[int, str]] = {}
        self._leaving = False
        self._left = threading.Event()
        self._threads = [threading.Thread(target=work, name="liveness", daemon=True) for work in (self._show, self._judge)]
        for thread in self._threads:
            thread.start()

    def _show(self) -> None:
        """Signs of life, there and back. Where the coordinator is gone, a call may never return."""
        beat = 0
        while not self._left.is_set():
            beat += 1
            try:
                self._store.key_value_set(f"{_ALIVE}{self._index}", f"{beat} {socket.gethostname()} {self.own}",
                                          allow_overwrite=True)
                alive = self._store.key_value_dir_get(_ALIVE) if self._index == 0 else [
                    (f"{_ALIVE}0", self._store.key_value_try_get(f"{_ALIVE}0"))]
                ended = self._store.key_value_dir_get(_ENDED)
            except Exception:  # the first process is not there (yet)
                self._left.wait(_TICK_S)
                continue
            for key, value in alive:
                self._saw(int(key.rpartition("/")[2]), value)
            self._marks = {int(key.rpartition("/")[2]): tuple(json.loads(value)) for key, value in ended}
            self._left.wait(BEAT_S)

    def _saw(self, index: int, beat: str) -> None:
        if index in self._changed and self._beats.get(index) != beat:
            self._beats[index], self._changed[index] = beat, self._clock
            _, self.hosts[index], told = beat.split(" ", 2)
            if told:
                self.told[index] = told

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._leaving:
            time.sleep(_TICK_S)
            now = time.monotonic()
            self._clock += min(now - before, 2 * _TICK_S)
            before = now
            if failed := {i: mark for i, mark in self._marks.items() if i != self._index}:
                time.sleep(LEAVE_S / 2)  # this process may be failing alike, and then says so itself
                index, (status, message) = min(failed.items())
                self._end(f"{self._named(index)} ended: {message}", status)
            elif self._relay is not None and self._relay.broken:
                time.sleep(_TICK_S)
                self._end(f"{self._named(0)} is lost: its connection closed")
            for index, changed in self._changed.items():
                if self._clock > changed + LOST_S:
                    self._end(f"{self._named(index)} is lost: no sign of life for {LOST_S:.0f} s")

    def _end(self, message: str, status: int = ending.RESTART) -> None:
        if self._done is not None:  # what happens to the others changes nothing any more
            os._exit(self._done)
        if not self._leaving:
            ending.end(message, status)

    def _named(self, index: int) -> str:
        host = self.hosts.get(index)
        return f"process {index} of {self._count}" + (f" on {host}" if host else "")

    def mark(self, status: int, message: str) -> None:
        """Tells the others that this process ends now, and why; returns when they had time to notice."""
        self._leaving = True
        telling = threading.Thread(target=self._tell, args=(status, message), daemon=True)
        telling.start()
        telling.join(LEAVE_S)

    def _tell(self, status: int, message: str) -> None:
        with contextlib.suppress(Exception):  # the first process may be gone, and this one alone
            self._store.key_value_set(f"{_ENDED}{self._index}", json.dumps([status, message]), allow_overwrite=True)
            while self._index == 0 and len(self._store.key_value_dir_get(_ENDED)) < self._count:
                time.sleep(_TICK_S)  # the marks end with this process

    def leave(self, status: int) -> None:
        """A good end: returns when all have come to theirs. If one of them is lost by then, this process ends at once. The
        threads are waited for, as Python would abort one that comes back from JAX's client while it shuts down."""
        self._done = status
        jax.distributed.shutdown()
        self._leaving = True
        self._left.set()
        for thread in self._threads:
            thread.join(LEAVE_S)


_watch: Liveness | None = None


def share(text: str) -> None:
    """Tells the first process, with the next sign of life."""
    if _watch is not None:
        _watch.own = text


def shared() -> dict[int, tuple[str, str]]:
    """In the first process: {process: (its host, what it shared last)} of the others."""
    return {} if _watch is None else {index: (_watch.hosts[index], told) for index, told in dict(_watch.told).items()}


def watch(index: int, count: int, relay: Relay | None) -> None:
    """Begins to watch the other processes of this run, if there are any."""
    global _watch
    if count > 1 and _watch is None and store() is not None:
        _watch = Liveness(index, count, relay)
        ending.before = _watch.mark


def fail(status: int, message: str) -> None:
    """Ends this process of several, which has said why it failed: the others are told, and nobody waits for it. Returns where
    there is one process."""
    if _watch is not None:
        _watch.mark(status, message)
        os._exit(status)


def await_verdict() -> None:
    """After an error that a lost process may be the cause of: returns only if none is lost."""
    if _watch is not None:
        time.sleep(LOST_S + 4 * BEAT_S)  # the first process notices, and tells the others
        ending.wait()


def leave(status: int) -> None:
    """At a good end, see `Liveness.leave`."""
    global _watch
    if _watch is not None:
        watched, _watch = _watch, None
        watched.leave(status)
