"""Where the numbers of a run go: metrics.jsonl, trackers, and a progress line on standard error.

Metrics stay on the devices until a logged step is over, and are read while the next step runs.
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from emo_jax.chips import peak_flops
from emo_jax.config import Config, flatten
from emo_jax.data.documents import MAX_LABELS
from emo_jax.files import AnyPath, write_text
from emo_jax.progress import duration
from emo_jax.train import goodput
from emo_jax.train.data_wait import DataWait
from emo_jax.train.flops import flops_per_token
from emo_jax.train.goodput import STEPS, TIME, Clock
from emo_jax.train.hosts import Hosts, Pace
from emo_jax.train.mirror import Mirror
from emo_jax.train.tensorboard import Picture
from emo_jax.train.trackers import Trackers
from emo_jax.train.verdicts import Watch

SCALARS = ("loss", "total_loss", "load_balancing_loss", "router_z_loss", "output_z_loss", "grad_norm", "learning_rate",
           "experts_max_load", "dropped_tokens", "loss_tokens", "divergence")
PER_LAYER = ("expert_load_max", "expert_load_min", "router_entropy", "pool_size_mean", "experts_per_document",
             "grad_norm_by_layer", "param_norm_by_layer")
# What all_to_all's receive buffers needed, over the steps since the last record: the largest, and the sum.
BUFFERS = {"required_capacity_factor": max, "fallback_steps": operator.add}
MAX_STEPS_IN_FLIGHT = 4
METRICS = "metrics.jsonl"


def records_and_foreign_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records of steps in a metrics.jsonl, and the number of lines that are none. An end torn by a kill is neither."""
    records, foreign = [], 0
    *lines, end = content.split(b"\n")
    for line in [*lines, end]:
        try:
            record = json.loads(line)
            valid = type(record) is dict and type(record.get("step")) is int and not record.keys().isdisjoint(("loss", "eval"))
        except (ValueError, RecursionError):
            record, valid = None, False
        if valid:
            records.append(record)
        elif line.strip() and not (line is end and line.startswith(b'{"')):
            foreign += 1
    return records, foreign


class JsonLines:
    """A file of JSON objects, one a line: `records`, and what is written after them."""

    def __init__(self, path: AnyPath, records: Iterable[dict[str, Any]]):
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # whatever could be written is
            self._file.close()


class MetricsFile(JsonLines):
    """metrics.jsonl, one JSON object a line; steps after `resumed_at` are dropped when it is opened, and evaluations of that
    step where they are not in its checkpoint (`evaluated`), as they are made again. `dropped`: (step, name of the evaluation
    or None) of these."""

    def __init__(self, path: AnyPath, resumed_at: int, evaluated: bool = True):
        records, _ = records_and_foreign_lines(path.read_bytes() if path.exists() else b"")
        kept = [record for record in records if record["step"] < resumed_at or (
            record["step"] == resumed_at and (evaluated or "eval" not in record))]
        super().__init__(path, kept)
        which = lambda records: {(record["step"], record.get("eval")) for record in records}
        self.dropped = which(records) - which(kept)


class StatusLine:
    """One line on standard error: redrawn on a terminal, printed anew elsewhere."""

    def __init__(self, steps: int):
        self._steps, self._live = steps, None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True, highlight=False), auto_refresh=False, redirect_stdout=False)
            self._live.start()
        self._show("compiling the first step")

    def update(self, record: dict[str, Any], eta: float | None) -> None:
        parts = [f"step {record['step']}/{self._steps}", f"loss {record['loss']:.4f}",
                 f"norm {record['grad_norm']:.2f}", f"lr {record['learning_rate']:.1e}",
                 f"{record['tokens_per_second']:,.0f} tokens/s"]
        if "mfu" in record:
            parts.append(f"mfu {record['mfu']:.1%}")
        parts.append(f"eta {'-' if eta is None else duration(eta)}")
        self._show("  ".join(parts))

    def _show(self, line: str) -> None:
        if self._live:
            from rich.text import Text

            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self.say(line)

    def say(self, message: str) -> None:
        if self._live:
            self._live.console.print(message, markup=False, soft_wrap=True)
        else:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()


class Rate:
    """Tokens and steps a second between two marks. The first interval holds compilation: it predicts nothing."""

    def __init__(self, step: int, tokens: int):
        self.tokens_per_second = 0.0
        self.seconds_per_step: float | None = None
        self.pace: Pace | None = None
        self.waited = 0.0  # seconds since the last mark, for devices
        self.dispatched = step
        self.data_wait = DataWait()
        self.begin(step, tokens)

    def begin(self, step: int, tokens: int) -> None:
        self._marks = 0
        self.restart(step, tokens)

    def restart(self, step: int, tokens: int) -> None:
        self._time, self._step, self._tokens = time.monotonic(), step, tokens
        self._dispatched, self.waited = self.dispatched, 0.0
        self.data_wait.restart()

    def mark(self, step: int, tokens: int) -> None:
        """`step` is over. If no step was dispatched since the last mark, this one ran before it: the rate stays."""
        if self.dispatched > self._dispatched:
            seconds = max(time.monotonic() - self._time, 1e-9)
            self.tokens_per_second = (tokens - self._tokens) / seconds
            self.seconds_per_step = seconds / (step - self._step) if self._marks else None
            self.data_wait.mark(seconds)
            self.pace = Pace((seconds - self.waited) / (step - self._step), self.data_wait.fraction)
            self._marks += 1
        self.restart(step, tokens)


