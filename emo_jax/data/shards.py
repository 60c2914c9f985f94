"""Token shards: what `emo-jax data tokenize` writes and token sources read.

    manifest.json                  every shard: sizes, counts, checksums, labels; the tokenizer's hash
    tokenizer.json
    shard-00000-of-00016.npy       tokens: flat, without a header (as OLMo-core reads them), little-endian uint16 or uint32, the
                                   end-of-document token after every document
    shard-00000-of-00016.index     its documents, see `pack_index`

A shard is a sequence of sections: documents of one label, held out of training or not. Documents are numbered through all
shards, in the order of the manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass
from typing import Any

import numpy as np

from emo_jax.errors import InputError
from emo_jax.files import shortened

MANIFEST = "manifest.json"
VERSION = 1
STRIDE = 512  # documents from one entry of an index's summary to the next


@dataclass(frozen=True)
class Section:
    label: str
    held_out: bool
    documents: int
    tokens: int


@dataclass(frozen=True)
class Shard:
    file: str  # name of the token file, in the folder of the manifest
    index: str
    tokens: int
    documents: int
    sha256: str
    index_sha256: str
    sections: tuple[Section, ...]
    left_out: dict[str, int]  # documents of the source that were not written, by reason


@dataclass(frozen=True)
class Manifest:
    dtype: str  # "uint16" or "uint32"
    eos_id: int
    vocab_size: int
    tokenizer_sha256: str  # of tokenizer.json
    source: str  # what a person named
    settings: dict[str, Any]  # what else the bytes depend on
    shards: tuple[Shard, ...]

    def dumps(self) -> str:
        return json.dumps({"format": "emo_jax tokens", "version": VERSION} | dataclasses.asdict(self), indent=1) + "\n"


def parse_manifest(text: str, where: str) -> Manifest:
    """Raises `InputError` naming `where`, and the field that is wrong."""
    try:
        tree = json.loads(text)
        if tree.pop("format") != "emo_jax tokens" or tree.pop("version") != VERSION:
            raise ValueError(f"its format is not 'emo_jax tokens' of version {VERSION}")
        manifest = _build(Manifest, tree | {"shards": tuple(map(parse_shard, tree.pop("shards")))})
        if manifest.dtype not in ("uint16", "uint32"):
            raise ValueError(f"dtype={shortened(repr(manifest.dtype))} must be uint16 or uint32")
        return manifest
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        why = f"{type(e).__name__}: {shortened(str(e), 400)}"
        raise InputError(f"{where}: not the manifest of tokenized data ({why})") from None


def parse_shard(tree: dict[str, Any]) -> Shard:
    shard = _build(Shard, tree | {"sections": tuple(_build(Section, x) for x in tree["sections"])})
    for name in ("tokens", "documents"):
        if sum(getattr(s, name) for s in shard.sections) != getattr(shard, name):
            raise ValueError(f"{name}={getattr(shard, name)} of {shard.file} are not those of its sections")
    if any("/" in name or "\\" in name or "\0" in name or name in ("", ".", "..") for name in (shard.file, shard.index)):
        raise ValueError(f"{shortened(repr((shard.file, shard.index)))} are no names of files in its folder")
    return shard


def _build(kind: Any, fields: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    if wrong := set(fields) ^ set(hints):
        raise ValueError(f"{kind.__name__} has other fields than expected: {sorted(map(shortened, wrong))}")
    for name, value in fields.items():
        wanted = typing.get_origin(hints[name]) or hints[name]
        if type(value) is not wanted or (wanted is int and not 0 <= value < 2**62):
            raise ValueError(f"{kind.__name__}.{name}={shortened(repr(value))} is not as expected")
    return kind(**fields)


def pack_index(ends: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The content of an index, flat int64: `ends[::STRIDE]` (a summary, which a reader keeps), `ends` [n] (the token after
    each document's last, from the start of the shard), `ids` [n] (each document's number in the source it came from)."""
    ends = np.asarray(ends, np.int64)
    return np.concatenate([ends[::STRIDE], ends, np.asarray(ids, np.int64)])


def index_documents(size: int) -> int:
    """The number n of documents of an index of `size` bytes: n / STRIDE (rounded up) + 2 n entries of 8."""
    return size // 8 * STRIDE // (2 * STRIDE + 1)


def index_bytes(documents: int) -> int:
    """The size of such an index."""
    return 8 * (-(-documents // STRIDE) + 2 * documents)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
