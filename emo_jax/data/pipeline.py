"""The batches of one host, in worker processes, resumable at any batch on any number of hosts and workers.

A run has S streams, as many as its first batch had rows. Stream s reads every S-th document of the shuffled documents
(`order.DocumentOrder`), tokenizes and packs them. The streams give one row each in turn, and batches are cut from that
sequence: so they do not depend on who computes the streams, and batches of any size that divides S, or is a multiple of it,
hold the same rows one after the other. Each host has an equal share of the streams and deals it out to its workers. The
position of a stream is the packer's state after the row, and it travels with each row; the data part of a checkpoint is the S
states, and which stream is next.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import grain
import numpy as np
from absl import flags

from emo_jax.config import Config, DataConfig
from emo_jax.data import waiting
from emo_jax.data.documents import MAX_LABELS, Source
from emo_jax.data.filters import repetitive_rows
from emo_jax.data.order import BothOrders, DocumentNumbers, DocumentOrder, document_order, split
from emo_jax.data.packing import Row, State, documents_read, initial_state, pack, state_width
from emo_jax.data.row_clock import PARTS, RowClock
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.errors import InputError, RestartError, RunError

COUNTS = ("skipped_documents", "dropped_rows")  # before a row, in its stream
FIELDS = ("tokens", "targets", "loss_weights", "positions", "segment_ids", "document_ids")
LONG = 1 << 20  # tokens: what takes seconds to tokenize is kept until the next such document
MAX_DROPPED = 1000  # rows in turn: a stream of nothing else never ends
_SIGTERM_GRACE_S = 60

MadeRow = tuple[Row, State, np.ndarray]  # a row, where its stream stands after it, seconds of `row_clock.PARTS`


def row_labels(source: Source) -> list[str]:
    """The labels whose numbers go with the rows; none where the source has one, too many, or does not know them."""
    return source.labels if 1 < len(source.labels) <= MAX_LABELS else []


@dataclass(frozen=True)
class RowStreams:
    """All that a worker needs to compute the rows of any stream. Picklable."""

    data: DataConfig
    source: Source
    tokenizer: Tokenizer
    order: DocumentOrder | BothOrders
    long: dict[int, np.ndarray] = field(default_factory=dict)  # tokens of the last long document, which all streams may read

    def rows(self, stream: int, state: State | None) -> Iterator[MadeRow]:
        """Rows, each with COUNTS."""
        clock, codes = RowClock(self.tokenizer), {label: code for code, label in enumerate(row_labels(self.source))}
        counts = dict.fromkeys(COUNTS, 0)

        def read(count: int) -> tuple[np.ndarray, int]:
            document = self.order.document(stream, count)
            tokens = self.long[document] if document in self.long else clock.encoded(self.source, document)
            if len(tokens) >= LONG and document not in self.long:
                self.long.clear()
                self.long[document] = tokens
            counts["skipped_documents"] += not len(tokens)
            return tokens, document

        d = self.data
        for row, after in pack(d.packing, read, d.sequence_length, d.max_documents_per_row,
                               d.document_end_target == "counted", state):
            if d.repetition_filter and repetitive_rows(row["tokens"][None, row["segment_ids"] > 0])[0]:
                if d.repetitive_rows == "dropped":
                    counts["dropped_rows"] += 1
                    if counts["dropped_rows"] >= MAX_DROPPED:
                        raise InputError(f"{self.source.name}: {MAX_DROPPED:,} rows in turn are repetitive, the last at "
                                         f"document {row['document_ids'][0]}; data.repetitive_rows='dropped' leaves nothing")
                    continue
                row["loss_weights"][:] = 0
            if codes:
                row["labels"] = self._labels(row, codes)
            yield row | {name: np.array(n) for name, n in counts.items()}, after, clock.seconds()
            clock.start()
            counts.update(dict.fromkeys(COUNTS, 0))

    def _labels(self, row: Row, codes: dict[str, int]) -> np.ndarray:
        """[T] int32: the number of the label of each token's document; 0 for padding."""
        segments = row["segment_ids"]
        firsts = np.diff(segments, prepend=0) > 0
        of_segment = [codes[self.source.label(i)] for i in row["document_ids"][firsts].tolist()]
        return np.array([0, *of_segment], np.int32)[segments]


