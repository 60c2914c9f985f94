"""The repetition filter: rows that a model can only learn to copy carry no loss."""

from __future__ import annotations

import numpy as np

MAX_PERIOD = 13
MIN_TIMES = 32


def is_repetitive(tokens: np.ndarray, max_period: int = MAX_PERIOD, min_times: int = MIN_TIMES) -> bool:
    """Whether some sequence of 1..max_period tokens follows itself min_times times without a break.

    tokens [n] int, without padding. A stretch repeats a period m as long as each token equals the one m before it, so
    that min_times periods are (min_times - 1) * m equal pairs in a row.
    """
    for period in range(1, max_period + 1):
        needed = (min_times - 1) * period
        if len(tokens) - period < needed:
            return False
        differs = np.flatnonzero(tokens[period:] != tokens[:-period])
        edges = np.concatenate(([-1], differs, [len(tokens) - period]))
        if np.diff(edges).max() - 1 >= needed:
            return True
    return False


def repetitive_rows(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.array([is_repetitive(row[:n]) for row, n in zip(tokens, lengths)])
