"""Byte ranges of files, local ones and objects of buckets.

Local files are read directly. Objects are read by pages, which are kept up to a budget of memory; missing pages that lie
close together are one request, and all requests of a call are under way at once (by TensorStore's drivers, which take a
fifth of the processor time of fsspec's and hold no lock of Python; but no library keeps pages within one budget for all
files, or counts what it fetched).
"""

from __future__ import annotations

import io
import logging
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from emo_jax import buckets
from emo_jax.errors import InputError, RunError
from emo_jax.files import reason

PAGE = 128 << 10
MERGED = 4 << 20  # the most that one request asks for
GAP = 1  # pages already there, or not asked for, that are fetched again to save a request
REFUSED = ("PERMISSION_DENIED", "UNAUTHENTICATED", "NOT_FOUND", "INVALID_ARGUMENT")
BEYOND = ("OUT_OF_RANGE", "FAILED_PRECONDITION")  # how servers say that a range is not within the object

log = logging.getLogger(__name__)

Page = tuple[str, int]  # a URL, and the number of a page in it


@dataclass(frozen=True)
class Retries:
    """Of requests that fail in a way that may pass: 429, 5xx, a cut or missing answer. seconds: the first pause, doubled up
    to `longest`. timeout: seconds without any answer after which a request counts as failed."""

    tries: int = 6
    seconds: float = 0.5
    longest: float = 16.0
    timeout: float = 30.0


RETRIES = Retries()


