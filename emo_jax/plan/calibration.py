"""The coefficients of the cost model, and how far it is off: least squares over what `emo-jax compile` printed.

`ROWS` is the table of aot/README.md. Who compiles anew replaces its numbers there and here; the fit is made when it is needed,
and `python -m emo_jax.plan.calibration` shows it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from emo_jax import chips
from emo_jax.aot import topology as topologies
from emo_jax.config import load_config, mesh_shape
from emo_jax.plan.cost import Coefficients, Cost, Place, cost


class Row(NamedTuple):
    """One line of the table."""

    config: str
    topology: str
    overrides: tuple[str, ...]
    memory: float  # bytes of a device
    exposed: float  # seconds
    seconds: float  # a step by the kernels' rooflines


def _row(topology: str, overrides: str, memory: float, exposed: float, seconds: float) -> Row:
    """GB, ms, s."""
    return Row("emo_1b14b_1t", topology, tuple(overrides.split()), memory * 1e9, exposed / 1e3, seconds)


ROWS: tuple[Row, ...] = (
    _row("v5p-64", "train.remat=attention", 48.7, 41, 3.34),
    _row("v5p-128", "train.remat=projections", 43.1, 1, 1.59),
    _row("v5p-128", "train.remat=full", 21.9, 1, 1.69),
    _row("v5p-128", "train.remat=light train.batch_size=256", 22.9, 25, 0.404),
    _row("v6e-256", "train.remat=light mesh.data=2 mesh.fsdp=128", 21.0, 97, 0.397),
    _row("v6e-256", "train.remat=light", 20.1, 154, 0.484),
    _row("v5e-256", "train.remat=attention mesh.data=2 mesh.fsdp=128", 8.7, 340, 1.33),
    _row("v5e-256", "train.remat=attention mesh.data=2 mesh.fsdp=8 mesh.expert=16 kernels.dispatch=local", 9.3, 206, 1.46),
    _row("tpu7x:4x4x4", "train.remat=attention", 15.3, 26, 0.518),
)


def place(config, topology: str, slices: int = 1) -> Place:
    """Where `config` runs on so many slices of `topology`. Raises `InputError`."""
    name, grid = topologies.parse(topology)
    devices = math.prod(grid) * chips.CHIPS[name].devices * slices
    return Place(chips.CHIPS[name], grid, mesh_shape(config, devices, slices), slices, name not in chips.WITHOUT_SPARSE_CORES)


@functools.cache
def cost_of(row: Row) -> Cost:
    config = load_config(row.config, row.overrides)
    return cost(config, place(config, row.topology))


def fit(rows: Sequence[Row], costs: Sequence[Cost]) -> Coefficients:
    """Least squares of the relative errors: of the seconds without exposed ones, of these, and of memory."""
    import numpy as np

    def solve(parts: list[tuple[float, ...]], of: list[float], scale: list[float]) -> list[float]:
        weight = 1 / np.asarray(scale)
        return np.linalg.lstsq(np.asarray(parts) * weight[:, None], np.asarray(of) * weight, rcond=None)[0].tolist()

    bandwidth = [c.place.chip.bandwidth or math.nan for c in costs]
    seconds = [row.seconds for row in rows]
    time = solve([(c.bytes_passes / b, c.bytes_weights / b) for c, b in zip(costs, bandwidth)],
                 [row.seconds - row.exposed - c.kernel_seconds - c.bytes_fixed / b
                  for row, c, b in zip(rows, costs, bandwidth)], seconds)
    exposed = solve([(c.communication(prefetched=True),) for c in costs],
                    [row.exposed - c.communication(prefetched=False) for row, c in zip(rows, costs)], seconds)
    memory = solve([(c.saved, c.working, c.gathered) for c in costs],
                   [row.memory - c.state - c.gradients for row, c in zip(rows, costs)], [row.memory for row in rows])
    return Coefficients(*time, *exposed, *memory)


class Error(NamedTuple):
    """Predicted / compiled - 1 of one row; `left_out`: by a fit without the row."""

    row: Row
    seconds: float
    memory: float
    seconds_left_out: float
    memory_left_out: float


class Calibration(NamedTuple):
    coefficients: Coefficients
    errors: tuple[Error, ...]

    def summary(self) -> dict[str, dict[str, float]]:
        """Of seconds and memory: the mean and the largest error of the fit, and of rows that it was not fitted on."""
        def of(name: str) -> tuple[float, float]:
            off = [abs(getattr(error, name)) for error in self.errors]
            return sum(off) / len(off), max(off)

        return {what: dict(zip(("mean", "largest", "mean_left_out", "largest_left_out"), of(what) + of(f"{what}_left_out")))
                for what in ("seconds", "memory")}


@functools.cache
def calibration(rows: tuple[Row, ...] = ROWS) -> Calibration:
    costs = [cost_of(row) for row in rows]

    def off(row: Row, c: Cost, fitted: Coefficients) -> tuple[float, float]:
        return c.seconds(fitted) / row.seconds - 1, c.memory(fitted) / row.memory - 1

    def others(row: Row) -> Coefficients:
        kept = [i for i, r in enumerate(rows) if r is not row]
        return fit([rows[i] for i in kept], [costs[i] for i in kept])

    fitted = fit(rows, costs)
    return Calibration(fitted, tuple(
        Error(row, *off(row, c, fitted), *off(row, c, others(row))) for row, c in zip(rows, costs)))


if __name__ == "__main__":
    from emo_jax.plan.text import errors

    print(errors(calibration()))
