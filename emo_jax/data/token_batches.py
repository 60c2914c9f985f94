"""The batches of one host from token files: rows by index, read ahead by Grain in threads."""

from __future__ import annotations

import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor

import grain
import numpy as np

from emo_jax.data import waiting
from emo_jax.data.pipeline import FIELDS, row_labels
from emo_jax.data.row_clock import PARTS
from emo_jax.data.stream import RowStream
from emo_jax.errors import InputError, RunError

ROWS_AHEAD = 4096  # of the stage, about a window of blocks
_WITHOUT_END = 1 << 40  # batches; how many there are is decided by whoever asks for them


class TokenBatches:
    """Yields dicts of numpy arrays [B / hosts, T]: `FIELDS`, and `labels` (index into the source's labels) where there are
    several. Batch k of the stage holds its rows from first + kB on, of which host h of H has the h-th H-th.

    first: the row of the stage to begin at. group: (h, H). threads: that read ahead.
    """

    def __init__(self, stream: RowStream, first: int, batch_size: int, group: tuple[int, int] = (0, 1), threads: int = 1):
        if batch_size % group[1]:
            raise InputError(f"train.batch_size={batch_size} must be a multiple of the {group[1]} processes")
        self.stream, self.first, self.batch_size = stream, first, batch_size
        self.read = 0  # batches that were returned
        self.labels, self.workers = row_labels(stream.source), max(1, threads)
        self._seconds = np.zeros(len(PARTS))
        self._counts = dict.fromkeys(("rows", "padding_tokens", "filtered_rows", "rows_at_document_limit"), 0)
        batches = grain.MapDataset.source(_Batches(stream, first, batch_size, group)).to_iter_dataset(
            grain.ReadOptions(num_threads=self.workers, prefetch_buffer_size=max(2, 2 * threads)))
        self._iterator = [iter(batches)]
        self.close = weakref.finalize(self, _close, self._iterator)  # also called when the process ends

    def __iter__(self) -> TokenBatches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch, counts, seconds = waiting.pull(self._iterator[0])
        except OSError as e:  # a file that went away
            raise RunError(f"reading the data of {self.stream.source.name} failed: {e}") from e
        self.read += 1
        self._seconds = self._seconds + seconds
        for name, count in counts.items():
            self._counts[name] += count
        return batch

    @property
    def rows_read(self) -> int:
        """Rows of the stage that all hosts have read after the batch returned last: with those of the stages before, the
        whole position."""
        return self.first + self.read * self.batch_size

    @property
    def epochs(self) -> float:
        """How often the label that was read most has been read."""
        return self.stream.epochs(self.rows_read)

    def timings(self) -> np.ndarray:
        """Seconds of `row_clock.PARTS` for the rows returned so far, summed over the threads."""
        return self._seconds

    def statistics(self) -> dict[str, int]:
        """Sums over the batches returned so far: rows; padding_tokens; filtered_rows (without any loss);
        rows_at_document_limit (cut because they hold data.max_documents_per_row documents)."""
        return dict(self._counts)


def _close(iterator: list) -> None:
    """Ends the threads that read ahead."""
    iterator.pop().close()


class _Batches(grain.sources.RandomAccessDataSource):
    """Batch k of a host, for Grain."""

    def __init__(self, stream: RowStream, first: int, batch_size: int, group: tuple[int, int]):
        host, count = group
        self.stream, self.batch_size = stream, batch_size
        self.first, self.own = first + host * (batch_size // count), batch_size // count
        self._ahead = _Ahead(self) if stream.source.is_remote else None

    def numbers(self, batch: int) -> np.ndarray:
        """The host's rows of a batch."""
        start = self.first + batch * self.batch_size
        return np.arange(start, start + self.own)

    def __len__(self) -> int:
        return _WITHOUT_END

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, int], np.ndarray]:
        began = time.perf_counter()
        if self._ahead is not None:
            self._ahead.wait_for(index)
        waited = time.perf_counter() - began
        rows, cuts, read = self.stream.rows_and_cuts(self.numbers(index))
        positions = np.arange(self.stream.config.data.sequence_length, dtype=np.int32)  # absolute in the row, as published
        rows["positions"] = np.tile(positions, (self.own, 1))
        counts = {"rows": self.own, "padding_tokens": int((rows["segment_ids"] == 0).sum()),
                  "filtered_rows": int((rows["loss_weights"].max(axis=1) == 0).sum()),
                  "rows_at_document_limit": sum(cut.beyond > 0 for cut in cuts)}
        names = (*FIELDS, "labels") if row_labels(self.stream.source) else FIELDS
        seconds = np.array([waited + read, 0.0, time.perf_counter() - began - waited - read])
        return {name: rows[name] for name in names}, counts, seconds


class _Ahead:
    """Fetches what the next batches of a host need from a bucket, ROWS_AHEAD rows of the stage at a time, in as few requests
    as their places allow: rows of one block come in several batches."""

    def __init__(self, batches: _Batches):
        self._batches, self._every = batches, max(1, ROWS_AHEAD // batches.batch_size)
        self._pool, self._lock = ThreadPoolExecutor(1), threading.Lock()
        self._coming: dict[int, Future] = {}

    def wait_for(self, batch: int) -> None:
        """Returns when the batch has been fetched; those after it are under way then."""
        part = batch // self._every
        with self._lock:
            for number in (part, part + 1):
                if number not in self._coming:
                    self._coming[number] = self._pool.submit(self._fetch, max(number * self._every, batch))
            for number in [n for n in self._coming if n < part - 1]:
                del self._coming[number]
            coming = self._coming[part]
        coming.result()

    def _fetch(self, first: int) -> None:
        stream, end = self._batches.stream, (first // self._every + 1) * self._every
        cuts = stream.cuts(np.concatenate([self._batches.numbers(batch) for batch in range(first, end)]), allow_end=True)
        stream.source.reader.load(stream.source.byte_ranges([(cut.section, *read) for cut in cuts for read in cut.reads]))
