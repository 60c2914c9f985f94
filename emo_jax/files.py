"""Paths as a person gives them, and writing so that a reader, or the next start after a kill, sees all of a file or none."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

from emo_jax.errors import InputError


def given_path(given: str | Path, field: str) -> Path:
    """`given` with ~ put in; there may be nothing there. Raises `InputError`, naming `field`, for what cannot be looked at:
    too long a name, a NUL character, the home of nobody, a folder without permission."""
    try:
        path = Path(given).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as e:
        raise InputError(f"{field}={shortened(str(given))!r} cannot be looked up: "
                         f"{getattr(e, 'strerror', None) or e}") from None
    return path


def shortened(text: str, limit: int = 200) -> str:
    """`text`, its middle left out where it is long."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}...({len(text):,} characters)...{text[-half:]}"


def folder_path(given: str | Path, flag: str = "--out") -> Path:
    """The absolute path of a folder that a person named with `flag`; there may be none yet. Raises `InputError`."""
    if not str(given):
        raise InputError(f"{flag} is empty; give a folder")
    if "://" in str(given):
        raise InputError(f"{flag} {given} is a URL; give a folder that all hosts see (a bucket can be mounted as one)")
    folder = given_path(given, flag).absolute()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{flag} {given} is a file; expected a folder")
    return folder


def make_folder(given: str | Path, flag: str = "--out") -> Path:
    """`folder_path`, made where it is not there."""
    folder = folder_path(given, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{flag} {given} cannot be written: {e.strerror}") from None
    return folder


@contextlib.contextmanager
def replacing(path: Path, suffix: str = ".tmp") -> Generator[Path]:
    """A path beside `path` to write a file or folder to; it gets its name when the block ends without an error. Processes
    that may write at the same time need a `suffix` each."""
    temporary = path.with_name(path.name + suffix)
    yield temporary
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_result(given: str | Path, value: Any) -> None:
    """The JSON file that a person named with --out, and its folder. Raises `InputError`."""
    path = given_path(given, "--out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)
    except OSError as e:
        raise InputError(f"--out {given} cannot be written: {e.strerror}") from None
