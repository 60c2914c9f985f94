"""How much of what a subset has learnt goes into the whole model: the task vector's coefficient, chosen on held-out text."""

from __future__ import annotations

from typing import Any

import jax

from emo_jax.errors import InputError
from emo_jax.loaded import LoadedModel
from emo_jax.model import Params
from emo_jax.train.evaluate import Evaluation

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
TOLERANCE = 0.05  # what other labels may lose, as a part of the gain


def choose_alpha(whole: LoadedModel, learnt: Params, evaluation: Evaluation, label: str,
                 tolerance: float = TOLERANCE) -> tuple[float, list[dict[str, Any]]]:
    """(alpha, what was tried): of `ALPHAS` the one that gains most on `label` among those by which the other labels lose at
    most `tolerance` of the gain, in nats/token (mean over the labels); the smallest one if none does. `learnt`: the parameters
    at alpha 1. Raises `InputError` for a label that is not scored, or the only one."""
    known = set(evaluation.labels.tolist())
    if label not in known or len(known) == 1:
        raise InputError(f"--alpha auto needs held-out documents of the label {label!r} and of others; there are those of "
                         f"{', '.join(sorted(known))}: give --label and --data")

    def losses(params: Params, what: str) -> dict[str, float]:
        labels = evaluation.summary(*evaluation.losses(params, what=what))["labels"]
        return {name: part["loss"] for name, part in labels.items()}

    before, tried = losses(whole.params, "scoring the whole model"), []
    for alpha in ALPHAS:
        blended = jax.tree.map(lambda old, new, alpha=alpha: old + alpha * (new - old), whole.params, learnt)
        change = {name: loss - before[name] for name, loss in losses(blended, f"scoring alpha {alpha}").items()}
        others = sum(x for name, x in change.items() if name != label) / (len(change) - 1)
        tried.append({"alpha": alpha, "gain": -change[label], "others": others})
    allowed = [t for t in tried if t["others"] <= tolerance * t["gain"]]
    return max(allowed, key=lambda t: t["gain"], default=tried[0])["alpha"], tried
