"""What a subset costs: its loss beside the full model's, by source label, on text that did not choose it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from emo_jax.checkpoints.subset import Subset, require_experts
from emo_jax.checkpoints.subset import full as everything
from emo_jax.data.evaluation import MAX_DOCUMENTS
from emo_jax.errors import InputError
from emo_jax.loaded import LoadedModel
from emo_jax.subsets import calibration as calibration_lib
from emo_jax.subsets.budget import Budget
from emo_jax.subsets.calibration import Calibration
from emo_jax.subsets.choose import choose
from emo_jax.train.evaluate import Evaluation

RESAMPLES = 1000
CONFIDENCE = 0.95
DOCUMENTS_OF_LABEL = 16  # that choose, in `check_own_labels`


def check_subsets(loaded: LoadedModel, subsets: dict[str, Subset]) -> dict[str, Any]:
    """Every subset, used for all text. Documents that one of them was chosen by are left out."""
    source, numbers = loaded.documents_to_score()
    used = {h for s in subsets.values() for h in s.calibration.get("document_hashes", ())}
    kept = calibration_lib.without(source, numbers[:MAX_DOCUMENTS], used) if used else numbers
    if not len(kept):
        raise InputError(f"every document of {source.name} was used to choose the subset; give other text with --data")
    evaluation = loaded.evaluation(source, kept)
    full = full_losses(loaded, evaluation)
    rows = [compare(evaluation, full, evaluation.losses(loaded.params, s.mask(), f"scoring {name}")) | describe(name, s)
            for name, s in subsets.items()]
    return {"data": source.name, "documents_left_out": int(len(numbers[:MAX_DOCUMENTS]) - len(kept)) if used else 0,
            "full": evaluation.summary(*full), "subsets": rows}


def check_own_labels(loaded: LoadedModel, keeps: Sequence[int], method: str, documents: int = 0,
                     **options: Any) -> dict[str, Any]:
    """A subset for every label and number of kept experts, each scored on the text of its own label only: half of the
    label's documents (at most `documents` of it) choose, the other half is scored."""
    source, numbers = loaded.documents_to_score()
    groups = calibration_lib.by_label(source, numbers[:MAX_DOCUMENTS])
    calibration, scored = calibration_lib.halves(loaded.config, source, loaded.tokenizer, groups,
                                                 documents or DOCUMENTS_OF_LABEL)
    evaluation = loaded.evaluation(source, scored)
    return {"data": source.name, "method": method} | curve(loaded, calibration, evaluation, keeps, method, **options)


def curve(loaded: LoadedModel, calibration: Calibration, evaluation: Evaluation, keeps: Sequence[int], method: str,
          **options: Any) -> dict[str, Any]:
    """{"full", "subsets"}: rows of a label use the subset of the label's group. One sweep a number of kept experts."""
    chosen = choose(loaded, calibration, method, [Budget(keep=k) for k in keeps], **options)
    full = full_losses(loaded, evaluation)
    rows = []
    for keep, subsets in zip(keeps, chosen):
        masks = masks_of_labels(evaluation, calibration.names, subsets)
        losses = evaluation.losses(loaded.params, masks, f"scoring {keep} experts")
        rows.append(compare(evaluation, full, losses) | {
            "name": f"keep {keep}", "keep": keep, "share": keep / loaded.config.model.num_experts, "method": method})
    return {"full": evaluation.summary(*full), "subsets": rows,
            "kept": {name: [list(map(list, s[i].kept)) for s in chosen] for i, name in enumerate(calibration.names)}}


def masks_of_labels(evaluation: Evaluation, names: Sequence[str], subsets: Sequence[Subset]) -> np.ndarray:
    """bool [L, n, R]: each row the mask of its label."""
    masks = {name: s.mask() for name, s in zip(names, subsets)}
    return np.stack([masks[label] for label in evaluation.labels], axis=1)


def full_losses(loaded: LoadedModel, evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """The whole model's, by the program that also serves subsets."""
    require_experts(loaded.config)
    return evaluation.losses(loaded.params, everything(loaded.config).mask(), "scoring the full model")


def describe(name: str, subset: Subset) -> dict[str, Any]:
    keep = sorted(set(subset.experts_per_layer))
    return {"name": name, "keep": keep[0] if len(keep) == 1 else subset.experts_per_layer, "share": subset.share,
            "method": subset.method}


def compare(evaluation: Evaluation, full: tuple, losses: tuple) -> dict[str, Any]:
    """The summary of `losses`, with "difference" from the full model (nats/token) and its bootstrap "interval" (95 %,
    over rows; None for a single row) in all and by label."""
    result = evaluation.summary(*losses)
    extra = lambda where: difference(full[0][where], losses[0][where], losses[1][where])
    result |= extra(slice(None))
    for label, part in result["labels"].items():
        part |= extra(evaluation.labels == label)
    return result


def difference(before: np.ndarray, after: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """The change of the loss per token, from the nats and counted tokens of the same rows [n]."""
    gap = after - before
    result = {"difference": float(gap.sum() / max(tokens.sum(), 1)), "interval": None}
    if len(gap) > 1:
        counts = np.random.default_rng(0).multinomial(len(gap), np.full(len(gap), 1 / len(gap)), RESAMPLES)
        drawn = (counts @ gap) / np.maximum(counts @ tokens, 1)
        tail = (1 - CONFIDENCE) / 2
        result["interval"] = [float(q) for q in np.quantile(drawn, [tail, 1 - tail])]
    return result
