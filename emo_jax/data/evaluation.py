"""Documents to evaluate on, and their rows by label: the same on every host."""

from __future__ import annotations

import dataclasses

import numpy as np

from emo_jax.config import Config, DataConfig
from emo_jax.data.documents import Source
from emo_jax.data.packing import Row, pack
from emo_jax.data.sources import open_source
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.errors import InputError

MAX_DOCUMENTS = 20_000  # documents that are looked at


def evaluation_set(data: DataConfig) -> tuple[Source, np.ndarray]:
    """The source of data.eval_path, and the numbers of its documents: MAX_DOCUMENTS spread over it, where there are more.
    Raises `InputError`."""
    try:
        source = open_source(dataclasses.replace(data, path=data.eval_path, format="auto"))
    except InputError as e:
        raise InputError(f"data.eval_path: {e}") from None
    return source, np.unique(np.linspace(0, len(source) - 1, min(len(source), MAX_DOCUMENTS)).astype(np.int64))


def evaluation_rows(config: Config, source: Source, tokenizer: Tokenizer, eval_indices: np.ndarray,
                    tokens: int | None = None) -> list[tuple[str, Row]]:
    """[(label, rows)] in the order of the labels: fields as in training, arrays [n, T].

    Each label has up to train.eval_rows / number of labels rows (at least one), concatenated and split from
    documents of that label only, of each the first `tokens` (None: all); the last row may be padded. Repetitive rows keep
    their loss. A label none of whose documents can be read is left out.
    """
    by_label = {}
    for i in eval_indices[:MAX_DOCUMENTS]:
        by_label.setdefault(source.label(int(i)), []).append(int(i))
    per_label = max(1, config.train.eval_rows // max(1, len(by_label)))
    found = [(label, _rows(config, source, tokenizer, by_label[label], per_label, tokens)) for label in sorted(by_label)]
    return [(label, rows) for label, rows in found if rows]


def _rows(config: Config, source: Source, tokenizer: Tokenizer, documents: list[int], limit: int,
          tokens: int | None) -> Row:
    def read(count: int) -> tuple[np.ndarray, int] | None:
        if count == len(documents):
            return None
        return source.encoded(documents[count], tokenizer)[:tokens], documents[count]

    d, rows = config.data, []
    for row, _ in pack("concat_and_split", read, d.sequence_length, d.max_documents_per_row,
                       d.document_end_target == "counted"):
        rows.append(row)
        if len(rows) == limit:
            break
    if not rows:
        return {}
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    positions = np.arange(d.sequence_length, dtype=np.int32)
    return stacked | {"positions": np.tile(positions, (len(rows), 1))}
