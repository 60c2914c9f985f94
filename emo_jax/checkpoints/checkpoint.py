"""Checkpoints: written by Orbax, restored onto any mesh, checked when read.

A step folder holds four items: `params` and `opt_state` (one array per leaf; expert tables in one chunk per layer and
expert, so that a few experts can be read alone), and their description, `meta` and `data` (see `description`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from emo_jax import compat, model, processes, sharding
from emo_jax import config as config_lib
from emo_jax.checkpoints import description
from emo_jax.checkpoints.description import DamagedCheckpoint
from emo_jax.checkpoints.orbax import COMMITTED, restore_tree
from emo_jax.config import Config
from emo_jax.config_rules import MAX_INT
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, absolute_path, copy_tree, make_folder, reason, remove_tree, shortened, write_text
from emo_jax.phases import trained_config

FOLDER = "checkpoints"
SAVED = "saved.json"  # beside it: says that a checkpoint was completed here once


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One step folder whose description was read; the arrays are read by `restore` and `restore_params`."""

    path: AnyPath
    step: int
    config: Config  # what it was trained with last: without stages
    meta: dict[str, Any]
    data: dict[str, Any]
    run_config: Config  # of the whole run

    @property
    def run(self) -> AnyPath:
        """The folder of the run, which also holds its tokenizer and config."""
        return self.path.parent.parent

    @cached_property
    def hash(self) -> str:
        """Identifies the parameters, for what was chosen for them (see `subset`). The checksum does not see the order of
        experts: that of `surgery.permute` is added."""
        made = self.meta.get("made", {})
        placed = [made["of"]["hash"], made["order"]] if "order" in made else []
        text = json.dumps([dataclasses.asdict(self.config.model), self.config.router.semantics,
                           self.meta["checksums"]["params"]["sum"], *placed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        """What a subset file, or a checkpoint made of this one, says about it."""
        return {"name": self.config.name, "step": self.step, "hash": self.hash}

    def position(self) -> dict[str, Any]:
        """Where the run stands in its data, see `emo_jax.train.batches`."""
        return self.data

    def restore_params(self, mesh: Mesh, config: Config | None = None) -> model.Params:
        """The parameters on `mesh`. Raises `DamagedCheckpoint`."""
        return self.restore({"params": model.abstract_params(config or self.config, mesh)})["params"]

    def restore(self, targets: dict[str, Any]) -> dict[str, Any]:
        """The arrays of every item, laid out as its tree of `jax.ShapeDtypeStruct` with shardings asks."""
        for item in targets:
            if item not in self.meta["checksums"]:
                raise DamagedCheckpoint(f"checkpoint {self.path}: it holds no {item}")
        return {item: self._restore(item, target) for item, target in targets.items()}

    def _restore(self, item: str, target):
        """Every process learns whether all of them could read, so that all fall back together."""
        error = tree = None
        try:
            tree = restore_tree(self.path / item, sharding.spread(target) if jax.process_count() > 1 else target)
        except Exception as e:
            error = f"{type(e).__name__}: {shortened(reason(e), 400)}"  # TensorStore's go on for pages
        if processes.any_process(error is not None):
            raise DamagedCheckpoint(f"checkpoint {self.path}: {item} cannot be read ({error or 'on another process'})")
        total, _ = _checksum(tree)
        if int(total) != self.meta["checksums"][item]["sum"]:
            raise DamagedCheckpoint(f"checkpoint {self.path}: {item} is not what was saved (its checksum differs)")
        return sharding.lay_out(tree, target)


def is_step(name: str) -> bool:
    """Whether a folder of that name is the one of a step."""
    return name.isascii() and name.isdecimal() and name == str(int(name[:10])) and int(name) <= MAX_INT


def steps(folder: AnyPath) -> list[int]:
    """The complete checkpoints of a `checkpoints/` folder, oldest first."""
    found = [p for p in folder.iterdir() if is_step(p.name)] if folder.is_dir() else []
    return sorted(int(p.name) for p in found if (p.is_dir() if isinstance(p, Path) else (p / COMMITTED).exists()))


def read_step(path: AnyPath) -> Checkpoint:
    """The checkpoint of one step folder. Raises `DamagedCheckpoint` if its description cannot be read."""
    meta, data = description.read(path)
    try:
        config = config_lib.from_dict(meta["config"])
        return Checkpoint(path, meta["step"], trained_config(config, meta["step"]), meta, data, config)
    except (InputError, TypeError, AttributeError) as e:
        raise DamagedCheckpoint(f"checkpoint {path}: meta: its config cannot be used: {e}") from None


def first_readable(folders: Iterable[AnyPath]) -> Checkpoint | None:
    """The first of these step folders whose description can be read."""
    for folder in folders:
        try:
            return read_step(folder)
        except DamagedCheckpoint:
            continue
    return None


def open_checkpoint(path: str | AnyPath, step: int | None = None) -> Checkpoint:
    """A checkpoint by its run folder, the `checkpoints/` in it, or one step folder; the newest step by default.

    Raises `InputError` if there is none, `DamagedCheckpoint` if it cannot be read.
    """
    given, where = path, absolute_path(path, "CKPT")
    if not where.is_dir():
        raise InputError(f"no checkpoint at {given}: no such folder")
    if is_step(where.name) and (where / "meta").exists():
        return read_step(where)
    folder = where / FOLDER if (where / FOLDER).is_dir() else where
    found = steps(folder)
    if not found:
        raise InputError(f"no checkpoint at {given}: expected a run folder (with {FOLDER}/), its {FOLDER}/ folder, or "
                         f"one step folder in it")
    if step is not None and step not in found:
        raise InputError(f"no checkpoint of step {step} at {given}; there are steps {', '.join(map(str, found))}")
    return read_step(folder / str(found[-1] if step is None else step))


def require_new(out: str | AnyPath) -> AnyPath:
    """The folder of a new run, made where it is not there. Raises `InputError` if it holds a checkpoint."""
    target = make_folder(out)
    if steps(target / FOLDER):
        raise InputError(f"--out {out} already holds a checkpoint; give another folder")
    return target


# ---- the step of a new run, written part by part ----


def unfinished_step(run: AnyPath, name: str) -> AnyPath:
    """Where step 0 is written until it is complete: a folder that no reader looks at. In a bucket it has its final name, and
    lacks what `steps` looks for."""
    return run / FOLDER / (name if isinstance(run, Path) else "0")


def finish_step(unfinished: AnyPath) -> AnyPath:
    final = unfinished.with_name("0")
    if isinstance(unfinished, Path):
        unfinished.rename(final)
    else:
        write_text(final / COMMITTED, f"complete: {final}\n")
    return final


def move_step(path: AnyPath, target: AnyPath) -> None:
    """Moves a step folder, or anything else, out of its run. In a bucket that is a copy, and the step is none before anything
    of it is deleted."""
    if isinstance(path, Path):
        target.parent.mkdir(exist_ok=True)
        shutil.move(path, target)
    else:
        copy_tree(path, target)
        (path / COMMITTED).unlink(missing_ok=True)
        path.unlink() if path.is_file() else remove_tree(path)


# ---- checksums ------------------------------------------------------------------------------------------------------


def checksums(items: dict[str, Any]) -> description.Checksums:
    """The wrapping sum of the bits of all leaves of every item, which no mesh changes, and whether all are finite."""
    return {item: {"sum": int(total), "finite": bool(finite)} for item, tree in items.items()
            for total, finite in [_checksum(tree)]}


def _checksum(tree):
    leaves = jax.tree.leaves(tree)
    with compat.set_mesh(leaves[0].sharding.mesh):
        return jax.device_get(_sum_of_bits(leaves))


@jax.jit
def _sum_of_bits(leaves):
    total, finite = jnp.uint32(0), jnp.bool_(True)
    for i, x in enumerate(leaves):
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        total += jnp.sum(bits, dtype=jnp.uint32) * jnp.uint32(2 * i + 1)
        if jnp.issubdtype(x.dtype, jnp.floating):
            finite &= jnp.all(jnp.isfinite(x))
    return total, finite
