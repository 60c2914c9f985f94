"""Opening a source of documents by what a config says."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from emo_jax.config import DataConfig
from emo_jax.data.documents import Document, Source
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, Listed, given_path, list_files

__all__ = ["Document", "Source", "open_source"]

_FORMATS = "a file or folder of .jsonl[.gz|.zst] or .txt, a glob of such files, or a TFDS dataset's version folder"
Listing = tuple[AnyPath, list[Listed]]


def open_source(data: DataConfig) -> Source:
    """The documents of `data.path`, all of them checked (see each source); `InputError` names what is wrong."""
    given_path(data.path, "data.path")
    kind, listing = (data.format, None) if data.format != "auto" else _detect(data.path)
    if kind == "embedded":
        if data.path:
            raise InputError(f"data.format='embedded' takes no data.path, got {data.path!r}")
        from emo_jax.data.embedded import EmbeddedSource

        return EmbeddedSource()
    if not data.path:
        raise InputError(f"data.format={data.format!r} needs data.path: {_FORMATS}")
    if kind == "tfds":
        from emo_jax.data.tfds_source import TfdsSource

        return TfdsSource(data.path, data.tfds_split, data.text_field, data.label_field)
    root, files = _find(data.path, kind, listing or _existing(data.path))
    cache_bytes = int(data.cache_gb * 1e9)
    if kind == "jsonl":
        from emo_jax.data.jsonl import JsonlSource

        return JsonlSource(data.path, files, data.text_field, data.label_field, cache_bytes)
    from emo_jax.data.text import TextSource

    return TextSource(data.path, root, files, cache_bytes)


def _is_kind(path: AnyPath, kind: str) -> bool:
    from emo_jax.data.jsonl import is_jsonl

    return is_jsonl(path) if kind == "jsonl" else path.suffix.lower() == ".txt"


def _detect(given: str) -> tuple[str, Listing | None]:
    """What a path stands for, and the files there, if they were listed to learn it."""
    if not given:
        return "embedded", None
    if (given_path(given, "data.path") / "dataset_info.json").is_file():
        return "tfds", None
    root, files = _existing(given)
    kinds = {kind for kind in ("jsonl", "text") if any(_is_kind(f.path, kind) for f in files)}
    if len(kinds) == 1:
        return kinds.pop(), (root, files)
    if kinds:
        raise InputError(f"data.path={given!r} holds both .jsonl and .txt files; set data.format to 'jsonl' or 'text'")
    seen = ", ".join(sorted({f.path.suffix or f.path.name for f in files})[:10]) or "nothing"
    raise InputError(f"data.path={given!r}: no documents found (it holds {seen}); expected {_FORMATS}")


def _find(given: str, kind: str, listing: Listing) -> Listing:
    """The root folder and the sorted, readable, non-empty files of a kind; a file named in full is taken as it is."""
    root, files = listing
    if [f.path for f in files] != [given_path(given, "data.path")]:
        files = [f for f in files if _is_kind(f.path, kind)]
    if not files:
        raise InputError(f"data.path={given!r}: no {'.jsonl[.gz|.zst]' if kind == 'jsonl' else '.txt'} files there")
    for path, size, _ in files:
        if size == 0:
            raise InputError(f"{path}: an empty file; expected documents")
        if isinstance(path, Path) and not os.access(path, os.R_OK):
            raise InputError(f"{path}: cannot be read (permission denied)")
    return root, files


def _existing(given: str) -> Listing:
    root, files = list_files(given)
    if files or root.is_dir():
        return root, files
    what = "no file matches" if glob.has_magic(given) else "no such file or folder"
    raise InputError(f"data.path={given!r}: {what}; expected {_FORMATS}")
