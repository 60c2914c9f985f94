"""General documents among those of a task, so that a model which is fine-tuned on the task forgets little else."""

from __future__ import annotations

import dataclasses

import numpy as np

from emo_jax.config import Config
from emo_jax.data.documents import Document, Encoder, Source, hash_text
from emo_jax.data.order import BothNumbers, DocumentNumbers, split
from emo_jax.data.sources import open_source
from emo_jax.errors import InputError
from emo_jax.progress import say


class WithGeneral(Source):
    """The documents of a task, then general ones, which have the numbers from `first_general` on."""

    def __init__(self, task: Source, general: Source):
        self._parts, self.first_general = (task, general), len(task)
        self.name, self.fingerprint = f"{task.name} and {general.name}", hash_text(task.fingerprint, general.fingerprint)
        self.labels = sorted({*task.labels, *general.labels}) if task.labels and general.labels else []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, i: int) -> Document:
        source, own = self._own(i)
        return dataclasses.replace(source[own], id=int(i))

    def content_hash(self) -> str:
        hashes = [source.content_hash() for source in self._parts]
        return f"both:{hash_text(*hashes)}" if all(hashes) else ""

    def load(self, numbers: range) -> None:
        first = self.first_general
        self._parts[0].load(range(min(numbers.start, first), min(numbers.stop, first)))
        self._parts[1].load(range(max(numbers.start - first, 0), max(numbers.stop - first, 0)))

    def label(self, i: int) -> str:
        source, own = self._own(i)
        return source.label(own)

    def where(self, i: int) -> str:
        source, own = self._own(i)
        return source.where(own)

    def encoded(self, i: int, tokenizer: Encoder) -> np.ndarray:
        source, own = self._own(i)
        return source.encoded(own, tokenizer)

    def _own(self, i: int) -> tuple[Source, int]:
        return (self._parts[0], int(i)) if i < self.first_general else (self._parts[1], int(i) - self.first_general)


def with_general(task: Source, train: DocumentNumbers, config: Config) -> tuple[Source, DocumentNumbers]:
    """The documents of `data.path` and `data.general_path`, and those to train on. What a run of the same `data.eval_fraction`
    and seed held out of the general documents is held out here, too. Raises `InputError`."""
    d = config.data
    try:
        of_general = dataclasses.replace(d, path=d.general_path, format="auto", leave_out_labels=d.general_leave_out_labels)
        general = open_source(of_general)
        numbers, _ = split(general, of_general, config.seed)
    except InputError as e:
        raise InputError(f"data.general_path: {e}") from None
    say(f"every {d.general_every}th row is of {len(numbers):,} general documents: {general.name}")
    both = WithGeneral(task, general)
    return both, BothNumbers(train, numbers, both.first_general, d.general_every)
