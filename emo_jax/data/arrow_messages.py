"""Where the messages of an Arrow stream lie. Only their headers are read, which no function of pyarrow does: it reads what
follows them, all of the data, too. The fields are those of the Arrow format's Message.fbs."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from emo_jax.data.ranges import RangeReader

SCHEMA, DICTIONARY, BATCH = 1, 2, 3


class Message(NamedTuple):
    kind: int
    start: int  # byte of the file
    end: int
    rows: int  # of a record batch


def messages(reader: RangeReader, path: str, start: int, size: int) -> Iterator[Message]:
    """Those from byte `start` of a file of `size` bytes up to the mark of their end, or the end of the file. `EOFError` where
    that lies within one."""
    while start < size:
        mark, length = struct.unpack("<ii", _read(reader, path, start, 8, size))
        first, length = (8, length) if mark == -1 else (4, mark)  # before Arrow 0.15 there was no mark
        if length == 0:
            return
        header = _read(reader, path, start + first, length, size)
        try:
            root = struct.unpack_from("<I", header)[0]
            kind, at, body = (_field(header, root, *f) for f in ((1, "B"), (2, "I"), (3, "q")))
            content = _table(header, root, 2) + at
            end = start + first + length + body
            found = Message(kind, start, end, _field(header, content, 0, "q") if kind == BATCH else 0)
        except struct.error as e:
            raise EOFError(f"no message at byte {start}: {e}") from None
        if not start < end <= size:
            raise EOFError(f"the message at byte {start} ends at byte {end}, the file at {size}")
        yield found
        start = end


def _read(reader: RangeReader, path: str, start: int, length: int, size: int) -> bytes:
    if length < 0 or start + length > size:
        raise EOFError(f"no message at byte {start} of {size}")
    return reader.read(path, start, length)


def _table(data: bytes, table: int, number: int) -> int:
    """Where the value of a field of a FlatBuffers table lies; 0: it has its default."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    size = struct.unpack_from("<H", data, fields)[0]
    offset = struct.unpack_from("<H", data, fields + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
    return table + offset if offset else 0


def _field(data: bytes, table: int, number: int, kind: str) -> int:
    at = _table(data, table, number)
    return struct.unpack_from(f"<{kind}", data, at)[0] if at else 0
