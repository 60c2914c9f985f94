"""What a tokenization is, and its folder.

Shard s of S holds the documents s * N // S .. (s + 1) * N // S of the N of a source. Its bytes depend on nothing but the fields
of `Tokenization`, so any process on any machine may write it, twice too. What is unfinished lies in OUT/unfinished:

    settings.json                a manifest without shards: what the bytes depend on. Who comes with something else is refused
    shard-00000-of-00016.json    the shard is complete, and what the manifest will say of it
    *.hashes, copies             see `copies`

Whoever finds all shards complete writes the manifest and removes that folder. OUT may be in a bucket: every file of it is one
object, which is there when all of it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from emo_jax import buckets
from emo_jax.config import DataConfig
from emo_jax.data.documents import Document, Source
from emo_jax.data.shards import MANIFEST, Manifest, Shard, index_bytes, parse_manifest, parse_shard
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.errors import InputError, RunError
from emo_jax.files import AnyPath, list_files, make_folder, reason, remove_tree

Report = Callable[[int, int], None]  # told of the documents and tokens that were worked on since the last call
Work = Callable[["Tokenization", int, Report], object]  # what is done for the shard of a number
OverShards = Callable[[Work, Sequence[int], str], None]  # does it for many; what: the work, for a person

AHEAD = 1024  # documents
THREADS = 32  # small objects that are read at the same time
BLOCK = 16 << 20  # bytes that are sent to a bucket at a time; it takes 10,000 of them


@dataclass(frozen=True)
class Tokenization:
    """All that the bytes of the shards depend on, and the folder they go to. Picklable."""

    source: Source
    tokenizer: Tokenizer
    out: AnyPath
    shards: int
    data: DataConfig
    seed: int
    min_tokens: int = 1  # shorter documents are left out; their end-of-document token does not count
    max_tokens: int = 0  # likewise longer ones; 0: no limit
    no_duplicates: bool = False  # of the documents with the same text, only the first is written

    def documents(self, number: int) -> range:
        total = len(self.source)
        return range(number * total // self.shards, (number + 1) * total // self.shards)

    def in_order(self, number: int) -> Iterator[int]:
        """The documents of a shard; AHEAD of them are fetched together from a bucket."""
        documents = self.documents(number)
        for n, i in enumerate(documents):
            if n % AHEAD == 0:
                with contextlib.suppress(InputError):  # which `read` will raise
                    self.source.load(documents[n:n + AHEAD])
            yield i

    def name(self, number: int) -> str:
        return f"shard-{number:05d}-of-{self.shards:05d}"

    def read(self, i: int) -> Document:
        """Document `i`. Raises `InputError` where it is wrong, `RunError` where it cannot be reached."""
        try:
            return self.source[i]
        except OSError as e:
            raise RunError(f"{self.source.name}: document {i} cannot be read: {e}") from e

    @property
    def unfinished(self) -> AnyPath:
        return self.out / "unfinished"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4")

    def manifest(self, shards: tuple[Shard, ...] = ()) -> Manifest:
        fields = ("text_field", "tokens_field", "label_field", "leave_out_labels", "eos_token", "eval_fraction")
        settings = {name: getattr(self.data, name) for name in fields} | {
            "documents": len(self.source), "fingerprint": self.source.fingerprint, "shards": self.shards, "seed": self.seed,
            "min_tokens": self.min_tokens, "max_tokens": self.max_tokens, "no_duplicates": self.no_duplicates}
        return Manifest(self.dtype.name, self.tokenizer.eos_id, self.tokenizer.vocab_size,
                        self.tokenizer.sha256, self.source.name, settings, shards)


def begin(job: Tokenization) -> Manifest | None:
    """Makes the folder ready for shards; a manifest where it is complete. Raises `InputError` if it holds something else."""
    settings, mine = job.unfinished / "settings.json", job.manifest()
    path = job.out / MANIFEST
    if path.is_file():
        manifest = parse_manifest(path.read_text(), str(path))
        _compare(job, manifest, mine)
        return manifest
    make_folder(job.unfinished)
    if not settings.is_file():  # of several that find none, all but those with something else write the same
        put(job, "unfinished/settings.json", [mine.dumps().encode()])
    _compare(job, parse_manifest(settings.read_text(), str(settings)), mine)
    if job.tokenizer.path != job.out / "tokenizer.json":
        put(job, "tokenizer.json", [job.tokenizer.content])
    return None


def _compare(job: Tokenization, there: Manifest, mine: Manifest) -> None:
    old, new = (dataclasses.asdict(m) | m.settings for m in (there, mine))
    changed = [name for name in new if name not in ("settings", "source") and old.get(name) != new[name]]
    if changed:
        raise InputError(f"{job.out} holds tokens that were made with "
                         + ", ".join(f"{name}={old.get(name)!r} (now {new[name]!r})" for name in changed)
                         + "; give another folder")


def finish(job: Tokenization) -> Manifest | None:
    """Writes the manifest if all shards are complete. None where some are not."""
    shards = finished(job, range(job.shards))
    if len(shards) == job.shards:
        put(job, MANIFEST, [job.manifest(tuple(shards.values())).dumps().encode()])
        with contextlib.suppress(FileNotFoundError):  # another process may remove it too
            remove_tree(job.unfinished)
    path = job.out / MANIFEST  # another process may have been first
    return parse_manifest(path.read_text(), str(path)) if path.is_file() else None


def finished(job: Tokenization, numbers: Sequence[int]) -> dict[int, Shard]:
    """What is known of those of the shards that are complete, by one listing of the folder."""
    root, files = list_files(str(job.out))
    sizes = {str(file.path.relative_to(root)): file.size for file in files}

    def read(number: int) -> Shard | None:
        path = job.unfinished / f"{job.name(number)}.json"
        try:
            shard = parse_shard(json.loads(path.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError, KeyError):  # another process may have removed it
            return None
        except buckets.errors(path) as e:
            raise RunError(f"{path}: cannot be read ({reason(e)})") from e
        expected = [shard.tokens * job.dtype.itemsize, index_bytes(shard.documents)]
        return shard if [sizes.get(shard.file), sizes.get(shard.index)] == expected else None

    listed = [number for number in numbers if f"unfinished/{job.name(number)}.json" in sizes]
    with ThreadPoolExecutor(THREADS) as pool:
        return {number: shard for number, shard in zip(listed, pool.map(read, listed)) if shard}


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def room_for(job: Tokenization, name: str) -> Generator[None]:
    """Turns the error of a full disk into a `RunError`."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(f"{job.out}: {name} cannot be written: {e.strerror}. Finished shards stay; where there is room, the "
                       f"same command goes on") from None


def put(job: Tokenization, name: str, blocks: Iterable[bytes]) -> str:
    """Writes the file `name`: on the disk, or an object in the bucket, when it gets its name. Returns its hash."""
    digest, write = hashlib.sha256(), _write_file if isinstance(job.out, Path) else _write_object
    with room_for(job, name), write(job, name) as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _write_file(job: Tokenization, name: str) -> Generator[IO[bytes]]:
    descriptor, temporary = tempfile.mkstemp(dir=job.unfinished)
    try:
        with open(descriptor, "wb", 1 << 20) as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, job.out / name)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _write_object(job: Tokenization, name: str) -> Generator[IO[bytes]]:
    url = str(job.out / name)
    # Closing alone would make an object of what was written before an error.
    file: Any = buckets.filesystem(url).open(url, "wb", block_size=BLOCK, autocommit=False)
    try:
        with file:
            yield file
        file.commit()
    except BaseException as e:
        with contextlib.suppress(Exception):
            file.discard()
        if not isinstance(e, Exception):
            raise
        raise RunError(f"{url}: cannot be written ({reason(e)}). Finished shards stay; the same command goes on") from e
