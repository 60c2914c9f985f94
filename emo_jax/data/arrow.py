"""Hugging Face datasets saved to disk, and other Arrow files (IPC streams and files), mapped into memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from emo_jax.config import DataConfig
from emo_jax.data.columns import ColumnSource
from emo_jax.data.documents import Recent
from emo_jax.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_OPEN = 64  # files
_MAGIC = b"ARROW1"  # an IPC file begins with it, a stream does not


class ArrowSource(ColumnSource):
    """A stream, as `datasets` writes it, has no table of contents: where its batches begin is found when it is opened."""

    def __init__(self, data: DataConfig, paths: Sequence[Path]):
        self._positions: list[np.ndarray | None] = []  # of the batches of each file, in bytes; None: an IPC file
        self._maps, self._schemas = Recent(_map, MAX_OPEN), Recent(_schema, MAX_OPEN)
        super().__init__(data, paths)

    def _open(self, path: str) -> tuple[pa.Schema, list[int]]:
        import pyarrow as pa

        try:
            content, schema = _map(path), _schema(path)
            if _is_file(content):
                reader, positions = pa.ipc.open_file(content), None
                rows = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
            else:
                rows, positions = _scan(path, content, schema)
        except (pa.ArrowException, OSError, EOFError) as e:
            raise InputError(f"{path}: not a complete Arrow file ({e})") from None
        self._positions.append(positions)
        return schema, rows

    def _read(self, file: int, block: int, field: str) -> pa.Array:
        import pyarrow as pa

        path, positions = self._paths[file], self._positions[file]
        content = self._maps.get(path)
        if positions is None:
            batch = pa.ipc.open_file(content).get_batch(block)
        else:
            message = pa.ipc.read_message(content.slice(int(positions[block])))
            batch = pa.ipc.read_record_batch(message, self._schemas.get(path))
        return batch.column(field)


def _scan(path: str, content: pa.Buffer, schema: pa.Schema) -> tuple[list[int], np.ndarray]:
    """(rows, position in bytes) of the batches of a stream."""
    import pyarrow as pa

    stream, rows, positions = pa.BufferReader(content), [], []
    pa.ipc.read_message(stream)  # the schema
    while True:
        position = stream.tell()
        try:
            message = pa.ipc.read_message(stream)
        except EOFError:  # the end of the stream; an end within a message is another error
            return rows, np.array(positions, np.int64)
        if message.type == "dictionary":
            raise InputError(f"{path}: an Arrow stream with dictionary columns, which cannot be read from the middle; "
                             f"write it as an Arrow file or as Parquet")
        rows.append(pa.ipc.read_record_batch(message, schema).num_rows)
        positions.append(position)


def saved_files(folder: Path, split: str) -> list[Path]:
    """The files of a dataset that was saved to `folder` with `save_to_disk`: of its only part, or of the split of a dict.
    [] if nothing was. Raises `InputError` naming the splits."""
    if (described := folder / "dataset_dict.json").is_file():
        splits = _json(described, "splits")
        if split not in splits:
            raise InputError(f"data.tfds_split={split!r}: the dataset saved in {folder} has the splits {splits}")
        folder /= split
    if not (state := folder / "state.json").is_file():
        return []
    return [folder / f["filename"] for f in _json(state, "_data_files")]


def _json(path: Path, field: str) -> list:
    try:
        return list(json.loads(path.read_text())[field])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: not the description of a saved dataset ({type(e).__name__}: {e})") from None


def _map(path: str) -> pa.Buffer:
    """All of a file, of which only what is used is read."""
    import pyarrow as pa

    return pa.memory_map(path).read_buffer()


def _is_file(content: pa.Buffer) -> bool:
    return content.slice(0, min(len(_MAGIC), content.size)).to_pybytes() == _MAGIC


def _schema(path: str) -> pa.Schema:
    import pyarrow as pa

    content = _map(path)
    return (pa.ipc.open_file(content) if _is_file(content) else pa.ipc.open_stream(content)).schema
