"""Unreadable documents: refused with file and record, or skipped and counted up to a share; nothing else moves."""

import dataclasses
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from emo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from emo_jax.data.documents import UnreadableDocument
from emo_jax.data.evaluation import evaluation_rows
from emo_jax.data.packing import pack
from emo_jax.data.pipeline import FIELDS, make_train_iterator
from emo_jax.data.skipping import EARLY
from emo_jax.data.sources import open_source
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.errors import InputError

BAD = (3, 40, 41, 90)  # of 100 documents


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Words, unknown ones included, and the end."""
    words = {"<|endoftext|>": 0, "?": 1} | {f"w{i}": 2 + i for i in range(100)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<|endoftext|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(made.to_str())
    return Tokenizer(path, "<|endoftext|>")


def parquet(path, bad=BAD, count=100):
    """Documents of 1 to 9 words; those of `bad` are no UTF-8."""
    texts = [b"\xff\xfe" if i in bad else b" ".join(b"w%d" % ((i + j) % 100) for j in range(1 + i % 9)) for i in range(count)]
    pq.write_table(pa.table({"text": pa.array(texts, pa.binary()), "source": ["ab"[i % 2] for i in range(count)]}), path,
                   row_group_size=16)
    return path


def config(path, **data):
    data = dict(path=str(path), sequence_length=16, max_documents_per_row=5, workers=0, eval_fraction=0.0,
                repetition_filter=False) | data
    return Config(name="t", model=ModelConfig(vocab_size=128), train=TrainConfig(batch_size=4, eval_rows=8),
                  data=DataConfig(**data))


def read(config, tokenizer, count, states=None, host=0, hosts=1):
    iterator = make_train_iterator(config, open_source(config.data), tokenizer, host, hosts, states)
    batches = [next(iterator) for _ in range(count)]
    state, counts = iterator.state(), iterator.statistics()
    iterator.close()
    return batches, state, counts


def test_without_a_share_the_first_bad_document_stops_with_its_record(tmp_path, tokenizer):
    path = parquet(tmp_path / "d.parquet")
    source = open_source(config(path).data)
    with pytest.raises(UnreadableDocument, match="d.parquet: record 4: field 'text' is not UTF-8 text"):
        source.encoded(3, tokenizer)
    with pytest.raises(InputError, match=r"d.parquet: record \d+: field 'text' is not UTF-8 text"):
        read(config(path), tokenizer, 40)


@pytest.mark.parametrize("packing", ["concat_and_split", "first_fit"])
def test_skipped_documents_leave_no_trace_in_the_rows(tmp_path, tokenizer, packing):
    c = config(parquet(tmp_path / "d.parquet"), max_skipped=0.05, packing=packing)
    batches, state, counts = read(c, tokenizer, 24)
    seen = {int(i) for b in batches for i in b["document_ids"][b["segment_ids"] > 0]}
    assert not seen & set(BAD) and len(seen) >= 95 and counts["skipped_documents"] >= len(BAD)
    assert all(set(b) == set(FIELDS) for b in batches)
    assert len({tuple(np.unique(b["tokens"])) for b in batches}) > 1
    for cut in (1, 7):
        head, middle, _ = read(c, tokenizer, cut)
        again, end, _ = read(c, tokenizer, 24 - cut, middle)
        for one, other in zip(batches, head + again):
            assert all(np.array_equal(one[name], other[name]) for name in FIELDS)
        assert end == state
    halves = [read(c, tokenizer, 24, host=host, hosts=2)[0] for host in range(2)]
    for k, batch in enumerate(batches):
        assert np.array_equal(batch["tokens"], np.concatenate([half[k]["tokens"] for half in halves]))


@pytest.mark.parametrize("packing", ["concat_and_split", "first_fit"])
def test_a_packer_passes_over_documents_without_tokens(packing):
    rng = np.random.default_rng(0)
    full = [(rng.integers(1, 9, n).astype(np.int32), i) for i, n in enumerate([3, 0, 0, 20, 1, 0, 7, 0])]

    def reading(documents):
        return lambda count: documents[count] if count < len(documents) else None

    with_empty = [row for row, _ in pack(packing, reading(full), 8, 4, True)]
    without = [row for row, _ in pack(packing, reading([d for d in full if len(d[0])]), 8, 4, True)]
    assert len(with_empty) == len(without) > 3
    for one, other in zip(with_empty, without):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_beyond_the_share_reading_stops_with_the_last_record(tmp_path, tokenizer, capfd):
    c = config(parquet(tmp_path / "d.parquet"), max_skipped=0.03)
    source = open_source(c.data)
    for i in BAD[:3] + BAD[:3]:  # the same ones again are not more of them
        assert source.encoded(i, tokenizer).shape == (0,) and source[i].text == "" and source.label(i) == "ab"[i % 2]
    assert "skipped 1 documents that cannot be read; the first: " in capfd.readouterr().err
    with pytest.raises(InputError) as e:
        source.encoded(BAD[3], tokenizer)
    assert str(e.value).startswith(f"{c.data.path}: record 91: field 'text' is not UTF-8 text")
    assert "4 of 100 documents cannot be read, more than data.max_skipped=0.03 allows" in str(e.value)


def test_many_bad_documents_stop_early(tmp_path, tokenizer):
    path = parquet(tmp_path / "d.parquet", bad=range(100, 1000), count=20_000)
    source = open_source(config(path, max_skipped=0.1).data)
    with pytest.raises(InputError, match=f"record {101 + EARLY}: "):
        for i in range(20_000):
            source.encoded(i, tokenizer)


def jsonl(path, bad, count=100):
    lines = [b'{"text": "\xff"}' if i in bad else json.dumps({"text": f"w{i}"}).encode() for i in range(count)]
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(b"\n".join(lines))
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_lines_are_skipped_and_counted_when_a_file_is_first_checked(tmp_path, name, capfd):
    path = jsonl(tmp_path / name, BAD)
    with pytest.raises(InputError, match=f"{name}: line 4: not UTF-8"):
        open_source(DataConfig(path=str(path)))
    for _ in range(2):  # the second time from the index
        source = open_source(DataConfig(path=str(path), max_skipped=0.04))
        assert [source[i].text for i in range(len(source))] == [f"w{i}" for i in range(100) if i not in BAD]
        told = capfd.readouterr().err
        assert f"{path}: skipped 4 documents that cannot be read; the first: {path}: line 4: not UTF-8" in told
    with pytest.raises(InputError) as e:
        open_source(DataConfig(path=str(path), max_skipped=0.03))
    assert f"{path}: line 91: not UTF-8" in str(e.value) and "4 of 100 documents" in str(e.value)


def test_text_files_are_skipped_and_counted(tmp_path, capfd):
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_bytes(b"\xff" if i == 7 else b"text %d" % i)
    with pytest.raises(InputError, match=f"{tmp_path / '07.txt'}: not UTF-8"):
        open_source(DataConfig(path=str(tmp_path)))
    source = open_source(DataConfig(path=str(tmp_path), max_skipped=0.05))
    assert len(source) == 19 and source[7].text == "text 8" and "skipped 1" in capfd.readouterr().err


def test_evaluation_leaves_out_what_cannot_be_read(tmp_path, tokenizer):
    c = config(parquet(tmp_path / "d.parquet", bad=range(1, 100, 2)), max_skipped=0.5)  # all of label b
    rows = evaluation_rows(c, open_source(c.data), tokenizer, np.arange(100))
    assert [label for label, _ in rows] == ["a"]


def test_token_ids_beyond_the_vocabulary_and_documents_without_any_are_skipped_too(tmp_path, tokenizer):
    ids = [[2, 3, 4], [], [5, 102], [6, 7]] * 10
    pq.write_table(pa.table({"ids": pa.array(ids, pa.list_(pa.int32()))}), tmp_path / "t.parquet")
    c = config(tmp_path / "t.parquet", tokens_field="ids", tokenizer=str(tokenizer.path))
    source = open_source(c.data)
    with pytest.raises(InputError, match="t.parquet: record 2: field 'ids' is empty"):
        source.encoded(1, tokenizer)
    with pytest.raises(InputError, match="t.parquet: record 3: token 2 is 102; expected ids in 0..101"):
        source.encoded(2, tokenizer)
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, max_skipped=0.5))
    (batch, *_), _, counts = read(c, tokenizer, 10)
    assert set(np.unique(batch["tokens"])) == {0, 2, 3, 4, 6, 7} and counts["skipped_documents"] > 10


def test_repetitive_rows_can_be_dropped_from_the_stream(tmp_path, tokenizer):
    texts = ["w1 " * 200 if i % 3 == 0 else " ".join(f"w{(i * j) % 97}" for j in range(199)) for i in range(61)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    c = config(tmp_path / "d.jsonl", sequence_length=50, repetition_filter=True, shuffle=False)
    masked, _, counts = read(c, tokenizer, 40)
    assert counts["filtered_rows"] > 30 and not counts["dropped_rows"]
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, repetitive_rows="dropped"))
    dropped, state, counts = read(c, tokenizer, 20)
    assert counts["dropped_rows"] > 10 and not counts["filtered_rows"] and counts["rows"] == 80
    for row in range(4):  # the rows that are left are those of the stream, in its order
        kept = [b["tokens"][row] for b in masked if b["loss_weights"][row].any()]
        assert all(np.array_equal(one, b["tokens"][row]) for one, b in zip(kept, dropped)) and len(kept) > 20
    again, end, _ = read(c, tokenizer, 11, read(c, tokenizer, 9)[1])
    assert end == state and np.array_equal(again[-1]["tokens"], dropped[-1]["tokens"])
    (tmp_path / "same.jsonl").write_text(json.dumps({"text": "w1 " * 2000}) + "\n")
    with pytest.raises(InputError, match="1,000 rows in turn are repetitive"):
        same = dataclasses.replace(c.data, path=str(tmp_path / "same.jsonl"), sequence_length=128)
        read(dataclasses.replace(c, data=same), tokenizer, 1)
