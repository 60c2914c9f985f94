"""Hashes of documents' content: which are held out, and which are exact copies of one before.

Copies are found in two steps: the hashes of every shard's documents go to a file (`write_hashes`, in any process), and who
finds all these files looks for equal ones (`find_copies`: 12 bytes of memory a document). Hashes have 64 bits: of ten billion
documents about three are taken for copies by mistake.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from emo_jax.data.documents import Document
from emo_jax.data.ranges import RangeReader
from emo_jax.data.tokenization import THREADS, Report, Tokenization, put
from emo_jax.errors import InputError
from emo_jax.files import AnyPath

PARTS = 16  # hashes are compared in so many parts, one after the other


def content_hash(document: Document, seed: int) -> bytes:
    """8 bytes, the same for the same text (or token ids) wherever the document lies."""
    content = document.text.encode() if document.tokens is None else document.tokens.astype("<u4").tobytes()
    return hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8)).digest()


def is_held_out(document: Document, fraction: float, seed: int) -> bool:
    return int.from_bytes(content_hash(document, seed), "little") < int(fraction * 2.0**64)


def hashes_path(job: Tokenization, number: int) -> AnyPath:
    return job.unfinished / f"{job.name(number)}.hashes"


def copies_path(job: Tokenization) -> AnyPath:
    return job.unfinished / "copies"


def write_hashes(job: Tokenization, number: int, report: Report) -> None:
    """The file of the hashes of a shard's documents, unless it is there."""
    if hashes_path(job, number).is_file() or copies_path(job).is_file():
        return
    hashes = bytearray()
    for i in job.in_order(number):
        try:
            hashes += content_hash(job.read(i), job.seed)
        except InputError:  # `write_shard` counts it; its number is like nothing else
            hashes += hashlib.blake2b(f"unreadable {i}".encode(), digest_size=8).digest()
        report(1, 0)
    put(job, f"unfinished/{hashes_path(job, number).name}", [bytes(hashes)])


def find_copies(job: Tokenization) -> None:
    """The file of the numbers of all documents that are copies of one before, in front of them where those of each shard begin
    and the last ones end; all hashes are there."""
    if copies_path(job).is_file():
        return
    hashes = np.empty(len(job.source), "<u8")
    with ThreadPoolExecutor(THREADS) as pool:
        def read(number: int) -> None:
            documents = job.documents(number)
            hashes[documents.start:documents.stop] = np.frombuffer(hashes_path(job, number).read_bytes(), "<u8")

        list(pool.map(read, range(job.shards)))
    part, found = hashes.view(np.uint8)[7::8] % PARTS, []
    for i in range(PARTS):
        numbers = np.flatnonzero(part == i)
        numbers = numbers[np.argsort(hashes[numbers], kind="stable")]
        found.append(numbers[1:][hashes[numbers[1:]] == hashes[numbers[:-1]]])
    copies = np.sort(np.concatenate(found)).astype("<i8")
    starts = copies.searchsorted([job.documents(number).start for number in range(job.shards)] + [len(job.source)])
    put(job, f"unfinished/{copies_path(job).name}", [starts.astype("<i8").tobytes(), copies.tobytes()])


def copies_within(job: Tokenization, number: int) -> np.ndarray:
    """[n] int64: those among the documents of a shard."""
    path, reader = str(copies_path(job)), RangeReader()
    start, end = np.frombuffer(reader.read(path, 8 * number, 16), "<i8") + job.shards + 1
    return np.frombuffer(reader.read(path, 8 * int(start), 8 * int(end - start)), "<i8")
