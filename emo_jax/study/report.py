"""The comparison of the study's models: tables and a figure, with intervals over seeds.

A folder DIR/VARIANT/SEED/measures.json holds what `study.measure` found of one model. Numbers are means over seeds with the
half width of their 95 % interval (Student's t; none for one seed). Differences between two variants are taken seed by seed:
models of one seed read the same rows in the same order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
from scipy import stats

from emo_jax.errors import InputError

CONFIDENCE = 0.95
Runs = dict[str, dict[int, dict[str, Any]]]  # variant -> seed -> measures


class Estimate(NamedTuple):
    mean: float
    half_width: float | None  # of the interval over seeds; None for one seed
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


def read(folder: str | Path) -> Runs:
    """Raises `InputError` if there are no measures, or they are of other documents or labels."""
    runs: Runs = {}
    paths = sorted(Path(folder).glob("*/*/measures.json"))
    for path in paths:
        try:
            found = json.loads(path.read_text())
            runs.setdefault(path.parent.parent.name, {})[int(found["seed"])] = found
        except (ValueError, KeyError) as e:
            raise InputError(f"{path}: not the measures of a model ({type(e).__name__}: {e})") from None
        first = runs[paths[0].parent.parent.name]
        for name in ("data", "labels", "step"):
            if found[name] != next(iter(first.values()))[name]:
                raise InputError(f"{path}: {name} differs from {paths[0]}; measure all models alike")
    if not runs:
        raise InputError(f"{folder}: no VARIANT/SEED/measures.json; make them with `emo-jax study measure`")
    return runs


def compare(folder: str | Path, main: str = "emo", baseline: str = "stdmoe") -> dict[str, Any]:
    """{"variants": {name: estimates}, "main_over_baseline": ratios of their losses above the full model by kept share,
    "text" (Markdown), "figure" (a file or None)}"""
    runs = read(folder)
    for name in (main, baseline):
        if name not in runs:
            raise InputError(f"{folder}: no variant {name!r}; there are {', '.join(runs)}")
    order = [main, baseline, *sorted(set(runs) - {main, baseline})]
    runs = {name: runs[name] for name in order}
    text = "\n\n".join([_overview(runs, baseline), _choosing(runs, main, baseline), _information(runs)])
    figure = _figure(runs, main, baseline, Path(folder) / "study.png")
    Path(folder, "study.md").write_text(text + "\n")
    ratios = {f"{s:.1%}": r._asdict() for s in _shares(runs) if (r := ratio(runs, main, baseline, above("trained", s)))}
    return {"variants": {name: _summary(of) for name, of in runs.items()}, "main_over_baseline": ratios, "text": text,
            "figure": figure}


# ---- numbers --------------------------------------------------------------------------------------------------------


def over_seeds(of: dict[int, dict[str, Any]], value: Callable[[dict], float | None]) -> Estimate | None:
    """None where any seed lacks the value."""
    values = [value(measures) for measures in of.values()]
    return None if any(v is None for v in values) else estimate(values)


def ratio(runs: Runs, name: str, baseline: str, value: Callable[[dict], float | None]) -> Estimate | None:
    """Of two variants, seed by seed; None where it has no meaning."""
    seeds = sorted(set(runs[name]) & set(runs[baseline]))
    pairs = [(value(runs[name][s]), value(runs[baseline][s])) for s in seeds]
    return None if not pairs or any(None in p or p[1] == 0 for p in pairs) else estimate([a / b for a, b in pairs])


def full(part: str) -> Callable[[dict], float | None]:
    return lambda measures: measures["full"][part]


def above(part: str, share: float, method: str = "", documents: int = 0) -> Callable[[dict], float | None]:
    """The loss above the full model's; by default with the first method and the most documents."""

    def value(measures: dict) -> float | None:
        rows = [r for r in measures["subsets"] if r["share"] == share and r["method"] == (method or _method(measures))]
        rows = [r for r in rows if r["documents"] == (documents or max(r["documents"] for r in rows))]
        return rows[0][part] if rows else None

    return value


def _method(measures: dict) -> str:
    return measures["subsets"][0]["method"]


def _shares(runs: Runs) -> list[float]:
    return sorted({r["share"] for of in runs.values() for m in of.values() for r in m["subsets"]}, reverse=True)


def _summary(of: dict[int, dict]) -> dict[str, Any]:
    rows = [{"method": method, "documents": count, "share": share, "part": part} | found._asdict()
            for method, count, share in sorted({(r["method"], r["documents"], r["share"])
                                                for m in of.values() for r in m["subsets"]})
            for part in ("trained", "left_out") if (found := over_seeds(of, above(part, share, method, count)))]
    return {"seeds": sorted(of), "above_full": rows,
            "full": {part: e._asdict() for part in ("trained", "left_out") if (e := over_seeds(of, full(part)))}}


# ---- tables ---------------------------------------------------------------------------------------------------------


def _overview(runs: Runs, baseline: str) -> str:
    shares = _shares(runs)
    head = ["model", "seeds", "full", f"above {baseline}", *(f"{s:.1%} kept" for s in shares), "full, left-out labels",
            *(f"{s:.1%}, left-out labels" for s in shares)]
    rows = []
    for name, of in runs.items():
        change = None if name == baseline else ratio(runs, name, baseline, full("trained"))
        rows.append([name, str(len(of)), _cell(over_seeds(of, full("trained")), ".3f"),
                     "" if change is None else change.percent_above_one(),
                     *(_cell(over_seeds(of, above("trained", s))) for s in shares),
                     _cell(over_seeds(of, full("left_out")), ".3f"),
                     *(_cell(over_seeds(of, above("left_out", s))) for s in shares)])
    return "Loss (nats/token) of the full model, and above it with few experts:\n\n" + _table(head, rows)


