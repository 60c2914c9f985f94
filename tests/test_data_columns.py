"""ArrayRecord, Parquet and Arrow: the same documents from each, and a message with file and record for what is wrong."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto.tf_example_generated_pb2 import Example

from emo_jax.config import DataConfig
from emo_jax.data import columns
from emo_jax.data.documents import UnreadableDocument
from emo_jax.data.order import split
from emo_jax.data.sources import open_source
from emo_jax.errors import InputError, RunError

DOCUMENTS = [{"text": f"document {i} é " * (1 + i % 7), "source": "abc"[i % 3], "ids": list(range(i % 5 + 1))}
             for i in range(90)]


class Tokens:
    """As much of a tokenizer as a source of token ids needs."""

    eos_id, vocab_size, sha256 = 99, 100, ""

    def encode_document(self, text):
        raise AssertionError("token ids are not tokenized")


def example(document):
    """A tf.train.Example, as TFDS and MaxText write one."""
    made = Example()
    for name, value in document.items():
        feature = made.features.feature[name]
        if isinstance(value, list):
            feature.int64_list.value.extend(value)
        else:
            feature.bytes_list.value.append(value.encode())
    return made.SerializeToString()


def array_records(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def table(documents):
    return pa.table({"text": [d["text"] for d in documents], "source": [d["source"] for d in documents],
                     "ids": pa.array([d["ids"] for d in documents], pa.list_(pa.uint16()))})


def arrow_stream(path, made, batch=17):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, made.schema) as writer:
        writer.write_table(made, max_chunksize=batch)
    return path


def saved_dataset(folder, made, files=2):
    """What `datasets.Dataset.save_to_disk` writes; test_a_dataset_that_was_saved_by_datasets compares."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    each = -(-len(made) // files)
    for i, name in enumerate(names):
        arrow_stream(folder / name, made.slice(i * each, each))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names], "_split": None}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def write(kind, folder):
    """DOCUMENTS in one or two files of a kind; what `data.path` is."""
    half, made = len(DOCUMENTS) // 2, table(DOCUMENTS)
    if kind in ("example", "json", "text"):
        def record(d):
            return example(d) if kind == "example" else (json.dumps(d) if kind == "json" else d["text"]).encode()
        for i, part in enumerate((DOCUMENTS[:half], DOCUMENTS[half:])):
            array_records(folder / f"c4-train.array_record-{i:05d}-of-00002", map(record, part))
    elif kind == "parquet":
        pq.write_table(made.slice(0, half), folder / "train-00000-of-00002.parquet", row_group_size=10)
        pq.write_table(made.slice(half), folder / "train-00001-of-00002.parquet", row_group_size=7)
    elif kind == "stream":
        return arrow_stream(folder / "train.arrow", made)
    elif kind == "file":
        coded = made.set_column(1, "source", made["source"].dictionary_encode())
        with pa.OSFile(str(folder / "train.arrow"), "wb") as file, pa.ipc.new_file(file, coded.schema) as writer:
            writer.write_table(coded, max_chunksize=13)
    elif kind == "saved":
        saved_dataset(folder / "set", made)
        arrow_stream(folder / "set" / "cache-1234.arrow", made)  # of a later `map`, no part of the dataset
        return folder / "set"
    elif kind == "dict":
        for split_name, part in (("train", made), ("test", made.slice(0, 3))):
            saved_dataset(folder / "set" / split_name, part)
        (folder / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
        return folder / "set"
    elif kind == "jsonl":
        (folder / "d.jsonl").write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    return folder


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("kind", ["example", "json", "text", "parquet", "stream", "file", "saved", "dict", "jsonl"])
def test_every_format_gives_the_same_documents_by_number(tmp_path, kind):
    source = open_source(DataConfig(path=str(write(kind, tmp_path))))
    assert len(source) == len(DOCUMENTS)
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for i in (89, 0, 45, 44, 17, 63):  # any order
            document = copy[i]
            assert (document.text, document.id) == (DOCUMENTS[i]["text"], i)
            assert document.label == copy.label(i) == ("c4-train" if kind == "text" else DOCUMENTS[i]["source"])
    with pytest.raises(IndexError):
        source[90]
    assert source.fingerprint == open_source(DataConfig(path=source.name)).fingerprint
    assert len(pickle.dumps(source)) < 20_000


@pytest.mark.parametrize("kind", ["example", "json", "parquet", "saved", "jsonl"])
def test_token_ids_are_documents_with_an_end(tmp_path, kind):
    source = open_source(DataConfig(path=str(write(kind, tmp_path)), tokens_field="ids"))
    for i in (0, 4, 88):
        assert source.encoded(i, Tokens()).tolist() == [*DOCUMENTS[i]["ids"], 99] and source[i].text == ""
        assert source.encoded(i, Tokens()).dtype == np.int32
    few = Tokens()
    few.vocab_size, few.eos_id = 4, 3
    assert source.encoded(3, few).tolist() == [0, 1, 2, 3]  # it has an end
    with pytest.raises(UnreadableDocument, match=r"(record|document) 5: token 5 is 4; expected ids in 0..3"):
        source.encoded(4, few)


def test_labels_are_the_files_where_documents_have_none(tmp_path):
    for folder, name in ((tmp_path / "law", "00000.parquet"), (tmp_path, "poems-00000-of-00003.parquet")):
        folder.mkdir(exist_ok=True)
        pq.write_table(table(DOCUMENTS).select(["text"]), folder / name)
    source = open_source(DataConfig(path=str(tmp_path)))
    assert source.labels == ["law", "poems"] and source.label(0) == "law" and source.label(179) == "poems"
    _, held_out = split(source, DataConfig(eval_fraction=0.0, leave_out_labels="law"), 0)
    assert len(split(source, DataConfig(eval_fraction=0.0, leave_out_labels="law"), 0)[0]) == 90 and not len(held_out)


def test_class_labels_have_names(tmp_path):
    described = json.dumps({"info": {"features": {"source": {"names": ["x", "y", "z"], "_type": "ClassLabel"}}}})
    made = pa.table({"text": ["one", "two"], "source": [2, None]}).replace_schema_metadata({"huggingface": described})
    pq.write_table(made, tmp_path / "p.parquet")
    saved_dataset(tmp_path / "saved", made, files=1)
    for path, default in ((tmp_path / "p.parquet", "p"), (tmp_path / "saved", "saved")):
        source = open_source(DataConfig(path=str(path)))
        assert [source[i].label for i in range(2)] == ["z", default]


def test_a_dataset_that_was_saved_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(DOCUMENTS)
    datasets.DatasetDict({"train": made, "dev": made.select(range(5))}).save_to_disk(tmp_path / "set", num_shards={
        "train": 3, "dev": 1})
    source = open_source(DataConfig(path=str(tmp_path / "set")))
    assert [source[i].text for i in range(len(source))] == [d["text"] for d in DOCUMENTS]
    assert len(open_source(DataConfig(path=str(tmp_path / "set" / "dev")))) == 5


def test_wrong_files_are_named(tmp_path):
    def message(**fields):
        with pytest.raises(InputError) as e:
            open_source(DataConfig(**fields))
        return str(e.value)

    path = str(write("dict", tmp_path))
    assert "has the splits ['train', 'test']" in message(path=path, tfds_split="dev")
    assert "data-00000-of-00002.arrow: no column 'body' (data.text_field)" in message(path=path, text_field="body")
    assert "column 'source' (data.tokens_field) is string; expected lists of" in message(path=path, tokens_field="source")
    assert "column 'ids' (data.text_field) is list" in message(path=path, text_field="ids")
    (tmp_path / "set" / "train" / "data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow: no such file, though the dataset names it" in message(path=path)
    for suffix, kind in ((".parquet", "Parquet"), (".arrow", "Arrow"), (".array_record", "ArrayRecord")):
        bad = tmp_path / f"bad{suffix}"
        bad.write_bytes(b"not what its name says " * 100)
        assert f"{bad}: not a complete {kind} file" in message(path=str(bad))
    records = str(array_records(tmp_path / "r.arrayrecord", [json.dumps(DOCUMENTS[0]).encode()]))
    assert "record 1: no field 'body' (data.text_field) in this JSON record; it has ['ids', 'source', 'text']" in message(
        path=records, text_field="body")
    assert open_source(DataConfig(path=records, text_field=""))[0].text == json.dumps(DOCUMENTS[0])
    text = str(array_records(tmp_path / "t.arrayrecord", [b"plain"]))
    assert "neither a tf.train.Example nor a JSON object" in message(path=text, tokens_field="ids")


@pytest.mark.parametrize("kind, damage", [("arrayrecord", 0.5), ("arrayrecord", 0.99), ("parquet", 0.5), ("stream", 0.5)])
def test_a_truncated_file_is_named_when_it_is_opened(tmp_path, kind, damage):
    if kind == "arrayrecord":
        path = array_records(tmp_path / "d.array_record", [json.dumps(d).encode() for d in DOCUMENTS])
    elif kind == "stream":
        path = arrow_stream(tmp_path / "d.arrow", table(DOCUMENTS))
    else:
        path = tmp_path / "d.parquet"
        pq.write_table(table(DOCUMENTS), path)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * damage)])
    with pytest.raises(InputError, match=f"{path.name}: not a complete"):
        open_source(DataConfig(path=str(path)))


