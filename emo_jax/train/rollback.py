"""Back to the last good checkpoint, when too many steps in a row are bad; the rows of those steps are left out from then on.

What is left out is in `skipped_rows.json` of the run's folder before the run goes on, so that a restart leaves out the same.
Where that file is lost, the run meets the same bad steps again, and writes it again.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from emo_jax import processes
from emo_jax.checkpoints import tiers
from emo_jax.checkpoints.checkpoint import FOLDER, steps
from emo_jax.errors import RunError
from emo_jax.files import AnyPath, write_json, write_text
from emo_jax.progress import is_primary, say
from emo_jax.train.metrics import METRICS
from emo_jax.train.run_folder import set_aside
from emo_jax.train.verdicts import RollBack

FILE = "skipped_rows.json"
AT_MOST = 3  # in a run


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
    run that has none yet, and writes down which rows are left out. Checkpoints of later steps are moved aside. A second
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
    tiers.forget(out)
    if is_primary():
        if not found:  # metrics without a checkpoint would be those of a run that lost them
            write_text(out / METRICS, "")
        for step in saved:
            if step > back_to:
                set_aside(out, out / FOLDER / str(step), "is of steps that the run goes back before")
    processes.wait_for_all("checkpoints rolled back")
    skipped.add(bad, back_to)
    where = f"the checkpoint of step {back_to}" if found else "the start"
    say(f"{bad.why}. Rolling back to {where}; the rows of the {bad.batches} steps from {bad.step} on are left out (rollback "
        f"{len(skipped.rollbacks)} of at most {AT_MOST}, see {out / FILE})")
