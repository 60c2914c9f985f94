"""Choosing the experts to keep: by router probability, contribution, layer by layer, or at random."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from emo_jax.checkpoints.subset import Subset, kept_of, require_experts
from emo_jax.data.documents import Examples
from emo_jax.errors import InputError
from emo_jax.loaded import LoadedModel
from emo_jax.rounding import round_up
from emo_jax.subsets.budget import Budget, pick
from emo_jax.subsets.calibration import Calibration, from_source, from_tokens
from emo_jax.subsets.layerwise import layerwise
from emo_jax.subsets.sweep import one_sweep

METHODS = ("layerwise", "router", "easy_ep", "reap", "random")


def choose(opened: LoadedModel, calibration: Calibration, method: str, budgets: Sequence[Budget], *, layer_group: int = 0,
           on_host: bool = False, seed: int = 0) -> list[list[Subset]]:
    """Subsets [budget][group]. One sweep over the text serves all groups, and all budgets too unless the method is
    `layerwise` (one sweep a budget, and one to share out a total). Raises `InputError`."""
    if method not in METHODS:
        raise InputError(f"--method {method!r} must be one of {', '.join(METHODS)}")
    require_experts(opened.config)
    for budget in budgets:
        budget.check(opened.config)
    if method == "layerwise":
        return [_layerwise(opened, calibration, budget, layer_group, on_host) for budget in budgets]
    scores = _random(opened, calibration, seed) if method == "random" else one_sweep(opened, calibration, method)
    chosen = []
    for budget in budgets:
        counts = [budget.routed(opened.config, s) for s in scores]
        masks = [np.stack([pick(row, n) for row, n in zip(s, count)]) for s, count in zip(scores, counts)]
        chosen.append(_subsets(opened, calibration, method, masks, None if method == "random" else scores))
    return chosen


def choose_one(opened: LoadedModel, calibration: Calibration, method: str, budget: Budget, **options) -> Subset:
    """The subset of a calibration with one group."""
    return choose(opened, calibration, method, [budget], **options)[0][0]


def choose_subset(loaded: LoadedModel, texts: Sequence[str], keep: int, method: str = "layerwise", **options) -> Subset:
    """The `keep` experts of every layer (shared ones included) that texts need. Options as for `choose`."""
    if isinstance(texts, str) or not len(texts) or not all(texts):
        raise InputError("texts must be a list of strings that are not empty")
    source = Examples("texts", list(texts))
    calibration = from_source(loaded.config, source, loaded.tokenizer, {"": range(len(source))})
    return choose_one(loaded, calibration, method, Budget(keep=keep), **options)


def choose_for_prompt(opened: LoadedModel, prompts: Sequence[np.ndarray], keep: int) -> Subset:
    """The experts that prompts (token ids) choose for themselves, by router probability."""
    length = round_up(max(map(len, prompts)), 64)  # few lengths, few compilations
    return choose_one(opened, from_tokens(prompts, length), "router", Budget(keep=keep))


def _layerwise(opened: LoadedModel, calibration: Calibration, budget: Budget, layer_group: int,
               on_host: bool) -> list[Subset]:
    groups = len(calibration.names)
    scores = one_sweep(opened, calibration, "router") if budget.needs_scores else [None] * groups
    routed = np.stack([budget.routed(opened.config, s) for s in scores])
    return _subsets(opened, calibration, "layerwise", *layerwise(opened, calibration, routed, layer_group, on_host))


def _random(opened: LoadedModel, calibration: Calibration, seed: int) -> np.ndarray:
    m, draw = opened.config.model, np.random.default_rng(seed)
    return draw.permuted(np.tile(np.arange(m.num_routed_experts, dtype=float),
                                 (len(calibration.names), m.num_layers, 1)), axis=2)


def _subsets(opened: LoadedModel, calibration: Calibration, method: str, masks, scores) -> list[Subset]:
    m = opened.config.model
    return [Subset(kept_of(mask), m.num_routed_experts, m.num_shared_experts, method,
                   dict(about, label=name) if name else dict(about),
                   None if scores is None else tuple(map(tuple, scores[i].tolist())), opened.identity())
            for i, (mask, name, about) in enumerate(zip(masks, calibration.names, calibration.about))]
