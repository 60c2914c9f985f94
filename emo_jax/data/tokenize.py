"""`emo-jax data tokenize`: all documents of a config to token shards, in processes of this machine.

Several jobs may share the work: each writes its shards, and the last one to finish writes the manifest.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from emo_jax.config import Config
from emo_jax.data.beam import workers as beam_workers
from emo_jax.data.copies import copies_path, find_copies, write_hashes
from emo_jax.data.order import split
from emo_jax.data.shards import Manifest
from emo_jax.data.sources import open_source
from emo_jax.data.tokenization import OverShards, Tokenization, Work, begin, finish, finished
from emo_jax.data.tokenizer import load_tokenizer
from emo_jax.data.write_shard import write_shard
from emo_jax.errors import InputError, RunError
from emo_jax.files import AnyPath, make_folder
from emo_jax.progress import Progress

SHARDS = 16


def open_tokenization(config: Config, out: str | AnyPath, shards: int = 0, min_tokens: int = 1, max_tokens: int = 0,
                      no_duplicates: bool = False) -> Tokenization:
    """shards: 0 for SHARDS, or one a document where there are fewer."""
    data = config.data
    if 0 < max_tokens < min_tokens:
        raise InputError(f"--max-tokens {max_tokens} is less than --min-tokens {min_tokens}")
    source = open_source(data)
    if source.tokenizer is not None:
        raise InputError(f"data.path={data.path!r} is tokenized already; expected documents")
    folder = make_folder(out)
    if shards > len(source):
        raise InputError(f"--shards {shards}: {source.name} has {len(source)} documents; expected at most one shard for each")
    for label in data.left_out if source.labels else ():
        if label not in source.labels:
            raise InputError(f"{source.name}: no document of label {label!r}; there are {', '.join(source.labels[:50])}")
    train_indices = range(0) if data.tokenizer else split(source, data, config.seed)[0]
    tokenizer = load_tokenizer(config, source, train_indices, folder)
    return Tokenization(source, tokenizer, folder, shards or min(SHARDS, len(source)), data, config.seed, min_tokens,
                        max_tokens, no_duplicates)


def tokenize(job: Tokenization, processes: int = 0, part: tuple[int, int] = (0, 1),
             beam: Sequence[str] | None = None) -> dict[str, Any]:
    """Writes the shards i, i + n, i + 2n, ... of part (i, n), and the manifest once all are there. processes: of this machine,
    0 for one a core; beam: options of Apache Beam to run there instead. Raises `InputError`, `RunError`."""
    index, count = part
    mine = range(index, job.shards, count)
    manifest = begin(job)
    if manifest is None:
        processes = min(processes or len(os.sched_getaffinity(0)), len(mine)) or 1
        with local_workers(job, processes) if beam is None else beam_workers(job, beam) as over_shards:
            if job.no_duplicates and not copies_path(job).is_file():
                # Those of the other jobs too, last, where they are not there yet: no job waits for one that may not run now.
                over_shards(write_hashes, sorted(range(job.shards), key=lambda n: (n - index) % count), "hashing")
                find_copies(job)
            done = finished(job, mine)
            over_shards(write_shard, [number for number in mine if number not in done], "tokenizing")
        manifest = finish(job)
    return _result(job, manifest, mine)


def _result(job: Tokenization, manifest: Manifest | None, mine: Sequence[int]) -> dict[str, Any]:
    if manifest is None:
        return {"out": str(job.out), "complete": False, "shards": job.shards, "shards_of_this_job": len(mine)}
    left_out, labels = Counter(), Counter()
    for shard in manifest.shards:
        left_out.update(shard.left_out)
        for section in shard.sections:
            labels[section.label] += section.tokens
    sections = [section for shard in manifest.shards for section in shard.sections]
    return {"out": str(job.out), "complete": True, "shards": job.shards, "shards_of_this_job": len(mine),
            "documents": sum(s.documents for s in sections), "tokens": sum(s.tokens for s in sections),
            "held_out_documents": sum(s.documents for s in sections if s.held_out),
            "held_out_tokens": sum(s.tokens for s in sections if s.held_out),
            "tokens_by_label": dict(sorted(labels.items())), "left_out": dict(sorted(left_out.items()))}


def report(result: dict[str, Any]) -> str:
    """The result of `tokenize` for a person."""
    if not result["complete"]:
        return (f"{result['shards_of_this_job']} of {result['shards']} shards are in {result['out']}; the last job to finish "
                f"writes the manifest")
    left_out = ", ".join(f"{n:,} {reason}" for reason, n in result["left_out"].items())
    return (f"{result['documents']:,} documents, {result['tokens']:,} tokens in {result['shards']} shards in {result['out']} "
            f"({result['held_out_documents']:,} documents held out)" + f"; left out: {left_out}" * bool(left_out))


# ---- processes -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def local_workers(job: Tokenization, processes: int) -> Generator[OverShards]:
    """Processes of this machine, with progress."""

    def progress_of(numbers: Sequence[int], what: str) -> Progress:
        return Progress(f"{what} {job.source.name}", sum(len(job.documents(n)) for n in numbers), "documents")

    def here(work: Work, numbers: Sequence[int], what: str) -> None:
        progress, done = progress_of(numbers, what), [0, 0]

        def report(documents: int, tokens: int) -> None:
            done[0] += documents
            done[1] += tokens
            progress.update(*done)

        for number in numbers:
            work(job, number, report)

    if processes == 1:
        yield here
        return
    context = multiprocessing.get_context("spawn")
    counts, stop = context.Array("q", 2), context.Event()

    def there(work: Work, numbers: Sequence[int], what: str) -> None:
        progress = progress_of(numbers, what)
        counts[:] = [0, 0]
        waiting = {pool.submit(_in_process, work, number) for number in numbers}
        while waiting:
            ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
            for future in ended:
                future.result()
            progress.update(*counts[:])

    with ProcessPoolExecutor(processes, context, _start, (job, counts, stop)) as pool:
        try:
            yield there
        except BrokenProcessPool:
            raise RunError(f"{job.source.name}: a process was killed (out of memory?); finished shards stay, the same command "
                           f"goes on with the others") from None
        finally:
            stop.set()  # without an error they are idle
            pool.shutdown(cancel_futures=True)


_worker: tuple[Any, ...] = ()  # of a process of the pool: what `_start` got


def _start(*given: Any) -> None:
    global _worker
    _worker = given
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_process(work: Work, number: int) -> None:
    job, counts, stop = _worker

    def report(documents: int, tokens: int) -> None:
        if stop.is_set():
            raise InterruptedError("another shard failed")
        with counts.get_lock():
            counts[0] += documents
            counts[1] += tokens

    work(job, number, report)
