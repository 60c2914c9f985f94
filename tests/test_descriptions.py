"""Whatever happens to the files of a run, it goes on exactly from what is intact, or says what is wrong."""

import gzip
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import damage
from tiny_run import series, tiny_config, write_documents

from emo_jax import config as config_lib
from emo_jax.checkpoints import checkpoint, description
from emo_jax.checkpoints.checkpoint import open_checkpoint, read_step
from emo_jax.checkpoints.compatibility import same_source
from emo_jax.checkpoints.description import DamagedCheckpoint
from emo_jax.cli import main
from emo_jax.config import DataConfig
from emo_jax.data import content
from emo_jax.data.sources import open_source
from emo_jax.errors import InputError, RunError
from emo_jax.train.loop import train

FAULTS = int(os.environ.get("EMO_JAX_FAULTS", "3"))  # random damages, each of a copy of a run that is then gone on with
FIXTURES = Path(__file__).parent / "fixtures"
RUN = ("mesh.data=2", "mesh.expert=2", "checkpoint.every=2", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder):
    """A run of 8 steps with checkpoints of steps 2, 4, 6 and 8."""
    train(tiny_config(folder, *RUN), folder / "whole")
    return folder / "whole"


@pytest.fixture
def out(whole, tmp_path):
    """A copy of it as it was after 6 steps."""
    return stopped(whole, tmp_path / "run")


def stopped(whole, out):
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "8")
    return out


def go_on(folder, out, *overrides, **options):
    return train(tiny_config(folder, *RUN, *overrides), out, **options)


# ---- at random -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(FAULTS))
def test_a_damaged_run_goes_on_exactly_or_says_what_is_wrong(folder, whole, out, seed):
    rng = random.Random(seed)
    done = "\n".join(damage(rng, out) for _ in range(rng.choice((1, 1, 1, 2, 4))))
    try:
        result = go_on(folder, out)
    except (InputError, RunError) as e:
        assert str(out) in str(e), done  # which file
        return
    assert_as_undisturbed(out, whole, result, done)


def assert_as_undisturbed(out, whole, result, done=""):
    first = result["resumed_from"] or 0
    assert [x for x in series(out) if x[0] > first] == [x for x in series(whole) if x[0] > first], done
    ends = [open_checkpoint(path, 8) for path in (out, whole)]
    assert ends[0].meta["checksums"] == ends[1].meta["checksums"] and ends[0].data == ends[1].data, done
    assert ends[0].meta["tokens"] == ends[1].meta["tokens"], done


# ---- descriptions ----------------------------------------------------------------------------------------------------


@pytest.fixture
def described(tmp_path):
    """A small run of three steps, whose checkpoint is sealed."""
    step = shutil.copytree(FIXTURES / "old_run", tmp_path / "run") / "checkpoints" / "3"
    description.write(step, description.sealed(description.read(step)))
    return tmp_path / "run"


def change(step, item, edit):
    """Edits a description without sealing it again, as whoever does not know of the seal."""
    path = step / item / "metadata"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(edit(tree) or tree))


CHANGES = {
    "a row position": ("data", lambda x: x["rows"][0].__setitem__(1, x["rows"][0][1] + 1), "seal differs"),
    "another step": ("meta", lambda x: x.update(step=7), "seal differs"),
    "other tokens": ("meta", lambda x: x.update(tokens=x["tokens"] + 1), "seal differs"),
    "another rate": ("meta", lambda x: x["config"]["optimizer"].update(learning_rate=1.0), "seal differs"),
    "no seal": ("meta", lambda x: x.update(seal=None), "seal differs"),
    **{f"{field} of another type": ("meta", lambda x, field=field: x.update({field: "x"}), f"meta is damaged: {field}=\"x\"")
       for field in ("step", "tokens", "config", "source", "checksums", "conventions", "versions", "held_out_loss")},
    **{f"no {field}": ("meta", lambda x, field=field: x.pop(field) and x, f"meta lacks {field!r}")
       for field in ("step", "tokens", "config", "source", "checksums")},
    "a sum of another type": ("meta", lambda x: x["checksums"]["params"].update(sum="7"), "checksums="),
    "a negative step": ("meta", lambda x: x.update(step=-1), "step=-1 must be an integer, 0 or more"),
    "no rows": ("data", lambda x: x.pop("rows") and x, "data lacks 'rows' or 'stages'"),
    "rows of another type": ("data", lambda x: x.update(rows=7), "data is damaged: rows=7"),
    "a row of another type": ("data", lambda x: x["rows"].__setitem__(1, None), "data is damaged: rows="),
    "a huge position": ("data", lambda x: x["rows"][1].__setitem__(0, 10**30), "data is damaged: rows="),
    "stages of another type": ("data", lambda x: x.update(stages=[[]]), "data is damaged: stages="),
    "next of another type": ("data", lambda x: x.update(next=True), "data is damaged: next=true"),
    "a list": ("data", lambda x: [x], "data is damaged: a JSON list"),
    "null": ("meta", lambda x: [None], "meta is damaged: a JSON list"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_description_that_is_not_what_was_saved_is_damaged(described, name):
    item, edit, message = CHANGES[name]
    change(described / "checkpoints" / "3", item, edit)
    with pytest.raises(DamagedCheckpoint) as e:
        open_checkpoint(described)
    assert f"checkpoint {described}/checkpoints/3: " in str(e.value) and message in str(e.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"7" * 5000, None, "folder", "loop"])
@pytest.mark.parametrize("item", ["meta", "data"])
def test_a_description_that_cannot_be_read_is_damaged(described, item, content):
    path = described / "checkpoints" / "3" / item / "metadata"
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content == "loop":
        path.symlink_to(path.name)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=f"checkpoints/3: {item} cannot be read"):
        open_checkpoint(described)


