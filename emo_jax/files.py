"""Paths as a person gives them, and writing so that a reader, or the next start after a kill, sees all of a file or none.

A path is local (`pathlib.Path`) or in a bucket (`etils.epath.Path`), see `emo_jax.buckets`. There, a folder is no more than
the beginning of names: it is there when an object is; and an object is written whole or not at all, but never renamed.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Generator
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from emo_jax import buckets
from emo_jax.errors import InputError

if TYPE_CHECKING:
    from etils import epath

    AnyPath = Path | epath.Path
else:
    AnyPath = PurePath  # which both are; to import etils would take as long as half of a command's start


def given_path(given: str | AnyPath, field: str) -> AnyPath:
    """`given` with ~ put in; there may be nothing there. Raises `InputError`, naming `field`, for what cannot be looked at:
    too long a name, a NUL character, the home of nobody, a folder without permission, a URL of no bucket."""
    if "://" in str(given):
        return _url_path(str(given), field)
    try:
        path = Path(given).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as e:
        raise InputError(f"{field}={shortened(str(given))!r} cannot be looked up: "
                         f"{getattr(e, 'strerror', None) or e}") from None
    return path


def _url_path(given: str, field: str) -> AnyPath:
    if not buckets.is_url(given) or not buckets.split_url(given)[1]:
        raise InputError(f"{field}={shortened(given)!r} is a URL of another kind than {' and '.join(buckets.SCHEMES)} with the "
                         f"name of a bucket")
    buckets.require_package(given, field)
    from etils import epath

    return epath.Path(given.rstrip("/"))


def cache_folder() -> Path:
    """Where indices, decompressed copies and compiled programs are kept between runs (safe to delete when no run uses them):
    $XDG_CACHE_HOME/emo_jax, else ~/.cache/emo_jax, else a folder of the user in the temporary directory."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for folder in (Path(home) / "emo_jax", Path(tempfile.gettempdir()) / f"emo_jax-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="emo_jax-"))


def absolute_path(given: str | AnyPath, field: str) -> AnyPath:
    """`given_path`, which no change of the working directory changes."""
    path = given_path(given, field)
    return path.absolute() if isinstance(path, Path) else path


def shortened(text: str, limit: int = 200) -> str:
    """`text`, its middle left out where it is long."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}...({len(text):,} characters)...{text[-half:]}"


def reason(error: Exception) -> str:
    """Why a file could not be read or written, in a line."""
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- folders --------------------------------------------------------------------------------------------------------


def folder_path(given: str | AnyPath, flag: str = "--out") -> AnyPath:
    """The absolute path of a folder that a person named with `flag`; there may be none yet. Raises `InputError`."""
    if not str(given):
        raise InputError(f"{flag} is empty; give a folder")
    folder = absolute_path(given, flag)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{flag} {given} is a file; expected a folder")
    return folder


def make_folder(given: str | AnyPath, flag: str = "--out") -> AnyPath:
    """`folder_path`, made where it is not there; a file is written there and deleted."""
    folder = folder_path(given, flag)
    try:
        if isinstance(folder, Path):
            folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{uuid.uuid4().hex}"
        probe.write_bytes(b"")
        probe.unlink()
    except Exception as e:  # those of a bucket are of many kinds
        raise InputError(f"{flag} {given} cannot be written: {reason(e)}") from None
    return folder


def inside(folder: AnyPath, name: Any, where: AnyPath | str) -> AnyPath:
    """The file of a `folder` that some data, read from `where`, names. Raises `InputError` for a name that leads out of it."""
    parts = PurePosixPath(name).parts if isinstance(name, str) and "\0" not in name and "\\" not in name else ()
    if not parts or ".." in parts or PurePosixPath(name).is_absolute():
        raise InputError(f"{where}: {shortened(repr(name))} is no name of a file in its folder")
    return folder / name


def remove_tree(folder: AnyPath) -> None:
    """Deletes a folder, if it is there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.rmtree()


