"""Where a run's wall time goes, over all its starts: time.jsonl beside metrics.jsonl, and the goodput that follows from it.

The main thread of the first process says after everything it does what that was (`Clock.lap`), so that every second belongs to
one cause. A record has the seconds since the one before, by cause. What lies between two starts, and which steps were taken
twice, the reader finds: metrics.jsonl keeps the steps that an undisturbed run would have, time.jsonl all that were taken.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax

from emo_jax import buckets
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, folder_path, reason
from emo_jax.progress import duration

TIME = "time.jsonl"
STEPS = "steps"  # the productive part
STARTUP, COMPILE, RESTORE, SAVE, EVALUATION, DATA_WAIT, ROLLBACK, OTHER = LAPS = (
    "startup", "compile", "restore", "save", "evaluation", "data_wait", "rollback", "other")
RESTART, REPEATED = "restart", "repeated"
CAUSES = {
    STEPS: "steps that count",
    STARTUP: "start-up: imports, processes, documents, the beginning of a stage",
    COMPILE: "compiling",
    RESTORE: "reading a checkpoint",
    SAVE: "saving, as far as training waited for it",
    EVALUATION: "evaluation",
    DATA_WAIT: "waiting for data while the devices had nothing to do",
    ROLLBACK: "going back after bad steps",
    OTHER: "writing profiles, ending",
    RESTART: "between the last record of one start and the next start",
    REPEATED: "steps that were taken again after a restart or a rollback",
}
_compiled = 0.0  # seconds for which the main thread has compiled


def _count(event: str, duration_secs: float, **_: str | int) -> None:
    global _compiled
    if event == "/jax/core/compile/backend_compile_duration" and threading.current_thread() is threading.main_thread():
        _compiled += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count)


class Clock:
    """Seconds of this process by cause, since the last record. began: when it was started, in Unix time; None: now."""

    def __init__(self, began: float | None = None):
        self._zero = time.time() - time.monotonic()  # so that a clock that is set changes no duration
        self._lapped = self._recorded = self._now() if began is None else began
        self._seconds: dict[str, float] = defaultdict(float)
        self._compiled, self._step, self._first = _compiled, 0, True

    def _now(self) -> float:
        return self._zero + time.monotonic()

    def lap(self, cause: str) -> None:
        """All that this process did since the last lap was for `cause`, but for what it compiled."""
        now = self._now()
        compiled = min(_compiled - self._compiled, now - self._lapped)
        self._seconds[COMPILE] += compiled
        self._seconds[cause] += now - self._lapped - compiled
        self._lapped, self._compiled = now, _compiled

    def lapping(self, during: str, function: Callable[..., Any], then: str) -> Callable[..., Any]:
        """`function`, whose calls are for `then` inside of something that is for `during`."""

        def lapped(*args: Any) -> Any:
            self.lap(during)
            try:
                return function(*args)
            finally:
                self.lap(then)

        return lapped

    def goes_on_after(self, step: int) -> None:
        self._step = step

    def record(self, step: int, done: bool = False) -> dict[str, Any]:
        """Up to the last lap, when `step` was over. done: the run's last."""
        seconds = {cause: round(s, 4) for cause, s in self._seconds.items() if s}
        record = {"from": self._step, "step": step, "began": round(self._recorded, 4), "ended": round(self._lapped, 4),
                  "seconds": seconds, **({"start": True} if self._first else {}), **({"done": True} if done else {})}
        self._step, self._recorded, self._first = step, self._lapped, False
        self._seconds.clear()
        return record


def read(path: AnyPath) -> list[dict[str, Any]]:
    """The records of a time.jsonl; what is none is left out, such as an end torn by a kill."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            record = json.loads(line)
            if (all(type(record[name]) is int for name in ("from", "step"))
                    and all(type(s) is float and 0 <= s < math.inf
                            for s in (record["began"], record["ended"], *record["seconds"].values()))
                    and record["seconds"].keys() <= {STEPS, *LAPS}):
                found.append(record)
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            continue
    return found


def account(records: list[dict[str, Any]]) -> dict[str, float]:
    """{cause: seconds}, which add up to the wall time from the first start to the last record; without the time between the
    end of a run and a start that gave it more steps."""
    seconds: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
    taken: list[tuple[int, int, float]] = []  # first step but one, last step, seconds of them
    before = None
    for record in records:
        if before and not before.get("done"):
            seconds[RESTART] += max(record["began"] - before["ended"], 0.0)
        while taken and taken[-1][1] > record["from"]:
            first, last, spent = taken.pop()
            lost = spent
            if first < record["from"]:
                lost = spent * (last - record["from"]) / (last - first)
                taken.append((first, record["from"], spent - lost))
            seconds[REPEATED] += lost
            seconds[STEPS] -= lost
        for cause, s in record["seconds"].items():
            seconds[cause] += s
        taken.append((record["from"], record["step"], record["seconds"].get(STEPS, 0.0)))
        before = record
    return seconds


def goodput(run: str) -> dict[str, Any]:
    """What `emo-jax goodput` reports of a run's folder. Raises `InputError` if it has no record."""
    folder = folder_path(run, "RUN")
    try:
        records = read(folder / TIME)
    except (OSError, *buckets.errors(folder)) as e:
        raise InputError(f"{folder / TIME} cannot be read: {reason(e)}") from None
    if not records:
        raise InputError(f"{folder} has no {TIME} with a record; expected the folder of a run (--out of `emo-jax train`) that "
                         "has logged a step")
    seconds = account(records)
    wall = sum(seconds.values())
    return {"run": str(folder), "began": records[0]["began"], "ended": records[-1]["ended"], "from": records[0]["from"],
            "step": records[-1]["step"], "starts": sum("start" in record for record in records),
            "wall_seconds": wall, "goodput": seconds[STEPS] / wall if wall else 0.0, "seconds": seconds}


def report(result: dict[str, Any]) -> str:
    wall, starts = result["wall_seconds"], result["starts"]
    lines = [f"{result['goodput']:.1%} of {duration(wall)} went into steps {result['from'] + 1} to {result['step']} "
             f"({starts} start{'s' * (starts != 1)})", "", f"{'seconds':>12} {'share':>7}"]
    lines += [f"{s:12,.1f} {s / wall if wall else 0.0:7.1%}  {CAUSES[cause]}"
              for cause, s in sorted(result["seconds"].items(), key=lambda item: -item[1]) if s]
    return "\n".join([*lines, f"{wall:12,.1f} {'':7}  wall time"])
