"""The functions behind `emo-jax data`."""

import itertools
import json

import numpy as np
import pytest

from emo_jax import progress
from emo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from emo_jax.data.sources import open_source
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.data.tools import bench, inspect, inspect_report, tokenize
from emo_jax.errors import InputError


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = [f"document {i} " + "word " * (i % 7) for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(
        json.dumps({"text": t, "source": "even" if i % 2 == 0 else "odd"}) + "\n" for i, t in enumerate(texts)))
    return Config(name="t", model=ModelConfig(vocab_size=300), train=TrainConfig(batch_size=4),
                  data=DataConfig(path=str(tmp_path / "d.jsonl"), sequence_length=32, max_documents_per_row=8))


def test_tokenize_writes_every_document(config, tmp_path):
    out = tmp_path / "tokens"
    result = tokenize(config, out)
    tokens, offsets = np.load(out / "tokens.npy"), np.load(out / "offsets.npy")
    meta = json.loads((out / "documents.json").read_text())
    source, tokenizer = open_source(config.data), Tokenizer(meta["tokenizer"], config.data.eos_token)
    assert result == {"documents": 60, "tokens": len(tokens), "out": str(out)} and tokens.dtype == np.uint16
    for i in range(60):
        ids = tokens[offsets[i]:offsets[i + 1]]
        assert ids[-1] == meta["eos_id"] and tokenizer.decode(ids[:-1]) == source[i].text
        assert meta["labels"][meta["label_of_document"][i]] == source[i].label
    assert {p.name for p in out.iterdir()} == {"tokens.npy", "offsets.npy", "documents.json", "tokenizer.json"}
    with pytest.raises(InputError, match="exists; give another folder"):
        tokenize(config, out)


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
    tokenize(config, tmp_path / "tokens")
    err = capfd.readouterr().err
    for work in (f"reading a sample of {config.data.path}", f"tokenizing {config.data.path}"):
        assert f"{work}: " in err and "of 60 documents" in err