def copy_tree(folder: AnyPath, target: AnyPath) -> None:
    """All objects below a folder of a bucket, to another folder of it."""
    system = buckets.filesystem(str(folder))
    names = system.find(str(folder), detail=False)
    prefix = len(buckets.without_scheme(folder))
    system.copy(names, [str(target) + name[prefix:] for name in names])


def copy_file(source: AnyPath, target: AnyPath) -> None:
    """Of a size that fits in memory."""
    target.write_bytes(source.read_bytes())


# ---- files that are there -------------------------------------------------------------------------------------------


class Listed(NamedTuple):
    """A file, as a listing shows it."""

    path: AnyPath
    size: int
    version: str  # changes when it is written again


def list_files(given: str) -> tuple[AnyPath, list[Listed]]:
    """(the folder that holds all of them, the files) that a file's name, a folder or a glob stands for, sorted; hidden ones
    of a folder are left out. No file where nothing is there. A bucket is listed once."""
    if buckets.is_url(given):
        return _list_bucket(given)
    path = Path(given).expanduser()
    if path.is_file():
        return path.parent, [listed_file(path)]
    if path.is_dir():
        return path, [listed_file(p) for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    matches = glob.glob(str(path), recursive=True) if glob.has_magic(given) else []
    found = [Path(p) for p in sorted(matches) if Path(p).is_file()]
    root = Path(os.path.commonpath([p.parent for p in found])) if found else path
    return root, [listed_file(p) for p in found]


def listed_file(path: Path) -> Listed:
    """A local file that is there."""
    stat = path.stat()
    return Listed(path, stat.st_size, str(stat.st_mtime_ns))


def _list_bucket(given: str) -> tuple[AnyPath, list[Listed]]:
    path, system, scheme = given_path(given, "the path"), buckets.filesystem(given), buckets.split_url(given)[0]
    magic = glob.has_magic(given)
    try:
        infos = system.glob(str(path), detail=True) if magic else system.find(str(path), detail=True)
    except FileNotFoundError:
        infos = {}
    except Exception as e:
        raise InputError(f"{given}: cannot be listed ({reason(e)})") from None
    found = [Listed(given_path(f"{scheme}://{name}", "the path"), int(info["size"]), _version(info))
             for name, info in infos.items() if info["type"] == "file" and not name.endswith("/")]
    found.sort(key=lambda listed: listed.path)
    if magic and found:
        return given_path(f"{scheme}://" + os.path.commonpath([buckets.without_scheme(f.path.parent) for f in found]),
                          "the path"), found
    if len(found) == 1 and found[0].path == path:
        return path.parent, found
    return path, [f for f in found if not f.path.name.startswith(".")]


def _version(info: dict[str, Any]) -> str:
    """Of the content where the service says so: on GCS an MD5, or a CRC32C of what was composed."""
    return str(info.get("md5Hash") or info.get("crc32c") or info.get("ETag") or info.get("etag") or info.get("LastModified"))


# ---- writing --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: AnyPath, suffix: str = ".tmp") -> Generator[AnyPath]:
    """A path beside `path` to write a file or folder to; it gets its name when the block ends without an error. Processes
    that may write at the same time need a `suffix` each. In a bucket it is `path` itself: a file is whole or not there,
    and of a folder the file that tells readers that it is complete must be written last."""
    if not isinstance(path, Path):
        yield path
        return
    temporary = path.with_name(path.name + suffix)
    yield temporary
    os.replace(temporary, path)


def write_text(path: AnyPath, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: AnyPath, value: Any, indent: int | None = None) -> None:
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_result(given: str | AnyPath, value: Any) -> None:
    """The JSON file that a person named with --out, and its folder. Raises `InputError`."""
    path, text = given_path(given, "--out"), json.dumps(value) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except Exception as e:
        raise InputError(f"--out {given} cannot be written: {reason(e)}") from None
