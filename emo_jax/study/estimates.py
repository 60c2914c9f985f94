"""What many models measured, as estimates: means with the half width of their 95 % interval over seeds (Student's t)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from emo_jax.errors import InputError
from emo_jax.study.variants import VARIANTS

CONFIDENCE = 0.95
Variants = dict[str, dict[int, dict[str, Any]]]  # variant -> seed -> measures


class Estimate(NamedTuple):
    mean: float
    half_width: float | None  # that the interval over seeds has; None for one seed
    seeds: int

    def text(self, form: str = "+.3f") -> str:
        return f"{self.mean:{form}}" + (f" ± {self.half_width:{form.lstrip('+')}}" if self.half_width is not None else "")

    def percent_above_one(self) -> str:
        width = "" if self.half_width is None else f" ± {100 * self.half_width:.2f}"
        return f"{100 * (self.mean - 1):+.2f}{width} %"


def estimate(values: list[float]) -> Estimate:
    n = len(values)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * stats.sem(values)) if n > 1 else None
    return Estimate(float(np.mean(values)), half, n)


def read(folder: str | Path) -> Variants:
    """Raises `InputError` if there are no measures, or they are of other documents or labels."""
    variants: Variants = {}
    paths = sorted(Path(folder).glob("*/*/measures.json"))
    for path in paths:
        try:
            found = json.loads(path.read_text())
            variants.setdefault(path.parent.parent.name, {})[int(found["seed"])] = found
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise InputError(f"{path}: not the measures of a model ({type(e).__name__}: {e})") from None
        first = variants[paths[0].parent.parent.name]
        for name in ("data", "labels", "step"):
            if found.get(name) != next(iter(first.values())).get(name):
                raise InputError(f"{path}: {name} differs from {paths[0]}; measure all models alike")
    if not variants:
        raise InputError(f"{folder}: no VARIANT/SEED/measures.json; make them with `emo-jax study measure`")
    return variants


def over_seeds(of: dict[int, dict[str, Any]], value: Callable[[dict], float | None]) -> Estimate | None:
    """None where any seed lacks the value."""
    values = [value(measures) for measures in of.values()]
    known = [v for v in values if v is not None]
    return estimate(known) if len(known) == len(values) else None


def ratio(variants: Variants, name: str, baseline: str, value: Callable[[dict], float | None]) -> Estimate | None:
    """A value of one variant over that of the baseline, seed by seed; None where it has no meaning."""
    seeds = sorted(set(variants[name]) & set(variants[baseline]))
    pairs = [(value(variants[name][s]), value(variants[baseline][s])) for s in seeds]
    ratios = [a / b for a, b in pairs if a is not None and b]
    return estimate(ratios) if 0 < len(ratios) == len(pairs) else None


def full(part: str) -> Callable[[dict], float | None]:
    return lambda measures: measures["full"][part]


def above(part: str, share: float, method: str = "", documents: int = 0) -> Callable[[dict], float | None]:
    """The loss above the full model's; by default with the first method and the most documents."""

    def value(measures: dict) -> float | None:
        rows = [r for r in measures["subsets"] if r["share"] == share and r["method"] == (method or method_of(measures))]
        rows = [r for r in rows if r["documents"] == (documents or max(r["documents"] for r in rows))]
        return rows[0][part] if rows else None

    return value


def selective_gap(votes: str, share: str) -> Callable[[dict], float | None]:
    return lambda measures: measures["selective_gap"][votes][share]["trained"] if "selective_gap" in measures else None


def method_of(measures: dict) -> str:
    return measures["subsets"][0]["method"]


def kept_shares(variants: Variants) -> list[float]:
    return sorted({r["share"] for of in variants.values() for m in of.values() for r in m["subsets"]}, reverse=True)


def baseline_of(name: str, variants: Variants, default: str) -> str:
    """The standard MoE with the same weights of the losses, where it was trained."""
    own = VARIANTS[name].baseline if name in VARIANTS else default
    return own if own in variants else default


def cell(found: Estimate | None, form: str = "+.3f") -> str:
    return "" if found is None else found.text(form)


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
