"""Documents in the rows of tables: what Parquet and Arrow files share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from emo_jax.config import DataConfig
from emo_jax.data.content import content_of_files
from emo_jax.data.documents import Document, Recent, Source, UnreadableDocument, hash_text, require_unchanged
from emo_jax.data.ranges import RangeReader
from emo_jax.data.records import label_of, label_of_file, text_of, tokens_of
from emo_jax.errors import InputError
from emo_jax.files import Listed
from emo_jax.progress import track

if TYPE_CHECKING:
    import pyarrow as pa

THREADS = 16  # files that are opened at the same time
CACHE_BYTES = 1 << 28  # of columns that were read last, in each process


class ColumnSource(Source):
    """The rows of files, each a sequence of blocks (row groups, record batches) of columns, of which only those that are
    needed are read. Rows are not checked in advance. Objects of a bucket are read by ranges."""

    def __init__(self, data: DataConfig, files: Sequence[Listed]):
        _require_pyarrow(data.path)
        name = self.name = data.path
        self._tokens_field, self._text_field = data.tokens_field, data.text_field
        self._label_field = data.label_field
        self._paths, self._sizes = [str(f.path) for f in files], [f.size for f in files]
        self._listed, self._default_labels = tuple(files), [label_of_file(f.path) for f in files]
        self._reader = RangeReader(int(data.cache_gb * 1e9), sizes=dict(zip(self._paths, self._sizes)))
        rows, blocks, names = [], [], []
        with ThreadPoolExecutor(THREADS) as pool:
            opened = track(pool.map(self._open, files), f"opening {name}", "files", total=len(files))
            for path, (schema, rows_of_blocks) in zip(self._paths, opened):
                names.append(self._check_schema(path, schema))
                rows += rows_of_blocks
                blocks.append(len(rows_of_blocks))
        self._label_names: list[tuple[str, ...] | None] = names  # of each file; None: it has no labels
        self._starts = np.cumsum([0, *rows])  # the first document of each block
        self._blocks = np.cumsum([0, *blocks])  # the first block of each file
        self._columns = Recent(self._read, CACHE_BYTES, _bytes)
        if not len(self):
            raise InputError(f"data.path={name!r}: no rows in its {len(files)} files; expected documents")
        unlabelled = [label for label, names in zip(self._default_labels, self._label_names) if names is None]
        self.labels = sorted(set(unlabelled)) if len(unlabelled) == len(files) else []
        self.fingerprint = hash_text(*(x for f in files for x in (f.path.name, f.size)), len(self))

    def _open(self, file: Listed) -> tuple[pa.Schema, list[int]]:
        """(schema, rows of each block), in a thread of several. Raises `InputError` for what is no such file."""
        raise NotImplementedError

    def _read(self, file: int, block: int, field: str) -> pa.Array | pa.ChunkedArray:
        """A column of a block of a file."""
        raise NotImplementedError

    def content_hash(self) -> str:
        return content_of_files(self._listed, self.name)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> Document:
        at, field = self._locate(i), self._tokens_field or self._text_field
        try:
            value, label = self._value(at, field), self._label(at)
            if self._tokens_field:
                return Document("", label, int(i), tokens_of(value, field))
            return Document(text_of(value, field), label, int(i))
        except ValueError as e:
            raise UnreadableDocument(f"{self.where(i)}: {e}") from None

    def label(self, i: int) -> str:
        try:
            return self._label(self._locate(i))
        except ValueError as e:
            raise UnreadableDocument(f"{self.where(i)}: {e}") from None

    def where(self, i: int) -> str:
        file = self._locate(i)[0]
        return f"{self._paths[file]}: record {i - self._starts[self._blocks[file]] + 1}"

    def _locate(self, i: int) -> tuple[int, int, int]:
        """(file, block of the file, row of the block)"""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.name}")
        block = int(self._starts.searchsorted(i, side="right")) - 1
        file = int(self._blocks.searchsorted(block, side="right")) - 1
        return file, block - int(self._blocks[file]), int(i - self._starts[block])

    def _label(self, at: tuple[int, int, int]) -> str:
        names = self._label_names[at[0]]
        if names is None:
            return self._default_labels[at[0]]
        return label_of(self._value(at, self._label_field), self._label_field, self._default_labels[at[0]], names)

    def _value(self, at: tuple[int, int, int], field: str) -> Any:
        """What a field holds; token ids as an array. `ValueError` if its block cannot be read."""
        import pyarrow as pa

        file, block, row = at
        require_unchanged(self._paths[file], self._sizes[file])  # reading a mapped file that shrank ends the process
        try:
            scalar: Any = self._columns.get(file, block, field)[row]
        except (pa.ArrowException, OSError) as e:
            require_unchanged(self._paths[file], self._sizes[file])
            raise ValueError(f"damaged ({e})") from None
        if isinstance(scalar, (pa.ListScalar, pa.LargeListScalar, pa.FixedSizeListScalar)):
            return None if scalar.values is None else scalar.values.to_numpy(zero_copy_only=False)
        try:
            return scalar.as_py()
        except UnicodeDecodeError as e:
            return e.object  # bytes, which are refused as such

    def _check_schema(self, path: str, schema: pa.Schema) -> tuple[str, ...] | None:
        """The names that integers in the label column stand for (() if they are none); None if there is no such column."""
        import pyarrow.types as t

        field, setting = (self._tokens_field, "tokens_field") if self._tokens_field else (self._text_field, "text_field")
        if field not in schema.names:
            raise InputError(f"{path}: no column {field!r} (data.{setting}); it has {schema.names[:20]}")
        kind: Any = schema.field(field).type
        kind = kind.value_type if t.is_dictionary(kind) else kind
        if self._tokens_field:
            listed = t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind)
            if not (listed and t.is_integer(kind.value_type)):
                raise InputError(f"{path}: column {field!r} (data.tokens_field) is {kind}; expected lists of integers")
        elif not any(is_kind(kind) for is_kind in (t.is_string, t.is_large_string, t.is_string_view, t.is_binary,
                                                   t.is_large_binary, t.is_null)):
            raise InputError(f"{path}: column {field!r} (data.text_field) is {kind}; expected text")
        return _class_names(schema, self._label_field) if self._label_field in schema.names else None


def _class_names(schema: pa.Schema, field: str) -> tuple[str, ...]:
    """The names of a Hugging Face ClassLabel, which stores numbers."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][field]
        return tuple(map(str, described.get("names") or ()))
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


def _bytes(column: pa.Array | pa.ChunkedArray) -> int:
    return column.nbytes


def _require_pyarrow(name: str) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as e:
        raise InputError(f"data.path={name!r}: Parquet and Arrow files need pyarrow ({e}): pip install "
                         "'emo-jax[parquet]'") from None
