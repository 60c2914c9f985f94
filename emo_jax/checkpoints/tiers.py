"""Two tiers of checkpoints: those of the run's folder and, with `checkpoint.local`, those of a fast folder in between.

Orbax's own tiers (0.12.8, `experimental.emergency`) are for other places: `CheckpointManager` wants several slices that hold
the same parameters, `ReplicatorCheckpointManager` the daemon of GKE that copies RAM disks. Here two writers save, and readers
see one list.

Several runs may share the fast folder: the checkpoints of one are in LOCAL/NAME-HASH/LIFE/checkpoints, NAME and HASH of its
folder's absolute path. LIFE is a random name, kept beside the run's own checkpoints, so that a run that begins anew in the same
folder has another: what an earlier one left is not used, and is deleted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import time
import uuid
from pathlib import Path
from typing import Any

import jax
import numpy as np

from emo_jax import buckets, processes
from emo_jax.checkpoints.checkpoint import FOLDER, read_step, steps
from emo_jax.checkpoints.description import DamagedCheckpoint
from emo_jax.checkpoints.space import Room
from emo_jax.checkpoints.writer import CheckpointWriter
from emo_jax.config import CheckpointConfig, Config
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, make_folder, remove_tree, write_json
from emo_jax.progress import is_primary

LIFE = "local_tier.json"  # in the run's checkpoints/
KEPT = 1  # local checkpoints
LOOK_EVERY_S = 5.0  # at the room on the disks, between saves
AFTER = "after"  # in `meta` of a local one: the newest step of the run's folder when it was saved


def prepare(out: AnyPath, options: CheckpointConfig) -> None:
    """Makes the fast folder of a run, if it asks for one, and deletes what earlier runs in `out` left there. Raises
    `InputError` unless it can be written, and is the same for all processes."""
    if not options.local:
        return
    if buckets.is_url(options.local):
        raise InputError(f"checkpoint.local={options.local} must be a local folder; checkpoints for a bucket go to --out")
    make_folder(options.local, "checkpoint.local")
    if is_primary() and _life(out) is None:
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        write_json(out / FOLDER / LIFE, {"life": uuid.uuid4().hex})
    processes.wait_for_all("local checkpoints: life")
    folder = _local(out, options)
    assert folder is not None
    for stale in folder.parent.iterdir() if is_primary() and folder.parent.is_dir() else ():
        if stale != folder:
            remove_tree(stale)
    _require_shared(Path(options.local).expanduser(), options)
    make_folder(folder, "checkpoint.local")


def _require_shared(folder: Path, options: CheckpointConfig) -> None:
    number = int(processes.gather(np.array(random.SystemRandom().randrange(2**31), np.int32))[0])
    probe = folder / f"probe-{number}"
    if is_primary():
        probe.touch()
    processes.wait_for_all("local checkpoints: probe written")
    missing = processes.any_process(not probe.exists())
    if is_primary():
        probe.unlink()
    if missing:
        raise InputError(f"checkpoint.local={options.local} is not the same folder for all processes; every one of them must "
                         f"see it (such as a file system that the hosts share)")


def forget(out: AnyPath) -> None:
    """No local checkpoint counts any more: for who goes back to an earlier one of the run's folder."""
    if is_primary():
        (out / FOLDER / LIFE).unlink(missing_ok=True)
    processes.wait_for_all("local checkpoints: forgotten")


def step_folders(out: AnyPath, options: CheckpointConfig) -> list[AnyPath]:
    """The complete checkpoints of both tiers, newest first."""
    run, local = out / FOLDER, _local(out, options)
    own = steps(run)
    found = [(step, "run", run / str(step)) for step in own]
    for step in steps(local / FOLDER) if local is not None else ():
        path = local / FOLDER / str(step)  # ty: ignore[unsupported-operator]
        if _goes_on_from(path, own[-1] if own else -1):
            found.append((step, "local", path))
    return [path for *_, path in sorted(found, reverse=True)]


def is_local(path: AnyPath, out: AnyPath) -> bool:
    return path.parent != out / FOLDER


