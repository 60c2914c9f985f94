"""Writing files so that a reader, or the next start after a kill, sees all of one or none of it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emo_jax.errors import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or folder to; it gets its name when the block ends without an error."""
    temporary = path.with_name(f"{path.name}.tmp")
    yield temporary
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    write_text(path, json.dumps(value, indent=indent) + "\n")


def make_folder(path: str | Path) -> Path:
    """The absolute path of a folder that a person named with --out; made where it is not there. Raises `InputError`."""
    if not str(path):
        raise InputError("--out is empty; give a folder")
    if "://" in str(path):
        raise InputError(f"--out {path} is a URL; give a folder that all hosts see (a bucket can be mounted as one)")
    folder = Path(path).absolute()
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out {path} is a file; expected a folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {_short(path)} cannot be written: {e.strerror}") from None
    return folder


def _short(path: str | Path) -> str:
    return text if len(text := str(path)) <= 200 else f"{text[:200]}... ({len(text):,} characters)"


def write_result(path: str | Path, value: Any) -> None:
    """The JSON file that a person named with --out, and its folder. Raises `InputError`."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)
    except OSError as e:
        raise InputError(f"--out {_short(path)} cannot be written: {e.strerror}") from None
