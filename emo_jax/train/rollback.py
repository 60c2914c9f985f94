"""Back to the last good checkpoint, when too many steps in a row are bad; the rows of those steps are left out from then on.

What is left out is in `skipped_rows.json` of the run's folder before the run goes on, so that a restart leaves out the same.
Where that file is lost, the run meets the same bad steps again, and writes it again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from emo_jax import processes
from emo_jax.checkpoints.checkpoint import FOLDER, move_step, steps
from emo_jax.config import Config
from emo_jax.errors import RunError
from emo_jax.files import AnyPath, write_json, write_text
from emo_jax.progress import is_primary, say
from emo_jax.train.bad_steps import DIVERGED, Verdict

FILE = "skipped_rows.json"
METRICS = "metrics.jsonl"
SKIPPED_IN_A_ROW = 8  # steps; a rise that stays is in the window, and no longer skipped, after four
DIVERGED_IN_A_ROW = 16
WITHOUT_LOSS_IN_A_ROW = 20
AT_MOST = 3  # in a run


class RollBack(Exception):
    """The run has to go back. `step`: the first of the bad ones; `batches`: as many, whose rows are left out. why: a clause
    that names the cause. advice: what to change if that does not help."""

    def __init__(self, step: int, batches: int, why: str, advice: str):
        super().__init__(why)
        self.step, self.batches, self.why, self.advice = step, batches, why, advice


class Watch:
    """Looks at every step after the fact, in order; the same on every process, and after a restart."""

    def __init__(self, config: Config, out: AnyPath, say: Callable[[str], None]):
        self._config, self._out, self._say = config, out, say
        self._without_loss = 0
        self.is_good = True  # the last step that was seen was taken, and no sign of a loss that diverges

    def see(self, step: int, metrics: dict[str, np.ndarray]) -> bool:
        """Whether the step was skipped, which is said. Raises `RollBack` for the last of too many, and `RunError` if no token
        has had a loss for long."""
        verdict = Verdict(*metrics["verdict"].tolist())
        self.is_good = not verdict.skipped and not verdict.diverged_in_a_row
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if verdict.skipped:
            self._say(f"step {step} is skipped: {self._reason(loss, norm, verdict)}")
        if verdict.skipped_in_a_row >= SKIPPED_IN_A_ROW:
            batches = int(verdict.skipped_in_a_row)
            raise RollBack(step - batches + 1, batches, f"{batches} steps in a row were skipped, the last, {step}, because "
                           + self._reason(loss, norm, verdict), self._advice(step, math.isfinite(loss) and math.isfinite(norm)))
        if verdict.diverged_in_a_row >= DIVERGED_IN_A_ROW:
            batches = int(verdict.diverged_in_a_row)
            uniform = math.log(self._config.model.vocab_size)
            raise RollBack(step - batches + 1, batches, f"the loss has diverged: it was above {DIVERGED * uniform:.2f}, "
                           f"{DIVERGED} times that of guesses, for {batches} steps in a row, and is {loss:.4g} at step {step}",
                           "lower optimizer.learning_rate or give a longer optimizer.warmup_steps")
        self._check_tokens(step, metrics)
        return bool(verdict.skipped)

    def _reason(self, loss: float, norm: float, verdict: Verdict) -> str:
        for name, value, mean, std in (("loss", loss, verdict.loss_mean, verdict.loss_std),
                                       ("grad_norm", norm, verdict.grad_norm_mean, verdict.grad_norm_std)):
            if not math.isfinite(value):
                return f"{name} is {value}"
            if (sigma := self._config.faults.skip_sigma) and value - mean > sigma * std:
                return (f"{name} {value:.4g} is more than faults.skip_sigma={sigma:g} standard deviations above the mean of "
                        f"the steps before ({mean:.4g}, standard deviation {std:.2g})")
        return "its numbers are bad"

    def _advice(self, step: int, finite: bool) -> str:
        look = f"look at the documents of the step (emo-jax replay {self._out} --step {step})"
        return f"{look}, or give a higher faults.skip_sigma" if finite else f"lower optimizer.learning_rate, or {look}"

    def _check_tokens(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        d, empty = self._config.data, float(metrics["loss"]) == 0 and float(metrics["loss_tokens"]) <= 1
        self._without_loss = self._without_loss + 1 if empty else 0
        cause = f"data.repetition_filter={d.repetition_filter} took all rows of {d.path or 'the default documents'}"
        if self._without_loss == 1:
            self._say(f"step {step}: no token has a loss; {cause}")
        if self._without_loss >= WITHOUT_LOSS_IN_A_ROW:
            raise RunError(f"no token had a loss in {self._without_loss} steps in a row, until step {step}: {cause}",
                           "look at the documents (emo-jax data inspect), or set data.repetition_filter=False")


# ---- what is left out -----------------------------------------------------------------------------------------------


class SkippedRows:
    """The rollbacks of a run so far: [{"step", "batches": that are read and dropped before it is taken, "back_to", "why"}]."""

    def __init__(self, out: AnyPath):
        self._path = out / FILE
        self.rollbacks: list[dict[str, Any]] = []
        if not self._path.exists():
            return
        try:
            saved = json.loads(self._path.read_text())
            if saved["sha256"] != _seal(saved["rollbacks"]):
                raise ValueError("its checksum differs")
            self.rollbacks = saved["rollbacks"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            say(f"damaged: {self._path} is not what was written ({type(e).__name__}: {e}), and is not used; if rows have to be "
                f"left out, the run will find them again")

    def before(self, step: int) -> int:
        """Batches that are left out between the step before and `step`."""
        return sum(r["batches"] for r in self.rollbacks if r["step"] == step)

    def add(self, bad: RollBack, back_to: int) -> None:
        self.rollbacks.append({"step": bad.step, "batches": bad.batches, "back_to": back_to, "why": bad.why})
        if is_primary():
            write_json(self._path, {"rollbacks": self.rollbacks, "sha256": _seal(self.rollbacks)}, indent=1)
        processes.wait_for_all("rows left out")


def _seal(rollbacks: Any) -> str:
    return hashlib.sha256(json.dumps(rollbacks, sort_keys=True).encode()).hexdigest()


def roll_back(out: AnyPath, bad: RollBack) -> None:
    """Leaves the folder so that `start.resume` goes on from the newest checkpoint before the bad steps, or from the start of a
    run that has none yet, and writes down which rows are left out. Checkpoints of later steps go to `rolled_back/`. A second
    rollback to the same checkpoint goes one further. Raises `RunError` if there were too many, or there is nowhere to go.

    A kill at any moment leaves either the run before the rollback, or one that goes back by itself, or the run after it."""
    skipped, saved = SkippedRows(out), steps(out / FOLDER)
    found = [step for step in saved if step < bad.step]
    good = f"the last checkpoint before that is of step {found[-1]}" if found else "there is no checkpoint of before that"
    if len(skipped.rollbacks) >= AT_MOST or (saved and not found):
        tried = f"; {len(skipped.rollbacks)} rollbacks have not helped (see {out / FILE})" if skipped.rollbacks else ""
        raise RunError(f"{bad.why}{tried}; {good}. Before the same command goes on, {bad.advice}")
    tried = {r["back_to"] for r in skipped.rollbacks}
    again = [step for step in found if step not in tried]
    back_to = (again or found or [0])[-1]
    if is_primary():
        if not found:  # metrics without a checkpoint would be those of a run that lost them
            write_text(out / METRICS, "")
        for step in saved:
            if step > back_to:
                _set_aside(out, step)
    processes.wait_for_all("checkpoints rolled back")
    skipped.add(bad, back_to)
    where = f"the checkpoint of step {back_to}" if found else "the start"
    say(f"{bad.why}. Rolling back to {where}; the rows of the {bad.batches} steps from {bad.step} on are left out (rollback "
        f"{len(skipped.rollbacks)} of at most {AT_MOST}, see {out / FILE})")


def _set_aside(out: AnyPath, step: int) -> None:
    target, n = out / "rolled_back" / str(step), 1
    while target.exists():
        n, target = n + 1, out / "rolled_back" / f"{step}-{n}"
    move_step(out / FOLDER / str(step), target)
    say(f"moved the checkpoint of step {step} to {target}")
