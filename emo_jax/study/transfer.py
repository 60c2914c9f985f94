"""Whether what a few experts learn on a label carries over to the whole model: one label of a trained model, way after way.

A way (`ARMS`) is a fine-tuning: what is trained, on which text, in which pools. Of each is measured, on documents that nothing
was trained on or chosen by: the gain on the label in the subset's view (only its experts may be used) and in the whole model,
and the change of all other labels in the whole model, nats/token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emo_jax.checkpoints.checkpoint import Checkpoint, open_checkpoint
from emo_jax.checkpoints.subset import Subset, full
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, remove_tree, write_result
from emo_jax.loaded import LoadedModel, load
from emo_jax.progress import say
from emo_jax.study.arms import APPENDED, ARMS, Arm
from emo_jax.study.measure import StudyText
from emo_jax.subsets.budget import Budget
from emo_jax.subsets.choose import choose_one
from emo_jax.surgery.extend import extend, extended_subset
from emo_jax.surgery.finetune import finetune
from emo_jax.surgery.merge import merge
from emo_jax.train.evaluate import Evaluation

DOCUMENTS = 50  # that choose the experts


def transfer(run: str, label: str, arms: Sequence[str], out: str | AnyPath, *, keep: int = 0, data: str = "",
             overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Trains each of `arms` on the documents of `label` that the model `run` names, and measures it on `data` (default: what
    the run held or left out); writes `out`/ARM.json and returns what they hold. What is there is not done again. `keep`:
    experts of the subset, shared ones included; 0: a quarter. Raises `InputError`."""
    folder, loaded = Path(out), load(run, data=data)
    keep = keep or loaded.config.model.num_experts // 4
    todo = [arm for arm in arms if not (folder / f"{arm}.json").exists()]
    if todo:
        text = StudyText(loaded, DOCUMENTS)
        subset = choose_one(loaded, text.choosing(DOCUMENTS, label), "router", Budget(keep=keep))
        before = _losses(text.evaluation(loaded), loaded, subset)
        for arm in todo:
            say(f"{run}, {label}: {ARMS[arm].sentence}")
            began = time.monotonic()
            after, seconds = _trained(loaded.saved, subset, label, ARMS[arm], folder / arm, overrides, text)
            others = [other for other in text.trained if other != label]
            change = {where: {name: after[where][name] - loss for name, loss in before[where].items()} for where in before}
            write_result(folder / f"{arm}.json", {
                "arm": arm, "run": run, "label": label, "left_out": label in text.left_out, "seed": loaded.config.seed,
                "keep": keep, "before": before, "after": after, "subset": -change["subset"][label],
                "full": -change["full"][label], "others": float(np.mean([change["full"][name] for name in others])),
                "cost": ARMS[arm].cost(), "seconds": seconds, "seconds_in_all": time.monotonic() - began})
            remove_tree(folder / arm)
    return [_read(folder / f"{arm}.json") for arm in arms]


def _trained(found: Checkpoint, subset: Subset, label: str, arm: Arm, folder: Path, overrides: Sequence[str],
             text: StudyText) -> tuple[dict[str, dict[str, float]], float]:
    """(`_losses` afterwards, seconds of training)"""
    whole, run = found, folder / "run"
    if arm.where == "appended":
        whole = open_checkpoint(extend(found, APPENDED, folder / "extended", init="most_used", subset=subset))
    began = time.monotonic()
    finetune(whole, subset if arm.where in ("inside", "alone") else None, run, found.config.data.path,
             [*arm.overrides(), *overrides], alone=arm.where == "alone", label=label)
    seconds = time.monotonic() - began
    if arm.where == "alone":
        merge(whole, open_checkpoint(run), subset, folder / "merged", router=True, shared=True)
        run = folder / "merged"
    loaded = load(run)
    if arm.where == "appended":
        subset = extended_subset(subset, APPENDED)
    return _losses(text.evaluation(loaded), loaded, subset), seconds


def _losses(evaluation: Evaluation, loaded: LoadedModel, subset: Subset) -> dict[str, dict[str, float]]:
    """nats/token by label: "full", of the whole model, and "subset", with the experts of the subset only."""
    return {name: {label: part["loss"] for label, part in evaluation.summary(
        *evaluation.losses(loaded.params, used.mask(), f"scoring the {name} model"))["labels"].items()}
        for name, used in (("full", full(loaded.config)), ("subset", subset))}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: not the result of a way of training ({type(e).__name__}: {e}); delete it, and it is made "
                         "again") from None
