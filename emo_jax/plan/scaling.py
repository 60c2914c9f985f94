"""Scaling on paper: what a device sends and holds in a step as devices are added, its own tokens staying as many."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from emo_jax.config import Config, mesh_shape, override
from emo_jax.errors import InputError
from emo_jax.plan.calibration import calibration, place
from emo_jax.plan.cost import cost

DEVICES = (8, 64, 256, 1024)
FLAT = 1.15  # bytes of the largest mesh / those of the smallest


class Strategy(NamedTuple):
    name: str
    axis: str  # takes as many devices as it can, at most `largest`; fsdp takes the others
    dispatch: str = "auto"
    largest: int = 2**30


def strategies(config: Config) -> list[Strategy]:
    m = config.model
    found = [Strategy("data", "data"), Strategy("fsdp", "fsdp")]
    if m.num_experts:
        found += [Strategy(f"expert, {how}", "expert", how, m.num_experts) for how in ("local", "ring", "all_to_all")]
    return [*found, Strategy("tensor (8) x fsdp", "tensor", "auto", 8)]


def table(config: Config, topology: str) -> dict[str, Any]:
    """Rows a device as with `topology`. Raises `InputError` if they are none."""
    here = place(dataclasses.replace(config, mesh=type(config.mesh)()), topology)
    rows = config.train.batch_size // math.prod(here.mesh.values())
    fitted, lines = calibration().coefficients, []
    for strategy in strategies(config):
        cells: list[dict[str, float] | None] = []
        for devices in DEVICES:
            size = math.gcd(devices, strategy.largest)
            mesh = {"fsdp": devices // size, strategy.axis: size}
            try:
                c = override(config, [f"mesh.{axis}={n}" for axis, n in mesh.items()] + [
                    f"kernels.dispatch={strategy.dispatch}", f"train.batch_size={rows * devices}", "train.microbatches=1"])
                one = cost(c, here._replace(mesh=mesh_shape(c, devices)))
                waited = sum(x.wire for x in one.collectives if not x.prefetched)
                cells.append({"devices": devices, "bytes": sum(x.wire for x in one.collectives), "waited_bytes": waited,
                              "memory": one.memory(fitted)})
            except InputError:
                cells.append(None)
        sent = [cell["bytes"] for cell in cells if cell]
        lines.append({"strategy": strategy.name, "cells": cells, "flat": len(sent) > 1 and sent[-1] <= FLAT * sent[0]})
    return {"config": config.name, "topology": topology, "rows_per_device": rows, "remat": config.train.remat,
            "devices": list(DEVICES), "memory_of_chip": here.chip.memory, "strategies": lines}


def text(r: dict[str, Any]) -> str:
    lines = [
        f"{r['config']}, {r['rows_per_device']} rows a device, remat {r['remat']}: GB that a device sends in a step / GB that "
        f"it holds (of {r['memory_of_chip'] / 1e9:.1f})",
        f"  {'devices':<18}" + "".join(f"{n:>16}" for n in r["devices"]),
    ]
    for line in r["strategies"]:
        cells = [f"{cell['bytes'] / 1e9:.1f} / {cell['memory'] / 1e9:.1f}" if cell else "-" for cell in line["cells"]]
        padded = "".join(f"{cell:>16}" for cell in cells)
        lines.append(f"  {line['strategy']:<18}{padded}  {'flat' if line['flat'] else 'grows'}")
    return "\n".join([*lines,
        "  flat: the bytes. -: such a mesh does not divide the model. The expert axis takes a device for each expert at most,",
        "  fsdp the others. What ring, all_to_all and tensor exchange is waited for; weights, gradients are prefetched.",
    ])
