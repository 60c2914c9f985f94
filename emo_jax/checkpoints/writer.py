"""Saving while training goes on: in the background, with retention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from emo_jax.checkpoints.checkpoint import FOLDER, checksums, read_step, steps
from emo_jax.checkpoints.description import DamagedCheckpoint, describe
from emo_jax.checkpoints.orbax_s3 import commit_class, for_orbax
from emo_jax.config import CheckpointConfig, Config
from emo_jax.errors import RunError
from emo_jax.files import AnyPath, absolute_path


class Best:
    """Orbax preservation policy: the `count` steps of lowest evaluation loss. The losses are kept in `meta`, because
    Orbax writes metrics of its own only for its older `best_fn`, and would forget the best step at a restart."""

    def __init__(self, count: int, folder: AnyPath):
        self.count, self.losses = count, {}
        for step in steps(folder) if count else ():
            try:
                loss = read_step(folder / str(step)).meta["held_out_loss"]
            except (DamagedCheckpoint, KeyError):
                continue
            if loss is not None:
                self.losses[step] = loss

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        ranked = sorted((c.step for c in checkpoints if c.step in self.losses), key=self.losses.__getitem__)
        return [c.step in ranked[:self.count] for c in checkpoints]


class CheckpointWriter:
    """Saves in the background and deletes what retention no longer asks for. A folder gets its final name when it is
    complete."""

    def __init__(self, out: AnyPath, options: CheckpointConfig):
        folder = absolute_path(out, "--out") / FOLDER
        self._best = Best(options.keep_best, folder)
        keep = [policies.LatestN(options.keep_last), self._best]
        if options.keep_every:
            keep.append(policies.EveryNSteps(options.keep_every))
        self._manager = ocp.CheckpointManager(
            for_orbax(folder), options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True,
                temporary_path_class=commit_class(folder)))

    def save(self, step: int, items: dict[str, Any], config: Config, *, tokens: int, source: dict[str, Any],
             position: dict[str, Any] | None, loss: float | None = None, **more: Any) -> None:
        """Returns when the arrays have left the devices. `items`: {"params", "opt_state"}; `loss`: the evaluation loss that
        `keep_best` ranks by; the others as in `describe`.

        Raises `RunError` instead of saving arrays that are not finite, and when this or an earlier save failed.
        """
        sums = checksums(items)
        if not all(item["finite"] for item in sums.values()):
            raise RunError(f"the state after step {step} is not finite and was not saved")
        if step in self._manager.all_steps():
            return
        described = describe(config, step, tokens, source, sums, position, held_out_loss=loss, **more)
        if loss is not None:
            self._best.losses[step] = loss
        arrays = {name: ocp.args.PyTreeSave(tree, save_args=_save_args(tree)) for name, tree in items.items()}
        try:
            self._manager.save(step, force=True, args=ocp.args.Composite(
                **arrays, meta=ocp.args.JsonSave(described.meta), data=ocp.args.JsonSave(described.data)))
        except Exception as e:
            raise RunError(f"writing the checkpoint of step {step}, or the one before, failed: {e}") from e

    def last_good(self) -> str:
        found = self._manager.all_steps()
        return f"the last good checkpoint is of step {max(found)}" if found else "there is no checkpoint yet"

    def ranks_as_best(self, loss: float) -> bool:
        """Whether a checkpoint of this evaluation loss would be kept for it."""
        kept = sorted(self._best.losses[step] for step in self._manager.all_steps() if step in self._best.losses)
        return self._best.count > 0 and (len(kept) < self._best.count or bool(loss < kept[self._best.count - 1]))

    def close(self) -> None:
        """Waits for the last save; raises `RunError` if it failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except Exception as e:
            raise RunError(f"writing the last checkpoint failed: {e}") from e


def _save_args(tree):
    """One chunk per (layer, expert) for expert tables [L, E, ., .]; Orbax's choice for everything else."""

    def args(path, leaf):
        in_table = any(getattr(k, "key", None) == "moe" for k in path) and leaf.ndim == 4
        return ocp.SaveArgs(shard_axes=(0, 1)) if in_table else ocp.SaveArgs()

    return jax.tree_util.tree_map_with_path(args, tree)
