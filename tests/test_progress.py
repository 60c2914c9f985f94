"""Progress of long work: on standard error, only where it takes long, with what a person wants to know."""

import jax
import pytest

from emo_jax import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def work(clock, items, seconds):
    for item in progress.track(items, "reading x", "documents"):
        clock[0] += seconds
        yield item


def test_a_line_every_few_seconds_says_how_much_how_fast_and_how_long(clock, capsys):
    assert list(work(clock, range(8000), 0.001)) == list(range(8000))
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 2
    assert captured.err.splitlines()[0].startswith("reading x: 3,0") and "of 8,000 documents (38 %)" in captured.err
    assert "1,000 a second, 0:00:05 left" in captured.err
    assert list(work(clock, iter("abc"), 7200)) == ["a", "b", "c"]  # nobody knows how many
    assert capsys.readouterr().err.splitlines()[1] == "reading x: 2 documents, 0.00014 a second"


def test_short_work_says_nothing(clock, capsys):
    assert list(work(clock, range(100), 0.02)) == list(range(100))
    assert list(work(clock, [], 60)) == []
    assert capsys.readouterr().err == ""


def test_a_work_of_bytes_counts_what_it_is_told(clock, capsys):
    bar = progress.Progress("unpacking", 0)
    clock[0] += 4
    bar.update(0)
    bar.total = 10_000_000
    clock[0] += 4
    bar.update(4_000_000)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "unpacking: 0 of 0 bytes (0 %), 0 a second"
    assert second == "unpacking: 4,000,000 of 10,000,000 bytes (40 %), 500,000 a second, 0:00:12 left"


def test_of_several_processes_one_speaks(clock, capsys, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for index in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        list(work(clock, range(2), 4))
        assert len(capsys.readouterr().err.splitlines()) == (0 if index else 2)