class TrainIterator:
    """Yields dicts of numpy arrays [B_host, T]: `FIELDS`, int32 but loss_weights float32, and `labels` int32 (indices of
    `row_labels`) if there are any. Prefetches in the background. `state()` belongs to the batch returned last, whatever has
    been prefetched; close it after use."""

    def __init__(self, streams: RowStreams, numbers: list[int], states: list[State], rows: int, workers: int):
        self._streams, self._states, self._taken = streams, list(states), 0
        self.labels = row_labels(streams.source)
        self._seconds = np.zeros(len(PARTS))
        self._counts = dict.fromkeys(("rows", "padding_tokens", "filtered_rows", "rows_at_document_limit", *COUNTS), 0)
        self.workers = _usable_workers(workers, len(numbers))
        made = _RowDataset(streams, numbers, states)
        if self.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads its own flags, which only an absl app would parse
            options = grain.MultiprocessingOptions(
                num_workers=self.workers, per_worker_buffer_size=min(256, max(2, 2 * rows // self.workers)))
            # Rows are small: sent through a pipe, they need no shared memory (which containers have little of).
            made = grain.experimental.WithOptionsIterDataset(
                made, grain.experimental.DatasetOptions(min_shm_size=1 << 40))
            made = made.mp_prefetch(options, worker_init_fn=_start_worker)
        stack = functools.partial(_stack, turns=max(rows // len(numbers), 1))
        batches = made.batch(rows, drop_remainder=True, batch_fn=stack)
        self._iterator = [iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2))]
        self.close = weakref.finalize(self, _close, self._iterator)  # also called when the process ends

    def __iter__(self) -> TrainIterator:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch, states, seconds = waiting.pull(self._iterator[0])
        except InputError:
            raise
        except (RuntimeError, OSError, EOFError) as e:  # a worker that died, a file that went away
            if "terminated unexpectedly" in str(e):
                raise RestartError(f"a data worker ended ({_exit(str(e))}) while it read {self._streams.source.name}") from e
            raise RunError(f"reading the data of {self._streams.source.name} failed: {e}") from e
        for state in states:  # of the streams in turn
            self._states[self._taken % len(self._states)] = state
            self._taken += 1
        self._count(batch)
        self._seconds = self._seconds + seconds
        return {name: batch[name] for name in (*FIELDS, "labels") if name in batch}

    def state(self) -> list[State]:
        """The state of each stream of this host, in the order of `streams_of`, after the batch returned last."""
        return [list(state) for state in self._states]

    @property
    def epochs(self) -> float:
        """How often this host's share of the documents has been read."""
        return self._streams.order.epochs([documents_read(state) for state in self._states])

    def statistics(self) -> dict[str, int]:
        """Sums over the batches returned so far: rows; padding_tokens; filtered_rows (without any loss);
        rows_at_document_limit (padded because they hold data.max_documents_per_row documents); skipped_documents (that cannot
        be read); dropped_rows (repetitive, with data.repetitive_rows=dropped)."""
        return dict(self._counts)

    def timings(self) -> np.ndarray:
        """Seconds of `row_clock.PARTS` for the rows returned so far, summed over the workers, which work at the same time."""
        return self._seconds

    def _count(self, batch: dict[str, np.ndarray]) -> None:
        padding = (batch["segment_ids"] == 0).sum(axis=1)
        full = batch["segment_ids"].max(axis=1) == self._streams.data.max_documents_per_row
        self._counts["rows"] += len(padding)
        self._counts["padding_tokens"] += int(padding.sum())
        for name in COUNTS:
            self._counts[name] += int(batch[name].sum())
        self._counts["filtered_rows"] += int((batch["loss_weights"].max(axis=1) == 0).sum())
        self._counts["rows_at_document_limit"] += int((full & (padding > 0)).sum())


def make_train_iterator(config: Config, source: Source, tokenizer: Tokenizer, process_index: int = 0,
                        process_count: int = 1, states: list[State] | None = None,
                        train_indices: DocumentNumbers | None = None, first: int = 0) -> TrainIterator:
    """The training batches of host `process_index` of `process_count`, from the start or after `states` (of all streams in
    order), of which stream `first` is next. train_indices: those of `split`, to save computing them again."""
    batch_size = config.train.batch_size
    if states is None:
        states = [initial_state() for _ in range(batch_size)]
    d, default = config.data, DataConfig()
    for name in ("mixture", "max_epochs", "order") if d.packing != "best_fit" else ("packing",):
        if getattr(d, name) != getattr(default, name):
            raise InputError(f"data.{name}={getattr(d, name)!r} is for token files, not for text; write them with "
                             f"`emo-jax data tokenize`")
    numbers = streams_of(batch_size, len(states), first, process_index, process_count)
    if train_indices is None:
        train_indices, _ = split(source, config.data, config.seed)
    order = document_order(train_indices, len(states), config.seed, config.data.shuffle)
    mine = [[int(x) for x in states[number]] for number in numbers]
    return TrainIterator(RowStreams(config.data, source, tokenizer, order), numbers, mine, batch_size // process_count,
                         config.data.workers)


def streams_of(batch_size: int, streams: int, first: int, process_index: int, process_count: int) -> list[int]:
    """The streams that a process computes, in the order of its rows. Raises `InputError` for sizes that do not fit."""
    if batch_size % process_count:
        raise InputError(f"train.batch_size={batch_size} must be a multiple of the {process_count} processes")
    if streams % batch_size and batch_size % streams:
        raise InputError(f"train.batch_size={batch_size}: the run reads its documents in {streams} streams, as many as its "
                         f"first batch had rows; give a divisor or a multiple of {streams}, or tokenize the documents first "
                         f"(emo-jax data tokenize), which allows any batch size")
    turn = min(batch_size, streams)  # streams that give a row to a batch
    if turn % process_count:
        raise InputError(f"train.batch_size={batch_size}: the {streams} streams of documents, as many as the run's first batch "
                         f"had rows, cannot be shared evenly by the {process_count} processes")
    share = turn // process_count
    return [(first + batch + process_index * share + i) % streams for batch in range(0, streams, turn) for i in range(share)]


def go_on(state: State, before: DataConfig, after: DataConfig) -> State:
    """Where a stream goes on whose rows are made otherwise from now on: no document is read twice, none is left out but those
    in rows that first_fit had begun, where these do not fit."""
    fits = before.packing == after.packing and all(getattr(before, name) <= getattr(after, name)
                                                   for name in ("sequence_length", "max_documents_per_row"))
    return state if fits else state[:2]


def states_to_array(states: list[State], data: DataConfig) -> np.ndarray:
    """[b, W] int64, padded with -1; W depends on the config only, so that hosts can gather them."""
    array = np.full((len(states), state_width(data.packing, data.max_documents_per_row)), -1, np.int64)
    for row, state in zip(array, states):
        row[:len(state)] = state
    return array


def array_to_states(array: np.ndarray) -> list[State]:
    return [row[row >= 0].tolist() for row in np.asarray(array)]


def _close(iterator: list) -> None:
    """Ends the background thread and the worker processes. Grain's objects are collected here, because those that
    live until the interpreter is torn down complain."""
    waiting.kill_stopped()
    iterator.pop().close()
    gc.collect()


def _exit(message: str) -> str:
    """How the worker ended that Grain's message is about."""
    code = int(found[1]) if (found := re.search(r"exit code (-?\d+)", message)) else 0
    if code >= 0:
        return f"exit status {code}"
    return f"killed by {signal.Signals(-code).name}" + (", as a machine does that is out of memory" if code == -9 else "")


def _usable_workers(wanted: int, streams: int) -> int:
    """The most workers up to `wanted` that share the streams evenly: Grain takes their rows in turn."""
    return next((n for n in range(min(wanted, streams), 0, -1) if streams % n == 0), 0)


def _stack(made: Sequence[MadeRow], turns: int) -> tuple[dict[str, np.ndarray], list[State], np.ndarray]:
    """(fields, states in the order of the rows, seconds). Of several turns, rows of the same stream go together."""
    rows = [row for first in range(len(made) // turns) for row in made[first::len(made) // turns]]
    batch = {name: np.stack([row[name] for row, _, _ in rows]) for name in rows[0][0]}
    positions = np.arange(batch["tokens"].shape[1], dtype=np.int32)  # absolute in the row, as published
    batch["positions"] = np.tile(positions, (len(rows), 1))
    return batch, [state for _, state, _ in made], np.sum([seconds for _, _, seconds in made], axis=0)


# ---- the Grain side --------------------------------------------------------------------------------------------------


class _RowDataset(grain.IterDataset):
    """The rows of the streams in turn, without end. A worker takes its slice of the streams."""

    def __init__(self, streams: RowStreams, numbers: list[int], states: list[State]):
        super().__init__()
        self._streams, self._numbers, self._states = streams, numbers, states

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        self._numbers, self._states = self._numbers[sl], self._states[sl]

    def __iter__(self) -> _RowIterator:
        return _RowIterator([self._streams.rows(n, s) for n, s in zip(self._numbers, self._states)])


class _RowIterator(grain.DatasetIterator):
    def __init__(self, streams: list[Iterator[MadeRow]]):
        super().__init__()
        self._generators, self._turn = streams, 0

    def __next__(self) -> MadeRow:
        row = next(self._generators[self._turn])
        self._turn = (self._turn + 1) % len(self._generators)
        return row

    def get_state(self) -> dict:
        return {}  # each row carries the state of its stream

    def set_state(self, state: dict) -> None:
        raise NotImplementedError("a TrainIterator starts at its states")


def _start_worker(index: int, count: int) -> None:
    """In a worker: survives the signals that a terminal or scheduler sends to the whole process group, because the
    training process still needs batches while it saves, and ends when the training process is gone."""
    parent = os.getppid()
    terminated = []
    waiting.write_stacks_when_asked()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(time.monotonic()))

    def watch() -> None:
        while os.getppid() == parent and not (terminated and time.monotonic() > terminated[0] + _SIGTERM_GRACE_S):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
