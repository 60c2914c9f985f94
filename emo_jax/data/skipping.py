"""Documents that cannot be read are refused, or skipped and counted up to a share of all (data.max_skipped)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from emo_jax.data.documents import Document, Encoder, Source, UnreadableDocument
from emo_jax.errors import InputError
from emo_jax.progress import say

EARLY = 100  # so many skipped documents tell that the share is exceeded before all documents were read
UNREADABLE = "unreadable"  # the label of a document whose label cannot be read either


class Skipping:
    """Counts the documents that were skipped. share: of all documents; 0: none may be skipped."""

    def __init__(self, share: float):
        self.share, self.count, self.first, self.last = share, 0, "", ""

    def skip(self, error: InputError, read: int) -> None:
        """read: documents so far, this one included. Raises `error` if none may be skipped, and `InputError` once more than
        EARLY and more than the share of those read were."""
        if not self.share:
            raise error
        self.count, self.first, self.last = self.count + 1, self.first or str(error), str(error)
        if self.count > EARLY:
            self.check(read)

    def check(self, documents: int) -> None:
        """Raises `InputError` if more than the share of `documents` were skipped, or all of them."""
        if self.count > self.share * documents or 0 < self.count == documents:
            raise InputError(f"{self.last}\n{self.count:,} of {documents:,} documents cannot be read, more than "
                             f"data.max_skipped={self.share} allows; the message above is of the last of them")

    def counts(self) -> dict[str, Any]:
        return {"count": self.count, "first": self.first, "last": self.last}

    def add(self, count: int, first: str, last: str) -> None:
        """What another one counted."""
        self.count, self.first, self.last = self.count + count, self.first or first, last or self.last

    def report(self, name: str) -> None:
        if self.count:
            say(f"{name}: skipped {self.count:,} documents that cannot be read; the first: {self.first}")


class LenientSource(Source):
    """`source`, whose unreadable documents have no text and no tokens. Each process counts those that it reads."""

    def __init__(self, source: Source, share: float):
        self.name, self.labels, self.fingerprint = source.name, source.labels, source.fingerprint
        self._source, self._skipping = source, Skipping(share)
        self._skipped: set[int] = set()
        self._read = 0

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Document:
        return self._try(i, self._source.__getitem__, i) or Document("", UNREADABLE, int(i), np.zeros(0, np.int32))

    def content_hash(self) -> str:
        return self._source.content_hash()

    def load(self, numbers: range) -> None:
        self._source.load(numbers)

    def label(self, i: int) -> str:
        return self._try(i, self._source.label, i) or UNREADABLE

    def where(self, i: int) -> str:
        return self._source.where(i)

    def encoded(self, i: int, tokenizer: Encoder) -> np.ndarray:
        """As of any source; [0] where the document was skipped."""
        tokens = self._try(i, self._source.encoded, i, tokenizer)
        return np.zeros(0, np.int32) if tokens is None else tokens

    def _try(self, i: int, read: Callable[..., Any], *args: Any) -> Any:
        """What `read(*args)` gives; None where document `i` is unreadable."""
        self._read += 1
        try:
            return read(*args)
        except UnreadableDocument as e:
            if i not in self._skipped:
                self._skipped.add(int(i))
                self._skipping.skip(e, self._read)
                self._skipping.check(len(self))
                if str(self._skipping.count).strip("0") == "1":  # 1, 10, 100, ...
                    self._skipping.report(self.name)
            return None
