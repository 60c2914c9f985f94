"""ArrayRecord files. A record is a tf.train.Example (as TFDS and MaxText write it), a JSON object, or text.

Their library reads local files, and those in gs:// by a request a record; it cannot be given what somebody else has read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from emo_jax import buckets
from emo_jax.config import DataConfig
from emo_jax.data.content import content_of_files
from emo_jax.data.documents import Document, Recent, Source, UnreadableDocument, hash_text, require_unchanged
from emo_jax.data.records import label_of, label_of_file, text_of, tokens_of
from emo_jax.errors import InputError
from emo_jax.files import Listed
from emo_jax.progress import track

MAX_OPEN = 64  # readers: each keeps its file's index, 8 bytes a record
FIRST = 100  # records among which one must be whole


class ArrayRecordSource(Source):
    """What the records are is told from the first one. Records are not checked in advance."""

    def __init__(self, data: DataConfig, files: Sequence[Listed]):
        self.name, self._data = data.path, data
        self._paths, self._sizes = [str(f.path) for f in files], [f.size for f in files]
        self._listed, self._default_labels = tuple(files), [label_of_file(f.path) for f in files]
        self._readers = Recent(_open, MAX_OPEN)
        with ThreadPoolExecutor(16) as pool:
            counts = list(track(pool.map(_count, self._paths), f"opening {self.name}", "files", total=len(files)))
        self._starts = np.cumsum([0, *counts])
        if not len(self):
            raise InputError(f"data.path={self.name!r}: no records in its {len(files)} files; expected documents")
        self.labels = []
        self.fingerprint = hash_text(*(x for f, n in zip(files, counts) for x in (f.path.name, f.size, n)))
        self._kind = self._find_kind()

    def content_hash(self) -> str:
        return content_of_files(self._listed, self.name)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> Document:
        file, number = self._locate(i)
        record, data = self._bytes(file, number), self._data
        try:
            if self._kind == "text":
                return Document(text_of(record, "of the whole record"), self._default_labels[file], int(i))
            fields = _PARSERS[self._kind](record)
            label = label_of(fields.get(data.label_field), data.label_field, self._default_labels[file])
            if data.tokens_field:
                return Document("", label, int(i), tokens_of(_present(fields, data.tokens_field), data.tokens_field))
            return Document(text_of(_present(fields, data.text_field), data.text_field), label, int(i))
        except ValueError as e:
            raise UnreadableDocument(f"{self.where(i)}: {e}") from None

    def where(self, i: int) -> str:
        file, number = self._locate(i)
        return f"{self._paths[file]}: record {number + 1}"

    def _locate(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.name}")
        file = int(np.searchsorted(self._starts, i, side="right")) - 1
        return file, int(i - self._starts[file])

    def _bytes(self, file: int, number: int) -> bytes:
        path = self._paths[file]
        try:
            # A range: for a list of numbers, as Grain's data source gives it, the reader goes through its whole index.
            return self._readers.get(path).read(number, number + 1)[0]
        except (RuntimeError, ValueError, IndexError) as e:
            self._readers.forget(path)  # it would repeat its error
            require_unchanged(path, self._sizes[file])
            raise UnreadableDocument(f"{path}: record {number + 1}: damaged ({_first_line(e)})") from None

    def _find_kind(self) -> str:
        """What the first record is. Raises `InputError` if it has not the field that is asked for."""
        number, record = self._first_record()
        data, found = self._data, self.where(number)
        field, setting = (data.tokens_field, "tokens_field") if data.tokens_field else (data.text_field, "text_field")
        for kind in ("Example", "JSON"):
            try:
                fields = _PARSERS[kind](record)
            except ValueError:
                continue
            if field in fields:
                return kind
            if field:
                as_text = "" if kind == "Example" or data.tokens_field else (
                    "; if records are text as a whole, give data.text_field= (empty)")
                raise InputError(f"{found}: no field {field!r} (data.{setting}) in this {kind} record; it has "
                                 f"{sorted(fields)[:20]}{as_text}")
        if data.tokens_field:
            raise InputError(f"{found}: neither a tf.train.Example nor a JSON object; expected one with the field "
                             f"{field!r} (data.tokens_field)")
        return "text"

    def _first_record(self) -> tuple[int, bytes]:
        """The number of the first record that is not damaged, and the record."""
        for i in range(min(len(self), FIRST)):
            try:
                return i, self._bytes(*self._locate(i))
            except UnreadableDocument:
                if not self._data.max_skipped or i == min(len(self), FIRST) - 1:
                    raise
        raise AssertionError


def _present(fields: dict[str, Any], field: str) -> Any:
    if field not in fields:
        raise ValueError(f"no field {field!r} among {sorted(fields)[:10]}")
    return fields[field]


def _example(record: bytes) -> dict[str, Any]:
    """The features of a tf.train.Example: bytes or numbers where there is one, arrays or lists of several."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_generated_pb2

    messages: Any = tf_example_generated_pb2
    try:
        features = messages.Example.FromString(record).features.feature
    except DecodeError:
        features = {}
    if not features:
        raise ValueError("not a tf.train.Example, as the first record is")
    return {name: _values(feature) for name, feature in features.items()}


def _values(feature: Any) -> Any:
    kind = feature.WhichOneof("kind")
    if kind is None:
        return None
    values = getattr(feature, kind).value
    if kind == "bytes_list":
        return values[0] if len(values) == 1 else list(values)
    return np.array(values, np.int64 if kind == "int64_list" else np.float32)


def _json(record: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(record)
    except (ValueError, RecursionError):  # what is not UTF-8 is a ValueError too
        fields = None
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object, as the first record is")
    return fields


_PARSERS = {"Example": _example, "JSON": _json}


def _open(path: str) -> Any:
    require_readable(path)
    from array_record.python.array_record_module import ArrayRecordReader  # ty: ignore[import-not-found]

    return ArrayRecordReader(path, options="readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=1 << 15)


def require_readable(path: object) -> None:
    """Raises `InputError` for files that the library does not read, in which it would see no records."""
    if buckets.is_url(path) and not str(path).startswith("gs://"):
        raise InputError(f"{path}: ArrayRecord files are read from local disks and gs:// only; write the documents as Parquet "
                         f"or .jsonl, or tokenize them where they can be read")
    if buckets.is_url(path) and (emulator := os.environ.get("STORAGE_EMULATOR_HOST")):
        os.environ.setdefault("CLOUD_STORAGE_EMULATOR_ENDPOINT", emulator)


def _count(path: str) -> int:
    try:
        reader = _open(path)
        count = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError) as e:
        raise InputError(f"{path}: not a complete ArrayRecord file ({_first_line(e)})") from None
    return count


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]
