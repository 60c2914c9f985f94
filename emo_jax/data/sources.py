"""Opening a source of documents by what a config says. A source of another kind is a file and a line of `FORMATS`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emo_jax.config import DataConfig
from emo_jax.data.arrayrecord import ArrayRecordSource
from emo_jax.data.arrow import ArrowSource, saved_files
from emo_jax.data.documents import Document, Source
from emo_jax.data.embedded import EmbeddedSource
from emo_jax.data.jsonl import JsonlSource
from emo_jax.data.parquet import ParquetSource
from emo_jax.data.skipping import LenientSource
from emo_jax.data.text import TextSource
from emo_jax.data.tfds_source import TfdsSource
from emo_jax.errors import InputError
from emo_jax.files import given_path

__all__ = ["Document", "Source", "open_source"]


def open_source(data: DataConfig) -> Source:
    """The documents of `data.path`. Raises `InputError` naming what is wrong, also later for a document that cannot be
    read, unless data.max_skipped lets it be skipped."""
    given_path(data.path, "data.path")
    kind = data.format if data.format != "auto" else _detect(data.path)
    if kind == "embedded" and data.path:
        raise InputError(f"data.format='embedded' takes no data.path, got {data.path!r}")
    if kind != "embedded" and not data.path:
        raise InputError(f"data.format={data.format!r} needs data.path: {_expected()}")
    source = FORMATS[kind].open(data)
    return LenientSource(source, data.max_skipped) if data.max_skipped else source


# ---- formats ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    files: str  # what they are called, for a message
    open: Callable[[DataConfig], Source]
    names: str = ""  # a regular expression: the names of its files
    is_folder: Callable[[Path], bool] | None = None  # whether a folder as a whole is data of this format

    def takes(self, path: Path) -> bool:
        return bool(self.names) and re.search(self.names, path.name, re.IGNORECASE) is not None


def _is_saved_dataset(folder: Path) -> bool:
    """Whether a Hugging Face dataset was saved there; a dataset_info.json is in those of TFDS too."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _is_tfds(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file() and not any(folder.glob("*.arrow"))


def _is_tokenized(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def _open_tokens(data: DataConfig) -> Source:
    from emo_jax.data.tokens import open_tokens  # ty: ignore[import-not-found]

    return open_tokens(data)


def _open_arrow(data: DataConfig) -> Source:
    saved = saved_files(Path(data.path).expanduser(), data.tfds_split)
    return ArrowSource(data, _readable(saved) if saved else _files(data, "arrow"))


FORMATS = {  # folders are looked at in this order
    "tokens": Format("a folder of emo-jax data tokenize", _open_tokens, is_folder=_is_tokenized),
    "arrow": Format(".arrow (and Hugging Face datasets saved to disk)", _open_arrow, r"\.arrow$", _is_saved_dataset),
    "tfds": Format("a TFDS dataset's version folder", TfdsSource, is_folder=_is_tfds),
    "jsonl": Format(".jsonl[.gz|.zst]", lambda data: JsonlSource(data, _files(data, "jsonl")), r"\.jsonl?(\.gz|\.zst)?$"),
    "text": Format(".txt", lambda data: TextSource(data, *_find(data.path, "text")), r"\.txt$"),
    "arrayrecord": Format(".array_record", lambda data: ArrayRecordSource(data, _files(data, "arrayrecord")),
                          r"\.array_?record(-\d+-of-\d+)?$"),
    "parquet": Format(".parquet", lambda data: ParquetSource(data, _files(data, "parquet")), r"\.parquet$"),
    "olmo": Format(".npy of token ids", _open_tokens, r"\.npy$"),
    "embedded": Format("", lambda data: EmbeddedSource()),
}


def _expected() -> str:
    files = ", ".join(f.files for f in FORMATS.values() if f.names)
    folders = ", ".join(f.files for f in FORMATS.values() if f.files and not f.names)
    return f"a file or folder of {files}; a glob of such files; {folders}"


def _detect(given: str) -> str:
    if not given:
        return "embedded"
    path = Path(given).expanduser()
    for kind, form in FORMATS.items():
        if form.is_folder and path.is_dir() and form.is_folder(path):
            return kind
    _, paths = _existing(given)
    kinds = [kind for kind, form in FORMATS.items() if any(form.takes(p) for p in paths)]
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        raise InputError(f"data.path={given!r} holds files of several formats; set data.format to one of {', '.join(kinds)}")
    seen = ", ".join(sorted({p.suffix or p.name for p in paths})[:10]) or "nothing"
    raise InputError(f"data.path={given!r}: no documents found (it holds {seen}); expected {_expected()}")


def _files(data: DataConfig, kind: str) -> list[Path]:
    return _find(data.path, kind)[1]


def _find(given: str, kind: str) -> tuple[Path, list[Path]]:
    """The root folder and the sorted, readable, non-empty files of a kind; a file named in full is taken as it is."""
    root, paths = _existing(given)
    if not Path(given).expanduser().is_file():
        paths = [p for p in paths if FORMATS[kind].takes(p)]
    if not paths:
        raise InputError(f"data.path={given!r}: no {FORMATS[kind].files} files there")
    return root, _readable(paths)


def _readable(paths: list[Path]) -> list[Path]:
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file, though the dataset names it")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: an empty file; expected documents")
        if not os.access(path, os.R_OK):
            raise InputError(f"{path}: cannot be read (permission denied)")
    return paths


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
        raise InputError(f"data.path={given!r}: no file matches; expected {_expected()}")
    raise InputError(f"data.path={given!r}: no such file or folder; expected {_expected()}")
