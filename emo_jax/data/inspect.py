"""`emo-jax data inspect`: what any dataset holds, and how it looks in rows."""

from __future__ import annotations

import dataclasses
from collections import Counter
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from emo_jax import plots
from emo_jax.config import Config
from emo_jax.data.documents import Source
from emo_jax.data.order import split
from emo_jax.data.pipeline import make_train_iterator
from emo_jax.data.shards import MANIFEST, parse_manifest
from emo_jax.data.stream import RowStream
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.data.tokens import TokenSource
from emo_jax.data.tools import open_data
from emo_jax.data.window import describe_row
from emo_jax.files import AnyPath, given_path
from emo_jax.progress import track

LOOK_AT = 2_000  # documents that are read
ROWS = 16  # rows that are packed
SHOWN = 3  # of each
STRIP = 96  # characters that stand for a row


def inspect(config: Config, folder: str | AnyPath) -> dict[str, Any]:
    """Counts (of text: from a sample of up to LOOK_AT documents spread over the source; of token shards: exact), the lengths of
    the documents, the first ones, and rows packed from one stream of documents."""
    source, tokenizer = open_data(config, folder)
    sample = np.unique(np.linspace(0, len(source) - 1, min(len(source), LOOK_AT)).astype(np.int64))
    labels, num_bytes, lengths = Counter(), 0, []
    bytes_of_token = tokenizer.token_bytes()
    for i in track(sample, f"reading a sample of {source.name}", "documents"):
        document = source[int(i)]
        tokens = tokenizer.encode_document(document.text) if document.tokens is None else document.tokens
        labels[document.label] += 1
        num_bytes += len(document.text.encode()) if document.tokens is None else int(bytes_of_token[tokens].sum())
        lengths.append(len(tokens))
    scale, num_tokens = len(source) / len(sample), sum(lengths)
    first = [source[i] for i in range(min(SHOWN, len(source)))]
    rows = _rows(config, source, tokenizer)
    documents = [len({p["document"] for p in row if p["segment"]}) for row in rows]
    padding = [sum(p["tokens"] for p in row if not p["segment"]) for row in rows]
    return {
        "source": source.name, "documents": len(source), "sampled_documents": len(sample),
        "labels": {label: round(n * scale) for label, n in sorted(labels.items())},
        "bytes": round(num_bytes * scale), "tokens": round(num_tokens * scale),
        "bytes_per_token": num_bytes / num_tokens, "tokens_per_document": num_tokens / len(sample),
        "tokenizer": str(tokenizer.path), "tokenizer_vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id,
        "histogram": _histogram(lengths), "sequence_length": config.data.sequence_length,
        "documents_per_row": float(np.mean(documents)), "padding": sum(padding) / (len(rows) * config.data.sequence_length),
        "first_documents": [{"label": d.label, "characters": len(d.text), "text": d.text[:200]} for d in first],
        "rows": rows[::ROWS // SHOWN][:SHOWN],
    } | (_exact(config) or _split(config, source))


def _split(config: Config, source: Source) -> dict[str, Any]:
    train_indices, eval_indices = split(source, config.data, config.seed)
    return {"exact": False, "train_documents": len(train_indices), "eval_documents": len(eval_indices)}


def _exact(config: Config) -> dict[str, Any] | None:
    """What the manifest of token shards says."""
    path = given_path(config.data.path, "data.path") / MANIFEST
    if not config.data.path or not path.is_file():
        return None
    manifest = parse_manifest(path.read_text(), str(path))
    sections = [section for shard in manifest.shards for section in shard.sections]
    labels, left_out = Counter(), Counter()
    for section in sections:
        labels[section.label] += section.documents
    for shard in manifest.shards:
        left_out.update(shard.left_out)
    return {"exact": True, "tokens": sum(s.tokens for s in sections), "labels": dict(sorted(labels.items())),
            "train_documents": sum(s.documents for s in sections if not s.held_out),
            "eval_documents": sum(s.documents for s in sections if s.held_out), "left_out": dict(left_out)}


def _rows(config: Config, source: Source, tokenizer: Tokenizer) -> list[list[dict[str, Any]]]:
    """ROWS rows; of text, of one stream. A batch has many streams, whose first rows would need as many times the reading."""
    if isinstance(source, TokenSource):
        made = RowStream(config, source).rows(np.arange(ROWS))
        return [describe_row({name: array[i] for name, array in made.items()}, source, tokenizer) for i in range(ROWS)]
    one = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0),
                              train=dataclasses.replace(config.train, batch_size=1, microbatches=1))
    iterator = make_train_iterator(one, source, tokenizer)
    try:
        batches = track(range(ROWS), f"packing rows of {source.name}", "rows")
        return [describe_row({name: a[0] for name, a in next(iterator).items()}, source, tokenizer) for _ in batches]
    finally:
        iterator.close()


