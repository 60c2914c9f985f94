"""Sources: documents by number, and a message with file and line for everything that is wrong."""

import gzip
import json
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import zstandard

from emo_jax.config import DataConfig
from emo_jax.data.order import split
from emo_jax.data.sources import open_source
from emo_jax.errors import InputError


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def lines(n, label="a", field="text"):
    return "".join(json.dumps({field: f"{label} number {i} é\n", "source": label}) + "\n" for i in range(n))


def write(path, text, kind=""):
    data = text if isinstance(text, bytes) else text.encode()
    if kind == ".gz":
        data = gzip.compress(data)
    elif kind == ".zst":  # two frames, as tools that append write them
        half = len(data) // 2
        data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
def test_jsonl_random_access(tmp_path, kind):
    path = write(tmp_path / f"d.jsonl{kind}", lines(50, "a") + "\n" + lines(50, "b"), kind)
    source = open_source(DataConfig(path=str(path)))
    assert len(source) == 100 and source.labels == ["a", "b"]
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for i in (99, 0, 50, 49):  # any order
            label = "ab"[i >= 50]
            assert copy[i].text == f"{label} number {i % 50} é\n" and copy[i].id == i
            assert copy[i].label == copy.label(i) == label
    with pytest.raises(IndexError):
        source[100]


def test_jsonl_folder_and_glob_keep_the_order_of_names(tmp_path):
    write(tmp_path / "b.jsonl", lines(2, "b"))
    write(tmp_path / "a.jsonl.gz", lines(3, "a"), ".gz")
    for path in (tmp_path, tmp_path / "*.jsonl*"):
        source = open_source(DataConfig(path=str(path)))
        assert [source.label(i) for i in range(len(source))] == ["a"] * 3 + ["b"] * 2


def test_jsonl_label_is_the_file_name_where_the_field_is_absent(tmp_path):
    path = write(tmp_path / "poems.v2.jsonl", '{"text": "x"}\n{"text": "y", "source": 7}')
    assert open_source(DataConfig(path=str(path))).labels == ["7", "poems"]


def test_jsonl_index_follows_a_changed_file(tmp_path):
    path = write(tmp_path / "d.jsonl", lines(3))
    first = open_source(DataConfig(path=str(path)))
    write(path, lines(4))
    second = open_source(DataConfig(path=str(path)))
    assert len(second) == 4 and second.fingerprint != first.fingerprint


@pytest.mark.parametrize("bad, expected", [
    ("not json\n", "not JSON"),
    ("[1, 2]\n", "a JSON list"),
    ('{"body": "x"}\n', "no field 'text' among ['body']"),
    ('{"text": 3}\n', "field 'text' is a int"),
    ('{"text": ""}\n', "field 'text' is empty"),
    ('{"text": "x", "source": {}}\n', "field 'source' (data.label_field) is a dict"),
    ('{"text": "\\ud800"}\n', "surrogate"),
    (b"\x80\x00\x01\n", "binary"),
])
@pytest.mark.parametrize("kind", ["", ".gz"])
def test_jsonl_bad_line_is_named(tmp_path, bad, expected, kind):
    bad = bad if isinstance(bad, bytes) else bad.encode()
    path = write(tmp_path / f"d.jsonl{kind}", lines(2).encode() + bad + lines(1).encode(), kind)
    with pytest.raises(InputError) as e:
        open_source(DataConfig(path=str(path)))
    assert f"{path}: line 3: " in str(e.value) and expected in str(e.value)


