"""The order of the rows of token files: blocks in a random order, rows mixed within a window of blocks.

A block is BLOCK_TOKENS successive tokens of a section (its last one may be shorter), so that a bucket is read in pieces of
about a megabyte; a window is WINDOW_BLOCKS successive blocks of an epoch's order, so that a batch holds rows of many places.
Which row stands at a position is computed from (seed, epoch, position): nothing is stored but the number of rows of each block.
Blocks do not depend on the sequence length, so that a stage with another one goes on with the first window that was not begun.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from emo_jax.data.order import mix

BLOCK_TOKENS = 1 << 18
WINDOW_BLOCKS = 64
_KEPT_WINDOWS = 8  # orders of windows that are kept
_KEPT_EPOCHS = 2


class BlockOrder:
    """rows [n] int: the rows of every block. key: tells this order from those of other seeds and labels, 64 bit."""

    def __init__(self, rows: np.ndarray, key: int, shuffle: bool = True):
        self.rows, self.key, self.shuffle = np.asarray(rows, np.int32), key, shuffle
        self.count = int(self.rows.sum(dtype=np.int64))  # rows of an epoch
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(block [n], row in the block [n]) of positions [n] in the concatenated epochs."""
        positions = np.asarray(positions, np.int64)
        blocks, rows = np.empty_like(positions), np.empty_like(positions)
        epochs, inside = np.divmod(positions, self.count)
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            order, starts = self._epoch(int(epoch))
            mixed = self._mix(int(epoch), starts, inside[here])
            slots = np.searchsorted(starts, mixed, side="right") - 1
            blocks[here], rows[here] = order[slots], mixed - starts[slots]
        return blocks, rows

    def after_window(self, position: int) -> tuple[int, int]:
        """(epoch, window): the first window that begins at or after `position`."""
        epoch, inside = divmod(position, self.count)
        _, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts[::WINDOW_BLOCKS], inside, side="left"))
        return (epoch, window) if window * WINDOW_BLOCKS < len(self.rows) else (epoch + 1, 0)

    def window_start(self, epoch: int, window: int) -> int:
        """The position at which a window begins."""
        return epoch * self.count + int(self._epoch(epoch)[1][window * WINDOW_BLOCKS])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(block of every slot [n], first position of every slot and the end [n + 1])."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            order = np.arange(len(self.rows))
            if self.shuffle:
                order = np.argsort(mix(self._key(epoch), order.astype(np.uint64)), kind="stable")
            return order.astype(np.int32), np.concatenate([[0], np.cumsum(self.rows[order], dtype=np.int64)])

        return _kept(self._epochs, epoch, _KEPT_EPOCHS, make)

    def _mix(self, epoch: int, starts: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """Where the rows of an epoch's positions stand in the order of its blocks, one after the other."""
        if not self.shuffle:
            return inside
        edges = np.append(starts[:-1:WINDOW_BLOCKS], starts[-1])
        windows = np.searchsorted(edges, inside, side="right") - 1
        mixed = np.empty_like(inside)
        for window in np.unique(windows):
            here, first, end = windows == window, edges[window], edges[window + 1]

            def make(window=window, size=end - first) -> np.ndarray:
                return np.argsort(mix(self._key(epoch, int(window) + 1), np.arange(size, dtype=np.uint64)), kind="stable")

            mixed[here] = first + _kept(self._windows, (epoch, int(window)), _KEPT_WINDOWS, make)[inside[here] - first]
        return mixed

    def _key(self, *numbers: int) -> int:
        key = self.key
        for number in numbers:
            key = int(mix(key, np.array([number], np.uint64))[0])
        return key

    def __reduce__(self):
        return BlockOrder, (self.rows, self.key, self.shuffle)


def _kept(cache: OrderedDict, key, limit: int, make):
    """The value of a key, made where it is not there; the `limit` newest are kept. Threads may make the same twice."""
    value = cache.get(key)
    if value is None:
        value = cache[key] = make()
        while len(cache) > limit:
            try:
                cache.popitem(last=False)
            except KeyError:  # another thread was faster
                break
    return value