class RangeReader:
    """Thread-safe. A pickled copy starts with no file open and nothing kept.

    budget: bytes of memory for what was read of objects; what one request read is let go together. max_open: local files that
    stay open. sizes: of objects, where they are known from a listing, which saves a request at the end of each.
    """

    def __init__(self, budget: int = 1 << 30, max_open: int = 64, retries: Retries = RETRIES,
                 sizes: Mapping[str, int] | None = None):
        self.budget, self.max_open, self.retries, self.sizes = budget, max_open, retries, dict(sizes or {})
        self._lock = threading.Lock()
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._pages: dict[Page, tuple[memoryview, int]] = {}  # and the number of the block that it is part of
        self._blocks: OrderedDict[int, tuple[int, list[Page]]] = OrderedDict()  # bytes and pages; the most recent is last
        self._coming: dict[Page, Future] = {}
        self._stores: dict[str, Any] = {}
        self._last_block = 0
        self._counts = dict.fromkeys(("asked_bytes", "fetched_bytes", "requests", "cached_bytes", "retries"), 0)

    def read(self, path: str, start: int, length: int) -> bytes:
        """Raises `InputError` if the file is not there or ends before, `RunError` when a server fails all tries."""
        return self.read_many([(path, start, length)])[0]

    def read_many(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The bytes of all (path, start, length), which must fit in memory together. Errors as in `read`."""
        wanted = {(path, n) for path, start, length in ranges if buckets.is_url(path)
                  for n in range(start // PAGE, -(-(start + length) // PAGE))}
        pages = self._get(sorted(wanted)) if wanted else {}
        with self._lock:
            self._counts["asked_bytes"] += sum(length for _, _, length in ranges)
        return [_cut(pages, *r) if buckets.is_url(r[0]) else self._read_local(*r) for r in ranges]

    def load(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Fetches what is missing of ranges of objects, as far as the budget keeps it, for `read_many` to find."""
        wanted = {(path, n) for path, start, length in ranges for n in range(start // PAGE, -(-(start + length) // PAGE))}
        self._get(sorted(wanted)[:self.budget // (4 * PAGE)])

    def size(self, path: str) -> int:
        """Bytes of a file. Raises `InputError` if there is none."""
        try:
            return int(buckets.filesystem(path).size(path) or 0) if buckets.is_url(path) else os.stat(path).st_size
        except Exception as e:  # those of a bucket are of many kinds
            raise InputError(f"{path}: cannot be read ({reason(e)})") from None

    def open(self, path: str, size: int) -> io.BufferedReader:
        """A file of that size, to be read from its beginning or anywhere."""
        return io.BufferedReader(self.open_raw(path, size), MERGED)

    def open_raw(self, path: str, size: int) -> io.RawIOBase:
        """Likewise, for who reads no more and no less than it needs at a time."""
        self.sizes[path] = size
        return _Opened(self, path, size)

    def forget(self) -> None:
        """Drops all pages that were kept."""
        with self._lock:
            self._pages.clear()
            self._counts["cached_bytes"] = 0

    def statistics(self) -> dict[str, int]:
        """Sums so far: asked_bytes, of all files; fetched_bytes, requests and retries, of objects. cached_bytes: now."""
        with self._lock:
            return dict(self._counts)

    def __reduce__(self):
        return RangeReader, (self.budget, self.max_open, self.retries, self.sizes)

    # ---- local files ----

    def _read_local(self, path: str, start: int, length: int) -> bytes:
        with self._lock:
            file = self._open.pop(path, None) or open(path, "rb")  # noqa: SIM115  stays open
            self._open[path] = file  # the most recent is last
            if len(self._open) > self.max_open:
                self._open.popitem(last=False)  # closed when no other thread reads it
        data = os.pread(file.fileno(), length, start)
        while len(data) < length:  # a file system may return less than asked
            more = os.pread(file.fileno(), length - len(data), start + len(data))
            if not more:
                raise OSError(f"{path}: the file ends at byte {start + len(data)}; it was changed while in use")
            data += more
        return data

    # ---- objects ----

    def _get(self, wanted: list[Page]) -> dict[Page, memoryview]:
        """The pages: kept ones, those that another thread is fetching, and the others, fetched here."""
        found, awaited, mine = {}, {}, {}
        with self._lock:
            for page in wanted:
                if page in self._pages:
                    found[page], block = self._pages[page]
                    self._blocks.move_to_end(block)
                elif page in self._coming:
                    awaited[page] = self._coming[page]
                else:
                    mine[page] = self._coming[page] = Future()
        try:
            self._fetch(list(_runs(mine)), mine, found)
        except BaseException as e:
            for future in mine.values():
                if not future.done():
                    future.set_exception(e)
            raise
        finally:
            with self._lock:
                for page in mine:
                    del self._coming[page]
        return found | {page: future.result() for page, future in awaited.items()}

    def _fetch(self, runs: list[Run], mine: dict[Page, Future], found: dict[Page, memoryview]) -> None:
        """Reads all runs at once, then again those that failed, after ever longer pauses."""
        r, failed = self.retries, []
        for attempt in range(1, r.tries + 1):
            reads = [(run, self._ask(run)) for run in runs]
            failed = []
            for run, future in reads:
                try:
                    self._keep(run, self._answer(run, future), mine, found)
                except InputError:
                    raise
                except (ValueError, TimeoutError) as e:
                    failed.append((run, str(e) or f"no answer in {r.timeout:g} s"))
            if not failed:
                return
            pause = min(r.seconds * 2 ** (attempt - 1), r.longest) * random.uniform(0.75, 1.25)
            for run, error in failed if attempt < r.tries else ():
                log.warning("%s: %s; again in %.1f s (%d of %d)", run, error, pause, attempt, r.tries - 1)
            runs = [run for run, _ in failed]
            if attempt < r.tries:
                with self._lock:
                    self._counts["retries"] += len(failed)
                time.sleep(pause)
        run, error = failed[0]
        raise RunError(f"{run}: cannot be read after {r.tries} tries; the last error: {error}")

    def _keep(self, run: Run, data: bytes, mine: dict[Page, Future], found: dict[Page, memoryview]) -> None:
        """The pages of one answer stay together, uncopied, until the block is the one that was used longest ago."""
        pages = [(run.url, run.first + i) for i in range(run.count)]
        with self._lock:
            self._last_block += 1
            for i, page in enumerate(pages):
                self._pages[page] = memoryview(data)[i * PAGE:(i + 1) * PAGE], self._last_block
                if page in mine:
                    found[page] = self._pages[page][0]
                    mine[page].set_result(found[page])
            self._blocks[self._last_block] = len(data), pages
            self._counts["cached_bytes"] += len(data)
            while self._counts["cached_bytes"] > self.budget:
                block, (size, old) = self._blocks.popitem(last=False)
                self._counts["cached_bytes"] -= size
                for page in old:
                    if page in self._pages and self._pages[page][1] == block:  # it was not read again since
                        del self._pages[page]

    def _ask(self, run: Run, to_the_end: bool = False) -> Any:
        import tensorstore as ts

        scheme, bucket, key = buckets.split_url(run.url)
        root = f"{scheme}://{bucket}/"
        with self._lock:
            self._counts["requests"] += 1
            if root not in self._stores:  # without retries of its own, which nobody would see
                spec = buckets.kvstore(root, request_retries={"max_retries": 0})
                self._stores[root] = ts.KvStore.open(spec).result()
        end = max(min(run.end, self.sizes.get(run.url, run.end)), run.start + 1)
        return self._stores[root].read(key, byte_range=slice(run.start, None if to_the_end else end))

    def _answer(self, run: Run, future: Any) -> bytes:
        """The bytes of a run, fewer where the object ends. `ValueError` and `TimeoutError` may pass, others do not."""
        try:
            answer = future.result(timeout=self.retries.timeout)
        except ValueError as e:
            if str(e).startswith(REFUSED):
                raise InputError(f"{run}: cannot be read ({e})") from None
            if not str(e).startswith(BEYOND):
                raise
            try:
                answer = self._ask(run, to_the_end=True).result(timeout=self.retries.timeout)
            except ValueError as e:
                if not str(e).startswith(BEYOND):
                    raise
                return b""  # all of it is beyond the end
        if answer.state == "missing":
            raise InputError(f"{run.url}: no such object")
        data = answer.value  # a copy each time
        with self._lock:
            self._counts["fetched_bytes"] += len(data)
        return data


class _Opened(io.RawIOBase):
    def __init__(self, reader: RangeReader, path: str, size: int):
        self._reader, self._path, self._size, self._at = reader, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """As many bytes as fit; the buffer of `BufferedReader` is one request, and more are read at once."""
        n = max(min(len(buffer), self._size - self._at), 0)
        if n:
            buffer[:n] = self._reader.read(self._path, self._at, n)
        self._at += n
        return n


@dataclass(frozen=True)
class Run:
    """Pages that one request asks for."""

    url: str
    first: int
    count: int

    @property
    def start(self) -> int:
        return self.first * PAGE

    @property
    def end(self) -> int:
        return (self.first + self.count) * PAGE

    def __str__(self) -> str:
        return f"{self.url} bytes {self.start}..{self.end - 1}"


def _runs(pages: Iterable[Page]) -> Iterable[Run]:
    """Sorted pages as runs of at most MERGED bytes."""
    url, first, last = "", 0, -1
    for page_url, number in pages:
        if page_url == url and number - last - 1 <= GAP and (number + 1 - first) * PAGE <= MERGED:
            last = number
            continue
        if url:
            yield Run(url, first, last + 1 - first)
        url, first, last = page_url, number, number
    if url:
        yield Run(url, first, last + 1 - first)


def _cut(pages: dict[Page, memoryview], url: str, start: int, length: int) -> bytes:
    parts, end = [], start + length
    for n in range(start // PAGE, -(-end // PAGE)):
        parts.append(pages[url, n][max(start - n * PAGE, 0):end - n * PAGE])
        last = n * PAGE + len(pages[url, n])
        if last < min(end, (n + 1) * PAGE):
            raise InputError(f"{url}: the object ends at byte {last}, before byte {end}; it was cut off, or changed while in "
                             f"use")
    return b"".join(parts)
