"""Packing and the repetition filter: rows by hand, properties, and going on from any row."""

import itertools

import numpy as np
import pytest

from emo_jax.data.filters import is_repetitive
from emo_jax.data.packing import documents_read, pack, state_width
from emo_jax.errors import InputError

PACKERS = ["concat_and_split", "first_fit"]


def reader(documents):
    def read(count):
        return (np.array(documents[count], np.int32), 100 + count) if count < len(documents) else None
    return read


def rows_of(packing, documents, length, max_documents=64, count_ends=True, state=None):
    return list(pack(packing, reader(documents), length, max_documents, count_ends, state))


def values(row):
    return {name: array.tolist() for name, array in row.items()}


def test_concat_and_split_by_hand():
    documents = [[1, 2, 9], [3, 4, 5, 6, 9], [9]]  # 9 ends a document; the last one is empty
    rows = rows_of("concat_and_split", documents, 4)
    assert [values(row) for row, _ in rows] == [
        {"tokens": [1, 2, 9, 3], "targets": [2, 9, 3, 4], "segment_ids": [1, 1, 1, 2],
         "document_ids": [100, 100, 100, 101], "loss_weights": [1, 1, 1, 1]},
        {"tokens": [4, 5, 6, 9], "targets": [5, 6, 9, 9], "segment_ids": [1, 1, 1, 1],
         "document_ids": [101, 101, 101, 101], "loss_weights": [1, 1, 1, 1]},
        {"tokens": [9, 0, 0, 0], "targets": [0, 0, 0, 0], "segment_ids": [1, 0, 0, 0],
         "document_ids": [102, 0, 0, 0], "loss_weights": [0, 0, 0, 0]}]
    assert [state for _, state in rows] == [[1, 1], [2, 0], [3, 0]]
    masked = rows_of("concat_and_split", documents, 4, count_ends=False)
    assert [row["loss_weights"].tolist() for row, _ in masked] == [[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]


def test_first_fit_by_hand():
    documents = [[1, 2, 9], [3, 4, 5, 6, 7, 8, 9], [10, 9], [9], [11, 12, 9]]
    rows = rows_of("first_fit", documents, 5)
    assert [values(row) for row, _ in rows] == [
        {"tokens": [3, 4, 5, 6, 7], "targets": [4, 5, 6, 7, 8], "segment_ids": [1, 1, 1, 1, 1],
         "document_ids": [101] * 5, "loss_weights": [1, 1, 1, 1, 1]},  # too long: its first five, then the rest
        {"tokens": [1, 2, 9, 8, 9], "targets": [2, 9, 8, 9, 0], "segment_ids": [1, 1, 1, 2, 2],
         "document_ids": [100, 100, 100, 101, 101], "loss_weights": [1, 1, 1, 1, 0]},
        {"tokens": [10, 9, 9, 0, 0], "targets": [9, 9, 0, 0, 0], "segment_ids": [1, 1, 2, 0, 0],
         "document_ids": [102, 102, 103, 0, 0], "loss_weights": [1, 1, 0, 0, 0]},
        {"tokens": [11, 12, 9, 0, 0], "targets": [12, 9, 0, 0, 0], "segment_ids": [1, 1, 1, 0, 0],
         "document_ids": [104, 104, 104, 0, 0], "loss_weights": [1, 1, 0, 0, 0]}]
    masked = rows_of("first_fit", documents, 5, count_ends=False)
    assert masked[1][0]["loss_weights"].tolist() == [1, 1, 0, 1, 0]


def some_documents(n=300, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(1, 50, rng.integers(0, longest)), 0).tolist() for _ in range(n)]


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("max_documents", [2, 64])
def test_no_token_is_lost_or_moved(packing, max_documents):
    documents, length = some_documents(), 32
    seen = {i: [] for i in range(len(documents))}
    for row, _ in rows_of(packing, documents, length, max_documents):
        real = row["segment_ids"] > 0
        n = real.sum()
        assert real[:n].all() and row["segment_ids"].max() <= max_documents
        assert not any(array[n:].any() for array in row.values())  # padding is 0 everywhere, without loss
        assert (row["targets"][:n - 1] == row["tokens"][1:n]).all() and row["loss_weights"][:n - 1].all()
        for segment in range(1, row["segment_ids"].max() + 1):
            at = row["segment_ids"] == segment
            assert len(set(row["document_ids"][at])) == 1  # nothing merged
            seen[row["document_ids"][at][0] - 100].append(row["tokens"][at].tolist())
    for i, pieces in seen.items():
        assert list(itertools.chain(*pieces)) == documents[i]
        if packing == "first_fit" and len(documents[i]) <= length:
            assert len(pieces) == 1  # whole


