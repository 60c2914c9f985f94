"""The function that makes a token shard of a range of documents: shard number -> files."""

from __future__ import annotations

import array
import dataclasses
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from emo_jax.data.copies import copies_within, is_held_out
from emo_jax.data.documents import Document
from emo_jax.data.shards import Section, Shard, pack_index
from emo_jax.data.tokenization import Report, Tokenization, put, room_for
from emo_jax.errors import InputError

BATCH_CHARACTERS = 1 << 18  # that much text is given to the tokenizer at once


def silent(documents: int, tokens: int) -> None:
    pass


def write_shard(job: Tokenization, number: int, report: Report = silent) -> Shard:
    """Writes shard `number` and its index. Complete, or not at all. Memory: 100 bytes a document and some MB of text; disk: the
    tokens of the shard, in the temporary directory where `job.out` is in a bucket. Raises `InputError` for documents that
    cannot be read, `RunError` where the disk is full."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are what runs at the same time
    name = job.name(number)
    # In the order of the source at first: a file without a name, which ends with this process.
    folder = job.unfinished if isinstance(job.out, Path) else None
    with room_for(job, f"{name}.npy"), tempfile.TemporaryFile(dir=folder) as spool:  # a full disk fails its closing, too
        spooled = _spool(job, number, spool, report)
        spool.flush()
        order = np.argsort(spooled.section_of_document, kind="stable")
        lengths = spooled.lengths[order]
        tokens = put(job, f"{name}.npy", _copied(spool, spooled.lengths, order, job.dtype.itemsize))
    index = put(job, f"{name}.index", [pack_index(np.cumsum(lengths), spooled.ids[order]).tobytes()])
    counts = np.bincount(spooled.section_of_document, minlength=len(spooled.sections))
    sizes = np.bincount(spooled.section_of_document, spooled.lengths, len(spooled.sections))
    sections = tuple(Section(label, held_out, int(n), int(t))
                     for (held_out, label), n, t in zip(spooled.sections, counts, sizes))
    shard = Shard(f"{name}.npy", f"{name}.index", int(lengths.sum()), len(lengths), tokens, index, sections, spooled.left_out)
    put(job, f"unfinished/{name}.json", [json.dumps(dataclasses.asdict(shard)).encode()])
    return shard


@dataclass
class _Spooled:
    sections: list[tuple[bool, str]]  # (held out, label), sorted: what is trained on comes first
    section_of_document: np.ndarray  # [n] int64
    lengths: np.ndarray  # [n] int64 tokens
    ids: np.ndarray  # [n] int64
    left_out: dict[str, int]


def _spool(job: Tokenization, number: int, file: IO[bytes], report: Report) -> _Spooled:
    """Writes the tokens of a shard's documents to `file` in the order of the source."""
    codes, lengths, ids = array.array("q"), array.array("q"), array.array("q")
    sections, left_out = {}, Counter()
    for read, documents in _batches(job, number, left_out):
        texts = iter(job.tokenizer.encode_batch([d.text for d in documents if d.tokens is None]))
        total = 0
        for document in documents:
            tokens = np.array([*next(texts), job.tokenizer.eos_id], job.dtype) if document.tokens is None else (
                document.tokens.astype(job.dtype))
            if len(tokens) - 1 < job.min_tokens or 0 < job.max_tokens < len(tokens) - 1:
                left_out["too_short" if len(tokens) - 1 < job.min_tokens else "too_long"] += 1
                continue
            file.write(tokens.tobytes())
            section = (is_held_out(document, job.data.eval_fraction, job.seed), document.label)
            codes.append(sections.setdefault(section, len(sections)))
            lengths.append(len(tokens))
            ids.append(document.id)
            total += len(tokens)
        report(read, total)
    ordered = sorted(sections)
    rank = np.zeros(len(sections), np.int64)
    rank[[sections[section] for section in ordered]] = np.arange(len(sections))
    return _Spooled(ordered, rank[np.array(codes, np.int64)], np.array(lengths, np.int64), np.array(ids, np.int64),
                    dict(sorted(left_out.items())))


def _batches(job: Tokenization, number: int, left_out: Counter[str]) -> Iterator[tuple[int, list[Document]]]:
    """(documents looked at, those of them to write). Counts the others in `left_out`."""
    copies = set(copies_within(job, number).tolist()) if job.no_duplicates else set()
    numbers = job.documents(number)
    read, batch, characters = 0, [], 0
    for i in job.in_order(number):
        read += 1
        if i in copies:
            left_out["duplicate"] += 1
            continue
        try:
            document = job.read(i)
            _check_tokens(job, document)
        except InputError as e:
            left_out["unreadable"] += 1
            if left_out["unreadable"] > job.data.max_skipped * len(numbers):
                raise InputError(f"{e} (data.max_skipped={job.data.max_skipped}: the share of unreadable documents of a "
                                 f"shard that may be left out)") from None
            continue
        if document.label in job.data.left_out:
            left_out["label"] += 1
            continue
        batch.append(document)
        characters += len(document.text) + (0 if document.tokens is None else len(document.tokens))
        if characters >= BATCH_CHARACTERS:
            yield read, batch
            read, batch, characters = 0, [], 0
    yield read, batch


def _check_tokens(job: Tokenization, document: Document) -> None:
    tokens, limit = document.tokens, job.tokenizer.vocab_size
    if tokens is None:
        return
    wrong = np.flatnonzero((tokens < 0) | (tokens >= limit))
    if len(wrong):
        raise InputError(f"{job.source.name}: document {document.id}: token {wrong[0]} is {tokens[wrong[0]]}; expected ids "
                         f"in 0..{limit - 1}, those of {job.tokenizer.path}")
    if not len(tokens) or tokens[-1] != job.tokenizer.eos_id:
        raise InputError(f"{job.source.name}: document {document.id} does not end in the end-of-document token "
                         f"{job.tokenizer.eos_id}")


def _copied(spool: IO[bytes], lengths: np.ndarray, order: np.ndarray, itemsize: int) -> Iterator[bytes]:
    """The documents of `spool` in another order."""
    starts = (np.cumsum(lengths) - lengths) * itemsize
    for start, size in zip(starts[order], lengths[order] * itemsize):
        yield os.pread(spool.fileno(), size, start)
