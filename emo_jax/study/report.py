"""The comparison of the study's models: tables and a figure, with intervals over seeds.

A folder DIR/VARIANT/SEED/measures.json holds what `study.measure` found of one model. Numbers are means over seeds with the
half width of their 95 % interval (Student's t; none for one seed). Differences between two variants are taken seed by seed:
models of one seed read the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from emo_jax import plots
from emo_jax.errors import InputError
from emo_jax.files import AnyPath
from emo_jax.study import frontier
from emo_jax.study.estimates import (
    Estimate,
    Variants,
    above,
    baseline_of,
    cell,
    full,
    kept_shares,
    method_of,
    over_seeds,
    ratio,
    read,
    selective_gap,
    table,
)


def compare(folder: str | Path, main: str = "emo", baseline: str = "stdmoe") -> dict[str, Any]:
    """{"variants": {name: estimates}, "main_over_baseline": ratios of their losses above the full model by kept share,
    "text" (Markdown), "figure" (a file or None)}"""
    variants = read(folder)
    for name in (main, baseline):
        if name not in variants:
            raise InputError(f"{folder}: no variant {name!r}; there are {', '.join(variants)}")
    order = [main, baseline, *sorted(set(variants) - {main, baseline})]
    variants = {name: variants[name] for name in order}
    text = "\n\n".join([_overview(variants, baseline), frontier.text(variants, baseline), _places(variants, baseline),
                         _choosing(variants, main, baseline), *_selective_gaps(variants), _information(variants)])
    frontier.figure(variants, baseline, Path(folder) / "frontier.png")
    figure = _figure(variants, main, baseline, Path(folder) / "study.png")
    Path(folder, "study.md").write_text(text + "\n")
    ratios = {f"{s:.1%}": r._asdict() for s in kept_shares(variants)
              if (r := ratio(variants, main, baseline, above("trained", s)))}
    return {"variants": {name: _summary(of) for name, of in variants.items()}, "main_over_baseline": ratios, "text": text,
            "figure": figure and str(figure)}


def _summary(of: dict[int, dict]) -> dict[str, Any]:
    rows = [{"method": method, "documents": count, "share": share, "part": part} | found._asdict()
            for method, count, share in sorted({(r["method"], r["documents"], r["share"])
                                                for m in of.values() for r in m["subsets"]})
            for part in ("trained", "left_out") if (found := over_seeds(of, above(part, share, method, count)))]
    return {"seeds": sorted(of), "above_full": rows,
            "full": {part: e._asdict() for part in ("trained", "left_out") if (e := over_seeds(of, full(part)))}}


# ---- tables ---------------------------------------------------------------------------------------------------------


def _overview(variants: Variants, baseline: str) -> str:
    shares = kept_shares(variants)
    head = ["model", "seeds", "full", f"above {baseline}", *(f"{s:.1%} kept" for s in shares), "full, left-out labels",
            *(f"{s:.1%}, left-out labels" for s in shares)]
    rows = []
    for name, of in variants.items():
        change = None if name == baseline else ratio(variants, name, baseline, full("trained"))
        rows.append([name, str(len(of)), cell(over_seeds(of, full("trained")), ".3f"),
                     "" if change is None else change.percent_above_one(),
                     *(cell(over_seeds(of, above("trained", s))) for s in shares),
                     cell(over_seeds(of, full("left_out")), ".3f"),
                     *(cell(over_seeds(of, above("left_out", s))) for s in shares)])
    return "Loss (nats/token) of the full model, and above it with few experts:\n\n" + table(head, rows)


def _places(variants: Variants, baseline: str) -> str:
    """Where the full model's loss is above the baseline's: by label, and by the position in the document."""
    rows = []
    for name in variants:
        beside = baseline_of(name, variants, baseline)
        if name == beside:
            continue
        for kind, of in (("label", lambda m: m["full"]["labels"]), ("token", lambda m: m.get("positions", {}))):
            for part in of(next(iter(variants[name].values()))):
                found = ratio(variants, name, beside, lambda m, of=of, part=part: of(m).get(part))
                rows += [[name, f"{kind} {part}", found.percent_above_one()]] if found else []
    return "Where: the full model's loss above that of its baseline:\n\n" + table(["model", "part", "above"], rows)


def _choosing(variants: Variants, main: str, baseline: str) -> str:
    shares = kept_shares(variants)
    head = ["model", "chosen by", "documents", *(f"{s:.1%} kept" for s in shares)]
    rows, lines = [], []
    for name in (main, baseline):
        settings = {(r["method"], r["documents"]) for m in variants[name].values() for r in m["subsets"]}
        for method, count in sorted(settings):
            rows.append([name, method, str(count), *(cell(over_seeds(variants[name], above("trained", s, method, count)))
                                                     for s in shares)])
    for share in shares:
        if (r := ratio(variants, main, baseline, above("trained", share))) is not None:
            lines.append(f"- {share:.1%} kept: the loss of {main} rises {r.text('.3f')} times as much as that of {baseline}")
        if (r := reach_of_one(variants[main], share)) is not None:
            lines.append(f"- {share:.1%} kept: one document reaches {r.text('.1%')} of what {_most(variants[main])} reach over "
                         f"a random choice ({main})")
    return "How experts are chosen (loss above the full model's, trained labels):\n\n" + table(head, rows) + (
        "\n\n" + "\n".join(lines))


def _most(of: dict[int, dict]) -> int:
    return max(r["documents"] for m in of.values() for r in m["subsets"])


def reach_of_one(of: dict[int, dict], share: float) -> Estimate | None:
    """(random - one document) / (random - most documents), of the loss with a share of the experts."""

    def value(measures: dict) -> float | None:
        random, one, most = (above("trained", share, *setting)(measures) for setting in
                             (("random",), (method_of(measures), 1), (method_of(measures),)))
        if random is None or one is None or most is None or random == most:
            return None
        return (random - one) / (random - most)

    return over_seeds(of, value)


def _selective_gaps(variants: Variants) -> list[str]:
    """Nothing for measures of an earlier version, which lack it."""
    measured = next((m["selective_gap"] for of in variants.values() for m in of.values() if "selective_gap" in m), {})
    columns = [(votes, share) for votes, shares in measured.items() for share in shares]
    rows = [[name, *(cell(over_seeds(of, selective_gap(*column))) for column in columns)] for name, of in variants.items()]
    return ["With a pool for each document (loss above the full model's, trained labels), by the votes of the whole document, "
            "which have seen the future of each token, of its tokens so far, and of its first tokens:\n\n"
            + table(["model", *(f"{share}, {votes}" for votes, share in columns)], rows)] if columns else []


def _information(variants: Variants) -> str:
    columns = {"expert_label": "expert and label", "expert_token": "expert and token", "cluster_label": "cluster and label",
               "cluster_token": "cluster and token", "effective_experts": "effective experts of a document"}
    rows = [[name, *(cell(over_seeds(of, lambda m, c=c: m.get("information", {}).get(c)), ".3f") for c in columns)]
            for name, of in variants.items()]
    return ("What experts tell (mutual information above chance, nats; clusters: adjusted, 0 to 1):\n\n"
            + table(["model", *columns.values()], rows))


# ---- figure ---------------------------------------------------------------------------------------------------------


def _figure(variants: Variants, main: str, baseline: str, path: AnyPath) -> AnyPath | None:
    """Loss above the full model's: by share, by documents that chose, by variant; None without matplotlib."""
    few, fewest = kept_shares(variants)[-2:]
    counts = sorted({r["documents"] for m in variants[main].values() for r in m["subsets"] if r["method"] == method_of(m)})
    colors = dict.fromkeys(variants, plots.GRAY) | dict(zip((main, baseline), plots.COLORS))

    def line(axis, name: str, label: str, xs: list[float], values: list[Callable], dashed: bool) -> None:
        found = [(x, e) for x, value in zip(xs, values) if (e := over_seeds(variants[name], value)) is not None]
        if found:
            bounds = [[e.mean + sign * (e.half_width or 0) for _, e in found] for sign in (0, -1, 1)]
            plots.line(axis, label, [x for x, _ in found], bounds[0], colors[name], *bounds[1:], dashed)

    def draw(by_share, by_documents, by_variant) -> None:
        for name in (main, baseline):
            for part, dashed in (("trained", False), ("left_out", True)):
                line(by_share, name, name + dashed * ",\nleft-out labels", kept_shares(variants),
                     [above(part, share) for share in kept_shares(variants)], dashed)
            for share, dashed in ((fewest, False), (few, True)):
                line(by_documents, name, f"{name}, {100 * share:g} %", counts,
                     [above("trained", share, documents=n) for n in counts], dashed)
        for i, name in enumerate(variants):
            for share in (few, fewest):
                if (e := over_seeds(variants[name], above("trained", share))) is not None:
                    plots.span(by_variant, i, e.mean, e.half_width, colors[name], hollow=share == few)
        plots.experts_kept(by_share, kept_shares(variants))
        by_documents.set_xscale("log")
        by_documents.set_xticks(counts, counts)
        by_documents.minorticks_off()
        by_documents.set_xlabel("documents of each label")
        by_variant.set_yticks(range(len(variants)), list(variants))
        by_variant.set_ylim(len(variants) - 0.5, -0.5)
        by_variant.axvline(0, color=plots.LIGHT, zorder=0)
        for axis, title in ((by_share, "By the share of the experts"), (by_documents, "By the documents that chose them"),
                            (by_variant, f"By variant: {100 * few:g} % (hollow) and {100 * fewest:g} % (filled)")):
            axis.set_title(title)

    return plots.save(path, 3, (14, 4.4), draw,
                      "Loss above the full model's in nats/token (means over labels; bands: 95 % over seeds)")
