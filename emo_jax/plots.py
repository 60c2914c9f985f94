"""One look for all figures: lines named at their ends, uncertainty as bands, colours that colour-blind readers tell apart.

matplotlib is optional: without it `save` says how to install it.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from typing import Any

from emo_jax.files import AnyPath
from emo_jax.progress import say

# Okabe and Ito's palette without its yellow, which is too light for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GRAY, LIGHT = "#222222", "#6e6e6e", "#e4e4e4"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "lines.linewidth": 2, "lines.markersize": 5,
    "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.titlepad": 10, "axes.labelcolor": GRAY,
    "axes.edgecolor": LIGHT, "axes.linewidth": 1.2, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "y", "grid.color": LIGHT,
    "grid.linewidth": 0.8, "xtick.color": LIGHT, "xtick.labelcolor": GRAY, "ytick.left": False, "ytick.labelcolor": GRAY,
    "figure.constrained_layout.w_pad": 0.12, "figure.constrained_layout.h_pad": 0.08,
}


def save(path: AnyPath, columns: int, size: tuple[float, float], draw: Callable[..., None],
         title: str = "") -> AnyPath | None:
    """`draw` gets `columns` axes side by side; the figure of `size` inches goes to `path`. None without matplotlib."""
    if not available():
        say("no figure: matplotlib is not installed (pip install 'emo-jax[report]')")
        return None
    content = render(path.suffix.removeprefix("."), columns, size, draw, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def render(kind: str, columns: int, size: tuple[float, float], draw: Callable[..., None], title: str = "") -> bytes:
    """What `save` writes, of a kind such as "png"."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(size, layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
        draw(*axes)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.draw_without_rendering()  # where everything lies is known from here on
        for axis in axes:
            _part_labels(axis)
        file = io.BytesIO()
        figure.savefig(file, dpi=150, format=kind)
    return file.getvalue()


def line(axis: Any, label: str, xs: Sequence[float], ys: Sequence[float], color: str, low: Sequence[float] | None = None,
         high: Sequence[float] | None = None, dashed: bool = False) -> None:
    """A line with its name at its last point, and the band from `low` to `high`."""
    axis.plot(xs, ys, color=color, marker="o", linestyle=(0, (3, 1.6)) if dashed else "-",
              markerfacecolor="white" if dashed else color, clip_on=False, zorder=3)
    if low is not None:
        axis.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
    axis.annotate(label, (xs[-1], ys[-1]), (9, 0), textcoords="offset points", va="center", color=color, gid="end")


def experts_kept(axis: Any, shares: Sequence[float]) -> None:
    """The x axis of `shares` (of 1): from all experts on the left to few on the right, where lines part."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(shares), [f"{100 * share:g} %" for share in shares])
    axis.set_xlim(max(shares) * 1.12, min(shares) / 1.12)
    axis.minorticks_off()
    axis.set_xlabel("experts kept")


def span(axis: Any, y: float, value: float, half_width: float | None, color: str, hollow: bool = False) -> None:
    """A value on a row of its own, and the band of its interval."""
    if half_width is not None:
        axis.plot([value - half_width, value + half_width], [y, y], color=color, alpha=0.25, linewidth=9,
                  solid_capstyle="butt")
    axis.plot(value, y, "o", color=color, markersize=7, markerfacecolor="white" if hollow else color, markeredgewidth=1.8)


def _part_labels(axis: Any) -> None:
    """Moves the names at line ends up and down until none covers another or what is below the axis."""
    labels = sorted((t for t in axis.texts if t.get_gid() == "end"), key=lambda t: t.xy[1])
    if not labels:
        return
    points = axis.figure.dpi / 72
    ys = [axis.transData.transform(t.xy)[1] / points for t in labels]
    half = [0.7 * t.get_fontsize() * (1 + t.get_text().count("\n")) for t in labels]
    moved = list(ys)
    for _ in range(100):
        moved[0] = max(moved[0], axis.bbox.y0 / points + half[0])
        for i in range(len(moved) - 1):
            if (short := half[i] + half[i + 1] - (moved[i + 1] - moved[i])) > 0:
                moved[i] -= short / 2
                moved[i + 1] += short / 2
    for text, before, after in zip(labels, ys, moved):
        text.set_position((text.get_position()[0], after - before))
