"""What a run does when something is wrong: which states it keeps, where it goes on, what it refuses."""

import json
import math
import shutil

import pytest
from tiny_run import records, series, tiny_config, write_documents

from emo_jax.checkpoints import checkpoint
from emo_jax.config import load_config
from emo_jax.errors import InputError
from emo_jax.train import loop
from emo_jax.train.loop import train

MESH = ("mesh.data=2", "mesh.expert=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def done(folder):
    """A run of 6 steps with checkpoints of steps 2, 4 and 6."""
    train(tiny_config(folder, *MESH, "train.steps=6", "checkpoint.every=2", "checkpoint.keep_last=3"), folder / "done")
    return folder / "done"


def damage(step_folder):
    (step_folder / "params" / "_METADATA").write_text("?")


def test_falls_back_to_the_newest_good_checkpoint(folder, done, tmp_path, capfd):
    out = shutil.copytree(done, tmp_path / "run")
    damage(out / "checkpoints" / "6")
    (out / "checkpoints" / "4" / "data" / "metadata").unlink()
    result = train(tiny_config(folder, *MESH, "train.steps=6", "checkpoint.every=2"), out)
    assert result["resumed_from"] == 2
    assert series(out) == series(done)
    assert sorted(p.name for p in (out / "damaged").iterdir()) == ["4", "6"]
    message = capfd.readouterr().err
    assert "resuming from step 2" in message and "checkpoints/6: params cannot be read" in message


def test_never_starts_anew_over_damaged_checkpoints(folder, done, tmp_path):
    out = shutil.copytree(done, tmp_path / "run")
    for step in (2, 4, 6):
        damage(out / "checkpoints" / str(step))
    with pytest.raises(InputError, match="none of the checkpoints .* can be read .steps 6, 4, 2.*nothing was changed"):
        train(tiny_config(folder, *MESH, "train.steps=6"), out)
    assert checkpoint.steps(out / "checkpoints") == [2, 4, 6]
    assert records(out) == records(done)


def test_a_receive_buffer_that_is_too_small_is_counted_and_named(folder, tmp_path, capfd):
    """Over all steps since the last record, not only the logged ones."""
    train(tiny_config(folder, "mesh.fsdp=2", "mesh.expert=4", "kernels.buffer_factor=1.0", "train.steps=4",
                      "kernels.grouped_matmul=reference", "train.log_every=4"), tmp_path / "run")
    (record,) = records(tmp_path / "run")
    assert 1 < record["fallback_steps"] <= 4 and 1 < record["required_capacity_factor"] < 4
    message = capfd.readouterr().err
    assert message.count("kernels.buffer_factor=1.0, and was computed by ring") == 1


def test_the_best_evaluation_is_kept(folder, tmp_path, monkeypatch):
    """Evaluated every second step, best at step 4; nothing else asks for a checkpoint before the end."""
    losses = {2: 5.0, 4: 1.0, 6: 2.0, 8: 3.0}
    evaluate = loop.TrainingLoop._evaluate

    def evaluate_as_planned(self):
        evaluate(self)
        self.evaluated[self.step]["loss"] = losses[self.step]

    monkeypatch.setattr(loop.TrainingLoop, "_evaluate", evaluate_as_planned)
    train(tiny_config(folder, *MESH, "train.eval_every=2", "checkpoint.keep_last=1"), tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4, 8]
    evaluations = records(tmp_path / "run", evaluation=True)
    assert [(r["eval"], r["step"]) for r in evaluations] == [("held_out", step) for step in (2, 4, 6, 8)]
    for r in evaluations:
        labels = r["labels"]
        assert sorted(labels) == ["color", "count"]
        total = sum(x["loss"] * x["tokens"] for x in labels.values())
        assert r["loss"] * r["tokens"] == pytest.approx(total)
        assert r["bits_per_byte"] * math.log(2) * r["bytes"] == pytest.approx(total)


def test_refuses_what_does_not_belong_to_the_run(folder, done, tmp_path):
    def refused(message, *overrides, out=done, path=folder / "tiny.py"):
        with pytest.raises(InputError, match=message):
            train(load_config(str(path), [*MESH, "train.steps=6", *overrides]), out)

    before = sorted(p for p in done.rglob("*"))
    refused(r"checkpoints/6 holds another model.*\n.*model.d_ff: 16 in the checkpoint, 32 given", "model.d_ff=32")
    refused("router.pool_min: 2 in the checkpoint, 3 given", "router.pool_min=3")
    refused("data.sequence_length: 32 in the checkpoint, 64 given", "data.sequence_length=64")
    refused("seed: 0 in the checkpoint, 1 given", "seed=1")
    other = write_documents(tmp_path / "other.jsonl", seed=1)
    refused("trained on other documents", f"data.path={other}")
    refused("is a file; expected a folder", out=folder / "tiny.py")
    refused("--out='http://x/run' is a URL of another kind than gs:// and s3://", out="http://x/run")
    assert sorted(p for p in done.rglob("*")) == before


def test_moved_documents_are_the_same_documents(folder, done, tmp_path):
    moved = shutil.copy(folder / "documents.jsonl", tmp_path / "elsewhere.jsonl")
    out = shutil.copytree(done, tmp_path / "run")
    result = train(tiny_config(folder, *MESH, "train.steps=7", f"data.path={moved}", "data.workers=2"), out)
    assert (result["resumed_from"], result["step"]) == (6, 7)
    assert json.loads((out / "config.json").read_text())["train"]["steps"] == 7


def test_anneal_starts_from_a_checkpoint_and_resumes(folder, done, tmp_path):
    """Parameters, optimizer, documents and step go on; the rate falls linearly to zero; routing may change."""
    anneal = (*MESH, f"train.init_from={done}", "train.steps=10", "optimizer.schedule=linear", "router.pool_min=3",
              "optimizer.warmup_steps=0", "optimizer.final_fraction=0", "optimizer.learning_rate=0.004")
    out = tmp_path / "anneal"
    train(tiny_config(folder, *anneal, "checkpoint.every=2"), out)
    rates = [(7, 0.003), (8, 0.002), (9, 0.001), (10, 0.0)]
    assert [(s, pytest.approx(r, abs=1e-9)) for s, r in rates] == series(out, "learning_rate")
    tokens = [r["tokens"] for r in records(done)]
    assert records(out)[0]["tokens"] > tokens[-1]
    shutil.rmtree(out / "checkpoints" / "10")
    before = series(out)
    train(tiny_config(folder, *anneal), out)
    assert series(out) == before and json.loads((out / "config.json").read_text())["optimizer"]["start_step"] == 6
    with pytest.raises(InputError, match="train.steps=6 is the final step and must be more than the 6 steps"):
        train(tiny_config(folder, *anneal, "train.steps=6"), tmp_path / "short")
    with pytest.raises(InputError, match="model.num_experts: 8 in the checkpoint, 4 given"):
        train(tiny_config(folder, *anneal, "model.num_experts=4", "mesh.expert=1"), tmp_path / "other")
