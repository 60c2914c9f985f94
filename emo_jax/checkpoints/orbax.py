"""Everything that touches Orbax: restoring a tree, saving in the background with retention.

This is its API before 1.0. What its next one (0.12.8: `orbax.checkpoint.experimental.v1`) cannot hold of this format: a JSON
item in the file `metadata` (`JsonHandler` writes `data.json`, which earlier releases do not find; its class is final and a
registry takes classes, not instances). And it has no way to ask whether a save has failed without waiting for it
(`AsyncResponse` has `result` only). Arrays are the same: it writes them through the same `CheckpointManager`, with the same
chunks, and reads those of this format. To change over, change this file.

Orbax knows local paths and gs:// only (0.12.8: `build_kvstore_tspec` takes s3:// for a local path, if for any), though
TensorStore has a driver for S3 and Orbax a way to commit without a rename. Here Orbax describes an S3 folder as it would one
of GCS, and the driver is exchanged in the description; an Orbax that knows S3 itself is left alone.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import path as orbax_path
from orbax.checkpoint._src.serialization import tensorstore_utils

from emo_jax import buckets
from emo_jax.files import AnyPath

RESTORE_GB = 4  # that a host holds on their way from files to devices
REPLICA_BYTES = 1 << 20  # arrays below it are written by one device that has them, not a slice by each

COMMITTED = orbax_path.atomicity.COMMIT_SUCCESS_FILE  # Orbax's mark of a step folder in a bucket that is complete


def restore_tree(folder: AnyPath, target: Any) -> Any:
    """The arrays of an item, laid out as a tree of `jax.ShapeDtypeStruct` with shardings asks."""
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=RESTORE_GB)
    return handler.restore(_for_orbax(folder), args=ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)))


class Saver:
    """Saves steps into a folder in the background. A step folder gets its final name when it is complete; then `verify` reads
    it, and those that `keep` leaves out of the steps that there are, ascending, are deleted: none if `verify` raises. name:
    differs between the savers of a process."""

    def __init__(self, folder: AnyPath, keep: Callable[[Sequence[int]], Collection[int]], verify: Callable[[int], object],
                 name: str = ""):
        self._manager = _Manager(
            _for_orbax(folder), options=ocp.CheckpointManagerOptions(
                preservation_policy=_Keep(keep), cleanup_tmp_directories=True, temporary_path_class=_commit_class(folder),
                multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name or None)))
        self._manager.verify = verify

    def save(self, step: int, arrays: dict[str, Any], described: dict[str, Any]) -> None:
        """Returns when the arrays have left the devices. arrays: {item: tree}; described: {item: JSON value}. Raises whatever
        Orbax does, also for an earlier save that failed."""
        items: dict[str, Any] = {name: ocp.args.PyTreeSave(tree, save_args=_save_args(tree)) for name, tree in arrays.items()}
        items |= {name: ocp.args.JsonSave(value) for name, value in described.items()}
        self._manager.saving = True
        try:
            self._manager.save(step, force=True, args=ocp.args.Composite(**items))
        except Exception:
            self._manager.saving = False
            raise

    @property
    def saving(self) -> bool:
        """Whether the last save goes on, its deletions included."""
        return self._manager.saving

    @property
    def error(self) -> Exception | None:
        """What the last save failed with, as soon as that is known. Never waits."""
        return self._manager.error

    def steps(self) -> list[int]:
        """Saved, or being saved, and kept."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Until the last save is over; raises what it failed with."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """`wait`, and no more saves."""
        self._manager.wait_until_finished()
        self._manager.close()


class _Manager(ocp.CheckpointManager):
    """Notes at once that a save failed (`check_for_errors` does not see it: a thread of Orbax takes the error first), and looks
    at what was written before Orbax deletes older steps."""

    verify: Callable[[int], object]
    saving = False
    error: Exception | None = None

    def _wait_for_checkpointers(self):
        with self._noting_errors():
            super()._wait_for_checkpointers()

    def _finalize_checkpoint(self, step: int):
        super()._finalize_checkpoint(step)
        if jax.process_index() == 0:
            with self._noting_errors():
                self.verify(step)

    def _finalize(self, step: int, steps_to_remove: list[int]):
        try:
            super()._finalize(step, steps_to_remove)
        finally:
            self.saving = False

    @contextlib.contextmanager
    def _noting_errors(self):
        try:
            yield
        except Exception as e:
            self.error = e
            raise


class _Keep:
    """An Orbax preservation policy."""

    def __init__(self, keep: Callable[[Sequence[int]], Collection[int]]):
        self._keep = keep

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self._keep(sorted(steps))
        return [step in kept for step in steps]


def _save_args(tree):
    """One chunk per (layer, expert) for expert tables [L, E, ., .]; Orbax's choice for everything else."""

    def args(path, leaf):
        in_table = any(getattr(k, "key", None) == "moe" for k in path) and leaf.ndim == 4
        return ocp.SaveArgs(shard_axes=(0, 1)) if in_table else ocp.SaveArgs()

    return jax.tree_util.tree_map_with_path(args, tree)


def _without_stacks(record: logging.LogRecord) -> bool:
    """Orbax logs the stack of an error that it also raises. Only who looks for more than a message wants to see it."""
    return not (record.exc_info and "orbax" in record.pathname) or logging.getLogger("emo_jax").isEnabledFor(logging.DEBUG)


def _write_small_arrays_whole() -> None:
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of what is meant
    ocp.type_handlers.register_type_handler(
        jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=REPLICA_BYTES), override=True)
    log.setLevel(level)


logging.getLogger("absl").addFilter(_without_stacks)
_write_small_arrays_whole()


# ---- S3 -------------------------------------------------------------------------------------------------------------


def _for_orbax(path: AnyPath) -> Any:
    """The path, when Orbax can read and write there. A path of pathlib or etils is enough for it."""
    if str(path).startswith("s3://"):
        _teach()
    return path


def _commit_class(path: AnyPath) -> type[orbax_path.atomicity.CommitFileTemporaryPath] | None:
    """How Orbax marks folders below `path` as complete, where its own choice, a rename, is none; else None."""
    return orbax_path.atomicity.CommitFileTemporaryPath if str(path).startswith("s3://") else None


@functools.cache
def _teach() -> None:
    original = tensorstore_utils.build_kvstore_tspec
    if original("s3://bucket/key", use_ocdbt=False)["driver"] != "file":
        return  # it knows S3

    @functools.wraps(original)
    def build(directory: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not directory.startswith("s3://"):
            return original(directory, *args, **kwargs)
        return _on_s3(original("gs" + directory.removeprefix("s3"), *args, **kwargs))

    setattr(tensorstore_utils, original.__name__, build)


def _on_s3(spec: Any) -> Any:
    if isinstance(spec, dict) and spec.get("driver") in ("gcs", "gcs_grpc"):
        return buckets.kvstore(f"s3://{spec['bucket']}/{spec['path']}")
    if isinstance(spec, dict):
        return {key: _on_s3(value) for key, value in spec.items()}
    return [_on_s3(value) for value in spec] if isinstance(spec, list) else spec
