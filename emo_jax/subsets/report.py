"""Tables and the figure of quality against the kept share of the experts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

_HEAD = f"{'experts':>8} {'kept':>7} {'nats/token':>11} {'nats/byte':>10} {'difference':>11}  95 % interval"


def curve_table(models: dict[str, dict[str, Any]]) -> str:
    """Loss by kept share, one line a model and share, averaged over all scored tokens; then by label."""
    lines = [f"{'model':20} {_HEAD}"]
    for name, result in models.items():
        for row in [{"name": "full", "share": 1.0, "keep": "all"} | result["full"], *result["subsets"]]:
            lines.append(f"{name[:20]:20} {_keep(row):>8} {row['share']:7.1%} {_losses(row)}")
    labels = sorted({label for result in models.values() for label in result["full"]["labels"]})
    lines += ["", f"{'nats/token by label':29} " + " ".join(
        f"{_short(name)} {100 * row['share']:g}%".rjust(14) for name, r in models.items() for row in _with_full(r))]
    for label in labels:
        cells = [row["labels"].get(label) for r in models.values() for row in _with_full(r)]
        lines.append(f"{label[:29]:29} " + " ".join(f"{c['loss']:14.4f}" if c else " " * 14 for c in cells))
    return "\n".join(lines)


def subset_table(result: dict[str, Any]) -> str:
    """The result of `check_subsets` for people: the full model and every subset, in all and by label."""
    lines = [f"{'subset':32} {_HEAD}"]
    for label in ["", *result["full"]["labels"]]:
        if label:
            lines.append(f"-- {label}")
        for row in _with_full(result):
            part = row["labels"][label] if label else row
            lines.append(f"{row['name'][-32:]:32} {_keep(row):>8} {row['share']:7.1%} {_losses(part)}")
    if result["documents_left_out"]:
        lines.append(f"{result['documents_left_out']} documents were left out: the subsets were chosen by them")
    return "\n".join(lines)


def save_figure(models: dict[str, dict[str, Any]], path: Path) -> Path | None:
    """Loss against kept share, one line a model. Without matplotlib: says so and returns None."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed (pip install 'emo-jax[report]')", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, result in models.items():
        rows = sorted(result["subsets"], key=lambda row: row["share"])
        shares = [100 * row["share"] for row in rows] + [100]
        left.plot(shares, [row["loss"] for row in rows] + [result["full"]["loss"]], marker="o", label=name)
        gaps = [row["difference"] for row in rows] + [0]
        line, = right.plot(shares, gaps, marker="o", label=name)
        intervals = [row["interval"] or [row["difference"]] * 2 for row in rows] + [[0, 0]]
        right.fill_between(shares, *zip(*intervals), color=line.get_color(), alpha=0.2, linewidth=0)
    for axis, title in ((left, "loss (nats/token)"), (right, "loss above the full model (nats/token)")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(shares, [f"{s:g}" for s in shares])
        axis.set(xlabel="experts kept (%)", title=title)
        axis.grid(alpha=0.3)
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _with_full(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": "full model", "share": 1.0, "keep": "all"} | result["full"], *result["subsets"]]


def _keep(row: dict[str, Any]) -> str:
    keep = row["keep"]
    return f"{min(keep)}-{max(keep)}" if isinstance(keep, list) else str(keep)


def _losses(row: dict[str, Any]) -> str:
    text = f"{row['loss']:11.4f} {row['loss_per_byte']:10.4f}"
    if "difference" not in row:
        return text
    interval = row["interval"]
    between = f"[{interval[0]:+.4f}, {interval[1]:+.4f}]" if interval else "one row"
    return f"{text} {row['difference']:+11.4f}  {between}"


def _short(name: str) -> str:
    return name[-8:]
