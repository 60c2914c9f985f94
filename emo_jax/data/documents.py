"""What a source of documents is, and where its indices are kept."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

MAX_LABELS = 64  # of a source, for labels to go with its rows


@runtime_checkable
class Encoder(Protocol):
    """A `Tokenizer`, as far as a source knows it: one can be trained on a source."""

    def encode_document(self, text: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Document:
    text: str
    label: str
    id: int  # the document's number in its source
    tokens: np.ndarray | None = None  # [n] where the source holds token ids, with the end-of-document token


class Source:
    """Documents by number: `len(source)`, `source[i]`. Picklable, and cheap to pickle: worker processes get a copy.

    name: what a person gave. labels: all labels in order, or [] where only reading a document tells its label.
    fingerprint: changes when the documents (as far as names and sizes tell) change.
    """

    name: str
    labels: list[str]
    fingerprint: str

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> Document:
        raise NotImplementedError

    def label(self, i: int) -> str:
        return self[i].label

    def encoded(self, i: int, tokenizer: Encoder) -> np.ndarray:
        """[n] int32: the tokens of document `i`, the end-of-document token included."""
        document = self[i]
        return tokenizer.encode_document(document.text) if document.tokens is None else document.tokens


class Examples(Source):
    """Texts that are at hand."""

    def __init__(self, name: str, texts: list[str], label: str = "example"):
        self.name, self.labels, self.fingerprint, self._texts = name, [label], "", texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, i: int) -> Document:
        return Document(self._texts[i], self.labels[0], int(i))


class FileReader:
    """Byte ranges of files, keeping the most recent files open. A pickled copy starts with none open."""

    def __init__(self, max_open: int = 64):
        self.max_open = max_open
        self._open = OrderedDict()

    def read(self, path: str, start: int, length: int) -> bytes:
        file = self._open.pop(path, None) or open(path, "rb")  # noqa: SIM115  stays open
        self._open[path] = file  # the most recent is last
        if len(self._open) > self.max_open:
            self._open.popitem(last=False)
        data = os.pread(file.fileno(), length, start)
        while len(data) < length:  # a file system may return less than asked
            more = os.pread(file.fileno(), length - len(data), start + len(data))
            if not more:
                raise OSError(f"{path}: the file ends at byte {start + len(data)}; it was changed while in use")
            data += more
        return data

    def __reduce__(self):
        return FileReader, (self.max_open,)


def cache_folder() -> Path:
    """Where indices and decompressed copies are kept between runs (safe to delete when no run uses them):
    $XDG_CACHE_HOME/emo_jax, else ~/.cache/emo_jax, else a folder of the user in the temporary directory."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for folder in (Path(home) / "emo_jax", Path(tempfile.gettempdir()) / f"emo_jax-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="emo_jax-"))


def hash_text(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()[:24]
