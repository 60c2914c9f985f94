"""OLMo-core's token files: flat arrays of token ids, the end-of-document token between documents.

`data.path` is a folder, glob or file of `.npy` files (headerless, as OLMo-core writes them, or real ones), or with
data.format=olmo a mix: a text file of lines `label,path`, where `{TOKENIZER}` stands for data.mix_tokenizer and relative paths
begin at data.mix_root. Where documents end is found by one scan of each file and kept in the cache folder.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from emo_jax.config import DataConfig
from emo_jax.data.documents import hash_text
from emo_jax.data.ranges import RangeReader
from emo_jax.data.shards import index_documents, pack_index
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.data.tokens import TokenFile, TokenSection, TokenSource
from emo_jax.errors import InputError
from emo_jax.files import Listed, cache_folder, given_path, list_files, replacing
from emo_jax.progress import track

_PIECE = 1 << 23  # tokens that are scanned at a time
_THREADS = 8  # files that are scanned at the same time


def open_olmo(data: DataConfig, files: Sequence[Listed] | None) -> TokenSource:
    """files: those that were found, labelled by their folder; None: `data.path` is a mix. Raises `InputError`."""
    if not data.tokenizer:
        raise InputError(f"data.path={data.path!r}: token files do not say which tokenizer made them; give data.tokenizer")
    tokenizer = Tokenizer(data.tokenizer, data.eos_token)
    named = read_mix(data) if files is None else [(f.path.parent.name, str(f.path)) for f in files]
    reader = RangeReader(int(data.cache_gb * 1e9), sizes={str(f.path): f.size for f in files or ()})
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"

    def index(listed: Listed) -> tuple[TokenFile, int]:
        return _index_file(reader, listed, dtype, tokenizer.eos_id)

    with ThreadPoolExecutor(_THREADS) as pool:
        listed = files if files is not None else list(pool.map(_list, (path for _, path in named)))
        indexed = list(track(pool.map(index, listed), f"finding the documents of {data.path}", "files", total=len(named)))
    sections = [TokenSection(i, label, False, 0, tokens, 0, file.documents)
                for i, ((label, _), (file, tokens)) in enumerate(zip(named, indexed))]
    fingerprint = hash_text(*(x for (label, path), (_, tokens) in zip(named, indexed)
                              for x in (label, path.rpartition("/")[2], tokens)))
    return TokenSource(data.path, [file for file, _ in indexed], sections, reader, tokenizer, fingerprint, list(listed))


def read_mix(data: DataConfig) -> list[tuple[str, str]]:
    """[(label, path)] of the lines of a mix file; empty lines and those that begin with # are left out."""
    path = given_path(data.path, "data.path")
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"data.path={data.path!r} cannot be read as a mix file of lines label,path ({e})") from None
    root, named = (data.mix_root or str(path.parent)).rstrip("/"), []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        label, comma, name = line.strip().partition(",")
        if not (label and comma and name):
            raise InputError(f"{data.path}: line {number}: {line[:80]!r} is not of the form label,path")
        name = name.replace("{TOKENIZER}", data.mix_tokenizer)
        named.append((label, name if "://" in name or name.startswith("/") else f"{root}/{name}"))
    if not named:
        raise InputError(f"{data.path}: no lines label,path in it")
    return named


def _list(path: str) -> Listed:
    found = list_files(path)[1]
    if not found:
        raise InputError(f"{path}: cannot be read (No such file or directory)")
    return found[0]


def _index_file(reader: RangeReader, listed: Listed, dtype: str, eos_id: int) -> tuple[TokenFile, int]:
    """(the file with its index, tokens)."""
    path, size = str(listed.path), listed.size
    first_byte, dtype = _header(reader, path, size, dtype)
    width = np.dtype(dtype).itemsize
    tokens, rest = divmod(size - first_byte, width)
    if rest or not tokens:
        raise InputError(f"{path}: {size - first_byte:,} bytes are no array of tokens of {width} bytes each (the type follows "
                         f"from the tokenizer's vocabulary)")
    index = cache_folder() / "tokens" / f"{hash_text(path, size, listed.version, first_byte, dtype, eos_id)}.index"
    if not index.is_file():
        ends = _scan(reader, path, first_byte, dtype, tokens, eos_id)
        index.parent.mkdir(parents=True, exist_ok=True)
        with replacing(index, f".{hash_text(id(ends))}.tmp") as temporary:
            pack_index(ends, np.arange(len(ends))).tofile(temporary)
    return TokenFile(path, dtype, first_byte, str(index), index_documents(index.stat().st_size)), tokens


def _header(reader: RangeReader, path: str, size: int, dtype: str) -> tuple[int, str]:
    """(first byte of the tokens, their type): those of a real .npy file, else 0 and the type given."""
    start = reader.read(path, 0, min(size, 256))
    if not start.startswith(b"\x93NUMPY"):
        return 0, dtype
    file = io.BytesIO(start)
    version = np.lib.format.read_magic(file)
    shape, _, found = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
    if len(shape) != 1 or found.kind not in "ui" or found.itemsize not in (2, 4):
        raise InputError(f"{path}: an array {found} {list(shape)}; expected one row of token ids of 2 or 4 bytes")
    return file.tell(), f"<u{found.itemsize}"


def _scan(reader: RangeReader, path: str, first_byte: int, dtype: str, tokens: int, eos_id: int) -> np.ndarray:
    """[n] int64: the token after the end of every document; the last one may lack its end-of-document token."""
    width, ends = np.dtype(dtype).itemsize, []
    for start in range(0, tokens, _PIECE):
        count = min(_PIECE, tokens - start)
        piece = np.frombuffer(reader.read(path, first_byte + width * start, width * count), dtype)
        ends.append(np.flatnonzero(piece == eos_id) + start + 1)
    found = np.concatenate(ends)
    return found if len(found) and found[-1] == tokens else np.append(found, tokens)
