"""The repetition filter: rows that a model can only learn to copy."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Integer

MAX_PERIOD = 13
MIN_TIMES = 32

_SAMPLES = 3  # of the equal pairs of a repetition are looked at first
_BLOCK_TOKENS = 1 << 18  # of rows that are looked at together: they stay in the cache


def is_repetitive(tokens: np.ndarray, max_period: int = MAX_PERIOD, min_times: int = MIN_TIMES) -> bool:
    """Whether some sequence of 1..max_period tokens follows itself min_times times without a break.

    tokens [n] int, without padding. A stretch repeats a period m as long as each token equals the one m before it, so
    that min_times periods are (min_times - 1) * m equal pairs in a row.
    """
    return any(_repeats(tokens, period, min_times) for period in range(1, max_period + 1))


def repetitive_rows(tokens: Integer[np.ndarray, "n T"],
                    lengths: Integer[np.ndarray, "n"] | None = None) -> Bool[np.ndarray, "n"]:
    """`is_repetitive` of the first `lengths` [n] tokens (None: all) of every row, many times as fast: a row is looked at
    whole only where _SAMPLES pairs in turn, a _SAMPLES-th of a repetition apart, are equal."""
    n, length = tokens.shape
    found, step = np.zeros(n, bool), max(1, _BLOCK_TOKENS // max(length, 1))
    for start in range(0, n, step):
        block = tokens[start:start + step]
        ends = None if lengths is None or (lengths[start:start + step] == length).all() else lengths[start:start + step]
        for period in range(1, MAX_PERIOD + 1):
            stride = (MIN_TIMES - 1) * period // _SAMPLES
            equal = block[:, period::stride] == block[:, :max(length - period, 0):stride]
            if ends is not None:
                equal &= np.arange(period, length, stride) < ends[:, None]
            in_turn = equal[:, 2:] & equal[:, 1:-1] & equal[:, :-2]
            for row in np.flatnonzero(in_turn.any(axis=1)):
                if not found[start + row]:
                    whole = block[row] if ends is None else block[row, :ends[row]]
                    found[start + row] = _repeats(whole, period, MIN_TIMES)
    return found


def _repeats(tokens: np.ndarray, period: int, min_times: int) -> bool:
    needed = (min_times - 1) * period
    if len(tokens) - period < needed:
        return False
    differs = np.flatnonzero(tokens[period:] != tokens[:-period])
    edges = np.concatenate(([-1], differs, [len(tokens) - period]))
    return bool(np.diff(edges).max() - 1 >= needed)
