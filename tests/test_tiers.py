"""Checkpoints in two tiers, their retention, and the room that they need."""

import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from tiny_run import series, tiny_config

import emo_jax
from emo_jax.checkpoints import checkpoint, space, tiers
from emo_jax.errors import InputError, RunError
from emo_jax.train import loop
from emo_jax.train.loop import train

ONE = ("data.eval_fraction=0", "faults.check_replicas_every=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiers")


def stopped_after(monkeypatch, step):
    """A run that is killed after a step: nothing is finished."""
    between = loop.TrainingLoop._between_steps

    def then_killed(self):
        between(self)
        if self.step == step:
            self.writer.close()  # what a background thread writes is complete
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.TrainingLoop, "_between_steps", then_killed)


def two_tiers(folder, tmp_path, *more):
    return tiny_config(folder, *ONE, "train.steps=8", "checkpoint.every=4", f"checkpoint.local={tmp_path / 'fast'}",
                       "checkpoint.local_every=1", *more)


@pytest.fixture
def killed(folder, tmp_path, monkeypatch):
    """A run that was killed after step 6, with checkpoints of step 4 in its folder and of step 6 in the fast one."""
    with monkeypatch.context() as patch:
        stopped_after(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            train(two_tiers(folder, tmp_path), tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4]
    (fast,) = (tmp_path / "fast").glob("run-*/*/checkpoints")
    assert checkpoint.steps(fast) == [6]
    return fast


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_config(folder, *ONE, "train.steps=8"), out)
    return series(out)


def test_a_run_goes_on_from_the_newest_of_both(folder, tmp_path, killed, whole):
    assert train(two_tiers(folder, tmp_path), tmp_path / "run")["resumed_from"] == 6
    assert series(tmp_path / "run") == whole
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4, 8]


def test_a_damaged_local_checkpoint_is_deleted_and_the_runs_own_taken(folder, tmp_path, killed, whole, capfd):
    (killed / "6" / "meta" / "metadata").write_text("?")
    assert train(two_tiers(folder, tmp_path), tmp_path / "run")["resumed_from"] == 4
    assert series(tmp_path / "run") == whole
    assert "deleted the damaged checkpoint" in capfd.readouterr().err


def test_local_checkpoints_of_an_earlier_life_are_not_used(folder, tmp_path, killed, whole):
    shutil.rmtree(tmp_path / "run")
    assert train(two_tiers(folder, tmp_path), tmp_path / "run")["resumed_from"] is None
    assert series(tmp_path / "run") == whole and not killed.exists()


def test_a_local_checkpoint_counts_only_after_the_one_that_it_came_from(folder, tmp_path, killed):
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert tiers.step_folders(tmp_path / "run", two_tiers(folder, tmp_path).checkpoint) == []


def test_the_fast_folder_must_be_one(folder, tmp_path):
    (tmp_path / "fast").write_text("")
    with pytest.raises(InputError, match="checkpoint.local .* is a file"):
        train(two_tiers(folder, tmp_path), tmp_path / "run")
    with pytest.raises(InputError, match="must be a local folder"):
        train(two_tiers(folder, tmp_path, "checkpoint.local=gs://bucket/x"), tmp_path / "other")


def test_an_older_checkpoint_stays_until_the_new_one_was_read_back(folder, tmp_path, monkeypatch):
    """And a save that fails is reported at once: the run would have had 200 steps."""
    read = loop.tiers.CheckpointWriter._verify

    def verify(self, step):
        if step == 4:
            raise OSError(5, "Input/output error", "step 4")
        read(self, step)

    monkeypatch.setattr(loop.tiers.CheckpointWriter, "_verify", verify)
    with pytest.raises(RunError, match="writing a checkpoint failed: Input/output error; the last good checkpoint is of step"):
        train(tiny_config(folder, *ONE, "train.steps=200", "checkpoint.every=2", "checkpoint.keep_last=1",
                          "checkpoint.keep_every=0"), tmp_path / "run")
    assert 2 in checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert len(series(tmp_path / "run")) < 20


Usage = namedtuple("Usage", "free")


def test_a_run_stops_saved_while_there_is_room(folder, tmp_path, monkeypatch):
    free = iter([10**12] * 3 + [10**6] * 100)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Usage(next(free)))
    monkeypatch.setattr(tiers, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(space.Room, "lacks", lambda self: None)
    with pytest.raises(RunError, match="0.001 GB free, less than checkpoint.min_free_gb=1: stopped after step ., saved"):
        train(tiny_config(folder, *ONE, "train.steps=200", "checkpoint.min_free_gb=1"), tmp_path / "run")
    (step,) = checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert step < 10


def test_a_checkpoint_that_does_not_fit_is_not_begun(folder, tmp_path, monkeypatch):
    sizes = iter([10**12] * 4 + [1000] * 100)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Usage(next(sizes)))
    monkeypatch.setattr(space.Room, "is_low", lambda self: None)
    with pytest.raises(RunError, match="the checkpoint of step . was not begun: the disk of .* has 1e-06 GB free, and a "):
        train(tiny_config(folder, *ONE, "train.steps=200", "checkpoint.every=1"), tmp_path / "run")


def test_a_run_without_room_for_its_checkpoints_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Usage(1000))
    with pytest.raises(InputError, match="no room for checkpoints: the disk of .* too little for two more checkpoints"):
        train(tiny_config(folder, *ONE, "train.steps=2"), tmp_path / "run")


def test_only_one_module_imports_orbax():
    package = Path(emo_jax.__file__).parent
    found = {str(p.relative_to(package)) for p in package.rglob("*.py")
             if re.search(r"^\s*(import|from) orbax", p.read_text(), re.MULTILINE)}
    assert found == {"checkpoints/orbax.py"}
