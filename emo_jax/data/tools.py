"""`emo-jax data bench`, and the source and the tokenizer of a config."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from emo_jax.config import Config
from emo_jax.data.documents import Source
from emo_jax.data.order import split
from emo_jax.data.pipeline import make_train_iterator
from emo_jax.data.sources import open_source
from emo_jax.data.tokenizer import Tokenizer, load_tokenizer
from emo_jax.files import AnyPath, given_path


def open_data(config: Config, folder: str | AnyPath) -> tuple[Source, Tokenizer]:
    """The source and the tokenizer of a config; `folder` holds or receives a tokenizer that has to be trained."""
    source, folder = open_source(config.data), given_path(folder, "--run")
    train_indices, _ = split(source, config.data, config.seed)
    return source, load_tokenizer(config, source, train_indices, folder)


def bench(config: Config, folder: str | AnyPath, workers: Sequence[int] = (0, 1, 2), seconds: float = 5.0) -> list[dict]:
    """Rows and tokens a second of the pipeline for each number of worker processes; its start-up is not counted."""
    source, tokenizer = open_data(config, folder)
    results = []
    for wanted in workers:
        changed = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=wanted))
        start = time.perf_counter()
        iterator = make_train_iterator(changed, source, tokenizer)
        for _ in range(3):  # what was prefetched during start-up
            next(iterator)
        began, batches, rows = time.perf_counter(), 0, iterator.statistics()["rows"]
        while batches == 0 or time.perf_counter() - began < seconds:
            next(iterator)
            batches += 1
        elapsed, counts = time.perf_counter() - began, iterator.statistics()
        iterator.close()
        rate = (counts["rows"] - rows) / elapsed
        results.append({
            "workers": iterator.workers, "startup_seconds": began - start, "rows_per_second": rate,
            "tokens_per_second": rate * config.data.sequence_length,
            "padding": counts["padding_tokens"] / (counts["rows"] * config.data.sequence_length)})
    return results
