"""Intervals over documents: a measure is computed anew with the weights of every resample, and two models share them.

A measure is a function of weights [B, D], of how often every document is in each of B resamples, that returns [B] or, by
layer, [B, L]. Its interval is its value with all documents once, more and less 1.96 standard deviations of the resamples:
their quantiles would be shifted, because information is overestimated the more, the more often the same document is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

RESAMPLES = 100
SIGMAS = 1.959964  # of 95 %
Measure = Callable[[np.ndarray], np.ndarray]


def resamples(documents: int, seed: int = 0, count: int = RESAMPLES) -> Float[np.ndarray, "B D"]:
    """Row 0: every document once; then bootstrap resamples. Of one document there is none."""
    if documents < 2:
        return np.ones((1, documents))
    drawn = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), count)
    return np.concatenate([np.ones((1, documents)), drawn])


@dataclass(frozen=True)
class Estimate:
    """A value and its resamples, the value first: [B] or [B, L]."""

    drawn: np.ndarray

    @cached_property
    def _half_width(self) -> np.ndarray | None:
        return np.asarray(SIGMAS * self.drawn[1:].std(axis=0, ddof=1)) if len(self.drawn) > 2 else None

    def mean(self) -> Estimate:
        """Over the layers."""
        return Estimate(self.drawn.mean(axis=1)) if self.drawn.ndim == 2 else self

    def __sub__(self, other: Estimate) -> Estimate:
        """Paired: both are of the same resamples."""
        both = min(len(self.drawn), len(other.drawn))
        return Estimate(self.drawn[:both] - other.drawn[:both])

    def describe(self) -> dict[str, Any]:
        """{"value", "low", "high"}: numbers, or lists by layer; no interval from too few resamples."""
        value, half = self.drawn[0], self._half_width
        low, high = (None, None) if half is None else ((value - half).tolist(), (value + half).tolist())
        return {"value": value.tolist(), "low": low, "high": high}
