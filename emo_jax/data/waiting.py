"""Waiting for rows, while a worker process that makes them may have died or been stopped, or the run is asked to leave."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
STACKS = "emo_jax-stacks"  # the file in the memory of a worker that its stacks are written to
ANSWER_S = 0.5


class Interrupted(Exception):
    """The run was asked to leave while it waited for rows. None of them was taken."""


_waiting = False


def pull(iterator: Iterator[Item]) -> Item:
    """`next(iterator)`, which `interrupt` ends."""
    global _waiting
    _waiting = True
    try:
        return next(iterator)
    finally:
        _waiting = False


def interrupt() -> None:
    """In a signal handler: raises `Interrupted` if the main thread waits for rows, which may never come."""
    if _waiting:
        raise Interrupted


# ---- workers --------------------------------------------------------------------------------------------------------


def stopped() -> list[int]:
    """The worker processes of this process that were stopped (SIGSTOP, a debugger), by process id."""
    return [pid for pid in _workers() if _state(pid) in ("T", "t")]


def kill_stopped() -> None:
    """Nobody can end them otherwise, and whoever waits for their rows would wait for ever."""
    for pid in stopped():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def stacks() -> str:
    """What every worker is doing now: the stacks of its threads, where the system has a /proc."""
    asked = {pid: _file_of_stacks(pid) for pid in _workers()}
    for pid, file in asked.items():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1) if file else None
    time.sleep(ANSWER_S)
    return "".join(f"data worker, process {pid} ({_state(pid)}):\n{file.read_text() if file else ''}\n"
                   for pid, file in asked.items())


def write_stacks_when_asked() -> None:
    """In a worker: SIGUSR1 asks."""
    if hasattr(os, "memfd_create"):
        faulthandler.register(signal.SIGUSR1, os.fdopen(os.memfd_create(STACKS), "w"))


def _file_of_stacks(pid: int) -> Path | None:
    """None before the worker is ready to be asked."""
    with contextlib.suppress(OSError):
        return next((file for file in Path(f"/proc/{pid}/fd").iterdir() if STACKS in os.readlink(file)), None)
    return None


def _workers() -> list[int]:
    return sorted(p.pid for p in multiprocessing.active_children() if p.pid is not None and "grain" in p.name)


def _state(pid: int) -> str:
    """The letter that ps shows; "" where nobody knows."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""
