"""A folder of text files: one document a file."""

from __future__ import annotations

from pathlib import Path

from emo_jax.data.documents import Document, Source, hash_text
from emo_jax.errors import InputError
from emo_jax.progress import track


class TextSource(Source):
    """The label of a file is the folder it is in: the first one below the given folder, else the given folder."""

    def __init__(self, name: str, root: Path, paths: list[Path]):
        self.name = name
        self._paths = [str(p) for p in paths]
        sizes = [len(_read(path).encode()) for path in track(self._paths, f"checking {name}", "files")]
        parts = [p.relative_to(root).parts for p in paths]
        self._labels = [part[0] if len(part) > 1 else p.resolve().parent.name for p, part in zip(paths, parts)]
        self.labels = sorted(set(self._labels))
        self.fingerprint = hash_text(*(x for part, size in zip(parts, sizes) for x in ("/".join(part), size)))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> Document:
        return Document(_read(self._paths[i]), self._labels[i], int(i))

    def label(self, i: int) -> str:
        return self._labels[i]

    def where(self, i: int) -> str:
        return self._paths[i]


def _read(path: str) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    if not data:
        raise InputError(f"{path}: an empty file; expected the text of one document")
    if 0 in data:
        raise InputError(f"{path}: a binary file (a zero byte at {data.index(0)}); expected UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text (byte {e.start} is {data[e.start]:#04x})") from None
