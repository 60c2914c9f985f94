"""What `emo-jax data tokenize|inspect|bench` do: functions of a config that return plain values."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emo_jax.config import Config
from emo_jax.data.documents import Source
from emo_jax.data.order import split
from emo_jax.data.pipeline import make_train_iterator, row_streams
from emo_jax.data.sources import open_source
from emo_jax.data.tokenizer import Tokenizer, load_tokenizer
from emo_jax.errors import InputError
from emo_jax.files import given_path, make_folder
from emo_jax.progress import track

LOOK_AT = 2_000  # documents that `inspect` reads


def open_data(config: Config, folder: str | Path) -> tuple[Source, Tokenizer]:
    """The source and the tokenizer of a config; `folder` holds or receives a tokenizer that has to be trained."""
    source, folder = open_source(config.data), given_path(folder, "--run")
    train_indices, _ = split(source, config.data, config.seed)
    return source, load_tokenizer(config, source, train_indices, folder)


def tokenize(config: Config, out: str | Path) -> dict:
    """Writes all documents as token ids: OUT/tokens.npy (uint16, or uint32 for a large vocabulary), each document with
    its end-of-document token; OUT/offsets.npy int64 [n + 1], the first token of each; OUT/documents.json (labels)."""
    out = make_folder(out)
    if (out / "tokens.npy").exists():
        raise InputError(f"{out / 'tokens.npy'} exists; give another folder")
    source, tokenizer = open_data(config, out)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    sizes, labels, part = np.zeros(len(source) + 1, np.int64), [], out / "tokens.part"
    with open(part, "wb") as file:
        for i in track(range(len(source)), f"tokenizing {source.name}", "documents"):
            document = source[i]
            ids = tokenizer.encode_document(document.text).astype(dtype)
            ids.tofile(file)
            sizes[i + 1] = len(ids)
            labels.append(document.label)
    offsets = np.cumsum(sizes)
    names = sorted(set(labels))
    np.save(out / "offsets.npy", offsets)
    (out / "documents.json").write_text(json.dumps({
        "source": source.name, "tokenizer": str(tokenizer.path), "eos_id": tokenizer.eos_id, "labels": names,
        "label_of_document": [names.index(label) for label in labels]}) + "\n")
    tokens = np.lib.format.open_memmap(out / "tokens.npy", mode="w+", dtype=dtype, shape=(int(offsets[-1]),))
    tokens[:] = np.memmap(part, dtype, mode="r")
    tokens.flush()
    part.unlink()
    return {"documents": len(source), "tokens": int(offsets[-1]), "out": str(out)}


def inspect(config: Config, folder: str | Path, documents: int = 3) -> dict:
    """What is in the data, and how it looks in a row: counts from a sample of up to LOOK_AT documents spread over the
    source, the first documents, and one training row with its document boundaries."""
    source, tokenizer = open_data(config, folder)
    train_indices, eval_indices = split(source, config.data, config.seed)
    sample = np.unique(np.linspace(0, len(source) - 1, min(len(source), LOOK_AT)).astype(np.int64))
    labels, num_bytes, num_tokens = Counter(), 0, 0
    for i in track(sample, f"reading a sample of {source.name}", "documents"):
        document = source[int(i)]
        labels[document.label] += 1
        num_bytes += len(document.text.encode())
        num_tokens += len(source.encoded(int(i), tokenizer))
    scale = len(source) / len(sample)
    first = [source[i] for i in range(min(documents, len(source)))]
    return {
        "source": source.name, "documents": len(source), "train_documents": len(train_indices),
        "eval_documents": len(eval_indices), "sampled_documents": len(sample),
        "labels": {label: round(n * scale) for label, n in sorted(labels.items())},
        "bytes": round(num_bytes * scale), "tokens": round(num_tokens * scale),
        "bytes_per_token": num_bytes / num_tokens, "tokens_per_document": num_tokens / len(sample),
        "tokenizer": str(tokenizer.path), "tokenizer_vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id,
        "first_documents": [{"label": d.label, "characters": len(d.text), "text": d.text[:200]} for d in first],
        "row": _example_row(config, source, tokenizer),
    }


def _example_row(config: Config, source: Source, tokenizer: Tokenizer) -> list[dict]:
    row, _ = next(row_streams(config, source, tokenizer).rows(0, None))
    pieces = []
    for segment in np.unique(row["segment_ids"]):
        at = np.flatnonzero(row["segment_ids"] == segment)
        piece: dict[str, Any] = {"segment": int(segment), "first": int(at[0]), "tokens": len(at)}
        if segment:
            piece |= {"document": int(row["document_ids"][at[0]]), "text": tokenizer.decode(row["tokens"][at[:20]]),
                      "loss_tokens": int(row["loss_weights"][at].sum())}
        pieces.append(piece)
    return pieces


def inspect_report(result: dict) -> str:
    """The result of `inspect` for a person."""
    lines = [
        f"{result['source']}: {result['documents']:,} documents ({result['train_documents']:,} to train on, "
        f"{result['eval_documents']:,} held out), about {result['bytes'] / 1e6:,.1f} MB, "
        f"{result['tokens'] / 1e6:,.2f} million tokens ({result['bytes_per_token']:.2f} bytes a token, "
        f"{result['tokens_per_document']:,.0f} tokens a document)",
        f"tokenizer {result['tokenizer']}: {result['tokenizer_vocab_size']:,} tokens, end of document "
        f"{result['eos_id']}",
        "documents by label (from the sample): " + ", ".join(f"{k} {n:,}" for k, n in result["labels"].items()),
        "first documents:"]
    lines += [f"  [{d['label']}] {d['characters']:,} characters: {d['text'][:90]!r}" for d in result["first_documents"]]
    lines.append("a training row:")
    lines += [f"  {p['first']:>6} +{p['tokens']:<6} " + (f"document {p['document']}: {p['text'][:70]!r}" if p["segment"]
                                                       else "padding") for p in result["row"]]
    return "\n".join(lines)


def bench(config: Config, folder: str | Path, workers: Sequence[int] = (0, 1, 2), seconds: float = 5.0) -> list[dict]:
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
