"""The functions behind `emo-jax data`."""

import itertools
import json

import pytest

from emo_jax import progress
from emo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from emo_jax.data.sources import open_source
from emo_jax.data.tokenize import open_tokenization, tokenize
from emo_jax.data.tools import bench, inspect, inspect_report


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = [f"document {i} " + "word " * (i % 7) for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(
        json.dumps({"text": t, "source": "even" if i % 2 == 0 else "odd"}) + "\n" for i, t in enumerate(texts)))
    return Config(name="t", model=ModelConfig(vocab_size=300), train=TrainConfig(batch_size=4),
                  data=DataConfig(path=str(tmp_path / "d.jsonl"), sequence_length=32, max_documents_per_row=8))


def test_inspect_counts_and_shows_a_row(config, tmp_path):
    result = inspect(config, tmp_path)
    source = open_source(config.data)
    assert result["documents"] == 60 == result["train_documents"] + result["eval_documents"]
    assert result["labels"] == {"even": 30, "odd": 30}
    assert result["bytes"] == sum(len(source[i].text.encode()) for i in range(60))
    assert sum(piece["tokens"] for piece in result["row"]) == 32
    assert json.loads(json.dumps(result)) == result
    report = inspect_report(result)
    assert "60 documents" in report and "even 30, odd 30" in report and "document 0 " in report


def test_bench_measures_each_number_of_workers(config, tmp_path):
    results = bench(config, tmp_path, workers=[0, 1], seconds=0.2)
    assert [r["workers"] for r in results] == [0, 1]
    for r in results:
        assert r["tokens_per_second"] == pytest.approx(32 * r["rows_per_second"]) and r["rows_per_second"] > 0
        assert 0 <= r["padding"] < 1


def test_reading_many_documents_shows_progress(config, tmp_path, capfd, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    inspect(config, tmp_path)
    tokenize(open_tokenization(config, tmp_path / "tokens"), 1)
    err = capfd.readouterr().err
    for work in (f"reading a sample of {config.data.path}", f"tokenizing {config.data.path}"):
        assert f"{work}: " in err and "of 60 documents" in err
