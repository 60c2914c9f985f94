"""Parquet files: a row group of a column is read at a time, and the most recent ones are kept.

A document in the middle of a row group cannot be read alone, so that large row groups (over some thousand documents) make
the shuffled order slow; `emo-jax data tokenize` reads them in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emo_jax.config import DataConfig
from emo_jax.data.columns import ColumnSource
from emo_jax.data.documents import Recent
from emo_jax.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_OPEN = 16  # files: each keeps its footer in memory


class ParquetSource(ColumnSource):
    def __init__(self, data: DataConfig, paths: Sequence[Path]):
        self._files = Recent(_open, MAX_OPEN)
        super().__init__(data, paths)

    def _open(self, path: str) -> tuple[pa.Schema, list[int]]:
        import pyarrow as pa

        try:
            file = _open(path)
        except (pa.ArrowException, OSError) as e:
            raise InputError(f"{path}: not a complete Parquet file ({e})") from None
        return file.schema_arrow, [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    def _read(self, file: int, block: int, field: str) -> pa.ChunkedArray:
        return self._files.get(self._paths[file]).read_row_group(block, columns=[field], use_threads=False).column(field)


def _open(path: str) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)
