"""Checkpoints: Orbax, written in the background, restored onto any mesh, checked when read.

A step folder holds four items: `params` and `opt_state` (one array per leaf; expert tables in one chunk per layer and
expert, so that a few experts can be read alone), `meta` (config, conventions, tokens, versions, checksums) and `data`
(where each row of the global batch stands in its documents). A folder gets its final name when it is complete.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers as policies

import emo_jax
from emo_jax import compat
from emo_jax import config as config_lib
from emo_jax.config import CheckpointConfig, Config
from emo_jax.errors import InputError, RunError
from emo_jax.train import hosts
from emo_jax.train.compatibility import conventions
from emo_jax.train.step import TrainState, abstract_state

FOLDER = "checkpoints"
VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be read or is not what was written."""


# ---- writing --------------------------------------------------------------------------------------------------------


class Best:
    """Orbax preservation policy: the `count` steps of lowest evaluation loss. The losses are kept in `meta`, because
    Orbax writes metrics of its own only for its older `best_fn`, and would forget the best step at a restart."""

    def __init__(self, count: int, folder: Path):
        self.count, self.losses = count, {}
        for step in steps(folder) if count else ():
            try:
                loss = read_step(folder / str(step)).meta["held_out_loss"]
            except (DamagedCheckpoint, KeyError):
                continue
            if loss is not None:
                self.losses[step] = loss

    def should_preserve(self, checkpoints, *, context):
        ranked = sorted((c.step for c in checkpoints if c.step in self.losses), key=self.losses.get)
        return [c.step in ranked[:self.count] for c in checkpoints]


class CheckpointWriter:
    """Saves in the background and deletes what retention no longer asks for."""

    def __init__(self, out: Path, options: CheckpointConfig):
        folder = out.absolute() / FOLDER
        self._best = Best(options.keep_best, folder)
        keep = [policies.LatestN(options.keep_last), self._best]
        if options.keep_every:
            keep.append(policies.EveryNSteps(options.keep_every))
        self._manager = ocp.CheckpointManager(
            folder, options=ocp.CheckpointManagerOptions(preservation_policy=policies.AnyPreservationPolicy(keep),
                                                         cleanup_tmp_directories=True))

    def save(self, state: TrainState, meta: dict[str, Any], data: dict[str, Any], loss: float | None = None) -> None:
        """Returns when the arrays have left the devices; `loss` is the evaluation loss that `keep_best` ranks by.

        Raises `RunError` instead of saving a state that is not finite, and when this or an earlier save failed.
        """
        step = int(state.step)
        sums = checksums(state)
        if not all(item["finite"] for item in sums.values()):
            raise RunError(f"the state after step {step} is not finite and was not saved")
        if step in self._manager.all_steps():
            return
        meta = meta | {"step": step, "checksums": sums, "held_out_loss": loss}
        if loss is not None:
            self._best.losses[step] = loss
        try:
            self._manager.save(
                step, force=True,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(state.params, save_args=_save_args(state.params)),
                    opt_state=ocp.args.PyTreeSave(state.opt_state, save_args=_save_args(state.opt_state)),
                    meta=ocp.args.JsonSave(meta), data=ocp.args.JsonSave(data)))
        except Exception as e:
            raise RunError(f"writing the checkpoint of step {step}, or the one before, failed: {e}") from e

    def last_good(self) -> str:
        steps = self._manager.all_steps()
        return f"the last good checkpoint is of step {max(steps)}" if steps else "there is no checkpoint yet"

    def ranks_as_best(self, loss: float) -> bool:
        """Whether a checkpoint of this evaluation loss would be kept for it."""
        kept = sorted(self._best.losses[step] for step in self._manager.all_steps() if step in self._best.losses)
        return self._best.count > 0 and (len(kept) < self._best.count or loss < kept[self._best.count - 1])

    def close(self) -> None:
        """Waits for the last save; raises `RunError` if it failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except Exception as e:
            raise RunError(f"writing the last checkpoint failed: {e}") from e


def describe(config: Config, tokens: int, source: dict[str, Any]) -> dict[str, Any]:
    """The `meta` item. `source`: what identifies the documents, see `emo_jax.train.loop.fingerprint`."""
    versions = {"emo_jax": emo_jax.__version__} | {name: importlib.metadata.version(name) for name in VERSIONED}
    return {"config": config_lib.to_dict(config), "conventions": conventions(config), "tokens": tokens,
            "source": source, "versions": versions}


def _save_args(tree):
    """One chunk per (layer, expert) for expert tables [L, E, ., .]; Orbax's choice for everything else."""

    def args(path, leaf):
        in_table = any(getattr(k, "key", None) == "moe" for k in path) and leaf.ndim == 4
        return ocp.SaveArgs(shard_axes=(0, 1)) if in_table else ocp.SaveArgs()

    return jax.tree_util.tree_map_with_path(args, tree)