def test_a_config_that_is_no_longer_valid_is_a_damaged_checkpoint(described):
    step = described / "checkpoints" / "3"
    found = description.read(step)
    for edit, message in ((dict(seed=-1), "seed=-1 must be"), (dict(seed="x"), "must be int"), (dict(no_field=1), "no_field")):
        meta = found.meta | {"config": found.meta["config"] | edit}
        description.write(step, description.sealed(found._replace(meta=meta)))  # sealed: by another version
        with pytest.raises(DamagedCheckpoint, match=f"checkpoints/3: meta: its config cannot be used: .*{message}"):
            open_checkpoint(described)


def test_only_folders_with_the_name_of_a_step_are_steps(described):
    folder = described / "checkpoints"
    for name in ("048", "00", "²", "-3", "4" * 30, "6.bak", "x"):
        (folder / name).mkdir()
    for name in ("12", "notes.txt"):
        (folder / name).write_text("?")
    (folder / "14").symlink_to("nothing")
    assert checkpoint.steps(folder) == [3]


def test_what_was_written_before_there_were_seals_is_read(described):
    step = described / "checkpoints" / "3"
    change(step, "meta", lambda x: x.pop("seal") and x)
    assert read_step(step).step == 3


# ---- going on --------------------------------------------------------------------------------------------------------


def test_every_way_to_damage_a_checkpoint_leads_to_the_one_before(folder, whole, out, capsys):
    """A changed position, a checkpoint renamed, another copied, one without a description, one that is a file."""
    steps = out / "checkpoints"
    change(steps / "6", "data", CHANGES["a row position"][1])
    shutil.copytree(steps / "2", steps / "12")
    (steps / "4").rename(steps / "9")
    shutil.rmtree(steps / "9" / "opt_state")
    shutil.copytree(steps / "2", steps / "3")
    shutil.rmtree(steps / "3" / "meta")
    (steps / "3" / "meta").write_text("?")
    (steps / "5").write_text("?")
    (steps / "007").mkdir()
    (steps / "notes.txt").write_text("kept")
    result = go_on(folder, out)
    assert result["resumed_from"] == 2
    assert_as_undisturbed(out, whole, result)
    assert series(out) == series(whole)
    assert sorted(p.name for p in (out / "damaged").iterdir()) == ["007", "12", "3", "5", "6", "9"]
    message = capsys.readouterr().err
    for text in ("checkpoints/12: it is the one of step 2", "checkpoints/9: it is the one of step 4", "5 is not the folder of",
                 "checkpoints/6: meta and data are not what was saved", "checkpoints/3: meta cannot be read", "007 is not the"):
        assert text in message
    assert (steps / "notes.txt").read_text() == "kept"


