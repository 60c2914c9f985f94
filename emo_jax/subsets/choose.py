"""Choosing the experts to keep, by any of `emo_jax.subsets.methods`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from emo_jax.checkpoints.subset import Subset, kept_of, require_experts
from emo_jax.data.documents import Examples
from emo_jax.errors import InputError
from emo_jax.loaded import LoadedModel
from emo_jax.rounding import round_up
from emo_jax.subsets import methods
from emo_jax.subsets.budget import Budget, pick
from emo_jax.subsets.calibration import Calibration, from_source, from_tokens
from emo_jax.subsets.sweep import one_sweep


def choose(loaded: LoadedModel, calibration: Calibration, method: str, budgets: Sequence[Budget],
           **options: Any) -> list[list[Subset]]:
    """Subsets [budget][group]. One sweep over the text serves all groups, and all budgets too unless the method is
    `layerwise` (one sweep a budget, and one to share out a total). `options`: see `methods.Options`. Raises `InputError`."""
    how, chosen_options = methods.get(method), methods.Options(**options)
    require_experts(loaded.config)
    for budget in budgets:
        budget.check(loaded.config)
    if how.masks:
        return [_subsets(loaded, calibration, method, *how.masks(loaded, calibration, budget, chosen_options))
                for budget in budgets]
    scores = how.scores(loaded, calibration, chosen_options) if how.scores else one_sweep(loaded, calibration, method)
    chosen = []
    for budget in budgets:
        counts = [budget.routed(loaded.config, s) for s in scores]
        masks = [np.stack([pick(row, n) for row, n in zip(s, count)]) for s, count in zip(scores, counts)]
        chosen.append(_subsets(loaded, calibration, method, masks, scores if how.keeps_scores else None))
    return chosen


def choose_one(loaded: LoadedModel, calibration: Calibration, method: str, budget: Budget, **options) -> Subset:
    """The subset of a calibration with one group."""
    return choose(loaded, calibration, method, [budget], **options)[0][0]


def choose_subset(loaded: LoadedModel, texts: Sequence[str], keep: int, method: str = "layerwise", **options) -> Subset:
    """The `keep` experts of every layer (shared ones included) that texts need. Options as for `choose`."""
    if isinstance(texts, str) or not len(texts) or not all(texts):
        raise InputError("texts must be a list of strings that are not empty")
    source = Examples("texts", list(texts))
    calibration = from_source(loaded.config, source, loaded.tokenizer, {"": range(len(source))})
    return choose_one(loaded, calibration, method, Budget(keep=keep), **options)


def choose_for_prompts(loaded: LoadedModel, prompts: Sequence[Sequence[int] | np.ndarray], keep: int) -> list[Subset]:
    """The `keep` experts of every layer (shared ones included) that each of the prompts (token ids) chooses for itself, by
    router probability."""
    length = round_up(max(map(len, prompts)), 64)  # few lengths, few compilations
    return choose(loaded, from_tokens(prompts, length, apart=True), "router", [Budget(keep=keep)])[0]


def _subsets(loaded: LoadedModel, calibration: Calibration, method: str, masks, scores) -> list[Subset]:
    m = loaded.config.model
    return [Subset(kept_of(mask), m.num_routed_experts, m.num_shared_experts, method,
                   dict(about, label=name) if name else dict(about),
                   None if scores is None else tuple(map(tuple, scores[i].tolist())), loaded.identity())
            for i, (mask, name, about) in enumerate(zip(masks, calibration.names, calibration.about))]
