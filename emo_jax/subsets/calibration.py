"""The text that experts are chosen by: documents packed into rows, in groups that each get a subset of their own."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from emo_jax import sharding
from emo_jax.config import Config, DataConfig
from emo_jax.data.documents import Document, Source
from emo_jax.data.order import mix
from emo_jax.data.packing import pack
from emo_jax.data.skipping import UNREADABLE
from emo_jax.data.sources import open_source
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.errors import InputError
from emo_jax.files import given_path
from emo_jax.rounding import round_up

MAX_DOCUMENTS = 1000  # a group has at most so many, unless asked for more
FIELDS = ("tokens", "segment_ids", "positions")
Numbers = Sequence[int] | np.ndarray  # documents in their source


@dataclass(frozen=True)
class Calibration:
    """Rows [n, T] of whole documents (only those longer than a row are cut), each row of one group."""

    fields: dict[str, np.ndarray]  # each of FIELDS
    groups: np.ndarray  # [n] the group of every row
    names: tuple[str, ...]  # the groups'
    about: tuple[dict[str, Any], ...]  # for every group: path, hash, documents, tokens, document_hashes

    def batches(self, mesh: jax.sharding.Mesh, batch_size: int) -> Iterator[tuple[dict[str, jax.Array], np.ndarray]]:
        """(fields on the mesh [B, T], the group of every row [B]); the last batch is filled up with rows of padding,
        whose group is -1."""
        shards = sharding.batch_shards(mesh)
        size = round_up(min(batch_size, len(self.groups)), shards)
        for start in range(0, len(self.groups), size):
            count = len(self.groups[start:start + size])
            rows = {k: np.zeros((size, *x.shape[1:]), x.dtype) for k, x in self.fields.items()}
            for name, x in self.fields.items():
                rows[name][:count] = x[start:start + size]
            groups = np.full(size, -1)
            groups[:count] = self.groups[start:start + size]
            yield {name: sharding.place(x, mesh, sharding.TOKENS) for name, x in rows.items()}, groups


def from_tokens(documents: Sequence[Sequence[int] | np.ndarray] | np.ndarray, length: int | None = None,
                apart: bool = False) -> Calibration:
    """One group of token arrays, or with `apart` a group of each, every one in a row of its own (as long as the longest unless
    `length` is given)."""
    length = length or max(map(len, documents))
    tokens, segments = np.zeros((2, len(documents), length), np.int32)
    for i, document in enumerate(documents):
        tokens[i, :len(document)], segments[i, :len(document)] = document, 1
    groups = np.arange(len(documents)) * apart
    about = [{"path": "", "documents": int(mine.sum()), "tokens": int(segments[mine].sum())}
             for mine in (groups == group for group in range(groups.max() + 1))]
    return Calibration(_fields(tokens, segments), groups, ("",) * len(about), tuple(about))


def from_source(config: Config, source: Source, tokenizer: Tokenizer, groups: Mapping[str, Numbers],
                tokens: int | None = None) -> Calibration:
    """The documents of every group by their numbers in `source`, of each the first `tokens` (None: all)."""
    rows, owners, about = [], [], []
    for number, (name, documents) in enumerate(groups.items()):
        if not len(documents):
            raise InputError(f"{source.name}: no documents {f'of label {name!r} ' if name else ''}to choose experts by")
        packed = _pack(config.data, [source.encoded(int(i), tokenizer)[:tokens] for i in documents])
        if not packed:
            raise InputError(f"{source.name}: none of the {len(documents)} documents to choose experts by can be read")
        rows += packed
        owners += [number] * len(packed)
        hashes = [document_hash(source[int(i)]) for i in documents]
        about.append({"path": source.name, "hash": hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()[:16],
                      "documents": len(documents), "tokens": int(sum((r["segment_ids"] > 0).sum() for r in packed)),
                      "document_hashes": hashes})
    fields = _fields(*(np.stack([r[name] for r in rows]) for name in ("tokens", "segment_ids")))
    return Calibration(fields, np.array(owners), tuple(groups), tuple(about))


def open_calibration(config: Config, tokenizer: Tokenizer, path: str, label: str = "",
                     documents: int = 0) -> Calibration:
    """One group of the documents of a file or folder, or of those with a label: the first `documents` of a fixed random
    order (0: at most MAX_DOCUMENTS). Raises `InputError`."""
    source = open_source(calibration_data(config, path))
    numbers = of_label(source, np.arange(len(source)), label)
    return from_source(config, source, tokenizer, {label: sample(numbers, documents or MAX_DOCUMENTS, config.seed)})


def calibration_data(config: Config, path: str) -> DataConfig:
    if not given_path(path, "--calibration").exists() and "*" not in path:
        raise InputError(f"--calibration {path}: no such file or folder")
    return dataclasses.replace(config.data, path=path, format="auto")


def sample(numbers: Numbers, count: int, seed: int) -> np.ndarray:
    """At most `count` of the numbers, chosen by a hash of the seed and each of them, ascending."""
    numbers = np.asarray(numbers)
    return np.sort(numbers[np.argsort(mix(seed, numbers.astype(np.uint64)), kind="stable")[:count]])


def by_label(source: Source, numbers: Numbers) -> dict[str, list[int]]:
    """The numbers by the documents' labels, without documents whose label cannot be read."""
    found: dict[str, list[int]] = {}
    for i in numbers:
        if (label := source.label(int(i))) != UNREADABLE:
            found.setdefault(label, []).append(int(i))
    return dict(sorted(found.items()))


def of_label(source: Source, numbers: Numbers, label: str) -> np.ndarray:
    """The documents of a label ("": all of them). Raises `InputError` if there are none."""
    found = np.array([i for i in numbers if not label or source.label(int(i)) == label], int)
    if label and not len(found):
        known = source.labels or by_label(source, range(min(len(source), 10_000)))
        raise InputError(f"{source.name}: no document of label {label!r}; there are {', '.join(known)}")
    return found


def halves(config: Config, source: Source, tokenizer: Tokenizer, groups: Mapping[str, Numbers],
           most: int, tokens: int | None = None) -> tuple[Calibration, np.ndarray]:
    """(text to choose by: half of the documents of every group, `most` of it, of each the first `tokens` (None: all); the
    other halves of all groups, to score). Groups of one document are left out; `InputError` if there are no others."""
    choosing, scored = {}, []
    for name, numbers in groups.items():
        if len(numbers) > 1:
            half = sample(numbers, (len(numbers) + 1) // 2, config.seed)
            choosing[name] = sample(half, most, config.seed)
            scored.append(np.setdiff1d(numbers, half))
    if not scored:
        raise InputError(f"{source.name}: two documents of a label are needed, one to choose experts by and one to score")
    return from_source(config, source, tokenizer, choosing, tokens), np.sort(np.concatenate(scored))


def document_hash(document: Document) -> str:
    return hashlib.sha256(document.content).hexdigest()[:12]


def without(source: Source, numbers: Numbers, hashes: set[str]) -> np.ndarray:
    """The documents whose text is none of those that were used to choose."""
    return np.array([i for i in numbers if document_hash(source[int(i)]) not in hashes], int)


def _pack(data: DataConfig, documents: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
    def read(count: int):
        return (documents[count], count) if count < len(documents) else None

    return [row for row, _ in pack("first_fit", read, data.sequence_length, data.max_documents_per_row, True)]


def _fields(tokens: np.ndarray, segments: np.ndarray) -> dict[str, np.ndarray]:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {"tokens": tokens, "segment_ids": segments, "positions": np.ascontiguousarray(positions)}
