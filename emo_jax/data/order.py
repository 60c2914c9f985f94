"""Which documents are held out, and the order of the others. Stateless: nothing is stored, any position is computed."""

from __future__ import annotations

import numpy as np

from emo_jax.config import DataConfig
from emo_jax.data.documents import Source
from emo_jax.errors import InputError
from emo_jax.progress import track

SMALL = 20_000  # documents of a source whose labels are looked at by `split`
_MASK = (1 << 64) - 1


class TrainIndices:
    """The document numbers of 0..total-1 that are not in `others` (sorted): a sequence that is not stored."""

    def __init__(self, total: int, others: np.ndarray):
        self._count = total - len(others)
        self._smaller = others - np.arange(len(others))  # training documents below each other one

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self._count:
            raise IndexError(i)
        return int(i + np.searchsorted(self._smaller, i, side="right"))


class DocumentRanges:
    """The document numbers of successive ranges (first, count): a sequence that is not stored."""

    def __init__(self, ranges: list[tuple[int, int]]):
        self._firsts = np.array([first for first, _ in ranges], np.int64)
        self._starts = np.cumsum([0] + [count for _, count in ranges])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        return int(self._firsts[number] + i - self._starts[number])


class BothNumbers:
    """The training documents of a task, then general ones, of which every `every`-th row is (see `general`)."""

    def __init__(self, task: DocumentNumbers, general: DocumentNumbers, first_general: int, every: int):
        self.task, self.general, self.first_general, self.every = task, general, first_general, every

    def __len__(self) -> int:
        return len(self.task) + len(self.general)

    def __getitem__(self, i: int) -> int:
        return self.task[i] if i < len(self.task) else self.first_general + self.general[i - len(self.task)]


DocumentNumbers = TrainIndices | DocumentRanges | BothNumbers


def split(source: Source, data: DataConfig, seed: int) -> tuple[DocumentNumbers, np.ndarray]:
    """(training documents, held-out documents [n] int64 sorted), none of a label of `data.leave_out_labels`. A document is
    held out by a hash of the seed and its number, so whether it is does not depend on the others; in a small source, every
    label of two documents or more that the hash missed gives one. A source that was split when it was written is taken so."""
    own = source.split(data)
    if own is not None:
        return own
    total, left_out = len(source), documents_of_labels(source, data.left_out)
    held_out = _hashed(total, data.held_out_fraction, seed)
    if data.held_out_fraction > 0 and (total <= SMALL or not len(held_out)):
        held_out = np.union1d(held_out, _missed_labels(source, seed, held_out))
    held_out = np.setdiff1d(held_out, left_out)
    if len(held_out) and len(held_out) + len(left_out) == total:
        held_out = held_out[:-1]
    others = np.union1d(held_out, left_out)
    if len(others) == total:
        raise InputError(f"{source.name}: no documents to train on"
                         + f" besides those of data.leave_out_labels={data.leave_out_labels!r}" * bool(len(left_out)))
    return TrainIndices(total, others), held_out


def documents_of_labels(source: Source, labels: tuple[str, ...]) -> np.ndarray:
    """[n] int64 sorted. Reads the label of every document, if there are `labels`. Raises `InputError` for one without
    documents."""
    if not labels:
        return np.zeros(0, np.int64)
    numbers = track(range(len(source)), f"reading the labels of {source.name}", "documents")
    codes: dict[str, int] = {}
    of_document = np.fromiter((codes.setdefault(source.label(i), len(codes)) for i in numbers), np.int32, len(source))
    for label in labels:
        if label not in codes:
            raise InputError(f"{source.name}: no document of label {label!r}; there are {', '.join(sorted(codes)[:50])}")
    return np.flatnonzero(np.isin(of_document, [codes[label] for label in labels]))


