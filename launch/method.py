"""Draws EMO's method, README's picture, from toy logits routed by emo_jax itself: python launch/method.py

Writes method-light.svg and method-dark.svg beside this file. One row of three documents is shown; its global batch is 64
such rows.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from emo_jax import compat, sharding
from emo_jax.config import RouterConfig
from emo_jax.moe import losses
from emo_jax.moe.routing import draw_pool_sizes, route

DOCUMENTS = ("def area ( r ) : return pi * r", "melt the butter then add two eggs", "the dose is 20 mg a day")
ROWS, EXPERTS, TOP_K, TOPICS, SEED = 64, 12, 2, 12, 3
THEMES = {"light": {"ink": "#1f2328", "gray": "#656d76", "faint": "#d8dee4", "cell": "#f3f5f7", "paper": "#ffffff",
                    "documents": ("#0072B2", "#D55E00", "#009E73")},
          "dark": {"ink": "#e6edf3", "gray": "#9198a1", "faint": "#3d444d", "cell": "#1a2029", "paper": "#0d1117",
                   "documents": ("#58b4e8", "#f0883e", "#3fc796")}}
WIDTH, HEIGHT, LEFT, CELL, TALL, BAR, GAP = 915, 830, 70, 34, 13, 17, 10  # pixels; a cell is a token and an expert


def toy():
    """The routing of ROWS rows, and everything that is drawn of row 0."""
    draw = np.random.default_rng(SEED)
    words = [document.split() for document in DOCUMENTS]
    segments = np.repeat([1, 2, 3], [len(w) for w in words])
    # A topic likes four experts in a row, so that all topics together like all experts alike.
    likes = np.stack([np.roll([1.1, 1.9, 1.6, 0.8] + [0.0] * (EXPERTS - 4), EXPERTS * t // TOPICS)
                      for t in range(TOPICS)])
    topics = np.stack([draw.permutation(TOPICS)[:3] for _ in range(ROWS)])
    topics[0] = 1, 8, 5
    logits = likes[topics][:, segments - 1] + draw.normal(0, 0.75, (ROWS, len(segments), EXPERTS))
    sizes = draw_pool_sizes(RouterConfig(pool_min=3, pool_max=7), SEED, 0, 1, jnp.arange(3 * ROWS).reshape(ROWS, 3))[0]
    batch = jnp.asarray(logits, jnp.float32), jnp.asarray(np.tile(segments, (ROWS, 1)))
    with compat.set_mesh(sharding.single_device_mesh()):
        routing = route(*batch, sizes, TOP_K)
        loads = {}  # {name: (shares of the tokens [documents or 1, experts], load-balancing loss)}
        for name, rows in (("this row", 1), ("global batch", ROWS)):
            ids, scores, mask = routing.expert_ids[:rows], routing.scores[:rows], batch[1][:rows] > 0
            groups = segments == np.arange(1, 4)[:, None] if rows == 1 else [True]
            counts = np.stack([losses.expert_counts(ids, mask & group, EXPERTS)[0] for group in groups])
            tokens = rows * len(segments)
            loss = losses.load_balancing_loss(scores, jnp.asarray(counts.sum(0)), mask, TOP_K, tokens)
            loads[name] = counts / tokens / TOP_K, float(loss)
    return {"words": words, "segments": segments, "sizes": np.asarray(sizes[0]), "loads": loads,
            "probabilities": np.asarray(jax.nn.softmax(batch[0][0])), "pool": np.asarray(routing.pool[0]),
            "expert_ids": np.asarray(routing.expert_ids[0])}


class Picture:
    """Shapes in pixels from the upper left corner."""

    def __init__(self, theme: dict):
        self.theme, self.figure = theme, Figure((WIDTH / 100, HEIGHT / 100), facecolor="none")
        self.axis = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self.axis.set_axis_off()
        self.boxes: dict[str, list[Path]] = {}  # by color: one shape for each keeps the files small

    def box(self, x: float, y: float, width: float, height: float, color: str) -> None:
        self.boxes.setdefault(color, []).append(Path([(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)],
                                                     closed=True))

    def text(self, x: float, y: float, text: str, color: str = "ink", size: float = 8.5, **style) -> None:
        self.axis.text(x, y, text, color=self.theme.get(color, color), fontsize=size, **{"va": "center"} | style)

    def line(self, xs: tuple, ys: tuple) -> None:
        self.axis.plot(xs, ys, color=self.theme["ink"], linewidth=1, linestyle=(0, (3, 2)))

    def step(self, number: int, x: float, y: float, title: str, explanation: str) -> None:
        self.axis.plot(x + 8, y, "o", color=self.theme["ink"], markersize=12.5)
        self.text(x + 8, y + 0.5, str(number), self.theme["paper"], 8, ha="center", fontweight="bold")
        self.text(x + 22, y, title, size=9.5, fontweight="bold")
        self.text(x + 22, y + 16, explanation, "gray")

    def shade(self, document: int, strength: float) -> str:
        ramp = LinearSegmentedColormap.from_list("", [self.theme["cell"], self.theme["documents"][document]])
        return to_hex(ramp(round(16 * strength) / 16))

    def finished(self) -> Figure:
        for color, boxes in self.boxes.items():
            self.axis.add_patch(PathPatch(Path.make_compound_path(*boxes), facecolor=color, edgecolor="none", clip_on=False))
        return self.figure


def draw(theme: dict, t: dict) -> Figure:
    p, of = Picture(theme), t["segments"] - 1
    x_of = LEFT + CELL * np.arange(len(of)) + GAP * of
    starts = [int(x_of[of == n][0]) for n in range(3)]
    hues = theme["documents"]

    def cells(top: float, color) -> None:
        """Tokens by experts; `color(token, expert)`."""
        p.text(8, top + TALL * EXPERTS / 2, "experts", "gray")
        for e in range(EXPERTS):
            p.text(LEFT - 6, top + TALL * (e + 0.5) - 1, str(e + 1), "gray", 6.5, ha="right")
            for i, x in enumerate(x_of):
                p.box(x, top + TALL * e, CELL - 2, TALL - 2, color(i, e))

    def bars(x: float, bottom: float, heights, color, base=None) -> None:
        for e, height in enumerate(heights):
            p.box(x + BAR * e, bottom - height - (0 if base is None else base[e]), BAR - 2, height, color(e))
            if base is None or not base.any():  # the lowest bars of a stack
                p.text(x + BAR * (e + 0.5) - 1, bottom + 8, str(e + 1), "gray", 6.5, ha="center")

    p.text(8, 35, "tokens", "gray")
    for n, words in enumerate(t["words"]):
        p.text(starts[n], 12, f"document {n + 1}", hues[n], fontweight="bold")
        for i, word in enumerate(words):
            p.box(starts[n] + CELL * i, 24, CELL - 2, 22, p.shade(n, 0.18))
            p.text(starts[n] + CELL * (i + 0.5) - 1, 35, word, size=6.8, ha="center")

    p.step(1, LEFT, 72, "Router", "In every layer, how much does a token want each expert? A softmax over the experts.")
    cells(104, lambda i, e: p.shade(of[i], min(1, 1.8 * t["probabilities"][i, e])))

    p.step(2, LEFT, 290, "Votes", "The probabilities, summed over each document.")
    p.step(3, starts[1], 290, "Pool", "A document's strongest experts. How many is drawn anew every time.")
    for n in range(3):
        votes, pool = t["probabilities"][of == n].sum(0), t["pool"][of == n][0]
        bars(starts[n], 395, 70 * votes / votes.max(), lambda e: hues[n] if pool[e] else theme["faint"])
        p.text(starts[n], 419, f"pool of {t['sizes'][n]}", hues[n], fontweight="bold")

    p.step(4, LEFT, 456, f"Top {TOP_K} inside the pool", "Full color: the experts that a token is sent to. Faded: the rest of "
           "its document's pool. Gray: out of its reach.")
    cells(488, lambda i, e: p.shade(of[i], (0.22 + 0.78 * (e in t["expert_ids"][i])) * t["pool"][i, e]))

    p.step(5, LEFT, 674, "Load balancing", "Tokens of each expert. A document may leave experts idle, the global batch may "
           "not: there the loss asks for even use.")
    for x, (name, (shares, loss)) in zip(starts, t["loads"].items()):
        heights, bottom = 400 * shares, 790
        for n, part in enumerate(heights):
            color = theme["gray"] if len(heights) == 1 else hues[n]
            bars(x, bottom, part, lambda e: color, heights[:n].sum(0))
        p.line((x - 2, x + BAR * EXPERTS), (bottom - 400 / EXPERTS,) * 2)
        p.text(x, bottom + 24, name, fontweight="bold")
        p.text(x + BAR * EXPERTS - 2, bottom + 24, f"loss {loss:.2f}", "gray", ha="right")
    p.text(starts[1] + BAR * EXPERTS + 8, bottom - 400 / EXPERTS, "even: loss 1", "gray")
    return p.finished()


if __name__ == "__main__":
    found = toy()
    for name, theme in THEMES.items():
        with rc_context({"svg.hashsalt": "emo", "svg.fonttype": "none",
                         "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]}):
            draw(theme, found).savefig(pathlib.Path(__file__).with_name(f"method-{name}.svg"), metadata={"Date": None})
