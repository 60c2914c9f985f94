"""Whatever a person, a file or a document holds: a sentence that names it, or numbers; never a traceback, nothing that is not
finite, and no path out of the folder that the data came from."""

import copy
import dataclasses
import json
import math
import os
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import golden
from tiny_run import tiny_config
from token_shards import documents, write_shards

from emo_jax import cli, sharding
from emo_jax import config as config_lib
from emo_jax.checkpoints import subset as subset_lib
from emo_jax.config import Config, DataConfig
from emo_jax.convert.importing import import_checkpoint
from emo_jax.convert.tensors import Reader
from emo_jax.data.pipeline import make_train_iterator
from emo_jax.data.sources import open_source
from emo_jax.data.tokenizer import load_tokenizer
from emo_jax.errors import InputError, RunError
from emo_jax.subsets.report import coverage_table
from emo_jax.train.step import init_state, make_train_step

settings.register_profile("hostile", deadline=None, derandomize=True, max_examples=60, database=None,
                          suppress_health_check=list(HealthCheck))
settings.load_profile("hostile")

TEXT = st.text(st.characters(), max_size=40) | st.sampled_from(
    ["", "\0", "\ufeff", "\u202e", "\x1b[2J", "\ud800", "\r\n\v\f\x85\u2028", "<|endoftext|>", "a" * 5000, "../../etc/passwd"])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from([10**400, -1, 0, 2**63]),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8)


@st.composite
def changed(draw, good):
    """`good`, JSON, with up to three values anywhere in it replaced, or their keys deleted."""
    tree = {"": copy.deepcopy(good)}
    for _ in range(draw(st.integers(1, 3))):
        node, key = tree, ""
        while isinstance(node[key], (dict, list)) and node[key] and draw(st.integers(0, 3)):
            node = node[key]
            key = draw(st.sampled_from(sorted(node))) if isinstance(node, dict) else draw(st.integers(0, len(node) - 1))
        if key != "" and isinstance(node, dict) and not draw(st.integers(0, 3)):
            del node[key]
        else:
            node[key] = draw(JSON)
    return tree[""]


def refused_or(function, *args):
    """What the function returns; None where it was refused in a sentence."""
    try:
        return function(*args)
    except (InputError, RunError) as e:
        assert str(e).strip() and len(str(e)) < 20_000
        return None


# ---- configs and command lines --------------------------------------------------------------------------------------

FIELDS = sorted(config_lib.flatten(config_lib.to_dict(Config(name="x"))))


VALUES = TEXT | st.integers().map(str) | st.floats().map(str)


@given(st.lists(st.tuples(st.sampled_from(FIELDS) | TEXT, VALUES), max_size=4))
def test_any_override_gives_a_config_or_a_sentence(overrides):
    found = refused_or(config_lib.override, tiny.config(), [f"--{name}={value}" for name, value in overrides])
    assert found is None or isinstance(found, Config)


@given(changed(json.loads(json.dumps(config_lib.to_dict(tiny.config())))))
def test_any_saved_config_gives_a_config_or_a_sentence(tree):
    found = refused_or(config_lib.from_dict, tree)
    assert found is None or isinstance(found, Config)


LONG = ("bench", "completion", "study", "compile", "data")  # which have work without a file
COMMANDS = st.sampled_from([c.name.split() for c in cli.COMMANDS if c.name.split()[0] not in LONG])
WORDS = st.sampled_from(["--json", "--out", "--keep", "--data", "--step", "--subset", "--method", "--config", "--help", "-1",
                         "1e400", "--debug", "--train.steps=2", "--model.d_model", "--=", "--.=", "/proc/x/y", "/dev/null"])


@settings(max_examples=40)
@given(COMMANDS, st.lists(WORDS | TEXT, max_size=5))
def test_any_command_line_ends_in_a_sentence(tmp_path_factory, command, words):
    """In an empty folder, so that there is nothing that a command could do."""
    words = [word.replace("\0", "?") for word in words]  # which no process can be given
    here, there = os.getcwd(), tmp_path_factory.mktemp("empty")
    os.chdir(there)
    try:
        status = cli.main([*command, *words])
    except SystemExit as e:  # of argparse, which has said why
        status = e.code
    finally:
        os.chdir(here)
    assert status in (0, 1, 2)


def test_a_person_sees_a_traceback_only_with_debug(monkeypatch, capsys):
    def broken(*args):
        raise TypeError("no such thing\nin two lines")

    monkeypatch.setattr(config_lib, "load_config", broken)
    assert cli.main(["config", "emo_tiny"]) == 1
    text = capsys.readouterr().err
    assert text == "emo-jax config: internal error: TypeError: no such thing; --debug shows where, please report it\n"
    assert cli.main(["config", "emo_tiny", "--debug"]) == 1
    text = capsys.readouterr().err
    assert text.startswith("Traceback") and "in broken" in text and "--debug shows where" in text