def test_what_is_of_the_wrong_kind_in_a_run_is_set_aside(folder, whole, out, capsys):
    for name in ("config.json", "metrics.jsonl", "time.jsonl", "tokenizer.json"):
        (out / name).unlink()
        (out / name).mkdir()
        (out / name / "inside").write_text(name)
    shutil.rmtree(out / "tensorboard")
    (out / "tensorboard").write_text("x")
    (out / "damaged").write_text("y")
    result = go_on(folder, out)
    assert result["resumed_from"] == 6
    assert_as_undisturbed(out, whole, result)
    aside = out / "damaged-2"
    assert sorted(p.name for p in aside.iterdir()) == ["config.json", "metrics.jsonl", "tensorboard", "time.jsonl",
                                                       "tokenizer.json"]
    assert (aside / "metrics.jsonl" / "inside").read_text() == "metrics.jsonl" and (out / "damaged").read_text() == "y"
    message = capsys.readouterr().err
    for name in ("config.json is written anew", "metrics.jsonl is not a file", "tensorboard is not a folder",
                 "tokenizer.json is not a file"):
        assert f"{out}/{name}" in message
    assert (out / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()


def test_foreign_content_is_kept_aside_and_changes_no_number(folder, whole, out, capsys):
    """Lines and bytes in metrics.jsonl, a config.json that says another start of the schedule, another tokenizer."""
    good = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    foreign = [*good[:2], b"note\n", b"[1]\n", b'{"step": "3"}\n', b"\xff\x00\n", b"null\n", *good[2:]]
    (out / "metrics.jsonl").write_bytes(b"".join(foreign) + b"\x80\x81")
    saved = json.loads((out / "config.json").read_text())
    saved["optimizer"]["start_step"] = 5
    saved["model"]["d_ff"] = 32
    (out / "config.json").write_text(json.dumps(saved))
    (out / "tokenizer.json").write_text("{}")
    result = go_on(folder, out)
    assert result["resumed_from"] == 6
    assert_as_undisturbed(out, whole, result)
    assert series(out) == series(whole) and series(out, "learning_rate") == series(whole, "learning_rate")
    assert (out / "damaged" / "metrics.jsonl").read_bytes() == b"".join(foreign) + b"\x80\x81"
    assert (out / "damaged" / "tokenizer.json").read_text() == "{}"
    assert json.loads((out / "config.json").read_text()) == json.loads((whole / "config.json").read_text())
    message = capsys.readouterr().err
    assert "metrics.jsonl has 6 lines that are no records of steps" in message
    assert "tokenizer.json is not the tokenizer that the run was trained with" in message


def test_folders_that_are_no_run_are_refused_and_left(folder, tmp_path):
    for name, text, message in (("config.json", '{"architectures": []}', "config.json cannot be read"),
                                   ("config.json", "[", "config.json cannot be read"),
                                   ("checkpoints", "", "checkpoints is a file")):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / name).write_text(text)
        with pytest.raises(InputError, match=message):
            go_on(folder, tmp_path / "other")
        assert [p.name for p in (tmp_path / "other").iterdir()] == [name]
        shutil.rmtree(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").symlink_to("not-mounted")
    with pytest.raises(InputError, match="checkpoints is a link to nothing"):
        go_on(folder, tmp_path / "other")


def test_fewer_steps_than_the_run_has_are_refused_and_as_many_are_nothing_to_do(folder, whole, out, capsys):
    with pytest.raises(InputError, match="has been trained to step 6, and train.steps=4 is less: give 6 or more"):
        go_on(folder, out, "train.steps=4")
    assert main(["train", str(folder / "tiny.py"), "--out", str(out), *(f"--{x}" for x in RUN), "--train.steps=6"]) == 0
    assert "at its last step, 6: nothing to do" in capsys.readouterr().err and series(out) == series(whole)[:6]


def test_another_form_of_optimizer_state_is_no_damage(folder, out):
    with pytest.raises(InputError, match="optimizer.trainable: 'all' in the checkpoint, 'experts' given"):
        go_on(folder, out, "optimizer.trainable=experts")
    assert checkpoint.steps(out / "checkpoints") == [2, 4, 6]


# ---- a run without checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [("checkpoints",), ("checkpoints", "saved.json")])
def test_a_run_whose_checkpoints_are_gone_starts_over_only_when_told_to(folder, whole, out, lost):
    for name in lost:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="has saved checkpoints .its metrics end at step 8.*has none.*--start-over"):
        go_on(folder, out)
    assert (out / "metrics.jsonl").read_bytes() == before and not (out / "damaged").exists()
    if len(lost) == 1:
        (out / "checkpoints").mkdir()
        result = go_on(folder, out, start_over=True)
        assert result["resumed_from"] is None and series(out) == series(whole)
        assert (out / "damaged" / "metrics.jsonl").read_bytes() == before and any((out / "damaged" / "tensorboard").iterdir())
        assert go_on(folder, out, start_over=True)["resumed_from"] == 8  # of a launcher that repeats its command


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(folder, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "saved.json"))
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:3]))
    assert go_on(folder, out)["resumed_from"] is None
    assert series(out) == series(whole)
    assert "no checkpoint was complete yet: the steps up to 3 are repeated" in capsys.readouterr().err


