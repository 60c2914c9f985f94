"""Saving while training goes on: in the background, with retention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emo_jax import processes
from emo_jax.checkpoints.checkpoint import FOLDER, checksums, read_step, steps
from emo_jax.checkpoints.description import DamagedCheckpoint, describe
from emo_jax.checkpoints.orbax import Saver
from emo_jax.checkpoints.space import Room
from emo_jax.config import CheckpointConfig, Config
from emo_jax.errors import RunError
from emo_jax.files import AnyPath, absolute_path, reason


class CheckpointWriter:
    """Saves in the background and deletes what retention no longer asks for. A folder gets its final name when it is
    complete; an older one is deleted when the description of the new one was read back. tier: differs between the writers of a
    process."""

    def __init__(self, out: AnyPath, options: CheckpointConfig, tier: str = ""):
        self.folder = absolute_path(out, "--out") / FOLDER
        self._options, self._losses = options, _evaluation_losses(self.folder) if options.keep_best else {}
        self._saver = Saver(self.folder, self._kept, self._verify, tier)

    def save(self, step: int, items: dict[str, Any], config: Config, *, tokens: int, source: dict[str, Any],
             position: dict[str, Any] | None, loss: float | None = None, **more: Any) -> None:
        """Returns when the arrays have left the devices. `items`: {"params", "opt_state"}; `loss`: the evaluation loss that
        `keep_best` ranks by; the others as in `describe`.

        Raises `RunError` instead of saving arrays that are not finite, where there is no room for them, and when this or an
        earlier save failed.
        """
        sums = checksums(items)
        if not all(item["finite"] for item in sums.values()):
            raise RunError(f"the state after step {step} is not finite and was not saved")
        if step in self._saver.steps():
            return
        self.wait()  # what it deletes makes room
        lacks = Room(self.folder, items, self._options.min_free_gb).lacks()
        if processes.any_process(lacks is not None):
            raise RunError(f"the checkpoint of step {step} was not begun: {lacks or 'another process sees too little room'}",
                           "free space there, or keep fewer checkpoints (checkpoint.keep_last)")
        described = describe(config, step, tokens, source, sums, position, held_out_loss=loss, **more)
        if loss is not None:
            self._losses[step] = loss
        try:
            self._saver.save(step, items, described._asdict())
        except Exception as e:
            raise RunError(f"writing the checkpoint of step {step} failed: {_cause(e)}") from e

    @property
    def saving(self) -> bool:
        """Whether the last save goes on."""
        return self._saver.saving

    def newest_complete(self) -> int:
        """Its step, or -1."""
        found = self._saver.steps()
        return max(found[:-1] if self._saver.saving else found, default=-1)

    def check(self) -> None:
        """Raises `RunError` if a save has failed. Never waits."""
        if self._saver.error is not None:
            raise RunError(f"writing a checkpoint failed: {_cause(self._saver.error)}") from self._saver.error

    def wait(self) -> None:
        """Until the last save is over; raises `RunError` if it failed."""
        self.check()
        try:
            self._saver.wait()
        except Exception as e:
            raise RunError(f"writing a checkpoint failed: {_cause(e)}") from e

    def ranks_as_best(self, loss: float) -> bool:
        """Whether a checkpoint of this evaluation loss would be kept for it."""
        best, count = self._best(self._saver.steps()), self._options.keep_best
        return count > 0 and (len(best) < count or bool(loss < self._losses[best[-1]]))

    def close(self) -> None:
        """`wait`, and no more saves."""
        self.wait()
        try:
            self._saver.close()
        except Exception as e:
            raise RunError(f"writing a checkpoint failed: {_cause(e)}") from e

    def _verify(self, step: int) -> None:
        read_step(self.folder / str(step)).position()

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


def _cause(error: Exception) -> str:
    """In a line, without TensorStore's places in its source."""
    return reason(error).partition(" [source locations")[0]
