"""How experts are chosen: one file a method, whose name is the method's and which defines METHOD."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from emo_jax.errors import InputError

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


class Options(NamedTuple):
    """What a person may choose beside the method; most methods look at none of it."""

    layer_group: int = 0  # layerwise: recompute activations for so many layers at a time; 0 keeps them
    on_host: bool = False  # layerwise: keep them in host memory
    seed: int = 0  # random


class Method(NamedTuple):
    """One of the first three. `G` groups, shapes else as in `emo_jax.model`.

    statistic  what a forward pass adds up by row and expert, see `emo_jax.subsets.sweep.Statistic`: the ranking of all layers
    scores     (loaded, calibration, options) -> float [G, L, R], any other ranking that serves every budget
    masks      (loaded, calibration, budget, options) -> (bool, float) [G, L, R]: where a layer's ranking depends on what the
               layers before it keep
    """

    statistic: Any = None
    scores: Callable | None = None
    masks: Callable | None = None
    keeps_scores: bool = True  # whether a subset file holds them, for what is composed of subsets


def get(name: str) -> Method:
    if name not in NAMES:
        raise InputError(f"--method {name!r} must be one of {', '.join(NAMES)}")
    return importlib.import_module(f"{__name__}.{name}").METHOD
