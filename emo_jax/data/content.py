"""What files of documents hold, wherever they lie, so that a run notices that its documents are others.

A local file is read in full once for every size and time of change that it has; of an object in a bucket, the listing tells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emo_jax.data.documents import hash_text
from emo_jax.errors import InputError
from emo_jax.files import Listed, cache_folder, reason, replacing
from emo_jax.progress import track

THREADS = 8  # files that are read at the same time
KEPT_BYTES = 1 << 20  # the hash of a smaller file is not kept: reading it again is as fast


def content_of(hashes: Sequence[str]) -> str:
    """The same for files of the same bytes in the same order. hashes: SHA-256 of each."""
    return f"sha256:{hash_text(*hashes)}"


def content_of_files(files: Sequence[Listed], what: str) -> str:
    """`content_of` local files. Of objects in a bucket, what their listing says of their bytes (MD5 or CRC32C on GCS, the ETag
    on S3) and their sizes, which is comparable with that of objects only. Raises `InputError`."""
    if not all(isinstance(file.path, Path) for file in files):
        return f"objects:{hash_text(*(x for file in files for x in (file.size, file.version)))}"
    with ThreadPoolExecutor(THREADS) as pool:
        return content_of(list(track(pool.map(_hash, files), f"reading {what} for its checksum", "files", total=len(files))))


def _hash(file: Listed) -> str:
    path = Path(file.path)
    kept = cache_folder() / "content" / hash_text(path.resolve(), file.size, file.version)
    try:
        if kept.is_file():
            return kept.read_text()
        with path.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({reason(e)})") from None
    if file.size >= KEPT_BYTES:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept, f".{hash_text(id(file))}.tmp") as temporary:
            temporary.write_text(found)
    return found
