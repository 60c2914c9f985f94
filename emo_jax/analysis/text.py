"""The text that is looked at: documents of all labels in rows, and where in the rows each of their tokens lies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from emo_jax.config import Config
from emo_jax.data.documents import Source
from emo_jax.data.order import mix
from emo_jax.data.packing import pack
from emo_jax.data.skipping import UNREADABLE
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.errors import InputError

LEAST_TOKENS = 8  # of a document that is looked at
Numbers = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Text:
    """n tokens of D documents, in the order in which rows hold them: the tokens of a document follow each other. Of a document
    that is longer than a row, each part counts as a document."""

    rows: dict[str, np.ndarray]  # fields [N, T] for `model.forward`, and targets and loss_weights (0 at documents' ends)
    tokens: Int[np.ndarray, "n"]  # ids
    documents: Int[np.ndarray, "n"]  # 0..D - 1, ascending
    labels: Int[np.ndarray, "D"]  # of every document, a number in `names`
    names: tuple[str, ...]
    numbers: Int[np.ndarray, "D"]  # in the source
    source: str = ""

    @cached_property
    def starts(self) -> Int[np.ndarray, "E"]:
        """[D + 1]: the tokens of document d are starts[d]..starts[d + 1]."""
        return np.searchsorted(self.documents, np.arange(len(self.labels) + 1))

    @cached_property
    def row_starts(self) -> np.ndarray:
        """[N + 1], the same for rows."""
        return np.concatenate([[0], np.cumsum((self.rows["segment_ids"] > 0).sum(axis=1))])

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.names).encode())
        for array in (self.rows["tokens"], self.rows["segment_ids"], self.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Of [n, ...] over the tokens of every document: [D, ...] float64, a few documents of `values` in memory at a time."""
        made = np.zeros((len(self.labels), *values.shape[1:]))
        width = max(1, int(np.prod(values.shape[1:])))
        for low, high in _pieces(self.starts, max(1, (1 << 24) // width)):
            part = np.asarray(values[self.starts[low]:self.starts[high]], np.float32)
            made[low:high] = np.add.reduceat(part, self.starts[low:high] - self.starts[low], axis=0, dtype=np.float64)
        return made

    def thinned(self, tokens: int) -> Text:
        """Some of the rows, evenly, with about so many tokens."""
        rows = len(self.rows["tokens"])
        kept = np.unique(np.linspace(0, rows - 1, max(1, round(rows * min(1.0, tokens / len(self.tokens))))).astype(int))
        where = np.zeros(rows, bool)
        where[kept] = True
        use = where[np.repeat(np.arange(rows), np.diff(self.row_starts))]
        documents = np.unique(self.documents[use])
        return Text({name: x[kept] for name, x in self.rows.items()}, self.tokens[use],
                    np.searchsorted(documents, self.documents[use]), self.labels[documents], self.names,
                    self.numbers[documents], self.source)


def _pieces(starts: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of documents, of about `most` tokens each."""
    low = 0
    while low < len(starts) - 1:
        high = max(low + 1, int(np.searchsorted(starts, starts[low] + most, side="right")) - 1)
        yield low, high
        low = high


def weighted(values: Float[np.ndarray, "D *rest"], weights: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B *rest"]:
    """Means over documents with the weights of every resample."""
    return np.tensordot(weights, values, 1) / weights.sum(axis=1).reshape(-1, *[1] * (values.ndim - 1))


def read_text(config: Config, source: Source, tokenizer: Tokenizer, numbers: Numbers, tokens: int, most: int = 1 << 62) -> Text:
    """The documents `numbers` in a fixed random order, of each the first `tokens`, until there are `most` tokens in all."""
    numbers = np.asarray(numbers)
    order, encoded, labels, total = numbers[np.argsort(mix(0, numbers.astype(np.uint64)), kind="stable")], {}, {}, 0
    for number in map(int, order):
        label = source.label(number)
        ids = source.encoded(number, tokenizer)[:tokens] if label != UNREADABLE else ()
        if len(ids) >= LEAST_TOKENS:
            encoded[number], labels[number] = ids, label
            total += len(ids)
        if total >= most:
            break
    if not encoded:
        raise InputError(f"{source.name}: no document of {LEAST_TOKENS} tokens or more that can be read")
    groups: dict[str, list[int]] = {}
    for number in sorted(encoded):
        groups.setdefault(labels[number], []).append(number)
    return make_text(config, encoded, groups, source.name)


def make_text(config: Config, encoded: Mapping[int, Sequence[int] | np.ndarray], groups: Mapping[str, Numbers],
              source: str = "") -> Text:
    """`encoded`: the tokens of every document by its number; `groups`: the numbers by label."""
    length, parts = config.data.sequence_length, []
    names = tuple(sorted(groups))
    for label, name in enumerate(names):
        for number in map(int, groups[name]):
            ids = np.asarray(encoded[number], np.int32)
            parts += [(ids[start:start + length], number, label) for start in range(0, len(ids), length)]

    def read(count: int):
        return (parts[count][0], count) if count < len(parts) else None

    packed = [row for row, _ in pack("first_fit", read, length, config.data.max_documents_per_row, False)]
    rows = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
    part = rows.pop("document_ids")[rows["segment_ids"] > 0]
    firsts = np.flatnonzero(np.diff(part, prepend=-1))
    order = part[firsts]  # parts as the rows hold them
    rows["positions"] = np.tile(np.arange(length, dtype=np.int32), (len(packed), 1))
    documents = np.repeat(np.arange(len(order)), np.diff(firsts, append=len(part)))
    return Text(rows, rows["tokens"][rows["segment_ids"] > 0], documents,
                np.array([parts[i][2] for i in order]), names, np.array([parts[i][1] for i in order]), source)
