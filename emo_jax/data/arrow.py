"""Hugging Face datasets saved to disk, and other Arrow files (IPC streams and files). Local ones are mapped into memory; of an
object in a bucket, a record batch is one read of a range."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from emo_jax.buckets import errors, is_url
from emo_jax.config import DataConfig
from emo_jax.data.arrow_messages import BATCH, DICTIONARY, SCHEMA, messages
from emo_jax.data.columns import ColumnSource
from emo_jax.data.documents import Recent, hash_text
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, Listed, cache_folder, inside, replacing

if TYPE_CHECKING:
    import pyarrow as pa

MAX_OPEN = 64  # files
_MAGIC = b"ARROW1"  # an IPC file begins with it, a stream does not
_FIRST = 8  # byte of the first message in such a file


class ArrowSource(ColumnSource):
    """Where the batches of a file begin is found when it is opened; of an object, it is kept in the cache folder."""

    def __init__(self, data: DataConfig, files: Sequence[Listed]):
        self._positions: dict[str, np.ndarray] = {}  # see `_scan`; not of IPC files, which have a table of contents
        self._maps, self._ipc_files = Recent(_map, MAX_OPEN), Recent(self._ipc_file, MAX_OPEN)
        self._schemas = Recent(self._schema, MAX_OPEN)
        super().__init__(data, files)

    def _open(self, file: Listed) -> tuple[pa.Schema, list[int]]:
        import pyarrow as pa

        path = str(file.path)
        try:
            is_file = self._reader.read(path, 0, min(len(_MAGIC), file.size)) == _MAGIC
            schema = self._ipc_file(path).schema if is_file else None
            positions = self._scan(file, _FIRST if is_file else 0)
            if schema is None:
                self._positions[path] = positions
                schema = self._schema(path)
        except (pa.ArrowException, OSError, EOFError) as e:
            raise InputError(f"{path}: not a complete Arrow file ({e})") from None
        return schema, positions[1:, 2].tolist()

    def _scan(self, file: Listed, start: int) -> np.ndarray:
        """[1 + n, 3] int64: first byte, end and rows of the schema's message and of the n batches'."""
        path = str(file.path)
        kept = cache_folder() / "arrow" / f"{hash_text(path, file.size, file.version)}.npy"
        if is_url(path) and kept.is_file():
            return np.load(kept)
        found = list(messages(self._reader, path, start, file.size))
        if [m.kind for m in found[:1]] != [SCHEMA]:
            raise EOFError("no schema at its beginning")
        if not start and any(m.kind == DICTIONARY for m in found):
            raise InputError(f"{path}: an Arrow stream with dictionary columns, which cannot be read from the middle; "
                             f"write it as an Arrow file or as Parquet")
        positions = np.array([(m.start, m.end, m.rows) for m in found if m.kind in (SCHEMA, BATCH)], np.int64)
        if is_url(path):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept, f".{hash_text(id(positions))}.tmp") as temporary, open(temporary, "wb") as out:
                np.save(out, positions)
        return positions

    def _read(self, file: int, block: int, field: str) -> pa.Array:
        import pyarrow as pa

        path = self._paths[file]
        if path in self._positions:
            message = pa.ipc.read_message(self._message(path, block + 1))
            batch = pa.ipc.read_record_batch(message, self._schemas.get(path))
        else:
            batch = self._ipc_files.get(path).get_batch(block)
        column = batch.column(field)
        # A copy: else the other columns, which came with it, would stay in memory too.
        return pa.concat_arrays([column, column.slice(0, 0)]) if is_url(path) else column

    def _message(self, path: str, number: int) -> pa.Buffer:
        import pyarrow as pa

        start, end, _ = self._positions[path][number].tolist()
        return (pa.py_buffer(self._reader.read(path, start, end - start)) if is_url(path) else
                self._maps.get(path).slice(start, end - start))

    def _schema(self, path: str) -> pa.Schema:
        import pyarrow as pa

        return pa.ipc.read_schema(self._message(path, 0))

    def _ipc_file(self, path: str) -> Any:
        import pyarrow as pa

        return pa.ipc.open_file(self._reader.open_raw(path, self._reader.sizes[path]) if is_url(path) else _map(path))


def saved_files(folder: AnyPath, files: Sequence[Listed], split: str) -> list[Listed]:
    """The files of a folder that belong to a dataset saved there with `save_to_disk`: to its only part, or to the split
    of a dict. [] if nothing was. Raises `InputError` naming the splits, or the file that is not there."""
    there = {file.path: file for file in files}
    if (described := folder / "dataset_dict.json") in there:
        splits = _json(described, "splits")
        if split not in splits:
            raise InputError(f"data.tfds_split={split!r}: the dataset saved in {folder} has the splits {splits}")
        folder /= split
    if (state := folder / "state.json") not in there:
        return []
    named = [inside(folder, f.get("filename") if isinstance(f, dict) else f, state) for f in _json(state, "_data_files")]
    for path in named:
        if path not in there:
            raise InputError(f"{path}: no such file, though the dataset names it")
    return [there[path] for path in named]


def _json(path: AnyPath, field: str) -> list:
    try:
        return list(json.loads(path.read_text())[field])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, *errors(path)) as e:
        raise InputError(f"{path}: not the description of a saved dataset ({type(e).__name__}: {e})") from None


def _map(path: str) -> pa.Buffer:
    """All of a file, of which only what is used is read."""
    import pyarrow as pa

    return pa.memory_map(path).read_buffer()
