"""`emo-jax bench`: what the step and its parts cost against the ideal, as ratios within one run.

Machines differ and are shared, so every figure is the median of rounds that run the compared things in turn.
"""

from __future__ import annotations

import time
from typing import Callable

import jax
import numpy as np


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every function in every round, after one call to warm up: {name: [rounds]}."""
    for function in functions.values():
        jax.block_until_ready(function())
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: np.asarray(values) for name, values in times.items()}


def ratio(times: dict[str, np.ndarray], a: str, b: str) -> float:
    """The median over rounds of time a / time b, pair by pair."""
    return float(np.median(times[a] / times[b]))