# ---- documents ------------------------------------------------------------------------------------------------------


def rows_of(folder, lines, packing):
    path = folder / "d.jsonl"
    path.write_bytes(b"".join(lines))
    base = tiny_config(folder)
    config = dataclasses.replace(base, data=dataclasses.replace(base.data, path=str(path), eval_fraction=0.0, packing=packing))
    source = open_source(config.data)
    tokenizer = load_tokenizer(config, source, range(len(source)), folder / "tokenizer")
    iterator = make_train_iterator(config, source, tokenizer)
    try:
        return [next(iterator) for _ in range(2)], config, len(source), tokenizer
    finally:
        iterator.close()


@settings(max_examples=10)
@given(st.lists(TEXT | st.text("ab ", max_size=300), min_size=1, max_size=6),
       st.sampled_from(["concat_and_split", "first_fit"]))
def test_any_document_makes_rows_of_known_tokens(tmp_path_factory, texts, packing):
    folder = tmp_path_factory.mktemp("documents")
    lines = [json.dumps({"text": text, "source": text[:9]}).encode() + b"\n" for text in texts]
    made = refused_or(rows_of, folder, lines, packing)
    if made is None:
        return
    batches, config, count, tokenizer = made
    for rows in batches:
        assert rows["tokens"].min() >= 0 and rows["tokens"].max() < tokenizer.vocab_size <= config.model.vocab_size
        assert rows["segment_ids"].max() <= config.data.max_documents_per_row and rows["document_ids"].max() < count
        assert np.isfinite(rows["loss_weights"]).all()


@settings(max_examples=40)
@given(st.lists(JSON.map(json.dumps).map(str.encode) | changed({"text": "a b", "source": "s"}).map(json.dumps).map(str.encode)
                | st.binary(max_size=40), min_size=1, max_size=4))
def test_any_line_makes_rows_or_is_named(tmp_path_factory, lines):
    refused_or(rows_of, tmp_path_factory.mktemp("lines"), [line + b"\n" for line in lines], "concat_and_split")


# ---- packed batches -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step():
    """(config, a function from rows to the metrics of a step of new parameters), compiled once."""
    config = tiny.config(train=dict(batch_size=8, remat="none"), model=dict(num_layers=1))
    mesh = sharding.single_device_mesh()
    taken, state = make_train_step(config, mesh), init_state(config, mesh)

    def take(rows):
        with jax.set_mesh(mesh):
            start = jax.tree.map(jnp.copy, state)  # as it is donated
            after, metrics = taken(start, {name: sharding.place(x, mesh, sharding.TOKENS) for name, x in rows.items()})
        return jax.tree.map(np.asarray, after.params), {name: np.asarray(x) for name, x in metrics.items()}

    return config, take


def packed(lengths, weights, token, config):
    """Rows of documents of these lengths, one list a row; what is left over is padding."""
    B, T = config.train.batch_size, config.data.sequence_length
    rows = {name: np.zeros((B, T), np.int32) for name in ("tokens", "targets", "segment_ids", "document_ids", "positions")}
    rows["loss_weights"] = np.zeros((B, T), np.float32)
    number = 0
    for row, documents_of_row in enumerate(lengths[:B]):
        at = 0
        for segment, length in enumerate(documents_of_row[:config.data.max_documents_per_row], 1):
            part = (row, slice(at, min(at + length, T)))
            rows["segment_ids"][part], rows["document_ids"][part], at = segment, number, at + length
            rows["positions"][part] = np.arange(rows["positions"][part].size)
            rows["loss_weights"][part], rows["tokens"][part], rows["targets"][part] = weights, token, token
            number += 1
    return rows


LENGTHS = st.lists(st.lists(st.integers(1, 40), max_size=8), max_size=8)


@settings(max_examples=10)
@given(LENGTHS | st.sampled_from([[], [[32]] * 8, [[1] * 8] * 8, [[4] * 8] * 8, [[1]]]), st.sampled_from([0.0, 1.0]),
       st.sampled_from([0, 1, 63]))
def test_any_packing_gives_finite_numbers(step, lengths, weights, token):
    config, take = step
    params, metrics = take(packed(lengths, weights, token, config))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    assert not [name for name, x in metrics.items() if not np.isfinite(x).all()]
    assert math.isclose(float(metrics["tokens"]), float((packed(lengths, weights, token, config)["segment_ids"] > 0).sum()))


# ---- subset files, published folders, tokenized data ----------------------------------------------------------------

