"""Which tokens of token files make a row, and those rows.

`ConcatAndSplit` cuts each section every T tokens (the published packing); `BestFit` packs whole documents of a block. Both find
any row of any block without those before it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from emo_jax.config import DataConfig
from emo_jax.data.blocks import BLOCK_TOKENS
from emo_jax.data.packing import Row
from emo_jax.data.tokens import TokenSource
from emo_jax.errors import InputError


class Cut(NamedTuple):
    """The tokens of one row, all of one section."""

    section: int
    reads: list[tuple[int, int]]  # first token in the section, number
    lengths: np.ndarray  # [m] tokens of every piece of a document
    documents: np.ndarray  # [m] numbers of the documents in the section
    last_ends: bool  # the last piece is the end of its document
    beyond: int  # tokens left out, because the row held data.max_documents_per_row documents


class Packer:
    """What the rows of each block hold. Picklable."""

    def __init__(self, source: TokenSource, sections: Sequence[int], data: DataConfig):
        self.source, self.sections, self.data = source, tuple(sections), data
        self.section, self.first = block_table(source, sections)

    def counts(self) -> np.ndarray | None:
        """The rows of every block [n]; None where the documents have to be read."""
        raise NotImplementedError

    def count(self, block: int) -> int:
        """The rows of a block."""
        raise NotImplementedError

    def cuts(self, blocks: np.ndarray, rows: np.ndarray) -> list[Cut]:
        raise NotImplementedError


class ConcatAndSplit(Packer):
    """Row r of a section holds its tokens rT to (r + 1)T; a row belongs to the block that its first token is in."""

    def counts(self) -> np.ndarray:
        T = self.data.sequence_length
        sizes = np.array([s.tokens for s in self.source.sections])[self.section]
        last = np.minimum(self.first + BLOCK_TOKENS, sizes)
        return -(-last // T) - -(-self.first // T)

    def count(self, block: int) -> int:
        return int(self.counts()[block])

    def cuts(self, blocks: np.ndarray, rows: np.ndarray) -> list[Cut]:
        T = self.data.sequence_length
        starts = (-(-self.first[blocks] // T) + rows) * T
        return concat_cuts(self.source, self.section[blocks], starts, self.data)


def concat_cuts(source: TokenSource, sections: np.ndarray, starts: np.ndarray, data: DataConfig) -> list[Cut]:
    wanted = list(zip(sections.tolist(), starts.tolist()))
    source.load_index([(section, start, start + data.sequence_length) for section, start in wanted])
    return [concat_cut(source, section, start, data) for section, start in wanted]


def concat_cut(source: TokenSource, section: int, start: int, data: DataConfig) -> Cut:
    size = source.sections[section].tokens
    stop = min(start + data.sequence_length, size)
    number, ends = source.ends_in(section, start, stop)
    beyond = 0
    if len(ends) > data.max_documents_per_row:
        ends = ends[:data.max_documents_per_row]
        stop, beyond = int(ends[-1]), stop - int(ends[-1])
    lengths = np.minimum(ends, stop)
    lengths[1:] -= ends[:-1]
    lengths[0] -= start
    return Cut(section, [(start, stop - start + (stop < size))], lengths, number + np.arange(len(ends)), bool(ends[-1] == stop),
               beyond)


class BestFit(Packer):
    """The documents that begin in a block, whole, each in the fullest row that has room, the longest first ("best fit
    decreasing"; Grain's packer fills rows as documents come, so that no row could be found without those before it).
    Only documents longer than a row are cut."""

    def counts(self) -> None:
        return None

    def count(self, block: int) -> int:
        return len(self.packed(block)[3])

    def cuts(self, blocks: np.ndarray, rows: np.ndarray) -> list[Cut]:
        wanted = np.unique(blocks).tolist()
        starts = [(int(self.section[block]), int(self.first[block])) for block in wanted]
        self.source.load_index([(section, first - 1, first + BLOCK_TOKENS) for section, first in starts])
        packed = {block: self.packed(block) for block in wanted}
        return [self._cut(int(self.section[block]), *packed[block], row)
                for block, row in zip(blocks.tolist(), rows.tolist())]

    def packed(self, block: int) -> tuple[np.ndarray, np.ndarray, int, list[list[tuple[int, int, int]]]]:
        """(first token and end of each document, number of the first one, rows of pieces (document, offset, tokens))."""
        section, first = int(self.section[block]), int(self.first[block])
        stop = min(first + BLOCK_TOKENS, self.source.sections[section].tokens)
        number, ends = self.source.ends_in(section, first - 1, stop)
        if first == 0:
            starts = np.concatenate([[0], ends])
        else:
            number, starts = number + 1, ends
        starts = starts[starts < stop]
        ends = ends[len(ends) - len(starts):] if first == 0 else ends[1:len(starts) + 1]
        rows = best_fit(ends - starts, self.data.sequence_length, self.data.max_documents_per_row)
        return starts, ends, number, rows

    def _cut(self, section: int, starts, ends, number: int, rows, row: int) -> Cut:
        pieces = rows[row]
        reads = [(int(starts[d]) + offset, size) for d, offset, size in pieces]
        last = sum(reads[-1]) == int(ends[pieces[-1][0]])
        if not last:
            reads[-1] = (reads[-1][0], reads[-1][1] + 1)
        return Cut(section, reads, np.array([size for _, _, size in pieces]), number + np.array([d for d, _, _ in pieces]),
                   last, 0)


def best_fit(lengths: np.ndarray, T: int, max_documents: int) -> list[list[tuple[int, int, int]]]:
    """Rows of pieces (document, offset, tokens)."""
    rows, rests = [], []
    for document, length in enumerate(lengths.tolist()):
        whole = length // T * T
        rows += [[(document, offset, T)] for offset in range(0, whole, T)]
        if length > whole:
            rests.append((length - whole, document, whole))
    rests.sort(key=lambda rest: -rest[0])
    room: list[tuple[int, int]] = []  # (tokens that are free, row), sorted
    for size, document, offset in rests:
        at = bisect.bisect_left(room, (size, 0))
        free, row = room.pop(at) if at < len(room) else (T, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append((document, offset, size))
        if free > size and len(rows[row]) < max_documents:
            bisect.insort(room, (free - size, row))
    return rows


def block_table(source: TokenSource, sections: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(section [n] int32, first token in it [n] int64) of every block."""
    counts = [-(-source.sections[s].tokens // BLOCK_TOKENS) for s in sections]
    numbers = np.arange(sum(counts)) - np.repeat(np.cumsum([0, *counts[:-1]]), counts)
    return np.repeat(np.asarray(sections, np.int32), counts), numbers * BLOCK_TOKENS


# ---- tokens of rows -------------------------------------------------------------------------------------------------


def make_rows(source: TokenSource, cuts: Sequence[Cut], tokens_read: Sequence[np.ndarray], data: DataConfig,
              vocab_size: int = 1 << 31) -> Row:
    """Arrays [n, T]: tokens, targets, segment_ids, document_ids int32 and loss_weights float32, as `packing` makes them.
    tokens_read: those of all `reads` of the cuts.
    Raises `InputError` for a token beyond the vocabulary."""
    shape = (len(cuts), data.sequence_length)
    row: Row = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids", "document_ids")}
    row["loss_weights"] = np.zeros(shape, np.float32)
    read = iter(tokens_read)
    for i, cut in enumerate(cuts):
        parts = [next(read) for _ in cut.reads]
        tokens, size = parts[0] if len(parts) == 1 else np.concatenate(parts), int(cut.lengths.sum())
        known = min(size, len(tokens) - 1)  # of the targets: nothing may follow the last token
        row["tokens"][i, :size] = tokens[:size]
        row["targets"][i, :known] = tokens[1:known + 1]
        row["segment_ids"][i, :size] = np.arange(1, len(cut.lengths) + 1, dtype=np.int32).repeat(cut.lengths)
        numbers = cut.documents + source.first_documents[cut.section]
        row["document_ids"][i, :size] = (numbers & 0x7FFFFFFF).astype(np.int32).repeat(cut.lengths)
        row["loss_weights"][i, :known] = 1
        if data.document_end_target == "masked":
            row["loss_weights"][i, cut.lengths.cumsum()[:None if cut.last_ends else -1] - 1] = 0
    for name in ("tokens", "targets"):
        if row[name].view(np.uint32).max(initial=0) >= vocab_size:
            _raise_beyond(source, cuts, row[name].view(np.uint32), int(name == "targets"), vocab_size)
    return row


def _raise_beyond(source: TokenSource, cuts: Sequence[Cut], tokens: np.ndarray, shift: int, vocab_size: int) -> None:
    i, at = (int(x) for x in np.argwhere(tokens >= vocab_size)[0])
    cut, token, at = cuts[i], int(tokens[i, at]), at + shift
    for start, count in cut.reads:
        if at < count:
            section = source.sections[cut.section]
            raise InputError(f"{source.files[section.file].path}: token {section.first_token + start + at:,} is {token}, "
                             f"beyond the vocabulary (model.vocab_size={vocab_size})")
        at -= count
