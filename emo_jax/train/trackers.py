"""Where the numbers of metrics.jsonl go besides (train.trackers): a tracker is a class here, or in a file of its own, and a
line in `TRACKERS`. One that fails is given up, and the run goes on."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import sys
import threading
import uuid
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from emo_jax import buckets
from emo_jax.config import Config, to_dict
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, reason, write_json
from emo_jax.train.tensorboard import Picture, TensorBoard, tagged

FILE = "trackers.json"
PROJECT = "emo_jax"
CLOSE_S = 60.0  # for which the end of a run waits for what is not sent yet


class Run(NamedTuple):
    """What a tracker is told of a run."""

    config: Config
    folder: Path  # for files of a tracker's own; of a run in a bucket a temporary one, whose files go there
    name: str  # the same after a restart, and no other run's
    step: int  # after which this start goes on


class Tracker(Protocol):
    """Made with a `Run` before its first step; a run that goes on makes it again."""

    def write(self, step: int, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl, or {name: that of an evaluation}, where a value may be a `Picture`."""

    def close(self) -> None: ...


class WandB:
    """Weights & Biases, as its own variables say (WANDB_MODE, WANDB_PROJECT, ...)."""

    def __init__(self, run: Run):
        import wandb

        self._run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), id=run.name, name=run.name, resume="allow",
                               dir=run.folder, config=to_dict(run.config), settings=wandb.Settings(console="off"))
        self._run.define_metric("*", step_metric="step")  # its own step never goes back

    def write(self, step: int, record: dict[str, Any]) -> None:
        self._run.log({"step": step} | _numbers(record))

    def close(self) -> None:
        finishing = threading.Thread(target=self._run.finish, daemon=True)  # without a network it would wait for ever
        finishing.start()
        finishing.join(CLOSE_S)
        if finishing.is_alive():
            raise TimeoutError(f"not everything was sent within {CLOSE_S:.0f} s; `wandb sync` sends the rest")


class Trackio:
    """trackio, in its own folder (TRACKIO_DIR) or wherever its variables say."""

    def __init__(self, run: Run):
        import trackio

        self._finish = trackio.finish
        self._run = trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=run.name, resume="allow",
                                 config=to_dict(run.config))

    def write(self, step: int, record: dict[str, Any]) -> None:
        self._run.log(_numbers(record), step=step)

    def close(self) -> None:
        self._finish()


TRACKERS: dict[str, Callable[[Run], Tracker]] = {
    "tensorboard": lambda run: TensorBoard(run.folder / "tensorboard", run.step), "wandb": WandB, "trackio": Trackio}
EXTRAS = ("wandb", "trackio")  # packages, and extras, of their names


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {tag: value for tag, value in tagged(record) if not isinstance(value, Picture)}


def names(config: Config) -> list[str]:
    return list(dict.fromkeys(name for name in config.train.trackers.split(",") if name))


def require_packages(config: Config) -> None:
    """Raises `InputError` for a tracker that is not installed."""
    for name in names(config):
        if name in EXTRAS and importlib.util.find_spec(name) is None:
            raise InputError(f"train.trackers={config.train.trackers}: {name} is not installed: pip install 'emo-jax[{name}]'")


def run_name(config: Config, out: AnyPath) -> str:
    """Of the run in `out`, where it is kept."""
    path = out / FILE
    try:
        return str(json.loads(path.read_text())["name"])
    except (OSError, ValueError, LookupError, TypeError, *buckets.errors(path)):
        name = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', config.name)}-{uuid.uuid4().hex[:8]}"
        with contextlib.suppress(OSError, *buckets.errors(path)):
            write_json(path, {"name": name})
        return name


class Trackers:
    """All that a config names."""

    def __init__(self, config: Config, out: AnyPath, folder: Path, step: int, say: Callable[[str], None],
                 told: Set[tuple[int, str | None]] = frozenset()):
        """`told`: what was written before a start that goes on at `step`, after that step."""
        self._say, self._open, self._told = say, dict[str, Tracker](), told
        run = Run(config, folder, run_name(config, out) if set(names(config)) & set(EXTRAS) else config.name, step)
        with contextlib.redirect_stdout(sys.stderr):
            for name in names(config):
                self._try(name, lambda: self._open.update({name: TRACKERS[name](run)}))

    def write(self, step: int, record: dict[str, Any], evaluation: str | None = None) -> None:
        """A record of metrics.jsonl, or what the `evaluation` of that name found."""
        again = (step, evaluation) in self._told
        for name, tracker in list(self._open.items()):
            if not (again and name in EXTRAS):  # which, unlike TensorBoard, keep what they were told before a restart
                self._try(name, lambda: tracker.write(step, record if evaluation is None else {evaluation: record}))

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            for name, tracker in list(self._open.items()):
                self._try(name, tracker.close)

    def _try(self, name: str, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as e:  # theirs are of any kind
            self._open.pop(name, None)
            self._say(f"train.trackers: {name} failed and gets no more numbers ({type(e).__name__}: {reason(e)})")