def labels_but(source: Source, label: str) -> list[str]:
    """All labels of a source but one. Raises `InputError` if it has no document of that one."""
    labels = source.labels or sorted({source.label(i) for i in track(range(len(source)), f"reading the labels of {source.name}",
                                                                    "documents")})
    if label not in labels:
        raise InputError(f"{source.name}: no document of label {label!r}; there are {', '.join(labels[:50])}")
    return [other for other in labels if other != label]


def _hashed(total: int, fraction: float, seed: int, block: int = 1 << 22) -> np.ndarray:
    limit, chosen = np.uint64(min(int(fraction * 2.0**64), _MASK)), [np.zeros(0, np.int64)]
    for start in range(0, total, block):
        numbers = np.arange(start, min(start + block, total), dtype=np.uint64)
        chosen.append(start + np.flatnonzero(mix(seed, numbers) < limit))
    return np.concatenate(chosen)


def _missed_labels(source: Source, seed: int, held_out: np.ndarray) -> np.ndarray:
    """One document of each label that has two or more, none of them in `held_out`; looks at SMALL documents."""
    by_label, missed = {}, []
    for i in range(min(len(source), SMALL)):
        by_label.setdefault(source.label(i), []).append(i)
    for numbers in by_label.values():
        if len(numbers) > 1 and not np.isin(numbers, held_out).any():
            missed.append(numbers[int(np.argmin(mix(seed, np.array(numbers, np.uint64))))])
    return np.array(missed, np.int64)


def mix(seed: int, numbers: np.ndarray) -> np.ndarray:
    """[n] uint64 -> [n] uint64 that look random: the finaliser of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = numbers + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & _MASK)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class DocumentOrder:
    """The endless stream of training documents, dealt out to the rows of a batch: row b of B reads the positions
    b, B + b, 2B + b, ... of the concatenated epochs, each epoch shuffled anew."""

    def __init__(self, indices: DocumentNumbers, batch_size: int, seed: int, shuffle: bool):
        self.indices, self.batch_size, self.seed, self.shuffle = indices, batch_size, seed, shuffle

    def document(self, row: int, count: int) -> int:
        """Number of the `count`-th document of a row."""
        epoch, position = divmod(count * self.batch_size + row, len(self.indices))
        if self.shuffle:
            from grain.experimental import index_shuffle  # a fifth of a second, which opening a model need not wait for

            seed = int(mix(self.seed, np.array([epoch], np.uint64))[0]) & 0xFFFFFFFF
            position = index_shuffle(position, max_index=len(self.indices) - 1, seed=seed, rounds=4)
        return self.indices[position]

    def epochs(self, counts: list[int]) -> float:
        """How often the documents have been read, when the rows have read `counts` documents."""
        return sum(counts) / len(counts) * self.batch_size / len(self.indices)


class BothOrders:
    """As `DocumentOrder`, of `BothNumbers`: rows 0, every, 2 every, ... of a batch are of general documents, the others of the
    task's, each as the rows of a smaller batch. Raises `InputError` for a batch that has another share of them."""

    def __init__(self, both: BothNumbers, batch_size: int, seed: int, shuffle: bool):
        if batch_size % both.every:
            raise InputError(f"train.batch_size={batch_size} must be a multiple of data.general_every={both.every}")
        self._both, rows = both, batch_size // both.every
        self._task = DocumentOrder(both.task, batch_size - rows, seed, shuffle)
        self._general = DocumentOrder(both.general, rows, seed, shuffle)

    def document(self, row: int, count: int) -> int:
        turn, place = divmod(row, self._both.every)
        if place:
            return self._task.document(row - turn - 1, count)
        return self._both.first_general + self._general.document(turn, count)

    def epochs(self, counts: list[int]) -> float:
        """Of the task's documents."""
        return self._task.epochs([count for row, count in enumerate(counts) if row % self._both.every])


def document_order(numbers: DocumentNumbers, batch_size: int, seed: int, shuffle: bool) -> DocumentOrder | BothOrders:
    if isinstance(numbers, BothNumbers):
        return BothOrders(numbers, batch_size, seed, shuffle)
    return DocumentOrder(numbers, batch_size, seed, shuffle)
