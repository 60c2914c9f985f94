"""Rows of token files by index: row k of the epochs is computed from k, the index of documents, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emo_jax.config import DataConfig
from emo_jax.data.blocks import BLOCK_TOKENS, BlockOrder
from emo_jax.data.cuts import BestFit, ConcatAndSplit, Cut, Packer, concat_cuts, make_rows
from emo_jax.data.documents import hash_text
from emo_jax.data.filters import repetitive_rows
from emo_jax.data.plans import plan_rows
from emo_jax.data.tokens import TokenSource
from emo_jax.errors import InputError

OLMO_UNIT = 8192  # tokens that the published order keeps together


class Layout:
    count: int  # rows of an epoch

    def cuts(self, positions: np.ndarray) -> list[Cut]:
        """Those at positions in the concatenated epochs."""
        raise NotImplementedError

    def unread(self, position: int) -> tuple[int, int]:
        """(epoch, part): the first part of the data that no row before `position` is of, whatever the sequence length."""
        raise NotImplementedError

    def position(self, epoch: int, part: int) -> int:
        """The first row of a part."""
        raise NotImplementedError


def make_layout(source: TokenSource, sections: Sequence[int], data: DataConfig, seed: int) -> Layout:
    if data.order == "olmo":
        return OlmoLayout(source, sections, data, seed)
    return BlockLayout((BestFit if data.packing == "best_fit" else ConcatAndSplit)(source, sections, data), seed)


class BlockLayout(Layout):
    """The rows of a packer in the order of `BlockOrder`."""

    def __init__(self, packer: Packer, seed: int):
        data = packer.data
        drops = data.repetition_filter and data.repetitive_rows == "dropped"
        counts = None if drops else packer.counts()
        if counts is None:
            key = (packer.source.fingerprint, BLOCK_TOKENS, hash_text(*packer.sections), data.sequence_length, data.packing,
                   data.max_documents_per_row, drops)
            plan = plan_rows(Planner(packer, drops), len(packer.first), packer.source.name, key)
            counts, self._dropped = plan.counts, plan.dropped
        else:
            self._dropped = {}
        self.packer, self.order = packer, BlockOrder(counts, seed, data.shuffle)
        self.count = self.order.count

    def cuts(self, positions: np.ndarray) -> list[Cut]:
        blocks, rows = self.order.locate(positions)
        for i in np.flatnonzero(np.isin(blocks, list(self._dropped))) if self._dropped else ():
            dropped = self._dropped[int(blocks[i])]
            rows[i] += np.searchsorted(dropped - np.arange(len(dropped)), rows[i], side="right")
        return self.packer.cuts(blocks, rows)

    def unread(self, position: int) -> tuple[int, int]:
        return self.order.after_window(position)

    def position(self, epoch: int, part: int) -> int:
        return self.order.window_start(epoch, part)


class Planner:
    """(rows that are kept, numbers of those that are dropped) of a block. Picklable."""

    def __init__(self, packer: Packer, drops: bool):
        self.packer, self.drops = packer, drops

    def __call__(self, block: int) -> tuple[int, np.ndarray]:
        count = self.packer.count(block)
        if not self.drops:
            return count, np.zeros(0, np.int32)
        cuts = self.packer.cuts(np.full(count, block), np.arange(count))
        tokens = self.packer.source.read([(cut.section, *read) for cut in cuts for read in cut.reads])
        rows = make_rows(self.packer.source, cuts, tokens, self.packer.data)
        dropped = np.flatnonzero(repetitive_rows(rows["tokens"], (rows["segment_ids"] > 0).sum(axis=1)))
        return count - len(dropped), dropped


class OlmoLayout(Layout):
    """The published order (OLMo-core's NumpyFSLDataset and data loader): each file is cut to a multiple of OLMO_UNIT tokens,
    units are shuffled by PCG64(seed + epoch) with epochs from 1, and a unit's rows follow each other. The permutation of an
    epoch is held in memory, 4 bytes a unit."""

    def __init__(self, source: TokenSource, sections: Sequence[int], data: DataConfig, seed: int):
        T = data.sequence_length
        if OLMO_UNIT % T:
            raise InputError(f"data.order='olmo' needs a data.sequence_length that divides {OLMO_UNIT}, not {T}")
        self.source, self.sections, self.data, self.seed = source, np.array(sections), data, seed
        units = np.array([source.sections[s].tokens // OLMO_UNIT for s in sections])
        self.starts = np.cumsum(np.concatenate([[0], units]))
        self.rows_of_unit = OLMO_UNIT // T
        self.count = int(self.starts[-1]) * self.rows_of_unit
        self._epoch: tuple[int, np.ndarray] = (0, np.zeros(0, np.uint32))

    def cuts(self, positions: np.ndarray) -> list[Cut]:
        epochs, inside = np.divmod(np.asarray(positions, np.int64), self.count)
        units = np.empty_like(inside)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            units[here] = self._order(int(epoch))[inside[here] // self.rows_of_unit]
        file = np.searchsorted(self.starts, units, side="right") - 1
        starts = (units - self.starts[file]) * OLMO_UNIT + inside % self.rows_of_unit * self.data.sequence_length
        return concat_cuts(self.source, self.sections[file], starts, self.data)

    def unread(self, position: int) -> tuple[int, int]:
        return divmod(-(-position // self.rows_of_unit), self.count // self.rows_of_unit)

    def position(self, epoch: int, part: int) -> int:
        return epoch * self.count + part * self.rows_of_unit

    def _order(self, epoch: int) -> np.ndarray:
        held, order = self._epoch
        if held != epoch + 1:
            order = np.arange(self.starts[-1], dtype=np.uint32)
            if self.data.shuffle:
                np.random.Generator(np.random.PCG64(self.seed + epoch + 1)).shuffle(order)
            self._epoch = (epoch + 1, order)
        return order
