"""Kills: a run is started, and killed, stopped or told to end at a random moment, again and again until it is finished; then
all its numbers are those of a run that nothing happened to."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fault_runs
from fault_runs import STEPS, Process, differences, in_child, result, start_run

from emo_jax.checkpoints.checkpoint import FOLDER

HANG = 120.0  # seconds without an end, after which a run hangs, on cores of its own
SURVIVORS = 30.0  # seconds within which the others of a lost process end
JOINING = 120.0  # ... if it was lost before it joined them: nobody can tell that from one that starts late
RESTART = 75
TRACEBACKS = ("Traceback (most recent call last)", "internal error", "emo-jax: thread ")
# When it happens: (what has been said or made by then, seconds after that at most, how often)
MOMENTS = {"start": (None, 2.0, 5), "first step": ("compiling the first step", 1.5, 6), "steps": ("step {}/", 0.4, 6),
           "write": ("a temporary folder", 0.06, 6), "evaluation": (f"step {STEPS // 3}/", 0.15, 1),
           "end": (f"step {STEPS}/", 0.2, 1)}


class Lane(NamedTuple):
    """One kind of run; several are tried side by side."""

    name: str
    processes: int = 1
    bucket: str = ""  # URL of a folder for its runs
    environment: dict[str, str] | None = None
    overrides: tuple[str, ...] = ()


class Fault(NamedTuple):
    signal: str
    moment: str
    delay: float
    victims: tuple[int, ...]  # of the processes

    def __str__(self) -> str:
        return f"{self.signal} to {list(self.victims)}, {self.delay:.3f} s after {self.moment}"


def draw_fault(draw: random.Random, lane: Lane) -> Fault:
    number = draw.choices(("SIGKILL", "SIGTERM", "SIGSTOP"), (80, 20, 10 if lane.processes > 1 else 0))[0]
    moments = {name: m for name, m in MOMENTS.items() if name != "write" or not lane.bucket}
    name = draw.choices(list(moments), [m[2] for m in moments.values()])[0]
    everyone = tuple(range(lane.processes))
    victims = everyone if number != "SIGSTOP" and draw.random() < 0.3 else (draw.choice(everyone),)
    return Fault(number, name, draw.uniform(0, MOMENTS[name][1]), victims)


def kill_runs(lane: Lane, kills: int, seed: str, folder: Path, until: float) -> Iterator[dict[str, Any]]:
    """What came of every kill, and of every run that was finished after some: {"kind", "fault", "problems"}. No more kills
    come after the time `until`."""
    draw, number = random.Random(seed), 0
    config = fault_runs.write_config(folder)
    undisturbed = _undisturbed(lane, config, folder)
    while kills > 0:
        run = _Run(lane, config, folder / f"run{number}", f"{lane.bucket}/run{number}" if lane.bucket else "")
        number += 1
        while not run.finished and not run.broken:
            found = run.attempt(draw_fault(draw, lane) if kills > 0 else None)
            kills = kills - (found["kind"] == "kill") if time.monotonic() < until else 0
            yield found
        problems = differences(in_child(result, run.out, environment=lane.environment), undisturbed) if run.finished else []
        kept = {"kept": str(run.folder)} if problems or run.broken else {}
        yield {"kind": "run", "fault": f"after {run.kills} kills", "problems": problems} | kept
        if not kept:
            shutil.rmtree(run.folder)


def _undisturbed(lane: Lane, config: Path, folder: Path) -> dict[str, Any]:
    (folder / "logs").mkdir()
    started = start_run(config, folder / "undisturbed", lane.processes, folder / "logs", *lane.overrides,
                        environment=lane.environment)
    _wait(started, HANG * 3)
    statuses = [p.poll() for p in started]
    for process in started:
        process.clean()
    if any(statuses):
        raise RuntimeError(f"the undisturbed run ended with {statuses}: {started[0].says()[-3000:]}")
    return in_child(result, str(folder / "undisturbed"))


class _Run:
    def __init__(self, lane: Lane, config: Path, folder: Path, url: str):
        self.lane, self.config, self.folder, self.out = lane, config, folder, url or str(folder / "run")
        self.finished = self.broken = False
        self.kills = self.starts = 0
        folder.mkdir()

    def attempt(self, fault: Fault | None) -> dict[str, Any]:
        """Starts the run, lets `fault` happen, and waits for the end of all its processes."""
        logs = self.folder / f"start{self.starts}"
        logs.mkdir()
        self.starts += 1
        self.before = self._temporary()
        started = start_run(self.config, self.out, self.lane.processes, logs, *self.lane.overrides,
                            environment=self.lane.environment)
        happened = self._wait_for(fault, started) if fault else False
        problems, asked = [], time.monotonic()
        for victim in fault.victims if fault and happened else ():
            started[victim].send(getattr(signal, fault.signal))
        stopped = [started[v] for v in fault.victims] if fault and happened and fault.signal == "SIGSTOP" else []
        late = _wait([p for p in started if p not in stopped], hang())
        for process in stopped:
            process.send(signal.SIGCONT)
        late = _wait(stopped, hang()) or late
        if late:
            running = sum(p.poll() is None for p in started)
            problems.append(f"hang: {running} of {len(started)} still run after {time.monotonic() - asked:.0f} s")
        for process in started:
            process.clean()
        seconds = max(p.ended for p in started if p not in stopped) - asked if happened else 0.0
        problems += self._problems(started, fault if happened else None, seconds)
        self.finished = all(p.status == 0 for p in started)
        self.broken = any(not x.startswith(("traceback", "late")) for x in problems)
        self.kills += happened
        return {"kind": "kill" if happened else "start", "fault": str(fault) if happened else "none", "problems": problems,
                "signal": fault.signal if fault and happened else "", "moment": fault.moment if fault and happened else "",
                "statuses": [p.status for p in started], "seconds": round(seconds, 2),
                **({"said": [p.says()[-1500:] for p in started]} if problems else {})}

    def _problems(self, started: list[Process], fault: Fault | None, seconds: float) -> list[str]:
        said, problems = [p.says() for p in started], []
        if any(word in text for text in said for word in TRACEBACKS):
            problems.append("traceback: one was printed, or left out for an internal error")
        if any("damaged:" in text for text in said):
            problems.append("checkpoints: one that was reported good was set aside after a kill")
        for i, process in enumerate(started):
            struck = fault and i in fault.victims
            allowed = {0, RESTART}
            if struck:
                allowed |= {"SIGKILL": {-9}, "SIGTERM": {-15}, "SIGSTOP": {-9, -6, 1}}[fault.signal]
            if not fault:
                allowed = {0}
            if process.status not in allowed:
                problems.append(f"status: process {i} of {len(started)} ended with {process.status}")
        limit = JOINING if any("did not all come" in text for text in said) else SURVIVORS
        if fault and fault.signal != "SIGTERM" and len(started) > 1 and seconds > limit:
            problems.append(f"late: the others ended after {seconds:.0f} s")
        return problems

    def _wait_for(self, fault: Fault, started: list[Process]) -> bool:
        """Whether the moment of `fault` came before the run's end."""
        wanted, began = MOMENTS[fault.moment][0], time.monotonic()
        while wanted and not self._has_come(wanted, started[0]):
            if any(p.poll() is not None for p in started) or time.monotonic() - began > hang():
                return False
            time.sleep(0.003)
        time.sleep(fault.delay)
        return all(p.poll() is None for p in started)

    def _has_come(self, wanted: str, process: Process) -> bool:
        if wanted == "a temporary folder":
            return bool(self._temporary() - self.before)
        return wanted.partition("{")[0] in process.says() and ("{" not in wanted or "/" in process.says())

    def _temporary(self) -> set[str]:
        """The folders in which checkpoints are being written."""
        folder = Path(self.out) / FOLDER
        try:
            return {p.name for p in folder.iterdir() if "tmp" in p.name}
        except OSError:
            return set()


def hang() -> float:
    """Seconds after which a run hangs, on cores that are shared."""
    return min(HANG * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), 6 * HANG)


def _wait(started: list[Process], seconds: float) -> bool:
    """Whether some of them have not ended by then."""
    until = time.monotonic() + seconds
    while any(p.poll() is None for p in started):
        if time.monotonic() > until:
            return True
        time.sleep(0.005)
    return False
