"""Curves and pictures for TensorBoard and other trackers, grouped by topic: the part of a tag before its first slash."""

from __future__ import annotations

import contextlib
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Names of metrics.jsonl by their topic. Those that are not here are a topic of their own: held_out, loss_by_label, tasks.
TOPICS = {
    "loss": ("loss", "total_loss", "load_balancing_loss", "router_z_loss", "output_z_loss"),
    "optimizer": ("learning_rate", "grad_norm", "grad_norm_by_layer", "param_norm_by_layer", "skipped_steps", "skipped"),
    "routing": ("experts_max_load", "expert_load_max", "expert_load_min", "router_entropy", "pool_size_mean",
                "experts_per_document", "dropped_tokens", "required_capacity_factor", "fallback_steps"),
    "speed": ("tokens_per_second", "mfu", "data_wait_fraction", "save_seconds", "host_step_seconds", "host_data_wait_fraction",
              "device_memory_bytes", "device_memory_peak_bytes"),
    "data": ("tokens", "loss_tokens", "tokens_by_label"),
}
TAGS = {name: f"{topic}/{name}" for topic, names in TOPICS.items() for name in names} | {"subsets": "modularity"}


class Picture(NamedTuple):
    """A value of an evaluation that is for TensorBoard only; drawn by the process that writes."""

    png: Callable[[], bytes]


def tagged(record: dict[str, Any]) -> Iterator[tuple[str, float | Picture]]:
    """The (tag, number or picture) of a record of metrics.jsonl, or of {name: that of an evaluation}."""
    for name, value in record.items():
        if name != "step":
            yield from _tagged(TAGS.get(name, name), value)


def _tagged(tag: str, value: Any) -> Iterator[tuple[str, float | Picture]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _tagged(f"{tag}/{name}", part)
    elif isinstance(value, list):
        for layer, part in enumerate(value):
            yield from _tagged(f"{tag}/layer_{layer:02d}", part)
    elif isinstance(value, (int, float, Picture)):
        yield tag, value


class TensorBoard:
    """Event files in `folder`; nothing if tensorboardX is not installed. They are not left to the thread that writes for its
    `SummaryWriter`: where a full disk ends that, the next who writes waits for ever."""

    def __init__(self, folder: Path, resumed_at: int):
        self._file: Any = None
        try:
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        except ImportError:
            print("no TensorBoard events: tensorboardX is not installed", file=sys.stderr)
            return
        folder.mkdir(parents=True, exist_ok=True)
        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._file, self._event = EventsWriter(str(folder / "events")), events.Event
        self._scalar, self._summary = summary.scalar, summaries.Summary
        start = events.SessionLog(status=events.SessionLog.START)
        self._file.write_event(self._event(step=resumed_at + 1, session_log=start))  # hides what was logged of later steps

    def write(self, step: int, record: dict[str, Any]) -> None:
        if self._file:
            for tag, value in tagged(record):
                self._add(step, self._image(tag, value.png()) if isinstance(value, Picture) else self._scalar(tag, value))
            self._file.flush()

    def _image(self, tag: str, png: bytes) -> Any:
        width, height = struct.unpack(">II", png[16:24])  # of its header
        image = self._summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
        return self._summary(value=[self._summary.Value(tag=tag, image=image)])

    def _add(self, step: int, summary: Any) -> None:
        self._file.write_event(self._event(step=step, wall_time=time.time(), summary=summary))

    def close(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # whatever could be written is
                self._file.close()
