"""Which row of which label stands at row k of a stage.

Labels have fixed numbers of every MIXED rows, evenly spread, so that their shares do not drift, any row is found at once, and
no row comes twice in an epoch. A label that was read data.max_epochs times leaves, and the others take its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from emo_jax.errors import InputError

MIXED = 1024


class _Piece(NamedTuple):
    """Rows of a stage with the same labels."""

    first: int  # row of the stage
    counts: np.ndarray  # [labels] of every MIXED rows
    bases: np.ndarray  # [labels] rows of each that were read before


class Mixture:
    """weights [n]: shares of the rows. bases [n]: rows of each label that were read before the stage. limits [n]: rows that
    may be read in all; None: no limit."""

    def __init__(self, weights: Sequence[float], bases: Sequence[int], limits: Sequence[int] | None = None):
        shares, read = np.asarray(weights, np.float64), np.asarray(bases, np.int64)
        self.rows: int | None = None  # of the stage; None: without end
        self._pieces = [_Piece(0, fixed_counts(shares), read)] if limits is None else []
        if limits is not None:
            self.rows = self._add_pieces(shares, read, np.asarray(limits, np.int64))
        self._patterns = [_pattern(piece.counts) for piece in self._pieces]

    def _add_pieces(self, shares: np.ndarray, read: np.ndarray, limits: np.ndarray) -> int:
        """The rows of all pieces, each of which ends where a label has not enough rows left for another round."""
        first = 0
        while (counts := fixed_counts(np.where(read < limits, shares, 0.0))).any():
            active = counts > 0
            rounds = int(((limits - read)[active] // counts[active]).min())
            if rounds:
                self._pieces.append(_Piece(first, counts, read))
                first, read = first + rounds * int(counts.sum()), read + rounds * counts
            read = np.where(active & (limits - read < counts), limits, read)
        return first

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(label [n], position among the label's rows [n]) of rows [n] of the stage. Raises `IndexError` beyond the end."""
        rows = np.asarray(rows, np.int64)
        if self.rows is not None and rows.size and rows.max() >= self.rows:
            raise IndexError(int(rows.max()))
        labels, positions = np.empty_like(rows), np.empty_like(rows)
        which = np.searchsorted([piece.first for piece in self._pieces], rows, side="right") - 1
        for number in np.unique(which):
            piece, (label, rank), here = self._pieces[number], self._patterns[number], which == number
            rounds, slot = np.divmod(rows[here] - piece.first, len(label))
            labels[here] = label[slot]
            positions[here] = piece.bases[label[slot]] + rounds * piece.counts[label[slot]] + rank[slot]
        return labels, positions

    def read(self, rows: int) -> np.ndarray:
        """[labels]: how many rows of each have been read, those before the stage included, after its first `rows`."""
        if not self._pieces:
            return np.zeros(0, np.int64)
        number = max(int(np.searchsorted([piece.first for piece in self._pieces], rows, side="right")) - 1, 0)
        piece, (label, _) = self._pieces[number], self._patterns[number]
        rounds, slot = divmod(rows - piece.first, len(label))
        return piece.bases + rounds * piece.counts + np.bincount(label[:slot], minlength=len(piece.counts))


def fixed_counts(weights: np.ndarray) -> np.ndarray:
    """[n] integers in these proportions that sum to MIXED (largest remainders), at least 1 for each that is not zero; one
    alone is 1 of 1."""
    weights = np.asarray(weights, np.float64)
    if (weights > 0).sum() <= 1:
        return (weights > 0).astype(np.int64)
    exact = np.maximum(weights / weights.sum() * MIXED, weights > 0)
    counts = np.floor(exact).astype(np.int64)
    while counts.sum() != MIXED:
        step = 1 if counts.sum() < MIXED else -1
        error = np.where((weights > 0) & ((step > 0) | (counts > 1)), step * (exact - counts), -np.inf)
        counts[int(np.argmax(error))] += step
    return counts


def _pattern(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(label [sum of counts], its how-manieth row), every label evenly spread."""
    label = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([np.arange(n) for n in counts])
    order = np.lexsort((label, (rank + 0.5) / counts[label]))
    return label[order], rank[order]


def parse_mixture(text: str, known: Sequence[str]) -> dict[str, float]:
    """{label: weight} of data.mixture, "label:weight,...". Raises `InputError`."""
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        label, colon, weight = part.rpartition(":")
        try:
            value = float(weight)
        except ValueError:
            value = -1.0
        if not colon or not 0 < value < float("inf") or label in weights:
            raise InputError(f"data.mixture={text!r}: {part!r} must be a label and a weight more than 0, such as web:0.7, each "
                             f"label once")
        if label not in known:
            raise InputError(f"data.mixture={text!r}: there is no label {label!r}; there are {', '.join(list(known)[:50])}")
        weights[label] = value
    return weights