@pytest.mark.parametrize("value, expected", [
    (b"caf\xe9", "is not UTF-8 text (byte 3 is 0xe9)"), (b"", "is empty"), (None, "is null")])
def test_a_document_that_is_no_text_is_named(tmp_path, value, expected):
    made = pa.table({"text": pa.array([b"fine", value, b"fine"], pa.binary()), "source": ["a", "a", "a"]})
    pq.write_table(made, tmp_path / "p.parquet")
    arrow_stream(tmp_path / "s.arrow", made)
    records = [example({"text": "fine", "source": "a"})] * 3
    records[1] = b"" if value is None else Example.FromString(records[0]).SerializeToString().replace(b"fine", b"caf\xe9")
    paths = [tmp_path / "p.parquet", tmp_path / "s.arrow"]
    if value != b"":
        paths.append(array_records(tmp_path / "r.array_record", records))
    for path in paths:
        source = open_source(DataConfig(path=str(path)))
        assert source[0].text == source[2].text == "fine"
        with pytest.raises(UnreadableDocument) as e:
            source[1]
        assert str(e.value).startswith(f"{path}: record 2: ")
        assert expected in str(e.value) or (value is None and "not a tf.train.Example" in str(e.value))


def test_a_damaged_record_does_not_take_its_file_with_it(tmp_path):
    texts = [f"document {i} ".encode() * 400 for i in range(300)]
    path = array_records(tmp_path / "d.array_record", texts)
    data = bytearray(path.read_bytes())
    data[20_000:20_100] = bytes(100)
    path.write_bytes(data)
    source = open_source(DataConfig(path=str(path)))
    read, failed = {}, []
    for i in range(len(source)):
        try:
            read[i] = source[i].text.encode()
        except UnreadableDocument as e:
            assert f"{path}: record {i + 1}: damaged" in str(e)
            failed.append(i)
    assert 0 < len(failed) < 50 and all(read[i] == texts[i] for i in read)


