"""Documents -> rows of T tokens. Two packers, both generators that can go on from any row.

They are our own because Grain's packers keep no state from which any row's successor can be made on another number of
hosts.

Both read documents by `read(count) -> (tokens [n] int32 with the end-of-document token, document number)`, count =
0, 1, 2, ..., None after the last; one without any token is passed over. They yield `(row, state)`: the state (a flat list
of ints) is the packer's position after that row; given back, the packer goes on with the next row.

A row is a dict of [T] arrays: tokens, targets, segment_ids, document_ids int32; loss_weights float32. Padding has 0
everywhere. Pieces of documents are numbered 1.. in `segment_ids`. The target of the last token of a document is the
first token of the next one. A row never holds more than `max_documents` documents: it is closed before and padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from emo_jax.errors import InputError

Row = dict[str, np.ndarray]
State = list[int]
Read = Callable[[int], "tuple[np.ndarray, int] | None"]

OPEN_ROWS = 8  # rows that first_fit fills at the same time


@dataclass(eq=False)
class _Piece:
    """A document, or the part of one that fits into a row."""

    tokens: np.ndarray  # [n]
    document: int
    ends: bool  # the last token is the end of the document
    origin: tuple[int, int]  # (count of the document, offset in it)


def pack(packing: str, read: Read, length: int, max_documents: int, count_ends: bool,
         state: State | None = None) -> Iterator[tuple[Row, State]]:
    """Rows of `length` tokens by data.packing. count_ends: whether the target at a document's end has loss weight 1."""
    packer = {"concat_and_split": concat_and_split, "first_fit": first_fit}[packing]
    return packer(read, length, max_documents, count_ends, state)


def state_width(packing: str, max_documents: int) -> int:
    """The longest state of a packer."""
    return 2 if packing == "concat_and_split" else 2 + OPEN_ROWS * (1 + 2 * max_documents)


def documents_read(state: State) -> int:
    return state[0]


def initial_state() -> State:
    return [0, 0]


# ---- concat and split ------------------------------------------------------------------------------------------------


def concat_and_split(read: Read, length: int, max_documents: int, count_ends: bool,
                     state: State | None = None) -> Iterator[tuple[Row, State]]:
    """The published packing: documents one after the other, cut where a row ends and continued in the next row. The
    last target of a row is the first token of the next row. State: [count of the next document, offset in it]."""
    state = state or initial_state()
    if len(state) != 2:
        raise _wrong_state("concat_and_split")
    count, offset = state
    count, current = _next(read, count, offset)
    while current is not None:
        pieces, room = [], length
        while room and current is not None and len(pieces) < max_documents:
            tokens, document = current
            piece = _Piece(tokens[offset:offset + room], document, offset + room >= len(tokens), (count, offset))
            pieces.append(piece)
            room -= len(piece.tokens)
            offset += len(piece.tokens)
            if piece.ends:
                offset = 0
                count, current = _next(read, count + 1)
        next_token = None if current is None else current[0][offset]
        yield _make_row(pieces, length, next_token, count_ends), [count, offset]


# ---- first fit -------------------------------------------------------------------------------------------------------


def first_fit(read: Read, length: int, max_documents: int, count_ends: bool,
              state: State | None = None) -> Iterator[tuple[Row, State]]:
    """Whole documents: each goes into the first of up to OPEN_ROWS open rows that has room; if none has, the fullest
    is closed and padded. Only documents longer than a row are cut, into pieces of one row and a rest.

    State: [count of the next document, offset in it], then for every open row its number of pieces and their origins.
    """
    state = state or initial_state()
    count, offset = state[:2]
    rows = _reopen(read, state, length)
    count, current = _next(read, count, offset)

    def closed(row: list[_Piece]) -> tuple[Row, State]:
        rows.remove(row)
        last = row[-1]  # a piece that ends within its document fills its row, and the document goes on after it
        next_token = None if last.ends else _continuation(read, last, current, count)
        return _make_row(row, length, next_token, count_ends), _first_fit_state(count, offset, rows)

    while current is not None:
        tokens, document = current
        piece = _Piece(tokens[offset:offset + length], document, offset + length >= len(tokens), (count, offset))
        row = next((r for r in rows if _filled(r) + len(piece.tokens) <= length), None)
        if row is None and len(rows) == OPEN_ROWS:
            yield closed(max(rows, key=_filled))  # the oldest of those that are equally full
        if row is None:
            row = []
            rows.append(row)
        row.append(piece)
        offset += len(piece.tokens)
        if piece.ends:
            offset = 0
            count, current = _next(read, count + 1)
        if _filled(row) == length or len(row) == max_documents:
            yield closed(row)
    while rows:
        yield closed(rows[0])


