"""Files of a run that grow while it goes on, where the run's folder is in a bucket: nothing can be appended to an object."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from emo_jax import buckets
from emo_jax.files import AnyPath, reason
from emo_jax.progress import say

EVERY_S = 30.0  # between two uploads, at least
SHARE = 20  # and so many times what the last one took: it grows with the files


class Mirror:
    """`folder`, a temporary one, whose files are written to `target` as whole objects: from time to time in the background,
    at `upload` and at the end. `first`: the files of `target` that are gone on with."""

    def __init__(self, target: AnyPath, first: Sequence[str]):
        self.target, self.folder = target, Path(tempfile.mkdtemp(prefix="emo_jax-run-"))
        for name in first:
            if (target / name).exists():
                (self.folder / name).write_bytes((target / name).read_bytes())
        self._pool = ThreadPoolExecutor(1, "mirror")
        self._running: Future | None = None
        self._sizes: dict[Path, int] = {}
        self._next = time.monotonic() + EVERY_S

    def changed(self) -> None:
        """Uploads if it is time to."""
        if time.monotonic() >= self._next:
            self.upload()

    def upload(self) -> None:
        """Begins to upload what is there, unless that is going on."""
        if self._running is None or self._running.done():
            self._running = self._pool.submit(self._upload)

    def close(self) -> None:
        """Waits until everything is in the bucket. What cannot be written there stays in `folder`, and is no failure."""
        self._pool.shutdown()
        if self._upload():
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            say(f"the files are in {self.folder}")

    def _upload(self) -> bool:
        began = time.monotonic()
        try:
            for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
                size, url = path.stat().st_size, str(self.target / path.relative_to(self.folder).as_posix())
                if self._sizes.get(path) != size:
                    buckets.filesystem(url).put_file(str(path), url)
                    self._sizes[path] = size
        except Exception as e:  # of many kinds
            say(f"metrics could not be written to {self.target}: {reason(e)}")
            return False
        finally:
            self._next = time.monotonic() + max(EVERY_S, SHARE * (time.monotonic() - began))
        return True
