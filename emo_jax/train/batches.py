"""The batches of a run from phase to phase: which documents they are made of, and where the run stands in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from emo_jax import processes
from emo_jax.checkpoints.compatibility import ROW_FIELDS
from emo_jax.config import Config, flatten, to_dict
from emo_jax.data.general import WithGeneral
from emo_jax.data.pipeline import array_to_states, go_on, make_train_iterator, states_to_array, streams_of
from emo_jax.data.stream import stream_of_stages
from emo_jax.data.token_batches import TokenBatches
from emo_jax.data.tokens import TokenSource
from emo_jax.files import AnyPath
from emo_jax.phases import Phase, phases
from emo_jax.progress import say
from emo_jax.train import start

# Fields of `data` that say nothing about which documents there are, or which of them are held out.
_NOT_OF_DOCUMENTS = frozenset(ROW_FIELDS) | {f"data.{name}" for name in (
    "workers", "cache_gb", "max_skipped", "order", "mixture", "mixture_unit", "max_epochs", "shuffle")}


class DocumentsOfPhases:
    """The documents of every phase of a run. Phases that name the same ones share them."""

    def __init__(self, out: AnyPath):
        self._out, self._opened = out, {}

    def of(self, config: Config) -> start.Documents:
        """`config`: of a phase."""
        fields = flatten(to_dict(config))
        key = tuple(fields[name] for name in fields if name.startswith("data.") and name not in _NOT_OF_DOCUMENTS)
        if key not in self._opened:
            self._opened[key] = start.open_documents(config, self._out)
        return self._opened[key]


def batches_of(run: Config, phase: Phase, documents: DocumentsOfPhases, group: tuple[int, int],
               place: start.Place | None) -> TextBatches | TokenBatchesOfPhase:
    """The batches of this process in a phase of a run. group: (index, count) of its rows. place: where the run stands."""
    found = documents.of(phase.config)
    if isinstance(found.source, TokenSource):
        return TokenBatchesOfPhase(run, phase, documents, group, place)
    return TextBatches(phase.config, found, group, place)


class TokenBatchesOfPhase(TokenBatches):
    """Batches of this process from token files."""

    def __init__(self, run: Config, phase: Phase, documents: DocumentsOfPhases, group: tuple[int, int],
                 place: start.Place | None):
        rows = [*(place.position.get("stages", []) if place else []), *[0] * (phase.stage + 1)][:phase.stage + 1]
        configs = [p.config for p in phases(run) if p.starts_stage][:phase.stage + 1]
        stream = stream_of_stages([(config, documents.of(config).source) for config in configs], rows)
        self._before = rows[:-1]
        super().__init__(stream, rows[-1], phase.config.train.batch_size, group, phase.config.data.workers)

    def position(self) -> dict[str, Any]:
        """After the batch returned last, the same on every process: {"stages": rows that were read of each stage so far}."""
        return {"stages": [*self._before, self.rows_read]}


def check_phases(left: Sequence[Phase], documents_of: Callable[[Config], start.Documents], mesh: Mesh,
                 place: start.Place | None) -> None:
    """Opens the documents of the phases that are left. Raises `InputError` for a batch size that their streams cannot serve."""
    streams = place and len(place.position.get("rows") or ())
    for phase in left:
        documents, size = documents_of(phase.config), phase.config.train.batch_size
        if isinstance(documents.source, TokenSource):
            continue
        streams = streams if streams and place and place.goes_on(phase.config, documents) else size
        streams_of(size, streams, 0, *processes.row_group(mesh, size))
        place = start.Place({}, phase.config, documents.fingerprint)


class TextBatches:
    """Batches of this process from documents of text. What earlier stages have read of token files stays in the position."""

    def __init__(self, config: Config, documents: start.Documents, group: tuple[int, int], place: start.Place | None):
        states, self._first = None, 0
        if place is not None and place.goes_on(config, documents):
            states, self._first = place.position.get("rows"), place.position.get("next", 0)
        if states is not None and place is not None:
            before, states = states, [go_on(state, place.config.data, config.data) for state in states]
            if states != before:
                say("rows that data.packing=first_fit had begun do not fit the new rows and are left out")
        self._size, self._data, self._group, self._taken = config.train.batch_size, config.data, group, 0
        self._first_general = documents.source.first_general if isinstance(documents.source, WithGeneral) else None
        self._streams = self._size if states is None else len(states)
        self._of_tokens = {k: v for k, v in (place.position if place else {}).items() if k == "stages"}
        self._iterator = make_train_iterator(config, documents.source, documents.tokenizer, *group, states=states,
                                             train_indices=documents.train, first=self._first)
        self.labels, self.workers = self._iterator.labels, self._iterator.workers

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self._taken += 1
        if self._first_general is not None:
            batch["general"] = (batch["document_ids"] >= self._first_general).astype(np.int32)
        return batch

    def timings(self) -> np.ndarray:
        return self._iterator.timings()

    def close(self) -> None:
        self._iterator.close()

    def position(self) -> dict[str, Any]:
        """After the batch returned last, the same on every process: {"rows": the state of every stream, "next": the stream
        that gives the next row, if that is not 0}."""
        size, count = self._size, self._group[1]
        local = states_to_array(self._iterator.state(), self._data)
        gathered = array_to_states(processes.gather_groups(local, self._group))
        numbers = [streams_of(size, self._streams, self._first, index, count) for index in range(count)]
        by_stream = dict(zip(itertools.chain(*numbers), gathered))
        following = (self._first + self._taken * size) % self._streams
        return self._of_tokens | {"rows": [by_stream[stream] for stream in range(self._streams)]} | (
            {"next": following} if following else {})
