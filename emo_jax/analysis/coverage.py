"""Which experts serve which label, how alike labels are in that, and which clusters of two models are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from emo_jax.analysis.activations import Activations
from emo_jax.analysis.resampling import Measure
from emo_jax.subsets.use import effective

POOL_SHARE = 0.25  # of the routed experts, in the pools whose overlap is measured


def coverage(a: Activations) -> dict[str, Any]:
    """By label and layer: the share of the choices that each expert has [G, L, R], the effective number of experts [G, L], and
    the share of experts that are used more than evenly [G, L] (as published)."""
    members = np.eye(len(a.text.names))[a.text.labels]
    counts = np.tensordot(members.T, a.choices, 1)
    use = counts / np.maximum(counts.sum(axis=2, keepdims=True), 1)
    return {"use": use, "effective": effective(counts), "covered": (use > 1 / a.experts).mean(axis=2)}


def similarity(a: Activations) -> dict[str, Any]:
    """Label by label, for each layer [L, G, G]: cosine and Euclidean distance of the shares of the experts, and the share of
    experts that the pools of two documents have in common."""
    use = np.moveaxis(coverage(a)["use"], 1, 0)  # [L, G, R]
    norm = np.maximum(np.linalg.norm(use, axis=2), 1e-30)
    cosine = np.einsum("lgr,lhr->lgh", use, use) / (norm[:, :, None] * norm[:, None, :])
    distance = np.linalg.norm(use[:, :, None] - use[:, None], axis=3)
    return {"cosine": cosine, "distance": distance, "pool_overlap": _overlaps(a, pools(a), np.ones(len(a.text.labels)))[0]}


def pools(a: Activations) -> Bool[np.ndarray, "D L R"]:
    """The strongest experts of every document, `POOL_SHARE` of all."""
    size = max(1, round(POOL_SHARE * a.experts))
    rank = np.argsort(np.argsort(-a.probability_sums, axis=2, kind="stable"), axis=2)
    return rank < size


def pool_overlap(a: Activations) -> Measure:
    """How much more of their pools two documents of one label have in common than two documents of different labels, as a
    share of a pool, [B, L]."""
    chosen = pools(a)

    def measure(weights: np.ndarray) -> np.ndarray:
        made = []
        for w in weights:
            overlap, pairs = _overlaps(a, chosen, w)
            same = np.eye(len(a.text.names), dtype=bool)
            within, between = (np.where(where, pairs, 0.0) for where in (same, ~same))
            mean = lambda p: (overlap * p).sum(axis=(1, 2)) / max(p.sum(), 1e-30)
            made.append(mean(within) - mean(between) if between.sum() else np.zeros(a.layers))
        return np.stack(made)

    return measure


def _overlaps(a: Activations, chosen: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean overlap of two different documents of two labels [L, G, G], number of such pairs [G, G]). From sums of the pools:
    the overlaps of all pairs add up to the product of the sums."""
    members = np.eye(len(a.text.names))[a.text.labels] * weights[:, None]  # [D, G]
    sums = np.tensordot(members.T, chosen.astype(np.float32), 1)  # [G, L, R]
    size, counts, own = chosen[0, 0].sum(), members.sum(axis=0), (members**2).sum(axis=0)
    shared = np.einsum("glr,hlr->lgh", sums, sums) - size * np.diag(own)
    pairs = np.outer(counts, counts) - np.diag(own)
    return np.where(pairs > 0, shared / np.maximum(size * pairs, 1e-30), 0.0), pairs


def align(first: Int[np.ndarray, "n"], second: Int[np.ndarray, "n"]) -> list[dict[str, Any]]:
    """Clusters of two models, one to one, so that the sum of the overlaps of their tokens (Jaccard) is the largest."""
    from scipy.optimize import linear_sum_assignment

    both = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(both, (first, second), 1)
    either = both.sum(axis=1, keepdims=True) + both.sum(axis=0, keepdims=True) - both
    jaccard: Float[np.ndarray, "C C2"] = both / np.maximum(either, 1)
    rows, columns = linear_sum_assignment(-jaccard)
    found = [{"a": int(i), "b": int(j), "tokens": float(jaccard[i, j])} for i, j in zip(rows, columns)]
    return sorted(found, key=lambda pair: -pair["tokens"])
