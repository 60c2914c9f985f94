"""Files that are damaged or change during a run, and a very long document: a message with the file, soon."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from emo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from emo_jax.data.inspect import inspect
from emo_jax.data.pipeline import LONG, make_train_iterator
from emo_jax.data.sources import open_source
from emo_jax.data.tokenizer import LONG_TEXT, Tokenizer
from emo_jax.errors import InputError, RunError


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def config(tmp_path):
    """Of documents in `path`, with a tokenizer of three words."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "?": 1, "a": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    fields = dict(tokenizer=str(tmp_path / "tokenizer.json"), sequence_length=64, workers=0, eval_fraction=0.0)
    return lambda path, **data: Config(name="t", model=ModelConfig(vocab_size=8), train=TrainConfig(batch_size=4),
                                       data=DataConfig(path=str(path), **fields, **data))


def test_a_damaged_gzip_member_in_the_middle_is_told_with_its_place(tmp_path):
    members = [gzip.compress(b"".join(json.dumps({"text": f"{i} {os.urandom(40).hex()}"}).encode() + b"\n"
                                      for i in range(part, part + 2000))) for part in (0, 2000, 4000)]
    for name, damaged in (("bits", members[1][:5000] + bytes(100) + members[1][5100:]), ("header", b"xx" + members[1][2:]),
                          ("end", members[1][:-8] + bytes(8))):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(members[0] + damaged + members[2])
        with pytest.raises(InputError) as e:
            open_source(DataConfig(path=str(path)))
        message = str(e.value)
        line = int(message.partition("in or after line ")[2].partition(" ")[0].replace(",", ""))
        assert message.startswith(f"{path}: damaged .gz file after ") and line <= 4001


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_that_shrinks_during_a_run_stops_it_with_its_name(tmp_path, config, kind):
    path, texts = tmp_path / f"d.{kind}", ["a " * 100] * 200
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    else:
        pq.write_table(pa.table({"text": texts}), path, row_group_size=10)
    c = config(path)
    iterator = make_train_iterator(c, open_source(c.data), Tokenizer(c.data.tokenizer, c.data.eos_token))
    next(iterator)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(RunError, match=rf"d\.{kind}: .*changed while in use"):
        for _ in range(200):
            next(iterator)
    iterator.close()


def test_a_document_of_ten_megabytes_on_one_line_is_said_and_tokenized_twice(tmp_path, config, capfd):
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "a " * 5_000_000}) + "\n")
    result = inspect(config(tmp_path / "d.jsonl"), tmp_path)
    assert result["documents"] == 1 and result["bytes"] == 10_000_000 and result["rows"][0][0]["tokens"] == 64
    assert capfd.readouterr().err.count("tokenizing a document of 10,000,000 characters") == 2  # the sample, and the row


def test_a_long_document_is_tokenized_once_for_all_rows(tmp_path, config, capfd):
    text = "a " * (max(LONG, LONG_TEXT // 2) + 1)
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "a"}) + "\n")
    c = config(tmp_path / "d.jsonl", shuffle=False)
    iterator = make_train_iterator(c, open_source(c.data), Tokenizer(c.data.tokenizer, c.data.eos_token))
    batch = next(iterator)
    iterator.close()
    assert (batch["document_ids"][::2] == 0).all() and capfd.readouterr().err.count("tokenizing a document") == 1
