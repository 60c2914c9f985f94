"""Documents that are tokenized already, in flat token files: what `emo-jax data tokenize` writes, or OLMo-core's files.

A `TokenSource` is a source of documents by number like any other, and gives ranges of tokens for rows that are addressed by
index (see `rows`). Tokens and the index of documents are read by range; nothing is held in memory but a list of sections, one
entry a file and label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emo_jax.buckets import errors, is_url
from emo_jax.config import DataConfig
from emo_jax.data.content import content_of_files
from emo_jax.data.documents import Document, Encoder, Source, hash_text
from emo_jax.data.order import DocumentRanges
from emo_jax.data.ranges import RangeReader
from emo_jax.data.shards import MANIFEST, STRIDE, index_bytes, parse_manifest
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.data.verify import verify
from emo_jax.errors import InputError
from emo_jax.files import Listed, given_path, reason

MAX_HELD_OUT = 2_000  # held-out documents of a section that are looked at


@dataclass(frozen=True)
class TokenFile:
    path: str
    dtype: str
    first_byte: int  # of the first token
    index: str  # path of the index of its documents, see `shards.pack_index`
    documents: int


@dataclass(frozen=True)
class TokenSection:
    """Successive documents of a file, all of one label."""

    file: int
    label: str
    held_out: bool
    first_token: int  # in the file
    tokens: int
    first_document: int  # in the file
    documents: int


class TokenSource(Source):
    """Documents are numbered in the order of the sections. fingerprint: without `listed`, of the hashes in the manifest."""

    def __init__(self, name: str, files: Sequence[TokenFile], sections: Sequence[TokenSection], reader: RangeReader,
                 tokenizer: Tokenizer, fingerprint: str, listed: Sequence[Listed] = ()):
        self.name, self.fingerprint, self.tokenizer = name, fingerprint, tokenizer
        self.files, self.sections, self.reader = tuple(files), tuple(sections), reader
        self.labels = sorted({s.label for s in sections})
        self.first_documents = np.cumsum([0] + [s.documents for s in sections])
        self.is_remote = any("://" in file.path for file in files)
        self._listed = tuple(listed)  # the files, where no manifest has their hashes
        self._summaries: dict[int, np.ndarray] = {}

    def content_hash(self) -> str:
        return content_of_files(self._listed, self.name) if self._listed else f"manifest:{self.fingerprint}"

    def __len__(self) -> int:
        return int(self.first_documents[-1])

    def __getitem__(self, i: int) -> Document:
        tokens = self.encoded(i, self.tokenizer)
        text = self.tokenizer.decode(tokens[:-1] if tokens[-1] == self.tokenizer.eos_id else tokens)
        return Document(text, self.label(i), int(i), tokens)

    def label(self, i: int) -> str:
        return self.sections[self.section_of(i)].label

    def section_of(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.name}")
        return int(np.searchsorted(self.first_documents, i, side="right")) - 1

    def split(self, data: DataConfig) -> tuple[DocumentRanges, np.ndarray]:
        """Held out are the documents that were set aside when the source was written, MAX_HELD_OUT of each section."""
        train, held_out = [], [np.zeros(0, np.int64)]
        for section, first in zip(self.sections, self.first_documents.tolist()):
            if section.label in data.left_out:
                continue
            if section.held_out:
                held_out.append(first + np.arange(min(section.documents, MAX_HELD_OUT)))
            else:
                train.append((first, section.documents))
        return DocumentRanges(train), np.concatenate(held_out)

    def encoded(self, i: int, tokenizer: Encoder) -> np.ndarray:
        if tokenizer.sha256 != self.tokenizer.sha256:
            raise InputError(f"{self.name} was tokenized with another tokenizer ({self.tokenizer.path})")
        number = self.section_of(i)
        start, end = self.document_range(number, i - int(self.first_documents[number]))
        return self.read([(number, start, end - start)])[0].astype(np.int32)

    def document_range(self, section: int, document: int) -> tuple[int, int]:
        """(first token, end) in the section of a document of it."""
        s = self.sections[section]
        first = s.first_document + document
        ends = self._ends(s.file, max(first - 1, 0), first + 1)
        start = max(int(ends[0]), s.first_token) if first else 0
        return start - s.first_token, int(ends[-1]) - s.first_token

    def where(self, i: int) -> str:
        file = self.files[self.sections[self.section_of(i)].file]
        return f"{file.path}: document {self.source_number(i)} of the source that it was tokenized from"

    def source_number(self, i: int) -> int:
        """The number that document `i` had in the source that it was tokenized from."""
        number = self.section_of(i)
        s = self.sections[number]
        file, local = self.files[s.file], s.first_document + i - int(self.first_documents[number])
        entry = -(-file.documents // STRIDE) + file.documents + local
        return int(np.frombuffer(self.reader.read(file.index, 8 * entry, 8), "<i8")[0])

    # ---- ranges of tokens ----

    def read(self, ranges: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """The tokens of every (section, first token in it, number); unsigned, of the file's type."""
        return [np.frombuffer(data, self.files[self.sections[section].file].dtype)
                for data, (section, _, _) in zip(self.reader.read_many(self.byte_ranges(ranges)), ranges)]

    def byte_ranges(self, ranges: Sequence[tuple[int, int, int]]) -> list[tuple[str, int, int]]:
        """(path, first byte, bytes) of such ranges of tokens."""
        wanted = []
        for section, start, count in ranges:
            s = self.sections[section]
            file = self.files[s.file]
            size = np.dtype(file.dtype).itemsize
            wanted.append((file.path, file.first_byte + size * (s.first_token + start), size * count))
        return wanted

    def ends_in(self, section: int, start: int, stop: int) -> tuple[int, np.ndarray]:
        """(n, ends): n documents of the section end at or before token `start`; `ends` are those of the next ones, up to the
        first at or after `stop`."""
        s = self.sections[section]
        start, stop = start + s.first_token, stop + s.first_token
        low, high = self._around(s, start, stop)
        ends = self._ends(s.file, low, high)
        first, last = int(ends.searchsorted(start, "right")), int(ends.searchsorted(stop)) + 1
        return low + first - s.first_document, ends[first:last] - s.first_token

    def load_index(self, ranges: Sequence[tuple[int, int, int]]) -> None:
        """Fetches all that `ends_in` of the (section, start, stop) will read, from a bucket, in two rounds of requests."""
        if self.is_remote:
            new = {self.sections[section].file for section, _, _ in ranges} - self._summaries.keys()
            self.reader.load((f.index, 0, 8 * -(-f.documents // STRIDE)) for f in map(self.files.__getitem__, sorted(new)))
            sections = [(self.sections[section], start, stop) for section, start, stop in ranges]
            self.reader.load(self._entries(s.file, *self._around(s, s.first_token + start, s.first_token + stop))
                             for s, start, stop in sections)

    def _around(self, s: TokenSection, start: int, stop: int) -> tuple[int, int]:
        """Documents of the file, from one that ends at or before token `start` of it to one that ends at or after `stop`."""
        summary = self._summary(s.file)
        return (STRIDE * max(int(summary.searchsorted(start, "right")) - 1, 0),
                min(STRIDE * int(summary.searchsorted(stop)) + 1, s.first_document + s.documents))

    def _entries(self, file: int, first: int, last: int) -> tuple[str, int, int]:
        """The byte range of the ends of documents in the index of a file."""
        f = self.files[file]
        return f.index, 8 * (-(-f.documents // STRIDE) + first), 8 * (last - first)

    def _ends(self, file: int, first: int, last: int) -> np.ndarray:
        return np.frombuffer(self.reader.read(*self._entries(file, first, last)), "<i8")

    def _summary(self, file: int) -> np.ndarray:
        found = self._summaries.get(file)
        if found is None:
            f = self.files[file]
            found = np.frombuffer(self.reader.read(f.index, 0, 8 * -(-f.documents // STRIDE)), "<i8")
            self._summaries[file] = found
        return found

    def __getstate__(self):
        return self.__dict__ | {"_summaries": {}}


def open_shards(data: DataConfig) -> TokenSource:
    """The folder of a manifest, see `shards`. Raises `InputError`."""
    folder = given_path(data.path, "data.path")
    try:
        text = (folder / MANIFEST).read_text()
    except (OSError, UnicodeDecodeError, *errors(folder)) as e:
        raise InputError(f"data.path={data.path!r}: {MANIFEST} cannot be read ({reason(e)}); expected a folder that "
                         f"`emo-jax data tokenize` has finished") from None
    manifest = parse_manifest(text, str(folder / MANIFEST))
    verify(folder, manifest)
    tokenizer = Tokenizer(data.tokenizer or folder / "tokenizer.json", data.eos_token)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise InputError(f"data.tokenizer={str(tokenizer.path)!r}: {data.path} was tokenized with another one, which lies in "
                         f"that folder; leave data.tokenizer empty")
    dtype = {"uint16": "<u2", "uint32": "<u4"}[manifest.dtype]
    files, sections, sizes = [], [], {}
    for number, shard in enumerate(manifest.shards):
        file = TokenFile(str(folder / shard.file), dtype, 0, str(folder / shard.index), shard.documents)
        files.append(file)
        sizes |= {file.path: shard.tokens * np.dtype(dtype).itemsize, file.index: index_bytes(shard.documents)}
        token = document = 0
        for s in shard.sections:
            sections.append(TokenSection(number, s.label, s.held_out, token, s.tokens, document, s.documents))
            token, document = token + s.tokens, document + s.documents
    fingerprint = hash_text(*(shard.sha256 for shard in manifest.shards))
    reader = RangeReader(int(data.cache_gb * 1e9), sizes=sizes if is_url(folder) else {})
    return TokenSource(data.path, files, sections, reader, tokenizer, fingerprint)
