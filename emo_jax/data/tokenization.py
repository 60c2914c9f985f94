"""What a tokenization is, and its folder.

Shard s of S holds the documents s * N // S .. (s + 1) * N // S of the N of a source. Its bytes depend on nothing but the fields
of `Tokenization`, so any process on any machine may write it, twice too. What is unfinished lies in OUT/unfinished:

    settings.json                a manifest without shards: what the bytes depend on. Who comes with something else is refused
    shard-00000-of-00016.json    the shard is complete, and what the manifest will say of it
    *.hashes, copies             see `copies`

Whoever finds all shards complete writes the manifest and removes that folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emo_jax.config import DataConfig
from emo_jax.data.documents import Document, Source
from emo_jax.data.shards import MANIFEST, Manifest, Shard, index_bytes, parse_manifest, parse_shard, sha256
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.errors import InputError, RunError
from emo_jax.files import make_folder

Report = Callable[[int, int], None]  # told of the documents and tokens that were worked on since the last call
Work = Callable[["Tokenization", int, Report], object]  # what is done for the shard of a number
OverShards = Callable[[Work, Sequence[int], str], None]  # does it for many; what: the work, for a person


@dataclass(frozen=True)
class Tokenization:
    """All that the bytes of the shards depend on, and the folder they go to. Picklable."""

    source: Source
    tokenizer: Tokenizer
    out: Path
    shards: int
    data: DataConfig
    seed: int
    min_tokens: int = 1  # shorter documents are left out; their end-of-document token does not count
    max_tokens: int = 0  # likewise longer ones; 0: no limit
    no_duplicates: bool = False  # of the documents with the same text, only the first is written

    def documents(self, number: int) -> range:
        total = len(self.source)
        return range(number * total // self.shards, (number + 1) * total // self.shards)

    def name(self, number: int) -> str:
        return f"shard-{number:05d}-of-{self.shards:05d}"

    def read(self, i: int) -> Document:
        """Document `i`. Raises `InputError` where it is wrong, `RunError` where it cannot be reached."""
        try:
            return self.source[i]
        except OSError as e:
            raise RunError(f"{self.source.name}: document {i} cannot be read: {e}") from e

    @property
    def unfinished(self) -> Path:
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
                        sha256(self.tokenizer.path.read_bytes()), self.source.name, settings, shards)


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
        put(job, "tokenizer.json", [job.tokenizer.path.read_bytes()])
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
    shards = [shard for number in range(job.shards) if (shard := finished(job, number))]
    if len(shards) == job.shards:
        put(job, MANIFEST, [job.manifest(tuple(shards)).dumps().encode()])
        shutil.rmtree(job.unfinished, ignore_errors=True)
    path = job.out / MANIFEST  # another process may have been first
    return parse_manifest(path.read_text(), str(path)) if path.is_file() else None


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
    """Writes the file `name`: on the disk when it gets its name. Returns its hash."""
    digest = hashlib.sha256()
    descriptor, temporary = tempfile.mkstemp(dir=job.unfinished)
    try:
        with room_for(job, name), open(descriptor, "wb", 1 << 20) as file:
            for block in blocks:
                file.write(block)
                digest.update(block)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, job.out / name)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def finished(job: Tokenization, number: int) -> Shard | None:
    """What is known of a shard that is complete."""
    try:
        shard = parse_shard(json.loads((job.unfinished / f"{job.name(number)}.json").read_bytes()))
        sizes = [(job.out / name).stat().st_size for name in (shard.file, shard.index)]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return shard if sizes == [shard.tokens * job.dtype.itemsize, index_bytes(shard.documents)] else None
