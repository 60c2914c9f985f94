"""Whether the files of tokenized data are those that its manifest describes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from emo_jax.data.ranges import RangeReader
from emo_jax.data.shards import MANIFEST, Manifest, index_bytes
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, list_files, reason
from emo_jax.progress import track

THREADS = 32  # reading waits more than it computes


def verify(folder: AnyPath, manifest: Manifest, checksums: bool = False) -> int:
    """The bytes of all files. Sizes come from one listing; checksums read everything. Raises `InputError` naming the first
    file that is wrong."""
    sizes = {str(file.path.relative_to(folder)): file.size for file in list_files(str(folder))[1]}
    reader, total = RangeReader(budget=0), 0
    for name, size, _ in _files(manifest):
        if sizes.get(name) != size:
            found = f"it has {sizes[name]:,} bytes" if name in sizes else "there is no such file"
            raise InputError(f"{folder / name}: {found}; {MANIFEST} says {size:,} bytes")
        total += size
    _check_hash(reader, folder / "tokenizer.json", sizes.get("tokenizer.json"), manifest.tokenizer_sha256)
    if checksums:
        files = list(_files(manifest))
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                checks = [pool.submit(_check_hash, reader, folder / name, size, sha256) for name, size, sha256 in files]
                for check in track(checks, f"checking {folder}", "files"):
                    check.result()
            finally:
                pool.shutdown(cancel_futures=True)
    return total


def _files(manifest: Manifest) -> Iterator[tuple[str, int, str]]:
    """(name, bytes, sha256)"""
    itemsize = np.dtype(manifest.dtype).itemsize
    for shard in manifest.shards:
        yield shard.file, shard.tokens * itemsize, shard.sha256
        yield shard.index, index_bytes(shard.documents), shard.index_sha256


def _check_hash(reader: RangeReader, path: AnyPath, size: int | None, expected: str) -> None:
    if size is None:
        raise InputError(f"{path}: there is no such file")
    try:
        with reader.open(str(path), size) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({reason(e)})") from None
    if found != expected:
        raise InputError(f"{path}: its SHA-256 is {found}; {MANIFEST} says {expected}: the file was changed or is damaged")
