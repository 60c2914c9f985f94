"""Parquet files: a row group of a column is read at a time, and the most recent ones are kept.

A document in the middle of a row group cannot be read alone, so that large row groups (over some thousand documents) make
the shuffled order slow; `emo-jax data tokenize` reads them in order. Of an object in a bucket, the footer and the column of a
row group are one read of a range each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from emo_jax.buckets import is_url
from emo_jax.config import DataConfig
from emo_jax.data.columns import ColumnSource
from emo_jax.data.documents import Recent
from emo_jax.errors import InputError
from emo_jax.files import Listed

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_OPEN = 16  # files: each keeps its footer in memory


class ParquetSource(ColumnSource):
    def __init__(self, data: DataConfig, files: Sequence[Listed]):
        self._files = Recent(self._file, MAX_OPEN)
        super().__init__(data, files)

    def _file(self, path: str) -> pq.ParquetFile:
        import pyarrow.parquet as pq

        return pq.ParquetFile(self._reader.open_raw(path, self._reader.sizes[path]) if is_url(path) else path)

    def _open(self, file: Listed) -> tuple[pa.Schema, list[int]]:
        import pyarrow as pa

        try:
            opened = self._file(str(file.path))
        except (pa.ArrowException, OSError) as e:
            raise InputError(f"{file.path}: not a complete Parquet file ({e})") from None
        return opened.schema_arrow, [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]

    def _read(self, file: int, block: int, field: str) -> pa.ChunkedArray:
        return self._files.get(self._paths[file]).read_row_group(block, columns=[field], use_threads=False).column(field)
