"""`emo-jax data bench`: how fast rows come, against what the disk, the tokenizer or Grain's own parts reach in the same run."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from emo_jax.config import Config
from emo_jax.data.documents import Source
from emo_jax.data.pipeline import make_train_iterator
from emo_jax.data.ranges import RangeReader
from emo_jax.data.row_clock import PARTS
from emo_jax.data.stream import RowStream
from emo_jax.data.token_batches import TokenBatches
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.data.tokens import TokenSource
from emo_jax.data.tools import open_data
from emo_jax.files import AnyPath

PIECE = 4 << 20  # bytes of a plain read
GRAIN_TOKENS = 20_000_000  # that are written as ArrayRecord


def bench(config: Config, folder: str | AnyPath, workers: Sequence[int] = (0, 1, 2), seconds: float = 5.0,
          against_grain: bool = False) -> list[dict[str, Any]]:
    """A line for each number of worker processes (text) or of threads (token files), and what they are compared with. Opening
    the source and the first batches are not in the rates."""
    source, tokenizer = open_data(config, folder)
    if isinstance(source, TokenSource):
        return _bench_tokens(config, source, [n for n in workers if n] or [1], seconds, against_grain)
    lines: list[dict[str, Any]] = [_bench_tokenizer(source, tokenizer, seconds)]
    for wanted in workers:
        changed = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=wanted))
        iterator = make_train_iterator(changed, source, tokenizer)
        line = _rate(iterator, config, seconds) | {"padding": _padding(iterator, config), "parts": _parts(iterator)}
        iterator.close()
        if not iterator.workers:  # else the time of other processes counts
            line["of_tokenizer"] = line["tokens_per_cpu_second"] / lines[0]["tokens_per_cpu_second"]
        lines.append({"what": f"{iterator.workers} workers", **line})
    return lines


def _bench_tokens(config: Config, source: TokenSource, threads: Sequence[int], seconds: float,
                  against_grain: bool) -> list[dict[str, Any]]:
    began, stream = time.perf_counter(), RowStream(config, source)
    first = TokenBatches(stream, 0, config.train.batch_size)
    next(first)
    first.close()
    lines: list[dict[str, Any]] = [{"what": "first batch", "seconds": time.perf_counter() - began}]
    for count in threads:
        source.reader.forget()
        batches = TokenBatches(RowStream(config, source), 0, config.train.batch_size, threads=count)
        line = _rate(batches, config, seconds) | {"padding": _padding(batches, config), "parts": _parts(batches)}
        batches.close()
        lines.append({"what": f"{count} threads", **line})
    lines.append(_bench_plain(source, seconds))
    for line in lines[1:-1]:
        line["of_plain_read"] = line["tokens_per_second"] / lines[-1]["tokens_per_second"]
    return lines + [_bench_grain(config, source, seconds)] * against_grain


def _rate(batches: Iterator[dict[str, np.ndarray]], config: Config, seconds: float) -> dict[str, Any]:
    start = time.perf_counter()
    for _ in range(3):  # what was prefetched during start-up
        next(batches)
    rows_of_batch = config.train.batch_size
    began, cpu, count = time.perf_counter(), time.process_time(), 0
    while count == 0 or time.perf_counter() - began < seconds:
        next(batches)
        count += 1
    elapsed, tokens = time.perf_counter() - began, count * rows_of_batch * config.data.sequence_length
    return {"startup_seconds": began - start, "rows_per_second": count * rows_of_batch / elapsed,
            "tokens_per_second": tokens / elapsed,
            "tokens_per_cpu_second": tokens / max(time.process_time() - cpu, 1e-9)}  # of this process


def _padding(batches: Any, config: Config) -> float:
    counts = batches.statistics()
    return counts["padding_tokens"] / (counts["rows"] * config.data.sequence_length)


def _parts(batches: Any) -> dict[str, float]:
    """The shares of PARTS in the time that rows took."""
    seconds = batches.timings()
    return dict(zip(PARTS, (seconds / max(seconds.sum(), 1e-9)).tolist()))


def _bench_plain(source: TokenSource, seconds: float) -> dict[str, Any]:
    """The files from their beginning on, in pieces, four at a time."""
    reader = RangeReader(source.reader.budget, sizes=source.reader.sizes)
    pieces = ((file.path, at, min(PIECE, size - at)) for file in source.files for size in [reader.size(file.path)]
              for at in range(0, size, PIECE))
    began, done = time.perf_counter(), 0
    for group in itertools.takewhile(lambda _: time.perf_counter() - began < seconds,
                                     iter(lambda: list(itertools.islice(pieces, 4)), [])):
        done += sum(map(len, reader.read_many(group)))
    elapsed, width = time.perf_counter() - began, np.dtype(source.files[0].dtype).itemsize
    return {"what": "plain read", "tokens_per_second": done / width / elapsed, "bytes_per_second": done / elapsed}


def _bench_tokenizer(source: Source, tokenizer: Tokenizer, seconds: float) -> dict[str, Any]:
    """The tokenizers library alone, on documents that were read before."""
    texts = [source[int(i)].text for i in np.linspace(0, len(source) - 1, min(len(source), 2_000)).astype(int)]
    return {"what": "the tokenizer alone"} | _timed(lambda text: len(tokenizer.encode_document(text)), texts, seconds)


def _timed(function: Callable[[Any], int], items: Sequence[Any], seconds: float) -> dict[str, Any]:
    began, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for item in itertools.takewhile(lambda _: time.perf_counter() - began < seconds, itertools.cycle(items)):
        tokens += function(item)
    return {"tokens_per_second": tokens / (time.perf_counter() - began),
            "tokens_per_cpu_second": tokens / max(time.process_time() - cpu, 1e-9)}


def _bench_grain(config: Config, source: TokenSource, seconds: float) -> dict[str, Any]:
    """The same documents as records of an ArrayRecord file, shuffled, concatenated and split by Grain."""
    from array_record.python.array_record_module import ArrayRecordWriter  # ty: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        path, written, documents = Path(folder, "documents.array_record"), 0, 0
        writer = ArrayRecordWriter(str(path), "group_size:1")
        while written < GRAIN_TOKENS and documents < len(source):
            tokens = source.encoded(documents, source.tokenizer)
            writer.write(tokens.tobytes())
            written, documents = written + len(tokens), documents + 1
        writer.close()
        records = grain.MapDataset.source(grain.sources.ArrayRecordDataSource([str(path)])).shuffle(config.seed).repeat()
        rows = grain.experimental.ConcatThenSplitIterDataset(
            records.map(lambda record: {"tokens": np.frombuffer(record, np.int32)}).to_iter_dataset(),
            length_struct={"tokens": config.data.sequence_length})
        iterator = iter(rows.batch(config.train.batch_size))
        line = {"what": "Grain: ArrayRecord and ConcatThenSplitIterDataset"} | _rate(iterator, config, seconds)
        iterator.close()
    return line


def bench_report(lines: list[dict[str, Any]]) -> str:
    text = []
    for line in lines:
        parts = [f"{line['rows_per_second']:,.1f} rows/s"] if "rows_per_second" in line else []
        for name, form in (("tokens_per_second", "{:,.0f} tokens/s"), ("tokens_per_cpu_second", "{:,.0f} a second of one core"),
                           ("bytes_per_second", "{:,.0f} bytes/s"), ("of_plain_read", "{:.2f} of a plain read"),
                           ("of_tokenizer", "{:.2f} of the tokenizer alone"), ("padding", "{:.1%} padding"),
                           ("startup_seconds", "{:.1f} s to start"), ("seconds", "{:.2f} s")):
            if name in line:
                parts.append(form.format(line[name]))
        if "parts" in line:
            parts.append("time: " + ", ".join(f"{name} {share:.0%}" for name, share in line["parts"].items() if share >= 0.005))
        text.append(f"{line['what']}: " + ", ".join(parts))
    return "\n".join(text)