# ---- a run of an older version ---------------------------------------------------------------------------------------


def test_a_run_of_the_code_before_descriptions_were_sealed_goes_on(tmp_path):
    out = shutil.copytree(FIXTURES / "old_run", tmp_path / "run")
    saved = config_lib.from_dict(json.loads((out / "config.json").read_text()))
    changes = [f"data.path={out / 'documents.jsonl'}", "train.steps=6", "mesh.data=-1", "mesh.fsdp=1"]
    result = train(config_lib.override(saved, changes), out)
    assert result["resumed_from"] == 3
    # What that code itself went on with, on one device; compilers and meshes round differently.
    losses = [5.561253547668457, 5.503387451171875, 5.394832134246826, 5.284124851226807, 5.170600891113281, 5.074791431427002]
    assert [loss for _, loss in series(out)] == pytest.approx(losses, rel=1e-5)
    assert open_checkpoint(out).meta["source"].keys() > open_checkpoint(out, 3).meta["source"].keys()
    assert (out / "saved.json").is_file() and not (out / "damaged").exists()


# ---- documents -------------------------------------------------------------------------------------------------------


def test_documents_that_change_between_those_that_are_sampled_are_other_documents(folder, out, tmp_path):
    path = write_documents(tmp_path / "documents.jsonl")  # the same ones, moved
    lines = path.read_text().splitlines(keepends=True)
    number = 50
    assert number not in [round(119 * i / 15) for i in range(16)]
    lines[number] = lines[number].replace(" ", "  ", 2)
    path.write_text("".join(lines))
    with pytest.raises(InputError, match="checkpoints/6 was trained on other documents"):
        go_on(folder, out, f"data.path={path}")
    change(out / "checkpoints" / "6", "meta", lambda x: x.pop("seal") and x["source"].pop("content") and x)
    assert go_on(folder, out, f"data.path={path}", "train.steps=6")["step"] == 6  # an older checkpoint does not know


def test_every_source_notices_any_change_of_its_files_and_none_of_their_place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "KEPT_BYTES", 0)
    texts = [f"document {i} of some" for i in range(40)]

    def jsonl(path, texts):
        path.mkdir()
        (path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))

    def compressed(path, texts):
        path.mkdir()
        (path / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode()))

    def text(path, texts):
        path.mkdir()
        for i, t in enumerate(texts):
            (path / f"{i:03}.txt").write_text(t)

    def parquet(path, texts):
        path.mkdir()
        pq.write_table(pa.table({"text": texts}), path / "a.parquet", compression="none")

    def tokens(path, texts):
        path.mkdir()
        np.array([(ord(c) % 200) for t in texts for c in t], np.uint16).tofile(path / "a.npy")

    changed = [*texts[:21], texts[21].replace("some", "same"), *texts[22:]]
    found = {}
    for write in (jsonl, compressed, text, parquet, tokens):
        fields = {"tokenizer": str(FIXTURES / "old_run" / "tokenizer.json")} if write is tokens else {}
        hashes = []
        for folder, documents in (("a", texts), ("moved", texts), ("changed", changed)):
            path = tmp_path / f"{write.__name__}-{folder}"
            write(path, documents)
            source = open_source(DataConfig(path=str(path), **fields))
            hashes.append(source.content_hash())
            assert pickle.loads(pickle.dumps(source)).content_hash() == hashes[-1]
        assert hashes[0] == hashes[1] != hashes[2], write.__name__
        (path := tmp_path / f"{write.__name__}-a").rename(tmp_path / "old")
        write(path, changed)  # in place, of the same size
        assert open_source(DataConfig(path=str(path), **fields)).content_hash() == hashes[2], write.__name__
        (tmp_path / "old").rename(tmp_path / f"{write.__name__}-old")
        found[write.__name__] = hashes[0]
    assert found["jsonl"] == found["compressed"]


@pytest.mark.parametrize("saved, given, same", [
    ({}, {}, True), ({"sample": "x"}, {}, False), ({}, {"content": "sha256:1"}, True),
    *(({"content": "sha256:1"}, {"content": other}, same)
      for other, same in (("sha256:1", True), ("sha256:2", False), ("objects:2", True)))])
def test_fingerprints_are_compared_by_what_both_know(saved, given, same):
    both = {"documents": 3, "sample": "a", "tokenizer": "b"}
    assert same_source(both | saved, both | given) is same and not same_source({"imported": "x"}, both)
