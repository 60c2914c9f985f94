"""A run's folder: whether what lies there belongs to the run, and what is moved aside because it is not what it should be.

Nothing is deleted: what cannot be used goes to `damaged/`, with a message.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from emo_jax import buckets, processes
from emo_jax import config as config_lib
from emo_jax.checkpoints import tiers
from emo_jax.checkpoints.checkpoint import FOLDER, SAVED, first_readable, is_step, move_step, steps
from emo_jax.checkpoints.compatibility import require_same_model
from emo_jax.config import Config
from emo_jax.errors import InputError, RunError
from emo_jax.files import AnyPath, make_folder, reason, write_json, write_text
from emo_jax.progress import is_primary, say
from emo_jax.train.goodput import TIME
from emo_jax.train.metrics import METRICS, records_and_foreign_lines

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TENSORBOARD = "tensorboard"
SET_ASIDE = "damaged"


def open_folder(config: Config, out: str | AnyPath) -> AnyPath:
    """Makes the run's folder, or checks that what is there belongs to the same model. Raises `InputError`."""
    folder = make_folder(out)
    if _is_there(checkpoints := folder / FOLDER) and not checkpoints.is_dir():
        what = "a link to nothing" if isinstance(checkpoints, Path) and checkpoints.is_symlink() else "a file"
        raise InputError(f"{checkpoints} is {what}; it must be the folder of the run's checkpoints: bring that back, or give "
                         f"another --out")
    try:
        last = first_readable(tiers.step_folders(folder, config.checkpoint))
    except (OSError, *buckets.errors(folder)) as e:
        raise InputError(f"{checkpoints} cannot be listed ({reason(e)})") from None
    saved = folder / CONFIG
    if last is not None:
        require_same_model(last.run_config, config, str(last.path))
    elif _is_there(saved) and not steps(checkpoints):
        require_same_model(read_config(saved), config, str(saved))
    _check_tokenizer(folder, last.meta["source"].get("tokenizer") if last else None)
    return folder


def read_config(path: AnyPath) -> Config:
    """The config of a run. Raises `InputError`."""
    try:
        return config_lib.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, *buckets.errors(path)) as e:
        raise InputError(f"{path} cannot be read ({reason(e)}); expected the config of the run in --out: delete it, or give "
                         f"another --out") from None


def prepare(config: Config, out: AnyPath) -> None:
    """Makes place for what the run writes, once it is certain that it goes on here."""
    if is_primary():
        _prepare(config, out)
    processes.wait_for_all("the run's folder")


def _prepare(config: Config, out: AnyPath) -> None:
    try:
        for path in sorted((out / FOLDER).iterdir()) if (out / FOLDER).is_dir() else ():
            if path.name.isdigit() and not (is_step(path.name) and path.is_dir()):  # which a save would stumble over
                set_aside(out, path, "is not the folder of a step")
        _check_metrics(out)
        if _is_there(times := out / TIME) and not times.is_file():
            set_aside(out, times, "is not a file")
        if isinstance(out, Path) and _is_there(events := out / TENSORBOARD) and not events.is_dir():
            set_aside(out, events, "is not a folder")
        if _is_there(saved := out / CONFIG):
            try:
                read_config(saved)
            except InputError as e:
                set_aside(out, saved, f"is written anew: {e}")
        write_text(out / CONFIG, config_lib.dumps(config))
    except (OSError, *buckets.errors(out)) as e:
        raise RunError(f"{out} cannot be written: {reason(e)}") from e


# ---- a run that has no checkpoint ------------------------------------------------------------------------------------


class SavedMark:
    """Notes in a run's folder that a checkpoint was completed, so that a start that finds none knows that it is gone."""

    def __init__(self, out: AnyPath):
        self._out, self._noted = out, not is_primary() or (out / SAVED).exists()

    def note(self) -> None:
        if not self._noted and (found := steps(self._out / FOLDER)):
            write_json(self._out / SAVED, {"step": found[0]})
            self._noted = True


def require_new(config: Config, out: AnyPath, start_over: bool) -> None:
    """For a run without a checkpoint. Raises `InputError` if one was completed here, unless told to start over: then moves
    what that run logged aside."""
    logged = [record["step"] for record in records_and_foreign_lines(_read(out / METRICS))[0]]
    if start_over:
        for path in (out / METRICS, out / TIME, out / TENSORBOARD, out / SAVED):
            if is_primary() and _is_there(path):
                set_aside(out, path, "is of the run before (--start-over)")
        return
    try:
        every = read_config(out / CONFIG).checkpoint.every
    except InputError:
        every = config.checkpoint.every
    # The second save waits for the first: so many steps are proof where there is no mark.
    if (out / SAVED).exists() or (logged and max(logged) - min(logged) >= 2 * every):
        raise InputError(f"{out} holds a run that has saved checkpoints (its metrics end at step "
                         f"{max(logged, default=0)}), but {out / FOLDER} has none: bring them back, give another "
                         f"--out, or begin again at step 0 with --start-over, which moves the old metrics to {SET_ASIDE}/")
    if logged:
        say(f"no checkpoint was complete yet: the steps up to {max(logged)} are repeated")


# ---- moving aside ----------------------------------------------------------------------------------------------------


def set_aside(out: AnyPath, path: AnyPath, why: str) -> None:
    """Moves a file or folder of the run to its folder of damaged things, under a name that is free, and says so."""
    target = _free_name(out, path.name)
    try:
        move_step(path, target)
    except (OSError, *buckets.errors(out)) as e:
        raise RunError(f"{path} {why}, and cannot be moved to {target}: {reason(e)}") from e
    say(f"{path} {why}; moved to {target}")


def _free_name(out: AnyPath, name: str) -> AnyPath:
    n, folder = 1, out / SET_ASIDE
    while _is_there(folder) and not folder.is_dir():
        n, folder = n + 1, out / f"{SET_ASIDE}-{n + 1}"
    n, target = 1, folder / name
    while _is_there(target):
        n, target = n + 1, folder / f"{name}-{n + 1}"
    return target


def _is_there(path: AnyPath) -> bool:
    """A link to nothing too."""
    return os.path.lexists(path) if isinstance(path, Path) else path.exists()


# ---- what a start reads ----------------------------------------------------------------------------------------------


def _check_tokenizer(out: AnyPath, expected: str | None) -> None:
    """Moves the run's tokenizer aside where it is not the one of its checkpoint; it is made again from the documents.
    expected: the beginning of its SHA-256."""
    path = out / TOKENIZER
    if not is_primary() or not _is_there(path):
        return
    if not path.is_file():
        set_aside(out, path, "is not a file")
    elif expected and not hashlib.sha256(_read(path)).hexdigest().startswith(str(expected)):
        set_aside(out, path, "is not the tokenizer that the run was trained with")


def _read(path: AnyPath) -> bytes:
    """Nothing where there is no file."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except (OSError, *buckets.errors(path)) as e:
        raise InputError(f"{path} cannot be read ({reason(e)}); it belongs to the run in --out") from None


def _check_metrics(out: AnyPath) -> None:
    """Leaves the records of steps in metrics.jsonl; where there is anything else, all of it as it was is kept aside."""
    path = out / METRICS
    if _is_there(path) and not path.is_file():
        set_aside(out, path, "is not a file")
        return
    records, foreign = records_and_foreign_lines(_read(path))
    if foreign:
        set_aside(out, path, f"has {foreign} lines that are no records of steps; the {len(records)} others are kept")
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))
