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
from emo_jax.data.olmo import open_olmo
from emo_jax.data.parquet import ParquetSource
from emo_jax.data.shards import MANIFEST
from emo_jax.data.skipping import LenientSource
from emo_jax.data.text import TextSource
from emo_jax.data.tfds_source import TfdsSource
from emo_jax.data.tokens import open_shards
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, Listed, given_path, list_files

__all__ = ["Document", "Source", "open_source"]

Listing = tuple[AnyPath, list[Listed]]  # the folder that holds all of the files


def open_source(data: DataConfig) -> Source:
    """The documents of `data.path`. Raises `InputError` naming what is wrong, also later for a document that cannot be
    read, unless data.max_skipped lets it be skipped."""
    given_path(data.path, "data.path")
    kind, listing = (data.format, None) if data.format != "auto" else _detect(data.path)
    if kind == "embedded" and data.path:
        raise InputError(f"data.format='embedded' takes no data.path, got {data.path!r}")
    if kind != "embedded" and not data.path:
        raise InputError(f"data.format={data.format!r} needs data.path: {_expected()}")
    source = FORMATS[kind].open(data, listing)
    return LenientSource(source, data.max_skipped) if data.max_skipped and source.tokenizer is None else source


# ---- formats ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    files: str  # what they are called, for a message
    open: Callable[[DataConfig, Listing | None], Source]  # with the files of `data.path`, if they were listed
    names: str = ""  # a regular expression: the names of its files
    is_folder: Callable[[set[str]], bool] | None = None  # whether a folder of such files as a whole is data of this format

    def takes(self, path: AnyPath) -> bool:
        return bool(self.names) and re.search(self.names, path.name, re.IGNORECASE) is not None


def _is_saved_dataset(names: set[str]) -> bool:
    """Whether a Hugging Face dataset was saved there; a dataset_info.json is in those of TFDS too."""
    return not names.isdisjoint(("state.json", "dataset_dict.json"))


def _is_tfds(names: set[str]) -> bool:
    return "dataset_info.json" in names and not any(name.endswith(".arrow") for name in names)


def _is_tokenized(names: set[str]) -> bool:
    return MANIFEST in names


def _open_arrow(data: DataConfig, listing: Listing | None) -> Source:
    root, files = listing or _existing(data.path)
    return ArrowSource(data, saved_files(root, files, data.tfds_split) or _find(data.path, "arrow", (root, files))[1])


def _open_olmo(data: DataConfig, listing: Listing | None) -> Source:
    root, files = listing or _existing(data.path)
    is_mix = len(files) == 1 and files[0].path == given_path(data.path, "data.path") and files[0].path.suffix != ".npy"
    return open_olmo(data, None if is_mix else _find(data.path, "olmo", (root, files))[1])


FORMATS = {  # folders are looked at in this order
    "tokens": Format("a folder of emo-jax data tokenize", lambda data, _: open_shards(data), is_folder=_is_tokenized),
    "arrow": Format(".arrow (and Hugging Face datasets saved to disk)", _open_arrow, r"\.arrow$", _is_saved_dataset),
    "tfds": Format("a TFDS dataset's version folder", lambda data, _: TfdsSource(data), is_folder=_is_tfds),
    "jsonl": Format(".jsonl[.gz|.zst]", lambda data, files: JsonlSource(data, _find(data.path, "jsonl", files)[1]),
                    r"\.jsonl?(\.gz|\.zst)?$"),
    "text": Format(".txt", lambda data, files: TextSource(data, *_find(data.path, "text", files)), r"\.txt$"),
    "arrayrecord": Format(
        ".array_record", lambda data, files: ArrayRecordSource(data, _find(data.path, "arrayrecord", files)[1]),
        r"\.array_?record(-\d+-of-\d+)?$"),
    "parquet": Format(".parquet", lambda data, files: ParquetSource(data, _find(data.path, "parquet", files)[1]),
                      r"\.parquet$"),
    "olmo": Format(".npy of token ids", _open_olmo, r"\.npy$"),
    "embedded": Format("", lambda data, _: EmbeddedSource()),
}


def _expected() -> str:
    files = ", ".join(f.files for f in FORMATS.values() if f.names)
    folders = ", ".join(f.files for f in FORMATS.values() if f.files and not f.names)
    return f"a file or folder of {files}; a glob of such files; {folders}"


# ---- finding files ---------------------------------------------------------------------------------------------------


def _detect(given: str) -> tuple[str, Listing | None]:
    """What a path stands for, and the files there, if they were listed to learn it."""
    if not given:
        return "embedded", None
    root, files = _existing(given)
    if root == given_path(given, "data.path"):
        names = {f.path.name for f in files if f.path.parent == root}
        for kind, form in FORMATS.items():
            if form.is_folder and form.is_folder(names):
                return kind, (root, files)
    kinds = [kind for kind, form in FORMATS.items() if any(form.takes(f.path) for f in files)]
    if len(kinds) == 1:
        return kinds[0], (root, files)
    if kinds:
        raise InputError(f"data.path={given!r} holds files of several formats; set data.format to one of {', '.join(kinds)}")
    seen = ", ".join(sorted({f.path.suffix or f.path.name for f in files})[:10]) or "nothing"
    raise InputError(f"data.path={given!r}: no documents found (it holds {seen}); expected {_expected()}")


def _find(given: str, kind: str, listing: Listing | None) -> Listing:
    """The root folder and the sorted, readable, non-empty files of a kind; a file named in full is taken as it is."""
    root, files = listing or _existing(given)
    if [f.path for f in files] != [given_path(given, "data.path")]:
        files = [f for f in files if FORMATS[kind].takes(f.path)]
    if not files:
        raise InputError(f"data.path={given!r}: no {FORMATS[kind].files} files there")
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
    raise InputError(f"data.path={given!r}: {what}; expected {_expected()}")
