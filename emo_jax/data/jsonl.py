"""JSON Lines (.jsonl, .json; plain, .gz or .zst): one document a line, read by line number.

Every line is checked once, when a file is first opened. What is found (where each line starts, its label) is kept in
the cache folder under the file's path, size and time of change, so that the next run opens at once and worker
processes map the same pages. Compressed files are decompressed there, because they cannot be read from the middle; others,
those of a bucket too, are read where they are.
"""

from __future__ import annotations

import array
import gzip
import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from emo_jax.buckets import is_url
from emo_jax.config import DataConfig
from emo_jax.data.content import content_of
from emo_jax.data.documents import Document, Source, UnreadableDocument, hash_text
from emo_jax.data.ranges import RangeReader
from emo_jax.data.records import label_of, text_of, tokens_of
from emo_jax.data.skipping import Skipping
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, Listed, cache_folder
from emo_jax.progress import Progress, say

MAX_LABELS = 1000  # more of them in one file mean that the label field is no label
INDEX_VERSION = 3


class JsonlSource(Source):
    def __init__(self, data: DataConfig, files: list[Listed]):
        self.name, self._text_field, self._tokens_field = data.path, data.text_field, data.tokens_field
        self._files = [_IndexedFile(f, data) for f in files]
        self._starts = np.cumsum([0] + [f.count for f in self._files])
        self._reader = RangeReader(int(data.cache_gb * 1e9), sizes={str(f.path): f.size for f in files if is_url(f.path)})
        self.labels = sorted({label for f in self._files for label in f.labels})
        self.fingerprint = hash_text(*(x for f in self._files for x in (f.path.name, f.size, f.count)))
        skipping = Skipping(data.max_skipped)
        for file in self._files:
            skipping.add(**file.skipped)
        skipping.check(len(self) + skipping.count)
        skipping.report(self.name)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def content_hash(self) -> str:
        return content_of([file.sha256 for file in self._files])

    def load(self, numbers: range) -> None:
        self._reader.load(r for r in map(self._range, numbers) if is_url(r[0]))

    def __getitem__(self, i: int) -> Document:
        file, line = self._locate(i)
        record = json.loads(self._reader.read(*self._range(i)).decode("utf-8-sig"))
        label = file.labels[file.label_codes[line]]
        if self._tokens_field:
            return Document("", label, int(i), tokens_of(record[self._tokens_field], self._tokens_field))
        return Document(record[self._text_field], label, int(i))

    def label(self, i: int) -> str:
        file, line = self._locate(i)
        return file.labels[file.label_codes[line]]

    def where(self, i: int) -> str:
        file, line = self._locate(i)
        return f"{file.path}: document {line + 1}"

    def _range(self, i: int) -> tuple[str, int, int]:
        """(path, first byte, bytes) of a document's line."""
        file, line = self._locate(i)
        start, length = file.lines[line].tolist()
        return str(file.data_path), start, length

    def _locate(self, i: int) -> tuple[_IndexedFile, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.name}")
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._files[number], int(i - self._starts[number])


class _IndexedFile:
    """A checked file. lines [n, 2] int64: first byte and length of each document's line in `data_path`;
    label_codes [n] int32: index into `labels`. Both are memory-mapped when first used, in each process."""

    def __init__(self, file: Listed, data: DataConfig):
        self.path, self.size, version = file
        where = self.path.resolve() if isinstance(self.path, Path) else self.path
        key = hash_text(INDEX_VERSION, where, self.size, version, data.text_field, data.label_field, data.tokens_field,
                        data.max_skipped > 0)
        self.folder = cache_folder() / "jsonl" / key
        if not (self.folder / "index.json").is_file():
            _build_index(file, self.folder, data)
        meta = json.loads((self.folder / "index.json").read_text())
        self.count, self.labels, self.skipped = meta["count"], meta["labels"], meta["skipped"]
        self.sha256 = meta["sha256"]  # of its text, decompressed
        self.data_path = self.folder / "data.jsonl" if meta["decompressed"] else where

    @property
    def lines(self) -> np.ndarray:
        return self._array("lines")

    @property
    def label_codes(self) -> np.ndarray:
        return self._array("label_codes")

    def _array(self, name: str) -> np.ndarray:
        if "_arrays" not in self.__dict__:
            self._arrays = {n: np.load(self.folder / f"{n}.npy", mmap_mode="r") for n in ("lines", "label_codes")}
        return self._arrays[name]

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_arrays"}


