"""What the verdicts on steps lead to: a word in the log, a rollback, the end of the run."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from emo_jax.config import Config
from emo_jax.errors import RunError
from emo_jax.files import AnyPath
from emo_jax.train.bad_steps import DIVERGED, Verdict

SKIPPED_IN_A_ROW = 8  # steps; a rise that stays is in the window, and no longer skipped, after four
DIVERGED_IN_A_ROW = 16
WITHOUT_LOSS_IN_A_ROW = 20


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