def finite_or_null(x: Any) -> Any:
    """JSON has no number for what a skipped step may have."""
    if isinstance(x, dict):
        return {name: finite_or_null(value) for name, value in x.items()}
    if isinstance(x, list):
        return [finite_or_null(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _device_memory() -> dict[str, int]:
    """Bytes of the fullest device of this host, now and at most so far; nothing where the platform does not say."""
    stats = [s for device in jax.local_devices() if (s := device.memory_stats())]
    return {name: max(s[key] for s in stats) for name, key in (
        ("device_memory_bytes", "bytes_in_use"), ("device_memory_peak_bytes", "peak_bytes_in_use"))
        if stats and all(key in s for s in stats)}


class NoLog:
    """In place of the writers in processes that write nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class Log:
    """Collects the metrics of every step, looks for bad steps, and writes those of logged steps.

    `add` never waits for the step it is given, but for one some steps before it; `flush` does. Only the primary process writes,
    all of them look.
    """

    def __init__(self, config: Config, out: AnyPath, step: int, tokens: int, primary: bool, evaluated: bool, clock: Clock):
        self.tokens = tokens  # tokens seen up to the last flushed step
        self.last: dict[str, Any] = {}  # the last written record
        self._config, self._pending = config, deque()
        self._buffers: dict[str, float] = {}
        self._save_seconds = 0.0  # that training waited for saves since the last record
        self._fell_back = False
        self._labels: list[str] = []  # what `label_nats` and `label_tokens` of the steps are about
        self._by_label = np.zeros((2, MAX_LABELS))  # nats and tokens since the last record
        self._rate = Rate(step, tokens)
        self.data_wait = self._rate.data_wait
        self._over, self._clock, self._hosts = step, clock, Hosts()
        self._clock.goes_on_after(step)
        self._mirror = NoLog() if isinstance(out, Path) or not primary else Mirror(out, (METRICS, TIME))
        folder = self._mirror.folder if isinstance(self._mirror, Mirror) else out
        file = MetricsFile(folder / METRICS, step, evaluated) if primary else None
        self._file = file or NoLog()
        self._times = JsonLines(folder / TIME, goodput.read(folder / TIME)) if primary else NoLog()
        self._progress = StatusLine(config.train.steps) if primary else NoLog()
        self._trackers = Trackers(config, out, Path(folder), step, self._progress.say, file.dropped) if file else NoLog()
        self._peak_tokens_per_second: float | None = None
        self.say = self._progress.say
        self._watch = Watch(config, out, self.say)
        self._skipped = 0  # steps since the last record

    def begin(self, step: int, config: Config, labels: list[str]) -> None:
        """The next steps are those of a phase. `labels`: of its documents."""
        self.flush()
        self._labels = labels
        self._by_label[:] = 0
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak_tokens_per_second = peak * jax.device_count() / flops_per_token(config) if peak else None
        self._rate.begin(step, self.tokens)

    def is_logged(self, step: int) -> bool:
        return step % self._config.train.log_every == 0 or step == self._config.train.steps

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        needed = ("loss", "grad_norm", "verdict", "tokens", "loss_tokens", "label_nats", "label_tokens", *BUFFERS)
        kept = metrics if self.is_logged(step) else {name: metrics[name] for name in needed if name in metrics}
        self._pending.append((step, dict(kept)))
        self._rate.dispatched = step
        self.flush(until=step - MAX_STEPS_IN_FLIGHT)

    def flush(self, until: int | None = None) -> None:
        """Reads the steps up to `until` (default: all). Raises what `Watch.see` does."""
        while self._pending and (until is None or self._pending[0][0] <= until):
            step, metrics = self._pending.popleft()
            began = time.monotonic()
            metrics = jax.device_get(metrics)
            self.waited(time.monotonic() - began)
            if "expert_load_max" in metrics:
                metrics["experts_max_load"] = metrics["expert_load_max"].max()
            try:
                skipped = self._watch.see(step, metrics)
            except BaseException:
                self._pending.clear()
                raise
            self._over, self._skipped = step, self._skipped + skipped
            self.tokens += int(metrics["tokens"])
            self._count_buffers(step, metrics)
            if "label_nats" in metrics and not skipped:
                self._by_label += np.stack([metrics["label_nats"], metrics["label_tokens"]])
            if self.is_logged(step):
                self._write(step, metrics | {"skipped": skipped})

    def waited(self, seconds: float) -> None:
        """For devices, or to dispatch a step, which may wait for them."""
        self._rate.waited += seconds

    def devices_are_idle(self) -> bool:
        """Whether every step that was added is over."""
        return not self._pending or self._pending[-1][1]["loss"].is_ready()

    def is_good(self) -> bool:
        """Whether the last step was, so that its state is one to go back to."""
        self.flush()
        return self._watch.is_good

    def _count_buffers(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        for name, join in BUFFERS.items():
            if name in metrics:
                self._buffers[name] = join(self._buffers.get(name, 0.0), float(metrics[name]))
        if self._buffers.get("fallback_steps") and not self._fell_back:
            self._fell_back = True
            self.say(f"step {step}: a layer needed {self._buffers['required_capacity_factor']:.2f} times the balanced load, "
                     f"more than kernels.buffer_factor={self._config.kernels.buffer_factor}, and was computed by ring; "
                     "fallback_steps in metrics.jsonl counts how often")

    def _write(self, step: int, metrics: dict[str, Any]) -> None:
        self._rate.mark(step, self.tokens)
        record: dict[str, Any] = {"step": step, "tokens": self.tokens}
        record |= {name: float(metrics[name]) for name in SCALARS if name in metrics} | self._buffers
        record |= {"skipped_steps": self._skipped} | ({"skipped": True} if metrics["skipped"] else {})
        self._buffers, self._skipped = {}, 0
        record["tokens_per_second"] = self._rate.tokens_per_second
        if self._peak_tokens_per_second:
            record["mfu"] = self._rate.tokens_per_second / self._peak_tokens_per_second
        record["data_wait_fraction"] = self.data_wait.fraction
        if self._save_seconds:
            record["save_seconds"], self._save_seconds = self._save_seconds, 0.0
        record |= {name: np.asarray(metrics[name], np.float64).tolist() for name in PER_LAYER if name in metrics}
        record |= self._label_means() | _device_memory()
        if (pace := self._rate.seconds_per_step) and self._rate.pace:
            record |= self._hosts.record(self._rate.pace, pace)
        self.last = finite_or_null(record)
        self._file.write(self.last)
        self._clock.lap(STEPS)
        self._times.write(self._clock.record(step))
        self._trackers.write(step, self.last)
        self._mirror.changed()
        self._progress.update(record, pace and pace * (self._config.train.steps - step))
        for slow in (self.data_wait.complaint(), self._hosts.complaint(record)) if pace else ():
            if slow:
                self.say(f"step {step}: {slow}")

    def _label_means(self) -> dict[str, dict[str, float]]:
        """Loss and tokens of every label since the last record."""
        seen = {label: (nats, tokens) for label, nats, tokens in zip(self._labels, *self._by_label.tolist()) if tokens}
        self._by_label[:] = 0
        return {} if not seen else {"loss_by_label": {label: nats / tokens for label, (nats, tokens) in seen.items()},
                                    "tokens_by_label": {label: int(tokens) for label, (_, tokens) in seen.items()}}

    def restart_clock(self, step: int) -> None:
        """Leaves what happened since the last record (evaluation, saving) out of the next rate."""
        self._rate.restart(step, self.tokens)

    def evaluation(self, step: int, name: str, result: dict[str, Any]) -> None:
        self._file.write({"eval": name, "step": step} | result)
        self._trackers.write(step, {"loss": result["loss"], "bits_per_byte": result["bits_per_byte"],
                                    "labels": {k: v["loss"] for k, v in result["labels"].items()}}, name)
        self.say(f"step {step}  held-out loss {result['loss']:.4f}  {result['bits_per_byte']:.4f} bits/byte  ("
                 + ", ".join(f"{k} {v['loss']:.3f}" for k, v in result["labels"].items()) + ")")

    def numbers(self, step: int, name: str, result: dict[str, Any]) -> None:
        """Any other evaluation: (nested) numbers, lists by layer, and `Picture`s."""
        numbers = {k: v for k, v in result.items() if not isinstance(v, Picture)}
        self._file.write({"eval": name, "step": step} | numbers)
        self._trackers.write(step, result, name)
        self.say(f"step {step}  {name}  " + "  ".join(f"{k} {v:.4f}" for k, v in flatten(numbers).items()
                                                      if isinstance(v, float)))

    def saved(self, seconds: float) -> None:
        """A save took so long until training could go on. Whoever goes on from here finds the metrics up to here."""
        self._save_seconds += seconds
        self._times.write(self._clock.record(self._over))
        self._mirror.upload()

    def close(self, done: bool) -> None:
        """done: the run has come to its last step."""
        with contextlib.suppress(OSError):  # as of a full disk
            self._times.write(self._clock.record(self._over, done))
        for part in (self._progress, self._trackers, self._times, self._file, self._mirror):
            part.close()
