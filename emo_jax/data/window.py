"""`emo-jax data window`: exactly which documents any stretch of a run's rows holds.

Row k of a run is row k % B of the batch of step k // B, the first step being 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from emo_jax.config import Config
from emo_jax.data.documents import Source
from emo_jax.data.order import DocumentOrder, split
from emo_jax.data.packing import Row, State
from emo_jax.data.pipeline import RowStreams
from emo_jax.data.sources import open_source
from emo_jax.data.stream import stream_of_stages
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.data.tokens import TokenSource
from emo_jax.errors import InputError
from emo_jax.phases import phases
from emo_jax.progress import Progress

Position = tuple[int, Sequence[State]]  # a step, and the states of the B streams before it, as a checkpoint keeps them


def read_rows(config: Config, source: Source, tokenizer: Tokenizer, first: int, last: int,
              position: Position | None = None) -> Iterator[Row]:
    """Rows first..last - 1, fields [T]. A stream of text documents has to be read from `position` (default: the start) up to
    there, which takes as long as tokenizing it; only streams that the rows come from are read."""
    if isinstance(source, TokenSource):
        yield from _token_rows(config, source, first, last)
        return
    if len(phases(config)) > 1:
        raise InputError("rows of text are found in runs without stages and train.batch_ramp only, rows of token files in all")
    batch_size = config.train.batch_size
    start, states = position or (0, [None] * batch_size)
    if len(states) != batch_size:
        raise InputError(f"train.batch_size={batch_size}: the checkpoint's data position is for a batch of {len(states)} rows")
    order = DocumentOrder(split(source, config.data, config.seed)[0], batch_size, config.seed, config.data.shuffle)
    streams = RowStreams(config.data, source, tokenizer, order)
    opened = {k % batch_size for k in range(first, min(last, first + batch_size))}
    generators = {b: streams.rows(b, states[b]) for b in sorted(opened)}
    progress = Progress(f"reading {source.name} up to row {first:,}", (first // batch_size - start) * len(opened), "rows")
    skipped = 0
    for k in range(start * batch_size, last):
        if k % batch_size in opened:
            row, _, _ = next(generators[k % batch_size])
            if k >= first:
                yield row
            else:
                skipped += 1
                progress.update(skipped)


def _token_rows(config: Config, source: Source, first: int, last: int) -> Iterator[Row]:
    """Those of a run on token files, through all its stages."""
    read = [0] * (1 + len(config.stages))
    found, done = phases(config), 0
    configs = [phase.config for phase in found if phase.starts_stage]
    sources = [source if c.data == config.data else open_source(c.data) for c in configs]
    for phase in found:
        rows = (phase.until - phase.first_step) * phase.config.train.batch_size
        numbers = np.arange(max(first, done), min(last, done + rows)) - done + read[phase.stage]
        if len(numbers):
            stream = stream_of_stages(list(zip(configs, sources))[:phase.stage + 1], read)
            made = stream.rows(numbers)
            yield from ({name: array[i] for name, array in made.items()} for i in range(len(numbers)))
        read[phase.stage], done = read[phase.stage] + rows, done + rows


def describe_row(row: Row, source: Source, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The pieces of documents in a row, and its padding (segment 0): where they stand in it, and what they are."""
    pieces, segments = [], row["segment_ids"]
    starts = np.flatnonzero(np.diff(segments, prepend=-1))
    for first, end in zip(starts.tolist(), [*starts[1:].tolist(), len(segments)]):
        piece: dict[str, Any] = {"segment": int(segments[first]), "first": first, "tokens": end - first}
        if segments[first]:
            document, ids = int(row["document_ids"][first]), row["tokens"][first:end]
            piece |= {"document": document, "label": source.label(document), "where": source.where(document),
                      "loss_tokens": int(row["loss_weights"][first:end].sum()), "ids": ids.tolist(),
                      "text": tokenizer.decode(ids)}
        pieces.append(piece)
    return pieces


def window(config: Config, source: Source, tokenizer: Tokenizer, first: int, last: int,
           position: Position | None = None) -> list[dict[str, Any]]:
    """Rows first..last - 1: {"row", "step", "row_of_batch", "pieces"}."""
    rows = read_rows(config, source, tokenizer, first, last, position)
    return [{"row": k} | _step_of(config, k) | {"pieces": describe_row(row, source, tokenizer)}
            for k, row in zip(range(first, last), rows)]


def _step_of(config: Config, row: int) -> dict[str, int]:
    """The step that reads a row, counted from 0, and the row's number in its batch."""
    for phase in phases(config):
        size = phase.config.train.batch_size
        if row < (phase.until - phase.first_step) * size:
            return {"step": phase.first_step + row // size, "row_of_batch": row % size}
        row -= (phase.until - phase.first_step) * size
    raise InputError(f"the run's {config.train.steps:,} steps end before row {row:,}")


def window_report(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        lines.append(f"row {row['row']:,}: step {row['step']:,}, row {row['row_of_batch']} of its batch")
        for p in row["pieces"]:
            where = f"{p['first']:>6}..{p['first'] + p['tokens'] - 1:<6}"
            lines.append(f"  {where} padding" if not p["segment"] else
                         f"  {where} [{p['label']}] document {p['document']} ({p['where']}): {p['text'][:70]!r}")
    return "\n".join(lines)
