"""Opening a source of documents by what a config says."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from emo_jax.config import DataConfig
from emo_jax.data.documents import Document, Source
from emo_jax.errors import InputError
from emo_jax.files import given_path

__all__ = ["Document", "Source", "open_source"]

_FORMATS = "a file or folder of .jsonl[.gz|.zst] or .txt, a glob of such files, or a TFDS dataset's version folder"


def open_source(data: DataConfig) -> Source:
    """The documents of `data.path`, all of them checked (see each source); `InputError` names what is wrong."""
    given_path(data.path, "data.path")
    kind = data.format if data.format != "auto" else _detect(data.path)
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
    root, paths = _find(data.path, kind)
    if kind == "jsonl":
        from emo_jax.data.jsonl import JsonlSource

        return JsonlSource(data.path, paths, data.text_field, data.label_field)
    from emo_jax.data.text import TextSource

    return TextSource(data.path, root, paths)


def _is_kind(path: Path, kind: str) -> bool:
    from emo_jax.data.jsonl import is_jsonl

    return is_jsonl(path) if kind == "jsonl" else path.suffix.lower() == ".txt"


def _detect(given: str) -> str:
    if not given:
        return "embedded"
    path = Path(given).expanduser()
    if (path / "dataset_info.json").is_file():
        return "tfds"
    _, paths = _existing(given)
    kinds = {kind for kind in ("jsonl", "text") if any(_is_kind(p, kind) for p in paths)}
    if len(kinds) == 1:
        return kinds.pop()
    if kinds:
        raise InputError(f"data.path={given!r} holds both .jsonl and .txt files; set data.format to 'jsonl' or 'text'")
    seen = ", ".join(sorted({p.suffix or p.name for p in paths})[:10]) or "nothing"
    raise InputError(f"data.path={given!r}: no documents found (it holds {seen}); expected {_FORMATS}")


def _find(given: str, kind: str) -> tuple[Path, list[Path]]:
    """The root folder and the sorted, readable, non-empty files of a kind; a file named in full is taken as it is."""
    root, paths = _existing(given)
    if not Path(given).expanduser().is_file():
        paths = [p for p in paths if _is_kind(p, kind)]
    if not paths:
        raise InputError(f"data.path={given!r}: no {'.jsonl[.gz|.zst]' if kind == 'jsonl' else '.txt'} files there")
    for path in paths:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: an empty file; expected documents")
        if not os.access(path, os.R_OK):
            raise InputError(f"{path}: cannot be read (permission denied)")
    return root, paths


def _existing(given: str) -> tuple[Path, list[Path]]:
    path = Path(given).expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        return path, sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    if glob.has_magic(given):
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
        if found:
            return Path(os.path.commonpath([p.parent for p in found])), found
        raise InputError(f"data.path={given!r}: no file matches; expected {_FORMATS}")
    raise InputError(f"data.path={given!r}: no such file or folder; expected {_FORMATS}")