@pytest.mark.parametrize("kind", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_compressed_file(tmp_path, kind, damage):
    path = write(tmp_path / f"d.jsonl{kind}", lines(500), kind)
    data = path.read_bytes()
    path.write_bytes(data[:-9] if damage == "truncated" else b"garbage" + data)
    with pytest.raises(InputError, match=f"{path.name}: damaged {kind} file"):
        open_source(DataConfig(path=str(path)))


def test_missing_empty_and_ambiguous_paths(tmp_path):
    def message(**fields):
        with pytest.raises(InputError) as e:
            open_source(DataConfig(**fields))
        return str(e.value)

    assert "no such file or folder" in message(path=str(tmp_path / "nowhere"))
    assert "no file matches" in message(path=str(tmp_path / "*.jsonl"))
    assert "no documents found (it holds nothing)" in message(path=str(tmp_path))
    empty = write(tmp_path / "e.jsonl", "")
    assert f"{empty}: an empty file" in message(path=str(empty))
    assert "no documents in it" in message(path=str(write(tmp_path / "e.jsonl", "\n \n")))
    write(tmp_path / "t.txt", "text")
    assert "set data.format" in message(path=str(tmp_path))
    assert "needs data.path" in message(format="jsonl")
    assert "it holds .bin" in message(path=str(write(tmp_path / "weights.bin", "x")))
    (tmp_path / "dataset").mkdir()
    write(tmp_path / "dataset" / "dataset_info.json", "{}")
    assert "no TFDS dataset" in message(path=str(tmp_path / "dataset"))


def test_text_folder(tmp_path):
    (tmp_path / "poems" / "old").mkdir(parents=True)
    write(tmp_path / "poems" / "old" / "1.txt", "one é")
    write(tmp_path / "2.txt", "two")
    write(tmp_path / "notes.md", "not a document")
    source = open_source(DataConfig(path=str(tmp_path)))
    documents = [(d.text, d.label, d.id) for d in (source[0], source[1])]
    assert documents == [("two", tmp_path.name, 0), ("one é", "poems", 1)]
    for data, expected in ((b"a\0b", "a binary file"), (b"\xff\xfe", "not UTF-8"), (b"", "an empty file")):
        bad = write(tmp_path / "poems" / "bad.txt", data)
        with pytest.raises(InputError) as e:
            open_source(DataConfig(path=str(tmp_path)))
        assert f"{bad}: {expected}" in str(e.value)


def test_embedded_default_has_labels_enough_and_is_the_same_every_time():
    source, again = open_source(DataConfig()), open_source(DataConfig())
    counts = Counter(source.label(i) for i in range(len(source)))
    assert sum(n >= 100 for n in counts.values()) >= 4, counts
    sizes = [len(source[i].text.encode()) for i in range(len(source))]
    assert max(sizes) <= 20_000 and min(sizes) > 0 and 5e6 < sum(sizes) < 45e6
    assert again.fingerprint == source.fingerprint and again[7] == pickle.loads(pickle.dumps(source))[7]


def test_tfds_without_tensorflow(tmp_path):
    program = f"""
import sys, pickle
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({{
            "text": tfds.features.Text(), "source": tfds.features.ClassLabel(names=["x", "y"])}}))
    def _split_generators(self, manager):
        return {{"train": self._generate_examples()}}
    def _generate_examples(self):
        for i in range(40):
            yield i, {{"text": f"document {{i}} é", "source": i % 2}}

builder = Tiny(data_dir={str(tmp_path)!r}, file_format="array_record")
builder.download_and_prepare()

from emo_jax.config import DataConfig
from emo_jax.data.sources import open_source
from emo_jax.errors import InputError
path = str(builder.data_path)
source = pickle.loads(pickle.dumps(open_source(DataConfig(path=path))))
documents = [source[i] for i in range(len(source))]
assert sorted(d.text for d in documents) == sorted(f"document {{i}} é" for i in range(40))
assert all(d.label == "xy"[int(d.text.split()[1]) % 2] and documents[d.id] == d for d in documents)
for fields, expected in ((dict(tfds_split="dev"), "has the splits ['train']"),
                         (dict(text_field="body"), "has the fields")):
    try:
        open_source(DataConfig(path=path, **fields))
    except InputError as e:
        assert expected in str(e), e
    else:
        raise AssertionError(fields)
assert len(open_source(DataConfig(path=path, tfds_split="train[:10]"))) == 10
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("done\n"), done.stderr


def test_split_is_by_document_and_stable(tmp_path):
    source = open_source(DataConfig(path=str(write(tmp_path / "d.jsonl", lines(30_000)))))
    train, held_out = split(source, DataConfig(eval_fraction=0.05), seed=1)
    numbers = np.array([train[i] for i in range(len(train))])
    assert np.array_equal(np.sort(np.concatenate([numbers, held_out])), np.arange(30_000))  # each exactly once
    assert 1300 < len(held_out) < 1700
    longer = open_source(DataConfig(path=str(write(tmp_path / "e.jsonl", lines(40_000)))))
    assert np.array_equal(split(longer, DataConfig(eval_fraction=0.05), seed=1)[1][:len(held_out)], held_out)
    assert not np.array_equal(split(source, DataConfig(eval_fraction=0.05), seed=2)[1], held_out)
    assert len(split(source, DataConfig(eval_fraction=0.0), seed=1)[1]) == 0


def test_split_of_a_small_source_takes_one_of_each_label(tmp_path):
    path = write(tmp_path / "d.jsonl", lines(3, "a") + lines(1, "b") + lines(2, "c"))
    source = open_source(DataConfig(path=str(path)))
    train, held_out = split(source, DataConfig(eval_fraction=1e-9), seed=0)
    assert sorted(source.label(i) for i in held_out) == ["a", "c"] and len(train) == 4
    alone = open_source(DataConfig(path=str(write(tmp_path / "one.jsonl", lines(1)))))
    assert len(split(alone, DataConfig(eval_fraction=0.9), seed=0)[0]) == 1


def test_labels_can_be_left_out(tmp_path):
    path = write(tmp_path / "d.jsonl", lines(30, "a") + lines(20, "b") + lines(10, "c"))
    source = open_source(DataConfig(path=str(path)))
    train, held_out = split(source, DataConfig(eval_fraction=0.2, leave_out_labels="b,c"), seed=0)
    read = [train[i] for i in range(len(train))] + held_out.tolist()
    assert sorted(read) == list(range(30)) and len(held_out)
    with pytest.raises(InputError, match="no document of label 'd'; there are a, b, c"):
        split(source, DataConfig(leave_out_labels="a,d"), seed=0)
    with pytest.raises(InputError, match="no documents to train on besides those of data.leave_out_labels='a,b,c'"):
        split(source, DataConfig(leave_out_labels="a,b,c"), seed=0)