SUBSET = {"version": 1, "kept": [[0, 2], [1]], "num_routed": 3, "num_shared": 1, "method": "router", "keep": [3, 2],
          "calibration": {"document_hashes": ["a", "b"], "subsets": [{"path": "x", "coverage": 0.5}]},
          "scores": [[0.5, 0.1, 0.4], [0, 1, 0.25]], "model": {"name": "m", "step": 3, "hash": "c0ffee"}}


@given(changed(SUBSET))
def test_any_subset_file_is_a_subset_or_refused(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("subset") / "s.json"
    path.write_text(json.dumps(tree))
    found = refused_or(subset_lib.load, path)
    assert found is None or (found.mask().sum() == sum(map(len, found.kept)) and coverage_table(found))


CONFIG_JSON = json.loads((golden("emo")[0] / "config.json").read_text())
OUTSIDE = ("../outside.safetensors", "/etc/passwd", "..", ".", "", "a/../../outside.safetensors", "\0", 3, None, ["x"])


def published(folder, name="emo"):
    shutil.copytree(golden(name)[0], folder / "hf")
    return folder / "hf"


@given(changed(CONFIG_JSON))
def test_any_published_config_is_a_model_or_refused(tmp_path_factory, tree):
    """Its tensors are not there, so that none is imported."""
    folder = published(tmp_path_factory.mktemp("hf"))
    (folder / "config.json").write_text(json.dumps(tree))
    if refused_or(import_checkpoint, str(folder), str(folder.parent / "run")):
        assert (folder.parent / "run" / "checkpoints" / "0").is_dir()


@settings(max_examples=40)
@given(st.data())
def test_any_header_of_a_weights_file_is_read_or_refused(tmp_path_factory, data):
    folder = published(tmp_path_factory.mktemp("hf"))
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(data.draw(changed(json.loads(content[8:8 + length])))).encode()
    size = data.draw(st.sampled_from([len(header), len(header), 0, 7, 2**63, 2**64 - 1]))
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + content[8 + length:])
    refused_or(import_checkpoint, str(folder), str(folder.parent / "run"))


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_file_outside_a_published_folder_is_read(tmp_path, name):
    folder = published(tmp_path)
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    names = list(Reader(tmp_path / "outside.safetensors").tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(InputError, match="model.safetensors.index.json"):
        import_checkpoint(str(folder), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_refused_and_never_unpickled(tmp_path):
    folder = published(tmp_path)
    for name in ("pytorch_model.bin", "model.safetensors", "consolidated.pth"):
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        with pytest.raises(InputError, match="safetensors"):
            import_checkpoint(str(folder), str(tmp_path / "run"))
        (folder / name).unlink()
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [lambda w: w.pop("weight_map"), lambda w: w["weight_map"].update(x="missing.safetensors")])
def test_a_shard_that_is_missing_is_named(tmp_path, change):
    folder = published(tmp_path)
    tree = {"weight_map": dict.fromkeys(Reader(folder).tensors, "model.safetensors")}
    change(tree)
    (folder / "model.safetensors.index.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match="weight_map|missing.safetensors"):
        import_checkpoint(str(folder), str(tmp_path / "run"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    sections = {("a", False): documents(0, 5), ("a", True): documents(1, 2)}
    return write_shards(tmp_path_factory.mktemp("shards") / "good", [sections])


@given(st.data())
def test_any_manifest_is_read_or_refused(tmp_path_factory, shards, data):
    folder = tmp_path_factory.mktemp("shards") / "copy"
    shutil.copytree(shards, folder)
    (folder / "manifest.json").write_text(json.dumps(data.draw(changed(json.loads((shards / "manifest.json").read_text())))))
    source = refused_or(open_source, DataConfig(path=str(folder), format="tokens"))
    for i in range(len(source) if source else 0):
        refused_or(source.encoded, i, source.tokenizer)


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name != ""])
def test_no_file_outside_a_folder_of_token_files_is_read(tmp_path, shards, name):
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    tree = json.loads((folder / "manifest.json").read_text())
    shutil.copy(folder / tree["shards"][0]["file"], tmp_path / "outside.safetensors")
    tree["shards"][0]["file"] = name
    (folder / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match="manifest.json|no such file"):
        open_source(DataConfig(path=str(folder), format="tokens"))


STATE = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "x", "_split": "train"}


@settings(max_examples=40)
@given(changed(STATE) | st.sampled_from([{"_data_files": [{"filename": name}]} for name in OUTSIDE]))
def test_any_description_of_a_saved_dataset_is_read_or_refused(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("saved") / "dataset"
    folder.mkdir()
    table = pa.table({"text": ["a b", "c"]})
    for path in (folder / "data-00000-of-00001.arrow", folder.parent / "outside.safetensors"):
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps(tree))
    source = refused_or(open_source, DataConfig(path=str(folder)))
    assert source is None or len(source) % 2 == 0
