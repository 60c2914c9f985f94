"""Who writes into a run's folder: one start of a run at a time, wherever it runs.

The primary process holds the object `holder.json` in the folder and writes it again every few seconds, each time on the
condition that it is as this process left it (TensorStore's conditional writes, the same on a disk and in a bucket). Who finds
it there waits for a sign of life; who finds it written by another has lost the folder and writes nothing more into it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Generator
from datetime import UTC, datetime
from typing import Any

import tensorstore as ts

from emo_jax import buckets, processes
from emo_jax.errors import InputError, RunError
from emo_jax.files import AnyPath, reason
from emo_jax.progress import is_primary, say

NAME = "holder.json"
BEAT_S = 5.0  # between two signs of life
STALE_S = 30.0  # without a sign of life, after which a folder is taken over
POLL_S = 2.0
_RETRIES = {"max_retries": 4, "initial_delay": "200ms", "max_delay": "2s"}
_NO_LOCKS = ("OS error 37", "OS error 38", "OS error 95", "UNIMPLEMENTED")  # of file systems that know no locks


class HolderLost(RunError):
    """Another process took the folder over: nothing more may be written there."""


class Holder:
    """This process's hold on `folder`, kept up by a thread of its own."""

    def __init__(self, folder: AnyPath):
        self._folder, self._name = folder, str(folder / NAME)
        self._me: dict[str, Any] = {"id": uuid.uuid4().hex, **_this_process(), "since": _now(), "beat": 0}
        self._generation: bytes | None = None
        self._seen, self._lost = 0.0, ""
        self._lock, self._ended = threading.Lock(), threading.Event()
        url = str(folder) if buckets.is_url(folder) else f"file://{folder}"
        retries = {"request_retries": _RETRIES} if buckets.is_url(folder) else {}
        self._store = ts.KvStore.open(buckets.kvstore(f"{url}/", **retries)).result()

    def take(self) -> None:
        """Returns when the folder is this process's, which takes STALE_S where the last holder may still be there. Raises
        `InputError`, naming the holder, if it is."""
        found, since, deadline = self._read(), time.monotonic(), None
        while found.value:
            holder = _parsed(found.value)
            if gone := _is_gone(holder):
                say(f"{self._folder} was held by {_described(holder)}, {gone}: taking it over")
                break
            if deadline is None:
                deadline = since + STALE_S
                say(f"{self._folder} is held by {_described(holder)}; waiting up to {STALE_S:.0f} s for a sign of life")
            elif time.monotonic() > deadline:
                say(f"{self._folder}: no sign of life from {_described(holder)} for {STALE_S:.0f} s: taking it over")
                break
            time.sleep(POLL_S)
            before, found = found, self._read()
            if found.value and found.stamp.generation != before.stamp.generation:
                raise InputError(self._refusal(found.value))
        if not self._write(found.stamp.generation):
            raise InputError(self._refusal(self._read().value))
        threading.Thread(target=self._beat_on, name="holder", daemon=True).start()

    def _refusal(self, content: bytes) -> str:
        return (f"--out {self._folder} is held by {_described(_parsed(content))}, which is alive; two runs cannot write into "
                f"one folder. Wait for it, stop it, or give another --out")

    def check(self) -> None:
        """Raises `HolderLost` if another process has taken the folder. Asks the folder itself only where this process showed
        no sign of life for long, as one that was stopped."""
        if not self._lost and time.monotonic() > self._seen + STALE_S / 2:
            self._beat()
        if self._lost:
            raise HolderLost(self._lost)

    def confirm(self) -> None:
        """`check`, having asked the folder now."""
        self._beat()
        self.check()

    def release(self) -> None:
        """The folder is nobody's, unless it is another's by now."""
        self._ended.set()
        with self._lock, contextlib.suppress(ValueError):
            if not self._lost and self._generation is not None:
                self._store.write(NAME, None, if_equal=self._generation).result()

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_S) and not self._lost:
            self._beat()

    def _beat(self) -> None:
        """A sign of life. A store that cannot be reached is no loss: nobody else can be sure of having taken the folder."""
        with self._lock, contextlib.suppress(ValueError):
            if self._lost or self._ended.is_set() or self._write(self._generation):
                return
            found = self._read()  # a write that was answered too late is tried again, and does not find what it expects
            if not found.value or _parsed(found.value).get("id") == self._me["id"]:
                self._write(found.stamp.generation)
            else:
                self._lost = (f"{self._folder} was taken over by {_described(_parsed(found.value))}, while this process showed "
                              f"no sign of life; nothing more was written there")

    def _write(self, expected: bytes | None) -> bool:
        """Whether the object was as `expected`, and is now as this process wrote it."""
        self._me |= {"beat": self._me["beat"] + 1, "at": _now()}
        content = json.dumps(self._me, indent=1).encode()
        generation = self._store.write(NAME, content, if_equal=expected).result().generation
        if generation:
            self._generation, self._seen = generation, time.monotonic()
        return bool(generation)

    def _read(self) -> Any:
        return self._store.read(NAME).result()


@contextlib.contextmanager
def hold(folder: AnyPath) -> Generator[Holder | None]:
    """The folder is this run's for the block; what is yielded is None in all processes but the primary one. Raises
    `InputError` in every process if another run holds the folder, or if it cannot be written."""
    holder, error = None, None
    if is_primary():
        try:
            holder = Holder(folder)
            holder.take()
        except InputError as e:
            error = e
        except ValueError as e:  # TensorStore's errors
            if any(part in str(e) for part in _NO_LOCKS):
                say(f"{folder} knows no locks ({reason(e)}): nobody notices a second run that writes into it")
                holder = None
            else:
                error = InputError(f"--out {folder} cannot be written: {reason(e)}")
    if processes.any_process(error is not None):
        raise error or InputError(f"--out {folder} cannot be used, as the first process says")
    try:
        yield holder
    finally:
        if holder is not None:
            holder.release()


# ---- who a holder is ------------------------------------------------------------------------------------------------


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "started": _start_of(os.getpid())}


def _machine() -> str | None:
    """The same for two processes that see each other's process ids; None where nobody knows."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start_of(pid: int) -> int | None:
    """Clock ticks from the start of the machine to that of a process; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content)
    except ValueError:
        holder = None
    return holder if isinstance(holder, dict) else {}


def _is_gone(holder: dict[str, Any]) -> str:
    """Why a holder is known to have ended; "" if it is not."""
    pid = holder.get("pid")
    if holder.get("machine") is None or holder["machine"] != _machine() or not isinstance(pid, int):
        return ""
    return "" if _start_of(pid) == holder.get("started") else "which has ended"


def _described(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return f"something that is no process of ours (its {NAME} cannot be read)"
    return (f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')} "
            f"(last sign of life {holder.get('at')})")
