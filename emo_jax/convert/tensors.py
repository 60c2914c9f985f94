"""Safetensors files, read and written one tensor at a time.

A file is 8 bytes of header length (little endian), a JSON header {name: {"dtype", "shape", "data_offsets"}}, and the
data. A folder holds one `model.safetensors`, or several files and `model.safetensors.index.json` with
{"weight_map": {name: file}}.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from emo_jax.data.ranges import RangeReader
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, inside, list_files, reason, write_json

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


class Located(NamedTuple):
    """Where a tensor lies."""

    file: AnyPath
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class Reader:
    """The tensors of a folder (or one file), known by their headers; the data is read when asked for."""

    def __init__(self, path: AnyPath):
        self.path, self.tensors, self._reader = path, {}, RangeReader(budget=0)
        for file in self._files():
            for name, located in _read_header(file, self._reader).items():
                if name in self.tensors:
                    raise InputError(f"{file}: tensor {name!r} is also in {self.tensors[name].file}")
                self.tensors[name] = located

    def _files(self) -> list[AnyPath]:
        if self.path.is_file():
            return [self.path]
        if (self.path / INDEX).is_file():
            weight_map = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise InputError(f"{self.path / INDEX}: lacks weight_map, the file of every tensor")
            found = {str(inside(self.path, name, self.path / INDEX)): name for name in weight_map.values()}
            return [self.path / name for name in sorted(found.values())]
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise InputError(f"{self.path}: no *.safetensors file there")
        return files

    def read(self, name: str) -> np.ndarray:
        file, offset, dtype, shape = self.tensors[name]
        data = self._reader.read(str(file), offset, math.prod(shape) * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(shape)

    def dtypes(self) -> set[str]:
        return {t.dtype.name for t in self.tensors.values()}

    def fingerprint(self) -> list[list]:
        """Changes when a file is replaced."""
        return [[f.path.name, f.size, f.version] for path in sorted({t.file for t in self.tensors.values()})
                for f in list_files(str(path))[1]]


def _read_header(file: AnyPath, reader: RangeReader) -> dict[str, Located]:
    if not file.is_file():
        raise InputError(f"{file}: no such file, but the index names it")
    try:
        size = reader.size(str(file))
        length = struct.unpack("<Q", reader.read(str(file), 0, min(size, 8)))[0]
        if length > size:
            raise ValueError
        header = json.loads(reader.read(str(file), 8, min(length, size - 8)))
        header.pop("__metadata__", None)
        found = {name: _located(file, 8 + length, **item) for name, item in header.items()}
        end = 8 + length + max((item["data_offsets"][1] for item in header.values()), default=0)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        raise InputError(f"{file}: not a safetensors file (its header cannot be read)") from None
    for name, located in found.items():
        if located.dtype is None:
            raise InputError(f"{file}: tensor {name!r} has dtype {header[name]['dtype']}; expected "
                             f"{', '.join(DTYPES)}")
    if size < end:
        raise InputError(f"{file}: cut off; its header asks for {end:,} bytes, it has {size:,}")
    return found


def _located(file: AnyPath, data: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Located:
    """data: the byte at which offsets begin. Raises `ValueError` for what is no place in a file."""
    start, end = data_offsets
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, start, end)):
        raise ValueError
    found = DTYPES.get(dtype)
    if found is not None and end - start != math.prod(shape) * found.itemsize:
        raise ValueError
    return Located(file, data + start, found, tuple(shape))  # ty: ignore[invalid-argument-type]  None is refused by the caller


class Planned(NamedTuple):
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]


def write_folder(folder: AnyPath, planned: list[Planned], data: Iterable[np.ndarray], dtype: np.dtype,
                 shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the tensors in order into files of at most `shard_bytes` (or one tensor), with an index if there are
    several. `data` yields the array of every planned tensor in turn."""
    shards, size = [[]], 0
    for tensor in planned:
        nbytes = math.prod(tensor.shape) * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    arrays = iter(data)
    for name, shard in zip(names, shards):
        _write_file(folder / name, shard, arrays, dtype)
    assert next(arrays, None) is None, "more arrays than planned"  # and what the iterator checks at its end is checked
    if len(shards) > 1:
        total = sum(math.prod(t.shape) for t in planned)
        index = {"metadata": {"total_parameters": total, "total_size": total * dtype.itemsize},
                 "weight_map": {t.name: name for name, shard in zip(names, shards) for t in sorted(shard)}}
        write_json(folder / INDEX, index, indent=2)


def _write_file(file: AnyPath, shard: list[Planned], arrays: Iterable[np.ndarray], dtype: np.dtype) -> None:
    code = next(code for code, known in DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for (name, shape), array in zip(shard, arrays):
            assert array.shape == shape and array.dtype == dtype, (name, array.shape, array.dtype)
            f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def read_json(path: AnyPath) -> dict:
    """Raises `InputError` naming the file, and the line that is no JSON."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON ({e})") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({reason(e)})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, not {type(value).__name__}")
    return value