def _choosing(runs: Runs, main: str, baseline: str) -> str:
    shares = _shares(runs)
    head = ["model", "chosen by", "documents", *(f"{s:.1%} kept" for s in shares)]
    rows, lines = [], []
    for name in (main, baseline):
        settings = {(r["method"], r["documents"]) for m in runs[name].values() for r in m["subsets"]}
        for method, count in sorted(settings):
            rows.append([name, method, str(count), *(_cell(over_seeds(runs[name], above("trained", s, method, count)))
                                                     for s in shares)])
    for share in shares:
        if (r := ratio(runs, main, baseline, above("trained", share))) is not None:
            lines.append(f"- {share:.1%} kept: the loss of {main} rises {r.text('.3f')} times as much as that of {baseline}")
        if (r := reach_of_one(runs[main], share)) is not None:
            lines.append(f"- {share:.1%} kept: one document reaches {r.text('.1%')} of what {_most(runs[main])} reach over "
                         f"a random choice ({main})")
    return "How experts are chosen (loss above the full model's, trained labels):\n\n" + _table(head, rows) + (
        "\n\n" + "\n".join(lines))


def _most(of: dict[int, dict]) -> int:
    return max(r["documents"] for m in of.values() for r in m["subsets"])


def reach_of_one(of: dict[int, dict], share: float) -> Estimate | None:
    """(random - one document) / (random - most documents), of the loss with a share of the experts."""

    def value(measures: dict) -> float | None:
        random, one, most = (above("trained", share, *setting)(measures) for setting in
                             (("random",), (_method(measures), 1), (_method(measures),)))
        return None if None in (random, one, most) or random == most else (random - one) / (random - most)

    return over_seeds(of, value)


def _information(runs: Runs) -> str:
    columns = {"expert_label": "expert and label", "expert_token": "expert and token", "cluster_label": "cluster and label",
               "cluster_token": "cluster and token", "effective_experts": "effective experts of a document"}
    rows = [[name, *(_cell(over_seeds(of, lambda m, c=c: m["information"][c]), ".3f") for c in columns)]
            for name, of in runs.items()]
    return ("What experts tell (mutual information above chance, nats; clusters: adjusted, 0 to 1):\n\n"
            + _table(["model", *columns.values()], rows))


def _cell(found: Estimate | None, form: str = "+.3f") -> str:
    return "" if found is None else found.text(form)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


# ---- figure ---------------------------------------------------------------------------------------------------------


def _figure(runs: Runs, main: str, baseline: str, path: Path) -> str | None:
    """Loss above the full model's: by share, by documents that chose, by variant. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed (pip install 'emo-jax[report]')", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (by_share, by_documents, by_variant) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    shares = _shares(runs)
    counts = sorted({r["documents"] for m in runs[main].values() for r in m["subsets"] if r["method"] == _method(m)})
    colors = dict(zip(runs, plt.rcParams["axes.prop_cycle"].by_key()["color"] * 3))
    for name in (main, baseline):
        for part, style in (("trained", "-"), ("left_out", "--")):
            _line(by_share, [100 * s for s in shares], [over_seeds(runs[name], above(part, s)) for s in shares],
                  color=colors[name], linestyle=style, label=f"{name}, {part.replace('_', '-')} labels")
        for share, style in zip(shares[-2:], ("--", "-")):
            _line(by_documents, counts, [over_seeds(runs[name], above("trained", share, documents=n)) for n in counts],
                  color=colors[name], linestyle=style, label=f"{name}, {share:.1%} kept")
    for i, name in enumerate(runs):
        for j, share in enumerate(shares[-2:]):
            found = over_seeds(runs[name], above("trained", share))
            by_variant.barh(i + 0.4 * j - 0.2, found.mean, 0.4, xerr=found.half_width, color=colors[name],
                            alpha=(0.5, 1)[j])
    by_variant.set_yticks(range(len(runs)), list(runs))
    by_variant.invert_yaxis()
    by_share.set_xscale("log", base=2)
    by_share.set_xticks([100 * s for s in shares], [f"{100 * s:g}" for s in shares])
    by_documents.set_xscale("log")
    by_documents.set_xticks(counts, list(map(str, counts)))
    by_documents.minorticks_off()
    for axis, label in ((by_share, "experts kept (%)"), (by_documents, "documents that chose the experts of a label"),
                        (by_variant, f"nats/token, {shares[-2]:.1%} (light) and {shares[-1]:.1%} kept")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    figure.suptitle("Loss above the full model's (mean over labels; bands and bars: 95 % over seeds)", fontsize=11)
    by_share.set_ylabel("nats/token")
    by_share.legend(fontsize=8)
    by_documents.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return str(path)


def _line(axis, xs: list[float], found: list[Estimate | None], **style) -> None:
    points = [(x, e.mean, e.half_width or 0.0) for x, e in zip(xs, found) if e is not None]
    if points:
        x, mean, half = map(np.array, zip(*points))
        axis.plot(x, mean, marker="o", markersize=4, **style)
        axis.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.15, linewidth=0)
