"""The default source of a fresh machine: text that came with the running Python installation.

Modules, stubs, headers, documentation, licences and configuration of the standard library and of the installed
packages. The label of a document is its kind. Which files there are depends on the installation (not on the time or
the order of a listing); the fingerprint tells two installations apart.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import numpy as np

from emo_jax.data.content import content_of_files
from emo_jax.data.documents import Document, Source, hash_text
from emo_jax.data.ranges import RangeReader
from emo_jax.files import listed_file

BYTES_PER_LABEL = 5_000_000
DOCUMENT_BYTES = 20_000  # longer files are cut at line ends into documents of at most this size
DOCUMENTS_PER_FILE = 12  # what is beyond is left out, so that no file dominates its label
MAX_LINE_BYTES = 1_000  # a file with longer lines is data, not text

_LABEL_OF_SUFFIX = {
    ".pyi": "stub", ".h": "c_header", ".hpp": "c_header", ".md": "documentation", ".rst": "documentation",
    ".txt": "documentation", ".toml": "configuration", ".yaml": "configuration", ".yml": "configuration",
    ".json": "configuration", ".cfg": "configuration", ".ini": "configuration", ".pyx": "native_source",
    ".pxd": "native_source", ".c": "native_source", ".cc": "native_source", ".proto": "native_source",
}
_LICENSE_NAMES = ("license", "licence", "copying", "notice", "authors", "third_party")
_SKIPPED_FOLDERS = {"__pycache__", "test", "tests", "testing", "site-packages", "dist-packages", "node_modules"}


class EmbeddedSource(Source):
    name = "the text of this Python installation"

    def __init__(self):
        files = _choose_files()
        self._paths = [str(path) for path, _, _ in files]
        self.labels = sorted({label for _, label, _ in files})
        rows = [(number, start, length, self.labels.index(label))
                for number, (_, label, pieces) in enumerate(files) for start, length in pieces]
        self._pieces = np.array(rows, np.int32).reshape(-1, 4)  # file, first byte, length, label
        self._reader = RangeReader()
        self.fingerprint = hash_text(*(x for path, label, pieces in files for x in (path.name, label, pieces)))

    def content_hash(self) -> str:
        return content_of_files([listed_file(Path(path)) for path in self._paths], self.name)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, i: int) -> Document:
        file, start, length, label = self._pieces[i].tolist()
        return Document(self._reader.read(self._paths[file], start, length).decode(), self.labels[label], int(i))

    def label(self, i: int) -> str:
        return self.labels[self._pieces[i, 3]]

    def where(self, i: int) -> str:
        return self._paths[self._pieces[i, 0]]


def _choose_files() -> list[tuple[Path, str, list[tuple[int, int]]]]:
    """(path, label, [(first byte, length) of each document]), up to BYTES_PER_LABEL of each label."""
    candidates = {}
    for kind, root in (("stdlib", sysconfig.get_path("stdlib")), ("packages", sysconfig.get_path("purelib")),
                       ("packages", sysconfig.get_path("platlib")), ("include", sysconfig.get_path("include"))):
        for path in _walk(Path(root)):
            candidates.setdefault(path, (kind, _label(path, kind), path.relative_to(root).as_posix()))
    by_label = {}
    for path, (kind, label, relative) in candidates.items():
        if label:  # the order of a hash: a spread over all packages, the same on every listing
            by_label.setdefault(label, []).append((hash_text(kind, relative), path))
    chosen = []
    for label, files in sorted(by_label.items()):
        budget = BYTES_PER_LABEL
        for _, path in sorted(files):
            pieces = _cut(path)
            budget -= sum(length for _, length in pieces)
            if pieces:
                chosen.append((path, label, pieces))
            if budget <= 0:
                break
    return chosen


def _walk(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith("."))
        found += [Path(folder, name) for name in names]
    return found


def _label(path: Path, kind: str) -> str | None:
    name, suffix = path.name.lower(), path.suffix.lower()
    if name.endswith(("_pb2.py", "_pb2.pyi", "top_level.txt", "entry_points.txt")):
        return None  # generated
    if suffix == ".py":
        return "python_stdlib" if kind == "stdlib" else "python_packages"
    if name.startswith(_LICENSE_NAMES) or path.parent.name.lower() == "licenses":
        return "license"
    if name == "metadata" and path.parent.suffix == ".dist-info":
        return "documentation"  # a package's description, often its whole README
    return _LABEL_OF_SUFFIX.get(suffix)


def _cut(path: Path) -> list[tuple[int, int]]:
    """The documents of a file as (first byte, length), [] if it is no text."""
    try:
        data = path.read_bytes()
        data.decode()
    except (OSError, UnicodeDecodeError):
        return []
    if not data.strip() or 0 in data or max(map(len, data[:DOCUMENT_BYTES].split(b"\n"))) > MAX_LINE_BYTES:
        return []
    pieces, start = [], 0
    while start < len(data) and len(pieces) < DOCUMENTS_PER_FILE:
        end = len(data)
        if end - start > DOCUMENT_BYTES:
            end = data.rfind(b"\n", start, start + DOCUMENT_BYTES) + 1
            if end <= start:  # one line longer than a document
                break
        if data[start:end].strip():
            pieces.append((start, end - start))
        start = end
    return pieces
