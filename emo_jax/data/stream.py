"""All rows of a run's stage, by index: global row k is a pure function of (seed, the stages before, k).

Any number of hosts, and any batch size, reads the same sequence of rows. A stage goes on in each label where the stages before
stopped: at the very next row where rows are cut alike, else with the next window of blocks (see `blocks`) that none has begun.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from emo_jax.config import Config, DataConfig
from emo_jax.data.cuts import Cut, make_rows
from emo_jax.data.documents import Source, hash_text
from emo_jax.data.filters import repetitive_rows
from emo_jax.data.mixture import Mixture, parse_mixture
from emo_jax.data.packing import Row
from emo_jax.data.rows import Layout, make_layout
from emo_jax.data.tokens import TokenSource
from emo_jax.errors import InputError, RunError

_SAME_ROWS = ("sequence_length", "packing", "order", "max_documents_per_row", "repetition_filter", "repetitive_rows", "shuffle")


class Place(NamedTuple):
    """Where a stage left a label."""

    data: DataConfig
    sections: list[int]
    layout: Layout
    read: int  # rows


class RowStream:
    """The rows of a stage. before: (the stream of the stage before, how many of its rows were read)."""

    def __init__(self, config: Config, source: TokenSource, before: tuple[RowStream, int] | None = None):
        self.config, self.source = config, source
        data = config.data
        if data.packing == "first_fit":
            raise InputError("data.packing='first_fit' is for text; give best_fit or concat_and_split for token files")
        sections = _sections_of_labels(source, data)
        if not sections:
            raise InputError(f"{source.name}: no documents to train on")
        weights = parse_mixture(data.mixture, sorted(sections)) if data.mixture else {}
        if weights and data.order == "olmo":
            raise InputError("data.order='olmo' replays the published order, which has no data.mixture")
        # All rows alike are one label, "", whose key is no other label's.
        chosen = {label: sections[label] for label in weights} or {"": sorted(s for part in sections.values() for s in part)}
        self.labels = list(chosen)
        self.layouts = [make_layout(source, part, data, _key(config, label, data)) for label, part in chosen.items()]
        for label, layout in zip(self.labels, self.layouts):
            if not layout.count:
                raise InputError(f"{source.name}: label {label!r} has no row of data.sequence_length={data.sequence_length}")
        self.sections = list(chosen.values())
        self._earlier = {} if before is None else before[0].places(before[1])
        shares = [_share(source, chosen[label], weights[label], data) for label in weights] or [1.0]
        limits = [int(data.max_epochs * layout.count) for layout in self.layouts] if data.max_epochs else None
        self.mixture = Mixture(shares, list(map(self._base, range(len(self.labels)))), limits)

    def rows(self, numbers: np.ndarray) -> Row:
        """Arrays [n, T] of rows `numbers` [n] of the stage: tokens, targets, segment_ids, document_ids, labels int32,
        loss_weights float32; labels: index into `source.labels`. Raises `RunError` beyond the last row."""
        return self.rows_and_cuts(numbers)[0]

    def rows_and_cuts(self, numbers: np.ndarray) -> tuple[Row, list[Cut], float]:
        """`rows`, what they are made of, and the seconds that reading their tokens took."""
        config, data = self.config, self.config.data
        cuts, began = self.cuts(numbers), time.perf_counter()
        tokens = self.source.read([(cut.section, *read) for cut in cuts for read in cut.reads])
        seconds = time.perf_counter() - began
        rows = make_rows(self.source, cuts, tokens, data, config.model.vocab_size)
        if data.repetition_filter and data.repetitive_rows == "masked":
            rows["loss_weights"][repetitive_rows(rows["tokens"], (rows["segment_ids"] > 0).sum(axis=1))] = 0
        label_of = {label: number for number, label in enumerate(self.source.labels)}
        rows["labels"] = np.empty_like(rows["tokens"])
        rows["labels"][:] = np.array([label_of[self.source.sections[cut.section].label] for cut in cuts])[:, None]
        return rows, cuts, seconds

    def cuts(self, numbers: np.ndarray, allow_end: bool = False) -> list[Cut]:
        """allow_end: without those beyond the last row, which are an error otherwise."""
        if allow_end and self.mixture.rows is not None:
            numbers = numbers[numbers < self.mixture.rows]
        try:
            labels, positions = self.mixture.locate(numbers)
        except IndexError as e:
            raise RunError(f"there is no row {e} of the stage: its {self.mixture.rows:,} rows are all that "
                           f"data.max_epochs={self.config.data.max_epochs} allows") from None
        cuts: list[Cut | None] = [None] * len(labels)
        for label in np.unique(labels):
            here = np.flatnonzero(labels == label)
            for i, cut in zip(here, self.layouts[label].cuts(positions[here])):
                cuts[i] = cut
        return [cut for cut in cuts if cut is not None]

    def epochs(self, rows: int) -> float:
        """How often the most-read label has been read after `rows` rows of the stage."""
        read = self.mixture.read(rows)
        return max((n / layout.count for n, layout in zip(read.tolist(), self.layouts)), default=0.0)

    def places(self, rows: int) -> dict[tuple[str, str], Place]:
        """Where every label stands, after `rows` rows of the stage, that this or an earlier stage has read: by the fingerprint
        of its source and its name."""
        read = self.mixture.read(rows).tolist()
        return self._earlier | {(self.source.fingerprint, label): Place(self.config.data, sections, layout, n)
                                for label, sections, layout, n in zip(self.labels, self.sections, self.layouts, read)}

    def _base(self, number: int) -> int:
        """The first row of a label that no stage before has read."""
        place = self._earlier.get((self.source.fingerprint, self.labels[number]))
        if place is None or not place.read or place.sections != self.sections[number]:
            return 0
        old, new = place.data, self.config.data
        if all(getattr(old, name) == getattr(new, name) for name in _SAME_ROWS):
            return place.read
        if old.order == new.order and old.shuffle == new.shuffle:
            return self.layouts[number].position(*place.layout.unread(place.read))
        return 0


def stream_of_stages(stages: Sequence[tuple[Config, Source]], rows: Sequence[int]) -> RowStream:
    """The stream of the last of the stages of a run, each a config and its documents. rows: that were read of each. The last
    one's documents must be token files; stages of text are passed over."""
    stream = before = None
    for (config, source), count in zip(stages, rows):
        if isinstance(source, TokenSource):
            stream = RowStream(config, source, before)
            before = stream, count
    assert stream is not None
    return stream


def _sections_of_labels(source: TokenSource, data: DataConfig) -> dict[str, list[int]]:
    sections: dict[str, list[int]] = {}
    for label in data.left_out:
        if label not in source.labels:
            raise InputError(f"{source.name}: no document of label {label!r}; there are {', '.join(source.labels[:50])}")
    for number, section in enumerate(source.sections):
        if not section.held_out and section.tokens and section.label not in data.left_out:
            sections.setdefault(section.label, []).append(number)
    return sections


def _key(config: Config, label: str, data: DataConfig) -> int:
    """The seed of a label's order: for the published order that of the run."""
    return config.seed if data.order == "olmo" else int(hash_text(config.seed, label)[:16], 16)


def _share(source: TokenSource, sections: Sequence[int], weight: float, data: DataConfig) -> float:
    """The share of rows (that is, of tokens) that a weight means."""
    if data.mixture_unit == "tokens":
        return weight
    chosen = [source.sections[s] for s in sections]
    return weight * sum(s.tokens for s in chosen) / max(sum(s.documents for s in chosen), 1)


