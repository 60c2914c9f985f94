"""A folder of text files: one document a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from emo_jax.buckets import is_url
from emo_jax.config import DataConfig
from emo_jax.data.content import content_of
from emo_jax.data.documents import Document, Source, UnreadableDocument, hash_text
from emo_jax.data.ranges import RangeReader
from emo_jax.data.skipping import Skipping
from emo_jax.files import AnyPath, Listed, absolute_path
from emo_jax.progress import track

AT_ONCE = 64  # objects of a bucket that are read together


class TextSource(Source):
    """The label of a file is the folder it is in: the first one below the given folder, else the given folder."""

    def __init__(self, data: DataConfig, root: AnyPath, files: list[Listed]):
        self.name, self._files = data.path, [(str(f.path), f.size) for f in files]
        self._reader = RangeReader(int(data.cache_gb * 1e9), sizes=dict(self._files) if is_url(root) else {})
        skipping, sizes, kept, self._hashes = Skipping(data.max_skipped), [], [], []
        for i in track(range(len(files)), f"checking {self.name}", "files"):
            if is_url(root) and i % AT_ONCE == 0:
                self._reader.read_many([(path, 0, size) for path, size in self._files[i:i + AT_ONCE]])  # and keeps them
            try:
                text = self._read(i).encode()
                sizes.append(len(text))
                self._hashes.append(hashlib.sha256(text).hexdigest())
                kept.append(i)
            except UnreadableDocument as e:
                skipping.skip(e, i + 1)
        skipping.check(len(files))
        skipping.report(self.name)
        files, self._files = [files[i] for i in kept], [self._files[i] for i in kept]
        parts = [f.path.relative_to(root).parts for f in files]
        self._labels = [part[0] if len(part) > 1 else absolute_path(f.path, "the file").parent.name
                        for f, part in zip(files, parts)]
        self.labels = sorted(set(self._labels))
        self.fingerprint = hash_text(*(x for part, size in zip(parts, sizes) for x in ("/".join(part), size)))

    def __len__(self) -> int:
        return len(self._files)

    def content_hash(self) -> str:
        return content_of(self._hashes)

    def load(self, numbers: range) -> None:
        self._reader.load((path, 0, size) for path, size in self._files[numbers.start:numbers.stop] if is_url(path))

    def __getitem__(self, i: int) -> Document:
        return Document(self._read(i), self._labels[i], int(i))

    def label(self, i: int) -> str:
        return self._labels[i]

    def where(self, i: int) -> str:
        return self._files[i][0]

    def _read(self, i: int) -> str:
        path, size = self._files[i]
        try:
            data = self._reader.read(path, 0, size) if is_url(path) else Path(path).read_bytes()
        except OSError as e:
            raise UnreadableDocument(f"{path}: cannot be read ({e.strerror})") from None
        if not data:
            raise UnreadableDocument(f"{path}: an empty file; expected the text of one document")
        if 0 in data:
            raise UnreadableDocument(f"{path}: a binary file (a zero byte at {data.index(0)}); expected UTF-8 text")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise UnreadableDocument(f"{path}: not UTF-8 text (byte {e.start} is {data[e.start]:#04x})") from None