def _goes_on_from(path: AnyPath, newest: int) -> bool:
    """Not if the checkpoint that it came after is gone: then somebody went back in the run's folder. A damaged one does, so
    that whoever reads it says so."""
    try:
        return read_step(path).meta.get(AFTER, -1) <= newest
    except DamagedCheckpoint:
        return True


def _local(out: AnyPath, options: CheckpointConfig) -> Path | None:
    life = _life(out) if options.local else None
    if life is None:
        return None
    name = f"{out.name}-{hashlib.sha256(str(out).encode()).hexdigest()[:12]}"
    return Path(options.local).expanduser().absolute() / name / life


def _life(out: AnyPath) -> str | None:
    """None if there is none, or not one of ours."""
    try:
        life = json.loads((out / FOLDER / LIFE).read_text())["life"]
        return uuid.UUID(hex=life).hex
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, *buckets.errors(out)):
        return None


class TieredWriter:
    """The writers of both tiers, for a run that goes on from `step`. items: as `save` gets them."""

    def __init__(self, out: AnyPath, options: CheckpointConfig, step: int, items: dict[str, Any]):
        self._out, self._options = out, options
        self._tiers = {False: CheckpointWriter(out, options)}
        if (local := _local(out, options)) is not None:
            for later in steps(local / FOLDER) if is_primary() else ():
                if later > step:  # or it would be taken for the step when the run comes there
                    remove_tree(local / FOLDER / str(later))
            processes.wait_for_all("local checkpoints: later ones deleted")
            self._tiers[True] = CheckpointWriter(
                local, dataclasses.replace(options, keep_last=KEPT, keep_every=0, keep_best=0), "local")
        self._rooms = {tier: Room(writer.folder, items, options.min_free_gb) for tier, writer in self._tiers.items()}
        self._next_look = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a local checkpoint is, where none of the run's folder is."""
        return True in self._tiers and step % self._options.local_every == 0

    def save(self, step: int, items: dict[str, Any], config: Config, *, local: bool = False, **more: Any) -> None:
        """As `CheckpointWriter.save`."""
        if local:
            more[AFTER] = self._tiers[False].newest_complete()
        self._tiers[local].save(step, items, config, **more)

    def check(self) -> None:
        """Raises `RunError` if a save has failed. Never waits."""
        for writer in self._tiers.values():
            writer.check()

    def ranks_as_best(self, loss: float) -> bool:
        return self._tiers[False].ranks_as_best(loss)

    def require_room(self) -> None:
        """Raises `InputError` if the run would soon stop for lack of room."""
        low = next((low for room in self._rooms.values() if (low := room.is_low())), None)
        if processes.any_process(low is not None):
            raise InputError(f"no room for checkpoints: {low or 'another process sees too little'}; free space there, or give "
                             f"another {'--out or checkpoint.local' if True in self._tiers else '--out'}")

    def low_space(self, saving: bool | None) -> str | None:
        """A clause, if there is less room than the run should go on with. saving: None, or before a save whether it is local;
        only then do several processes look."""
        if saving is not None:
            self._tiers[saving].wait()  # what it deletes makes room
            low = self._rooms[saving].is_low()
            return (low or "another process sees little room") if processes.any_process(low is not None) else None
        if jax.process_count() > 1 or time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + LOOK_EVERY_S
        # A disk is fuller while a save goes on, before an older checkpoint is deleted.
        return next((low for tier, room in self._rooms.items()
                     if not self._tiers[tier].saving and (low := room.is_low())), None)

    def last_good(self) -> str:
        """Where the run can go on, as a clause."""
        for path in step_folders(self._out, self._options):
            try:
                read_step(path).position()
            except DamagedCheckpoint:
                continue
            return f"the last good checkpoint is of step {path.name} in {path.parent}"
        return f"there is no checkpoint yet in {self._out / FOLDER}"

    def close(self) -> None:
        """Waits for the last saves; raises `RunError` if one failed."""
        for writer in self._tiers.values():
            writer.close()
