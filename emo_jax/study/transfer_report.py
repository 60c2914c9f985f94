"""The comparison of the ways to improve a module: a table, and a figure, with intervals over seeds.

A folder DIR/VARIANT/SEED/LABEL/ARM.json holds what `study.transfer` measured. Means over the labels that all seeds have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emo_jax import plots
from emo_jax.errors import InputError
from emo_jax.files import AnyPath
from emo_jax.study.estimates import Estimate, cell, estimate, table
from emo_jax.study.transfer import ARMS

FIELDS = ("arm", "label", "left_out", "seed", "subset", "full", "others", "cost", "keep")


class Row(NamedTuple):
    """Of a variant and an arm, nats/token: gains on the label, and the change of the others."""

    labels: list[str]
    subset: Estimate
    full: Estimate
    carried: Estimate  # full / subset
    others: Estimate
    forgotten: Estimate  # others / full
    cost: float

    def cells(self) -> list[str]:
        return [cell(self.subset), cell(self.full), cell(self.carried, ".2f"), cell(self.others),
                cell(self.forgotten, "+.1%"), f"{self.cost:.2f}"]


HEAD = ["in the subset's view", "in the whole model", "carried over", "other labels", "forgotten", "cost"]


def read(folder: str | Path) -> dict[str, list[dict[str, Any]]]:
    """{variant: what was measured}. Raises `InputError` if there is nothing."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(Path(folder).glob("*/*/*/*.json")):
        try:
            measured = json.loads(path.read_text())
            found.setdefault(path.parents[2].name, []).append({name: measured[name] for name in FIELDS})
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path}: not the result of a way of training ({type(e).__name__}: {e})") from None
    if not found:
        raise InputError(f"{folder}: no VARIANT/SEED/LABEL/ARM.json; make them with `emo-jax study transfer`")
    return found


def compare(folder: str | Path) -> dict[str, Any]:
    """{"arms": {variant: {arm: estimates}}, "text" (Markdown), "figure" (a file or None)}"""
    measured = read(folder)
    rows = {variant: {arm: row(of) for arm in ARMS if (of := [m for m in all_ if m["arm"] == arm])}
            for variant, all_ in measured.items()}
    text = "\n\n".join([_all_labels(rows, measured), _by_label(measured)])
    Path(folder, "transfer.md").write_text(text + "\n")
    figure = _figure(rows, Path(folder) / "transfer.png")
    return {"arms": {variant: {arm: {name: value._asdict() if isinstance(value, Estimate) else value
                                     for name, value in r._asdict().items()} for arm, r in of.items()}
                     for variant, of in rows.items()}, "text": text, "figure": figure and str(figure)}


def row(measured: list[dict[str, Any]]) -> Row:
    """Of the labels and seeds of an arm. Ratios are those of a seed's means. Raises `InputError` for seeds without a label in
    common."""
    seeds = sorted({m["seed"] for m in measured})
    labels = sorted(set.intersection(*({m["label"] for m in measured if m["seed"] == s} for s in seeds)))
    if not labels:
        raise InputError(f"{measured[0]['arm']}: the seeds {seeds} have no label in common; measure all of them alike")
    measured = [m for m in measured if m["label"] in labels]

    def over_seeds(value: Callable[[Callable[[str], float]], float]) -> Estimate:
        return estimate([value(lambda name, s=s: float(np.mean([m[name] for m in measured if m["seed"] == s]))) for s in seeds])

    return Row(labels, over_seeds(lambda mean: mean("subset")), over_seeds(lambda mean: mean("full")),
               over_seeds(lambda mean: mean("full") / mean("subset")), over_seeds(lambda mean: mean("others")),
               over_seeds(lambda mean: mean("others") / mean("full")), measured[0]["cost"])


def _all_labels(rows: dict[str, dict[str, Row]], measured: dict[str, list[dict[str, Any]]]) -> str:
    labels = sorted({m["label"] + " (left out of pretraining)" * m["left_out"] for all_ in measured.values() for m in all_})
    keep = sorted({m["keep"] for all_ in measured.values() for m in all_})
    body = [[variant, f"`{arm}`: {ARMS[arm].sentence}", ", ".join(r.labels), str(r.full.seeds), *r.cells()]
            for variant, of in rows.items() for arm, r in of.items()]
    return (f"Gain on the label that a module of {', '.join(map(str, keep))} experts was trained on, change of all others "
            f"in the whole model (nats/token), and cost in plain trainings of the subset. Labels: {', '.join(labels)}.\n\n"
            + table(["model", "way", "labels", "seeds", *HEAD], body))


def _by_label(measured: dict[str, list[dict[str, Any]]]) -> str:
    body = []
    for variant, all_ in measured.items():
        for arm in ARMS:
            for label in sorted({m["label"] for m in all_ if m["arm"] == arm}):
                r = row([m for m in all_ if m["arm"] == arm and m["label"] == label])
                body.append([variant, f"`{arm}`", label, *r.cells()[:-1]])
    return "By label:\n\n" + table(["model", "way", "label", *HEAD[:-1]], body)


def _figure(rows: dict[str, dict[str, Row]], path: AnyPath) -> AnyPath | None:
    lines = [(f"{variant}: {arm}", r, color) for color, (variant, of) in zip(plots.COLORS, rows.items())
             for arm, r in of.items()]

    def draw(gains, others) -> None:
        for y, (_, r, color) in enumerate(lines):
            plots.span(gains, y, r.subset.mean, r.subset.half_width, color, hollow=True)
            plots.span(gains, y, r.full.mean, r.full.half_width, color, hollow=False)
            plots.span(others, y, r.others.mean, r.others.half_width, color, hollow=False)
        for axis in (gains, others):
            axis.set_ylim(len(lines) - 0.5, -0.5)
            axis.axvline(0, color=plots.LIGHT, zorder=0)
        gains.set_yticks(range(len(lines)), [name for name, _, _ in lines])
        others.set_yticks([])
        gains.set_title("Gain on the label: in the subset's view (hollow), in the whole model (filled)")
        others.set_title("Change of all other labels in the whole model")

    return plots.save(path, 2, (14, 1.5 + 0.32 * len(lines)), draw,
                      "What a module learns, and what of it the whole model keeps (nats/token; bands: 95 % over seeds)")