def checksums(state) -> dict[str, dict[str, Any]]:
    """{item: {"sum", "finite"}}: the wrapping sum of the bits of all leaves, which no mesh changes."""
    return {item: {"sum": int(total), "finite": bool(finite)} for item in ("params", "opt_state")
            for total, finite in [_checksum(getattr(state, item))]}


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


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One step folder whose `meta` was read; the arrays are read by `restore` and `restore_params`."""

    path: Path
    step: int
    config: Config
    meta: dict[str, Any]

    @property
    def run(self) -> Path:
        """The folder of the run, which also holds its tokenizer and config."""
        return self.path.parent.parent

    def data(self) -> dict[str, Any]:
        return _read_json(self.path, "data")

    def restore_params(self, mesh: Mesh, config: Config | None = None) -> dict:
        """The parameters on `mesh`. Raises `DamagedCheckpoint`."""
        return self._restore("params", abstract_state(config or self.config, mesh).params)

    def restore(self, target: TrainState) -> TrainState:
        """The training state, laid out as `target` (of `jax.ShapeDtypeStruct` with shardings) asks."""
        items = {name: self._restore(name, getattr(target, name)) for name in ("params", "opt_state")}
        step = jax.device_put(np.int32(self.step), target.step.sharding)
        return target._replace(step=step, **items)

    def _restore(self, item: str, target):
        """Every process learns whether all of them could read, so that all fall back together."""
        error = None
        try:
            tree = ocp.PyTreeCheckpointHandler().restore(self.path / item, args=ocp.args.PyTreeRestore(
                item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)))
        except Exception as e:
            error = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else e!r}"
        if hosts.any_process(error is not None):
            raise DamagedCheckpoint(f"checkpoint {self.path}: {item} cannot be read ({error or 'on another process'})")
        total, _ = _checksum(tree)
        if int(total) != self.meta["checksums"][item]["sum"]:
            raise DamagedCheckpoint(f"checkpoint {self.path}: {item} is not what was saved (its checksum differs)")
        return tree


def steps(folder: Path) -> list[int]:
    """The complete checkpoints of a `checkpoints/` folder, oldest first."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def read_step(path: Path) -> Checkpoint:
    """The checkpoint of one step folder. Raises `DamagedCheckpoint` if its description cannot be read."""
    meta = _read_json(path, "meta")
    try:
        return Checkpoint(path, int(meta["step"]), config_lib.from_dict(meta["config"]), meta)
    except KeyError as e:
        raise DamagedCheckpoint(f"checkpoint {path}: meta lacks {e}") from None


def open_checkpoint(path: str | Path, step: int | None = None) -> Checkpoint:
    """A checkpoint by its run folder, the `checkpoints/` in it, or one step folder; the newest step by default.

    Raises `InputError` if there is none, `DamagedCheckpoint` if it cannot be read.
    """
    given, path = path, Path(path).absolute()
    if not path.is_dir():
        raise InputError(f"no checkpoint at {given}: no such folder")
    if path.name.isdigit() and (path / "meta").exists():
        return read_step(path)
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    found = steps(folder)
    if not found:
        raise InputError(f"no checkpoint at {given}: expected a run folder (with {FOLDER}/), its {FOLDER}/ folder, or "
                         f"one step folder in it")
    if step is not None and step not in found:
        raise InputError(f"no checkpoint of step {step} at {given}; there are steps {', '.join(map(str, found))}")
    return read_step(folder / str(found[-1] if step is None else step))


def _read_json(path: Path, item: str) -> dict[str, Any]:
    try:
        return ocp.JsonCheckpointHandler().restore(path / item)
    except Exception as e:
        raise DamagedCheckpoint(f"checkpoint {path}: {item} cannot be read ({type(e).__name__}: {e})") from None