def test_a_row_is_closed_at_the_document_limit_and_keeps_its_next_target():
    rows = rows_of("concat_and_split", [[1, 9], [2, 9], [3, 9]], 8, max_documents=2)
    assert [row["tokens"].tolist() for row, _ in rows] == [[1, 9, 2, 9, 0, 0, 0, 0], [3, 9, 0, 0, 0, 0, 0, 0]]
    assert rows[0][0]["targets"].tolist() == [9, 2, 9, 3, 0, 0, 0, 0]
    assert rows[0][0]["loss_weights"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("packing", PACKERS)
def test_goes_on_from_every_row(packing):
    documents = some_documents(120, seed=3)
    rows = rows_of(packing, documents, 32, max_documents=4)
    for k in range(len(rows)):
        again = rows_of(packing, documents, 32, max_documents=4, state=list(rows[k][1]))
        assert [(values(r), s) for r, s in again] == [(values(r), s) for r, s in rows[k + 1:]]
        assert len(rows[k][1]) <= state_width(packing, 4) and documents_read(rows[k][1]) <= len(documents)


def test_first_fit_wastes_little():
    rows = rows_of("first_fit", some_documents(2000, longest=120), 256)
    assert np.mean([(row["segment_ids"] == 0).mean() for row, _ in rows]) < 0.05


def test_a_state_of_other_data_or_another_packing_is_refused():
    for packing, state, expected in (("concat_and_split", [0, 30], "not those that the checkpoint"),
                                     ("concat_and_split", [0, 0, 1, 0, 0], "data.packing"),
                                     ("first_fit", [9, 0, 1, 8, 0], "not those that the checkpoint"),
                                     ("first_fit", [3, 0, 2, 0, 0, 1, 0], "data.sequence_length")):
        with pytest.raises(InputError, match=expected):
            rows_of(packing, [[1, 2, 9], [3, 4, 9], [9], [9]], 4, state=state)


def brute_force(tokens, max_period, times):
    """Some period that is written `times` times in a row, tried at every place."""
    return any(tokens[i:i + m] * times == tokens[i:i + m * times]
               for m in range(1, max_period + 1) for i in range(len(tokens) - m * times + 1))


def test_repetition_filter_against_brute_force():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(600):
        tokens = rng.integers(0, 3, rng.integers(0, 40)).tolist()
        if rng.random() < 0.7:  # plant one that is near the limit
            period = rng.integers(0, 3, rng.integers(1, 6)).tolist()
            planted = (period * 6)[:rng.integers(3 * len(period), 5 * len(period) + 1)]
            at = rng.integers(0, len(tokens) + 1)
            tokens = tokens[:at] + planted + tokens[at:]
        expected = brute_force(tokens, 4, 4)
        assert is_repetitive(np.array(tokens, np.int32), 4, 4) == expected
        hits += expected
    assert 100 < hits < 550


def test_repetition_filter_limits():
    noise = np.arange(100, 200, dtype=np.int32)
    for period in (1, 2, 13):
        repeated = np.tile(np.arange(period, dtype=np.int32), 32)
        assert is_repetitive(np.concatenate([noise, repeated, noise]))
        assert not is_repetitive(np.concatenate([noise, repeated[:-1], noise]))
    assert not is_repetitive(np.tile(np.arange(14, dtype=np.int32), 40))