def _histogram(lengths: list[int]) -> list[dict[str, int]]:
    """Documents of from..to tokens, by powers of two."""
    powers = np.bincount(np.frexp(lengths)[1])
    return [{"from": 1 << p >> 1, "to": (1 << p) - 1, "documents": int(powers[p])}
            for p in range(np.flatnonzero(powers)[0], len(powers))]


# ---- for a person ----------------------------------------------------------------------------------------------------

_COLORS = ("cyan", "magenta", "green", "yellow", "blue", "red")


def inspect_report(result: dict[str, Any], colors: bool = False) -> str:
    """The result of `inspect`. colors: for a terminal; the ends of documents are seen without them too."""
    about = "" if result["exact"] else "about "
    text = Text(
        f"{result['source']}: {result['documents']:,} documents ({result['train_documents']:,} to train on, "
        f"{result['eval_documents']:,} held out), about {result['bytes'] / 1e6:,.1f} MB, "
        f"{about}{result['tokens'] / 1e6:,.2f} million tokens ({result['bytes_per_token']:.2f} bytes a token, "
        f"{result['tokens_per_document']:,.0f} tokens a document)\n"
        f"tokenizer {result['tokenizer']}: {result['tokenizer_vocab_size']:,} tokens, end of document {result['eos_id']}\n"
        f"documents by label{'' if result['exact'] else ' (from the sample)'}: "
        + ", ".join(f"{label} {n:,}" for label, n in result["labels"].items()) + "\n")
    if result.get("left_out"):
        text.append("left out: " + ", ".join(f"{n:,} {reason}" for reason, n in result["left_out"].items()) + "\n")
    text.append(f"tokens a document ({result['sampled_documents']:,} documents):\n")
    most = max(bar["documents"] for bar in result["histogram"])
    for bar in result["histogram"]:
        text.append(f"  {bar['from']:>11,}..{bar['to']:<11,} ")
        text.append("█" * -(-40 * bar["documents"] // most), "cyan")
        text.append(f" {bar['documents']:,}\n")
    text.append("first documents:\n")
    for d in result["first_documents"]:
        text.append(f"  [{d['label']}] {d['characters']:,} characters: {d['text'][:90]!r}\n")
    text.append(f"rows of {result['sequence_length']:,} tokens: {result['documents_per_row']:.1f} documents a row, "
                f"{result['padding']:.1%} padding\n")
    for row in result["rows"]:
        _append_row(text, row, result["sequence_length"])
    out = StringIO()
    Console(file=out, force_terminal=colors, color_system="standard" if colors else None).print(text, soft_wrap=True)
    return out.getvalue().rstrip()


def _append_row(text: Text, row: list[dict[str, Any]], length: int) -> None:
    """A strip in which neighbouring documents look different, and a line for each of them."""
    styles = [(color, mark) for color, mark in zip(cycle(_COLORS), "█▒" * len(row))]
    looks = [style if piece["segment"] else ("dim", "·") for style, piece in zip(styles, row)]
    text.append("  ")
    for (color, mark), piece in zip(looks, row):
        start, end = (round(STRIP * at / length) for at in (piece["first"], piece["first"] + piece["tokens"]))
        text.append(mark * (end - start), color)
    text.append("\n")
    for (color, _), piece in zip(looks, row):
        text.append(f"  {piece['first']:>6} +{piece['tokens']:<6} ")
        text.append((f"[{piece['label']}] document {piece['document']}: {piece['text'][:70]!r}" if piece["segment"] else
                     "padding") + "\n", color)


def save_picture(result: dict[str, Any], path: AnyPath) -> AnyPath | None:
    """The lengths of the documents as a figure. None without matplotlib."""
    bars = result["histogram"]

    def draw(axis: Any) -> None:
        axis.bar(range(len(bars)), [bar["documents"] for bar in bars], color=plots.COLORS[0], width=0.9)
        axis.set_xticks(range(len(bars)), [f"{bar['from']:,}" for bar in bars], rotation=45, ha="right")
        axis.set_xlabel("tokens a document, from")
        axis.set_ylabel(f"of {result['sampled_documents']:,} documents")

    return plots.save(path, 1, (7.0, 3.6), draw, f"{Path(result['source']).name}: length of documents")