@pytest.mark.parametrize("kind", ["json", "parquet", "stream"])
@pytest.mark.parametrize("change", ["gone", "shrunk"])
def test_a_file_that_changes_during_a_run_stops_it_with_its_name(tmp_path, kind, change):
    folder = write(kind, tmp_path)
    source = open_source(DataConfig(path=str(folder)))
    assert source[0].text
    for path in tmp_path.iterdir():
        if change == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:200])
    fresh = pickle.loads(pickle.dumps(source))  # as in a worker that has read nothing yet
    with pytest.raises(RunError, match="No such file" if change == "gone" else "it was changed while in use"):
        fresh[80]


def test_memory_does_not_grow_with_what_was_read(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    made = pa.table({"text": [rng.bytes(5_000).hex() for _ in range(2_000)]})  # 20 MB in row groups of 1 MB
    pq.write_table(made, tmp_path / "d.parquet", row_group_size=100, use_dictionary=False)
    monkeypatch.setattr(columns, "CACHE_BYTES", 3_000_000)
    source = open_source(DataConfig(path=str(tmp_path / "d.parquet")))
    before = pa.total_allocated_bytes()
    for i in range(0, 2_000, 37):
        assert len(source[i].text) == 10_000
        assert pa.total_allocated_bytes() - before < 6_000_000
    assert len(pickle.dumps(source)) < 5_000
