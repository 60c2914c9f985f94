"""Draws EMO's method, README's picture, from toy logits routed by emo_jax itself: python launch/method.py

Writes method-light.svg and method-dark.svg beside this file. One row of three documents is shown; its global batch is 64
such rows.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from emo_jax import compat, sharding
from emo_jax.config import RouterConfig
from emo_jax.moe import losses
from emo_jax.moe.routing import draw_pool_sizes, route

DOCUMENTS = ("def area ( r ) : return pi * r ** 2", "melt the butter then add two eggs", "the dose is 20 mg a day")
ROWS, EXPERTS, TOP_K, TOPICS, SEED = 64, 12, 2, 12, 3
THEMES = {"light": {"ink": "#1f2328", "gray": "#656d76", "faint": "#d8dee4", "cell": "#f3f5f7",
                    "documents": ("#0072B2", "#D55E00", "#009E73")},
          "dark": {"ink": "#e6edf3", "gray": "#9198a1", "faint": "#3d444d", "cell": "#1a2029",
                   "documents": ("#58b4e8", "#f0883e", "#3fc796")}}
LEFT, CELL, TALL, PANEL = 64, 25, 14, 172  # pixels: the tokens' left edge, a cell's width and height, the panels' height


def toy():
    """The routing of ROWS rows, and everything that is drawn of row 0."""
    draw = np.random.default_rng(SEED)
    words = [document.split() for document in DOCUMENTS]
    segments = np.repeat([1, 2, 3], [len(w) for w in words])
    # A topic likes four neighbouring experts, so that all topics together like all experts alike.
    likes = np.stack([np.roll([1.1, 1.9, 1.6, 0.8] + [0.0] * (EXPERTS - 4), 12 * t // TOPICS) for t in range(TOPICS)])
    topics = np.stack([draw.permutation(TOPICS)[:3] for _ in range(ROWS)])
    topics[0] = 1, 8, 5
    logits = likes[topics][:, segments - 1] + draw.normal(0, 0.75, (ROWS, len(segments), EXPERTS))
    sizes = draw_pool_sizes(RouterConfig(pool_min=3, pool_max=7), SEED, 0, 1, jnp.arange(3 * ROWS).reshape(ROWS, 3))[0]
    batch = jnp.asarray(logits, jnp.float32), jnp.asarray(np.tile(segments, (ROWS, 1)))
    with compat.set_mesh(sharding.single_device_mesh()):
        routing = route(*batch, sizes, TOP_K)
        shares = {}
        for name, rows in (("this row", 1), ("global batch", ROWS)):
            ids, scores, mask = routing.expert_ids[:rows], routing.scores[:rows], batch[1][:rows] > 0
            counts, tokens = losses.expert_counts(ids, mask, EXPERTS)[0], rows * len(segments)
            shares[name] = (np.asarray(counts) / tokens / TOP_K,
                            float(losses.load_balancing_loss(scores, counts, mask, TOP_K, tokens)))
    return {"words": words, "segments": segments, "sizes": np.asarray(sizes[0]), "shares": shares,
            "probabilities": np.exp(logits[0]) / np.exp(logits[0]).sum(1, keepdims=True),
            "pool": np.asarray(routing.pool[0]), "expert_ids": np.asarray(routing.expert_ids[0])}


def draw(theme: dict, t: dict) -> Figure:
    ...


if __name__ == "__main__":
    t = toy(); print(t)
