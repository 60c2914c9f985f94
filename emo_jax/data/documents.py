"""What a source of documents is."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from emo_jax.buckets import is_url
from emo_jax.errors import InputError, RunError

MAX_LABELS = 64  # of a source, for labels to go with its rows


class UnreadableDocument(InputError):
    """One document that cannot be read; the message names the file and the record. See `skipping`."""


@runtime_checkable
class Encoder(Protocol):
    """A `Tokenizer`, as far as a source knows it: one can be trained on a source."""

    eos_id: int
    vocab_size: int
    sha256: str  # of its tokenizer.json

    def encode_document(self, text: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Document:
    text: str  # "" where the source holds token ids
    label: str
    id: int  # the document's number in its source
    tokens: np.ndarray | None = None  # [n] integers, as the source has them: unchecked, perhaps without an end

    @property
    def content(self) -> bytes:
        """What tells it from other documents."""
        return self.text.encode() if self.tokens is None else self.tokens.astype("<i8").tobytes()


class Source:
    """Documents by number: `len(source)`, `source[i]`. Picklable, and cheap to pickle: worker processes get a copy.

    name: what a person gave. labels: all labels in order, or [] where only reading a document tells its label.
    fingerprint: changes when the documents (as far as names and sizes tell) change.
    """

    name: str
    labels: list[str]
    fingerprint: str
    tokenizer: Any = None  # that of a source of tokens

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> Document:
        raise NotImplementedError

    def content_hash(self) -> str:
        """"KIND:HASH" of all that its files hold, in order, wherever they lie and whatever they are called; comparable with one
        of the same kind. See `content`."""
        return ""

    def load(self, numbers: range) -> None:
        """Told of documents that will be read next, so that a bucket is asked for them at once."""

    def label(self, i: int) -> str:
        return self[i].label

    def split(self, data: Any) -> Any:
        """(documents to train on, held-out ones) by a `DataConfig`, if that was decided when the source was written."""
        return None

    def where(self, i: int) -> str:
        """Document `i` for a message: its file and its record there, counted from 1."""
        return f"{self.name}: document {i + 1}"

    def encoded(self, i: int, tokenizer: Encoder) -> np.ndarray:
        """[n] int32: the tokens of document `i`, the end-of-document token included. Raises `UnreadableDocument` for token
        ids that the tokenizer does not have."""
        document = self[i]
        if document.tokens is None:
            return tokenizer.encode_document(document.text)
        wrong = np.flatnonzero((document.tokens < 0) | (document.tokens >= tokenizer.vocab_size))
        if len(wrong):
            raise UnreadableDocument(f"{self.where(i)}: token {wrong[0] + 1} is {document.tokens[wrong[0]]}; expected ids in "
                                     f"0..{tokenizer.vocab_size - 1}, those of the tokenizer")
        ends = document.tokens[-1:].tolist() == [tokenizer.eos_id]
        return np.concatenate([document.tokens, np.full(0 if ends else 1, tokenizer.eos_id)], dtype=np.int32, casting="unsafe")


class Examples(Source):
    """Texts that are at hand."""

    def __init__(self, name: str, texts: list[str], label: str = "example"):
        self.name, self.labels, self.fingerprint, self._texts = name, [label], "", texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, i: int) -> Document:
        return Document(self._texts[i], self.labels[0], int(i))


class Recent:
    """What `make` gave for the keys asked for last, up to `limit` in all by `size` (default: so many), the last one in any
    case. A pickled copy starts empty, which no cache of a library does."""

    def __init__(self, make: Callable[..., Any], limit: int, size: Callable[[Any], int] | None = None):
        self._make, self._limit, self._size = make, limit, size
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._total = 0

    def get(self, *key: Any) -> Any:
        value, size = self._kept.pop(key, (None, 0))
        self._total -= size
        if value is None:
            value = self._make(*key)
            size = self._size(value) if self._size else 1
        self._kept[key] = value, size  # the most recent is last
        self._total += size
        while self._total > self._limit and len(self._kept) > 1:
            self._total -= self._kept.popitem(last=False)[1][1]
        return value

    def forget(self, *key: Any) -> None:
        self._total -= self._kept.pop(key, (None, 0))[1]

    def __reduce__(self):
        return Recent, (self._make, self._limit, self._size)


def require_unchanged(path: str, size: int) -> None:
    """Raises `RunError` if the file is not there any more or has not `size` bytes as when it was opened. Who reads a range of
    an object is told."""
    if is_url(path):
        return
    try:
        now = os.stat(path).st_size
    except OSError as e:
        raise RunError(f"{path}: {e.strerror}; it was there when it was opened") from None
    if now != size:
        raise RunError(f"{path}: has {now:,} bytes and had {size:,} when it was opened: it was changed while in use")


def hash_text(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()[:24]