def _filled(row: list[_Piece]) -> int:
    return sum(len(piece.tokens) for piece in row)


def _continuation(read: Read, piece: _Piece, current: tuple[np.ndarray, int] | None, count: int) -> int:
    document = current if piece.origin[0] == count else read(piece.origin[0])
    tokens, _ = _document_at(document, piece.origin[1])
    return tokens[piece.origin[1] + len(piece.tokens)]


def _first_fit_state(count: int, offset: int, rows: list[list[_Piece]]) -> State:
    return [count, offset] + [x for row in rows for x in (len(row), *(y for piece in row for y in piece.origin))]


def _reopen(read: Read, state: State, length: int) -> list[list[_Piece]]:
    rows, at = [], 2
    while at < len(state):
        row = []
        for i in range(at + 1, at + 1 + 2 * state[at], 2):
            if i + 1 >= len(state):
                raise _wrong_state("first_fit")
            start = state[i + 1]
            tokens, document = _document_at(read(state[i]), start)
            row.append(_Piece(tokens[start:start + length], document, start + length >= len(tokens), (state[i], start)))
        if not 0 < _filled(row) <= length:
            raise InputError(f"data.sequence_length={length}: the checkpoint holds rows that were begun with another "
                             f"length; keep the length, or start from the parameters only")
        rows.append(row)
        at += 1 + 2 * state[at]
    return rows


# ---- rows ------------------------------------------------------------------------------------------------------------


def _make_row(pieces: list[_Piece], length: int, next_token: int | None, count_ends: bool) -> Row:
    """next_token: what follows the last piece; None where nothing does, then its last target has no weight."""
    sizes = [len(piece.tokens) for piece in pieces]
    n = sum(sizes)
    row: Row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segment_ids", "document_ids")}
    row["loss_weights"] = np.zeros(length, np.float32)
    np.concatenate([piece.tokens for piece in pieces], out=row["tokens"][:n])
    row["targets"][:n - 1] = row["tokens"][1:n]
    row["segment_ids"][:n] = np.repeat(np.arange(1, len(pieces) + 1, dtype=np.int32), sizes)
    row["document_ids"][:n] = np.repeat([piece.document for piece in pieces], sizes)
    row["loss_weights"][:n] = 1
    if not count_ends:
        row["loss_weights"][[end - 1 for end, piece in zip(np.cumsum(sizes), pieces) if piece.ends]] = 0
    if next_token is None:
        row["loss_weights"][n - 1] = 0
    else:
        row["targets"][n - 1] = next_token
    return row


def _next(read: Read, count: int, offset: int = 0) -> tuple[int, tuple[np.ndarray, int] | None]:
    """The document `count`, to be read from `offset` on, or the first one after it that has tokens: (its count, it)."""
    current = read(count)
    if offset:
        return count, _document_at(current, offset)
    while current is not None and not len(current[0]):
        count += 1
        current = read(count)
    return count, current


def _document_at(document: tuple[np.ndarray, int] | None, offset: int) -> tuple[np.ndarray, int]:
    if document is None or offset >= len(document[0]):
        raise InputError("the documents are not those that the checkpoint was made with: one is shorter than the "
                         "position to resume at; give the same data.path and data.tokenizer")
    return document


def _wrong_state(packing: str) -> InputError:
    return InputError(f"data.packing={packing!r}: the checkpoint's data position was made with another packing")
