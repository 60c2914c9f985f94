"""Subsets from subsets: union, weighted mean or quotas under a budget, overlap, an order of the experts, the smallest to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from emo_jax.checkpoints.subset import Subset, kept_of
from emo_jax.errors import InputError
from emo_jax.loaded import LoadedModel
from emo_jax.subsets.budget import Budget, pick
from emo_jax.subsets.calibration import Calibration
from emo_jax.subsets.choose import choose_one
from emo_jax.train.evaluate import Evaluation


def require_same_model(subsets: Sequence[Subset]) -> None:
    shapes = {(len(s.kept), s.num_routed, s.num_shared) for s in subsets}
    hashes = {s.model.get("hash") for s in subsets} - {None}
    if not subsets or len(shapes) > 1 or len(hashes) > 1:
        raise InputError("the subsets must be of one model, but were chosen for " + "; ".join(
            f"{s.model.get('name', '?')} step {s.model.get('step', '?')} ({len(s.kept)} layers, {s.num_routed} routed "
            f"experts)" for s in subsets))


def union(subsets: Sequence[Subset]) -> Subset:
    """Every expert that one of the subsets keeps."""
    require_same_model(subsets)
    return _combined(subsets, np.any([s.mask() for s in subsets], axis=0), "union", None)


def weighted(subsets: Sequence[Subset], routed: int, weights: Sequence[float] | None = None) -> Subset:
    """The `routed` experts a layer with the largest weighted mean of the subsets' normalised scores; experts that no
    subset keeps come last. Weights: one for each subset, by default equal."""
    require_same_model(subsets)
    of_subsets = np.ones(len(subsets)) if weights is None else np.asarray(weights, float)
    if len(of_subsets) != len(subsets) or (of_subsets < 0).any() or of_subsets.sum() == 0:
        raise InputError(f"--weights {of_subsets.tolist()} must be {len(subsets)} numbers that are not negative, one for "
                         f"each subset")
    kept = np.any([s.mask() for s in subsets], axis=0)
    scores = np.einsum("s,slr->lr", of_subsets / of_subsets.sum(), [_normalised(s) for s in subsets])
    mask = np.stack([pick(row, routed) for row in scores + kept])  # normalised scores are at most 1
    return _combined(subsets, mask, "weighted", scores)


def by_marginal_need(subsets: Sequence[Subset]) -> list[list[int]]:
    """Every layer's routed experts, in the order in which they add most to the worst-covered subset: each next one is
    what the subset with the least covered score wants most."""
    require_same_model(subsets)
    scores, orders = np.stack([_normalised(s) for s in subsets]), []
    for layer in range(scores.shape[1]):
        left, covered, order = scores[:, layer].copy(), np.zeros(len(subsets)), []
        for _ in range(scores.shape[2]):
            expert = int(np.argmax(left[int(np.argmin(covered))]))
            order.append(expert)
            covered += scores[:, layer, expert]
            left[:, expert] = -1
        orders.append(order)
    return orders


def needed(subsets: Sequence[Subset], routed: int) -> Subset:
    """The first `routed` experts of each layer by marginal need."""
    mask = np.zeros(subsets[0].mask().shape, bool)
    for layer, order in enumerate(by_marginal_need(subsets)):
        mask[layer, order[:routed]] = True
    return _combined(subsets, mask, "need", np.mean([_normalised(s) for s in subsets], axis=0))


def quota(subsets: Sequence[Subset], routed: int, quotas: Sequence[float] | None = None) -> Subset:
    """The `routed` experts a layer, of which each subset is guaranteed the best of its own: its quota, a share of `routed`
    rounded down, by default the same for all (coverage quotas over corpora, arXiv 2607.01710). What the guarantees leave,
    as they may overlap, goes by the mean of the normalised scores. The order of the subsets changes nothing. Raises
    `InputError`."""
    require_same_model(subsets)
    counts = np.floor(quota_shares(len(subsets), quotas) * routed + 1e-9).astype(int)
    scores = np.stack([_normalised(s) for s in subsets])
    own = np.array([[pick(row, n) & (row > 0) for row in s] for s, n in zip(scores, counts)])
    mean = np.sort(scores, axis=0).mean(axis=0)  # sorted: rounds alike in every order
    mask = np.stack([pick(row, routed) for row in mean + 2 * own.any(axis=0)])
    return _combined(subsets, mask, "quota", mean, counts.tolist())


def quota_shares(count: int, quotas: Sequence[float] | None) -> np.ndarray:
    """Of `count` subsets, from --quotas. Raises `InputError`."""
    shares = np.full(count, 1 / count) if quotas is None else np.asarray(quotas, float)
    if len(shares) != count or not (shares >= 0).all() or not shares.sum() <= 1 + 1e-9:
        raise InputError(f"--quotas {shares.tolist()} must be {count} numbers that are not negative and at most 1 in sum, one "
                         f"for each corpus: its share of the kept experts")
    return shares


def similarity(subsets: Sequence[Subset]) -> dict[str, Any]:
    """Between every two subsets, averaged over layers: "overlap" (shared part of the union of kept experts) and, where
    all have scores, "cosine" of the scores; [S, S] lists."""
    require_same_model(subsets)
    masks = np.stack([s.mask() for s in subsets])
    both = np.einsum("alr,blr->abl", masks.astype(float), masks.astype(float))
    sizes = masks.sum(axis=2)
    overlap = (both / (sizes[:, None] + sizes[None] - both)).mean(axis=2)
    result = {"overlap": overlap.tolist(), "cosine": None}
    if all(s.scores is not None for s in subsets):
        scores = np.stack([s.score_array() for s in subsets])
        scores = scores / np.linalg.norm(scores, axis=2, keepdims=True)
        result["cosine"] = np.einsum("alr,blr->abl", scores, scores).mean(axis=2).tolist()
    return result


def suggest(loaded: LoadedModel, calibration: Calibration, evaluation: Evaluation, tolerance: float,
            method: str = "router", **options: Any) -> tuple[Subset, list[dict[str, Any]]]:
    """The smallest subset whose loss on `evaluation` stays within `tolerance` (nats/token) of the full model's, found
    by bisection over the number of experts, and the (keep, loss, difference) of every number tried."""
    if tolerance < 0:
        raise InputError(f"--tolerance {tolerance} must not be negative")
    m = loaded.config.model
    total = lambda losses: losses[0].sum() / max(losses[1].sum(), 1)
    full, tried = total(evaluation.losses(loaded.params, what="scoring the full model")), []

    def attempt(keep: int) -> tuple[Subset, bool]:
        subset = choose_one(loaded, calibration, method, Budget(keep=keep), **options)
        loss = total(evaluation.losses(loaded.params, subset.mask(), f"scoring {keep} experts"))
        tried.append({"keep": keep, "loss": float(loss), "difference": float(loss - full)})
        return subset, loss <= full + tolerance

    low, high = m.num_shared_experts + 1, m.num_experts  # high is always good enough
    best = choose_one(loaded, calibration, method, Budget(keep=high), **options)
    while low < high:
        middle = (low + high) // 2
        subset, good = attempt(middle)
        if good:
            best, high = subset, middle
        else:
            low = middle + 1
    return best, sorted(tried, key=lambda t: t["keep"])


def complement(subset: Subset) -> Subset:
    """Everything but the routed experts of `subset`: the model with them disabled."""
    return subset.with_mask(~subset.mask(), method="disabled", scores=None)


def _normalised(subset: Subset) -> np.ndarray:
    """Scores that sum to 1 in each layer; of a subset without scores, equal shares of what it keeps."""
    scores = subset.mask().astype(float) if subset.scores is None else subset.score_array()
    sums = scores.sum(axis=1, keepdims=True)
    return scores / np.where(sums > 0, sums, 1)


def _combined(subsets: Sequence[Subset], mask: np.ndarray, method: str, scores: np.ndarray | None,
              guaranteed: Sequence[int] | None = None) -> Subset:
    """Of each subset its "coverage" is stated, the share of its own scores that the kept experts have, the mean of the
    layers, and how many experts a layer it was "guaranteed"."""
    hashes = sorted({h for s in subsets for h in s.calibration.get("document_hashes", ())})
    parts = [{k: v for k, v in s.calibration.items() if k != "document_hashes"} | {
        "method": s.method, "coverage": float((_normalised(s) * mask).sum(axis=1).mean())} for s in subsets]
    for part, count in zip(parts, guaranteed or ()):
        part["guaranteed"] = count
    about = {"subsets": parts, "document_hashes": hashes}
    return Subset(kept_of(mask), subsets[0].num_routed, subsets[0].num_shared, method, about,
                  None if scores is None else tuple(map(tuple, scores.tolist())), subsets[0].model)
