"""`emo-jax bench`: what the step and its parts cost against the ideal, as ratios within one run.

Machines differ and are shared, so every figure is the median of rounds that run the compared things in turn.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable

import jax
import jax.numpy as jnp
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


def compute_dtype() -> type:
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def matmul() -> tuple[Callable[[], object], int]:
    """(a dense matmul that is large enough for this machine's full rate, its FLOPs)"""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (side, side), compute_dtype())  # a GPU multiplies ones faster than other numbers
    multiply = jax.jit(lambda a, b: a @ b)
    return lambda: multiply(a, a), 2 * side**3


def random_segments(rows: int, length: int, documents: int) -> np.ndarray:
    """Segment ids [rows, length] of about `documents` documents a row."""
    starts = np.zeros((rows, length), np.int32)
    starts[np.arange(rows)[:, None], np.random.default_rng(0).integers(1, length, (rows, documents - 1))] = 1
    return np.cumsum(starts, axis=1, dtype=np.int32) + 1


def shape(small: dict[str, int], published: dict[str, int], args: Namespace) -> dict[str, int]:
    """The sizes that `args` gives; the others are the small ones on CPU, else the published model's."""
    default = small if jax.default_backend() == "cpu" else published
    return {name: size if getattr(args, name) is None else getattr(args, name) for name, size in default.items()}
