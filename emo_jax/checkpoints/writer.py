"""Saving while training goes on: in the background, with retention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emo_jax.checkpoints.checkpoint import FOLDER, checksums, read_step, steps
from emo_jax.checkpoints.description import DamagedCheckpoint, describe
from emo_jax.checkpoints.orbax import Saver
from emo_jax.config import CheckpointConfig, Config
from emo_jax.errors import RunError
from emo_jax.files import AnyPath, absolute_path


class CheckpointWriter:
    """Saves in the background and deletes what retention no longer asks for. A folder gets its final name when it is
    complete."""

    def __init__(self, out: AnyPath, options: CheckpointConfig):
        folder = absolute_path(out, "--out") / FOLDER
        self._options, self._losses = options, _evaluation_losses(folder) if options.keep_best else {}
        self._saver = Saver(folder, self._kept)

    def save(self, step: int, items: dict[str, Any], config: Config, *, tokens: int, source: dict[str, Any],
             position: dict[str, Any] | None, loss: float | None = None, **more: Any) -> None:
        """Returns when the arrays have left the devices. `items`: {"params", "opt_state"}; `loss`: the evaluation loss that
        `keep_best` ranks by; the others as in `describe`.

        Raises `RunError` instead of saving arrays that are not finite, and when this or an earlier save failed.
        """
        sums = checksums(items)
        if not all(item["finite"] for item in sums.values()):
            raise RunError(f"the state after step {step} is not finite and was not saved")
        if step in self._saver.steps():
            return
        described = describe(config, step, tokens, source, sums, position, held_out_loss=loss, **more)
        if loss is not None:
            self._losses[step] = loss
        try:
            self._saver.save(step, items, described._asdict())
        except Exception as e:
            raise RunError(f"writing the checkpoint of step {step}, or the one before, failed: {e}") from e

    def last_good(self) -> str:
        found = self._saver.steps()
        return f"the last good checkpoint is of step {max(found)}" if found else "there is no checkpoint yet"

    def ranks_as_best(self, loss: float) -> bool:
        """Whether a checkpoint of this evaluation loss would be kept for it."""
        best, count = self._best(self._saver.steps()), self._options.keep_best
        return count > 0 and (len(best) < count or bool(loss < self._losses[best[-1]]))

    def close(self) -> None:
        """Waits for the last save; raises `RunError` if it failed."""
        try:
            self._saver.close()
        except Exception as e:
            raise RunError(f"writing the last checkpoint failed: {e}") from e

    def _kept(self, steps: Sequence[int]) -> set[int]:
        every = self._options.keep_every
        return {*steps[-self._options.keep_last:], *self._best(steps), *(s for s in steps if every and s % every == 0)}

    def _best(self, steps: Sequence[int]) -> list[int]:
        """The `keep_best` steps of lowest evaluation loss, the best first."""
        return sorted((s for s in steps if s in self._losses), key=self._losses.__getitem__)[:self._options.keep_best]


def _evaluation_losses(folder: AnyPath) -> dict[int, float]:
    """By step. They are kept in `meta`, so that a restart does not forget the best step."""
    losses = {}
    for step in steps(folder):
        try:
            loss = read_step(folder / str(step)).meta["held_out_loss"]
        except (DamagedCheckpoint, KeyError):
            continue
        if loss is not None:
            losses[step] = loss
    return losses