def _build_index(listed: Listed, folder: Path, data: DataConfig) -> None:
    """Checks every line of a file and writes the index to `folder`: complete, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
    try:
        path, compressed = listed.path, listed.path.suffix in (".gz", ".zst")
        if compressed:
            listed = _decompress(listed, temporary / "data.jsonl")
        lines, codes, labels, skipped, sha256 = _scan(listed, path, data)
        np.save(temporary / "lines.npy", lines)
        np.save(temporary / "label_codes.npy", codes)
        (temporary / "index.json").write_text(json.dumps(
            {"file": str(path), "count": len(codes), "labels": labels, "decompressed": compressed,
             "skipped": skipped.counts(), "sha256": sha256}))
        try:
            temporary.rename(folder)
        except OSError:  # another process was faster: the same index is there already
            if not (folder / "index.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _scan(listed: Listed, path: AnyPath, data: DataConfig) -> tuple[np.ndarray, np.ndarray, list[str], Skipping, str]:
    """(lines, label codes, labels) of the documents, the count of lines that are none, and the SHA-256 of all. path: for
    messages."""
    lines, codes, labels = array.array("q"), array.array("i"), {}
    progress, start = Progress(f"checking {path}", listed.size), 0
    stem, skipping, digest = path.name.split(".")[0], Skipping(data.max_skipped), hashlib.sha256()
    with RangeReader(budget=0).open(str(listed.path), listed.size) as file:
        for number, raw in enumerate(file, 1):
            digest.update(raw)
            if not raw.isspace():
                try:
                    label = _check_line(raw, data, stem)
                    lines.extend((start, len(raw)))
                    codes.append(labels.setdefault(label, len(labels)))
                except ValueError as e:
                    skipping.skip(UnreadableDocument(f"{path}: line {number}: {e}"), len(codes) + skipping.count + 1)
                if len(labels) > MAX_LABELS:
                    raise InputError(f"{path}: line {number}: more than {MAX_LABELS} different values of "
                                     f"data.label_field={data.label_field!r}; name a field that groups documents, or one "
                                     f"that no line has (then the file name is the label)")
            start += len(raw)
            if number % 1000 == 0:
                progress.update(start)
    if not codes:
        raise InputError(f"{path}: no documents in it; expected one JSON object a line with the field "
                         f"{data.tokens_field or data.text_field!r}")
    return np.array(lines, np.int64).reshape(-1, 2), np.array(codes, np.int32), list(labels), skipping, digest.hexdigest()


def _check_line(raw: bytes, data: DataConfig, default_label: str) -> str:
    """The label of a line; `ValueError` saying what is wrong with it."""
    field, kind = (data.tokens_field, "list") if data.tokens_field else (data.text_field, "string")
    expected = f"expected a JSON object with a {kind} field {field!r} (data.{'tokens' if kind == 'list' else 'text'}_field)"
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"not UTF-8 text{' (binary data?)' if bytes([0]) in raw else ''}; {expected}") from None
    except (ValueError, RecursionError) as e:
        reason = getattr(e, "msg", "nested too deeply")
        raise ValueError(f"not JSON ({reason}) at {_excerpt(raw)}; {expected}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, at {_excerpt(raw)}; {expected}")
    if field not in record:
        raise ValueError(f"no field {field!r} among {sorted(record)[:10]}; {expected}")
    (tokens_of if data.tokens_field else text_of)(record[field], field)
    return label_of(record.get(data.label_field), data.label_field, default_label)


def _excerpt(raw: bytes) -> str:
    return repr(raw[:40].decode("utf-8", "replace")) + ("..." if len(raw) > 40 else "")


def _decompress(listed: Listed, target: Path) -> Listed:
    path, total, line = listed.path, 0, 1
    progress = Progress(f"decompressing {path} into {target.parent.parent}", listed.size)
    if not isinstance(path, Path):
        say(f"{path} is compressed, so that its text is kept in {target.parent.parent}; an uncompressed one is read from the "
            f"bucket")
    blocks = _gzip_blocks if path.suffix == ".gz" else _zstd_blocks
    try:
        with RangeReader(budget=0).open(str(path), listed.size) as source, open(target, "wb") as out:
            for block in blocks(source):
                out.write(block)
                total, line = total + len(block), line + block.count(b"\n")
                progress.update(source.tell())
    except (EOFError, zlib.error, gzip.BadGzipFile, _Damaged) as e:
        raise InputError(f"{path}: damaged {path.suffix} file after {total:,} bytes of text, in or after line {line:,} "
                         f"({e})") from None
    return Listed(target, total, "")


class _Damaged(Exception):
    pass


def _gzip_blocks(source) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=source) as file:
        while block := file.read(1 << 20):
            yield block


def _zstd_blocks(source) -> Iterator[bytes]:
    """All frames of a file. A stream reader would take a truncated file for a complete one."""
    import zstandard

    frame = None
    while data := source.read(1 << 20):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as e:
                raise _Damaged(e) from None
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise _Damaged("the file ends within a frame")
