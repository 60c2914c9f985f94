"""Tables and the figure of quality against the kept share of the experts."""

from __future__ import annotations

from typing import Any

from emo_jax import plots
from emo_jax.checkpoints.subset import Subset
from emo_jax.files import AnyPath

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


def coverage_table(subset: Subset) -> str:
    """For people: a subset that was composed of others, and what part of each one's scores its experts have."""
    lines = [subset.summary()]
    for part in subset.calibration.get("subsets", ()):
        name = " ".join(str(part[k]) for k in ("path", "label") if part.get(k)) or f"a subset by {part.get('method')}"
        first = f", its first {part['guaranteed']} in every layer" if "guaranteed" in part else ""
        lines.append(f"  {part['coverage']:6.1%} of the scores of {name}{first}" if "coverage" in part else f"  of {name}")
    return "\n".join(lines)


def save_figure(models: dict[str, dict[str, Any]], path: AnyPath) -> AnyPath | None:
    """Loss against the kept share of the experts, and how far it is above the full model's; None without matplotlib."""

    def draw(loss, above) -> None:
        for (name, result), color in zip(models.items(), plots.COLORS):
            rows = [{"share": 1.0, "difference": 0.0, "interval": None} | result["full"],
                    *sorted(result["subsets"], key=lambda row: -row["share"])]
            shares, rise = [row["share"] for row in rows], [row["difference"] for row in rows]
            intervals = [row["interval"] or [row["difference"]] * 2 for row in rows]
            low, high = zip(*intervals)
            plots.line(loss, name, shares, [row["loss"] for row in rows], color)
            plots.line(above, name, shares, rise, color, low, high)
            for axis in (loss, above):
                plots.experts_kept(axis, shares)
        loss.set_title("Loss (nats/token)")
        above.set_title("Loss above the full model's (nats/token; bands: 95 %)")

    return plots.save(path, 2, (10, 3.8), draw)


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
