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
from dataclasses import dataclass
from typing import Any

import numpy as np

from emo_jax.errors import InputError

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
        return _build(Manifest, tree | {"shards": tuple(map(parse_shard, tree.pop("shards")))})
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise InputError(f"{where}: not the manifest of tokenized data ({type(e).__name__}: {e})") from None


def parse_shard(tree: dict[str, Any]) -> Shard:
    return _build(Shard, tree | {"sections": tuple(_build(Section, x) for x in tree["sections"])})


def _build(kind: Any, fields: dict[str, Any]) -> Any:
    wrong = set(fields) ^ {f.name for f in dataclasses.fields(kind)}
    if wrong:
        raise ValueError(f"{kind.__name__} has other fields than expected: {sorted(wrong)}")
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
