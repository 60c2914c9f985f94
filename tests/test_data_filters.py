"""The repetition filter for blocks of rows: exactly the one for a row, at a fraction of its time."""

import time

import numpy as np
import pytest

from emo_jax.data.filters import MAX_PERIOD, MIN_TIMES, is_repetitive, repetitive_rows


def planted(rng, rows, length, vocab):
    """Random rows, most with a repeat of about MIN_TIMES times: one pair too few, just enough, or broken once."""
    tokens = rng.integers(0, vocab, (rows, length))
    for row in tokens:
        period = int(rng.integers(1, MAX_PERIOD + 3))
        size = MIN_TIMES * period + int(rng.integers(-2, 3))
        if rng.random() < 0.2 or size > length:
            continue
        start = int(rng.choice([0, length - size, rng.integers(0, length - size + 1)]))
        row[start:start + size] = np.resize(rng.integers(0, vocab, period), size)
        if rng.random() < 0.3:
            row[start + int(rng.integers(0, size))] += 1
    return tokens


@pytest.mark.parametrize("vocab", [2, 50, 100_000])
@pytest.mark.parametrize("length", [1, 13, 33, 500, 1027])
def test_a_block_of_rows_gives_what_each_row_gives(vocab, length):
    rng = np.random.default_rng(length + vocab)
    tokens = planted(rng, 300, length, vocab)
    lengths = rng.integers(0, length + 1, len(tokens))
    tokens[np.arange(length) >= lengths[:, None]] = 0  # padding, which repeats
    for kind in (np.int32, np.uint32, np.uint16 if vocab < 2**16 else np.int64):
        rows = tokens.astype(kind)
        expected = np.array([is_repetitive(row[:n]) for row, n in zip(rows, lengths)])
        assert np.array_equal(repetitive_rows(rows, lengths), expected)
    whole = planted(rng, 300, length, vocab)
    expected = np.array([is_repetitive(row) for row in whole])
    assert np.array_equal(repetitive_rows(whole), expected)
    assert length < 500 or vocab == 2 or 30 < expected.sum() < 270


def test_a_block_of_rows_is_many_times_as_fast():
    tokens = np.random.default_rng(0).integers(0, 50_000, (512, 4096)).astype(np.uint16)

    def seconds(run):
        began = time.process_time()
        run()
        return time.process_time() - began

    block = min(seconds(lambda: repetitive_rows(tokens)) for _ in range(3))
    assert 8 * block < seconds(lambda: [is_repetitive(row) for row in tokens])
