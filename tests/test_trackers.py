"""train.trackers: who gets the numbers of metrics.jsonl besides; the real clients are in test_tracker_clients.py."""

import json

import pytest
from tiny_run import records, tiny_config

from emo_jax.errors import InputError
from emo_jax.train import loop, trackers


class Kept:
    """A tracker that keeps what it is told. fails: at the write of this step."""

    fails = -1

    def __init__(self, run):
        self.run, self.got, self.closed = run, [], 0
        if run.step == self.fails:
            raise ConnectionError("nobody is there")
        self.made.append(self)

    def write(self, step, record):
        if step == self.fails:
            raise ValueError("the server is\nsick")
        self.got.append((step, record))

    def close(self):
        self.closed += 1


@pytest.fixture
def two(monkeypatch):
    """Two trackers in place of the real ones: (their classes by name)"""
    found = {name: type(name, (Kept,), {"made": []}) for name in trackers.EXTRAS}
    monkeypatch.setattr(trackers, "TRACKERS", trackers.TRACKERS | found)
    monkeypatch.setattr(trackers, "require_packages", lambda config: None)
    return found


def test_a_run_that_goes_on_tells_its_trackers_under_the_same_name(tmp_path, two):
    for steps in (3, 5):
        loop.train(tiny_config(tmp_path, f"--train.steps={steps}", "--train.trackers=wandb,trackio"), tmp_path / "run")
    for kind in two.values():
        first, second = kind.made
        assert (first.run.step, second.run.step, first.closed, second.closed) == (0, 3, 1, 1)
        assert first.run.name == second.run.name == json.loads((tmp_path / "run" / "trackers.json").read_text())["name"]
        told = [record for step, record in first.got + second.got if "loss" in record]
        assert told == records(tmp_path / "run")
        assert [step for step, record in first.got + second.got if "held_out" in record] == [3, 5]
    assert not (tmp_path / "run" / "tensorboard").exists()  # which was not named
    loop.train(tiny_config(tmp_path, "--train.steps=2", "--train.trackers=wandb"), tmp_path / "other")
    assert two["wandb"].made[2].run.name != first.run.name


@pytest.mark.parametrize("fails", [0, 3])
def test_a_tracker_that_fails_is_given_up_and_the_run_and_the_others_go_on(tmp_path, two, capsys, fails):
    """0: at its begin."""
    two["wandb"].fails = fails
    config = tiny_config(tmp_path, "--train.steps=5", "--train.trackers=wandb,tensorboard,trackio")
    result = loop.train(config, tmp_path / "run")
    assert result["step"] == 5 and len(records(tmp_path / "run")) == 5
    assert [step for step, record in two["trackio"].made[0].got if "loss" in record] == [1, 2, 3, 4, 5]
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    why = "ValueError: the server is" if fails else "ConnectionError: nobody is there"
    assert capsys.readouterr().err.count(f"wandb failed and gets no more numbers ({why})") == 1
    assert [tracker.closed for tracker in two["wandb"].made] == [0] * (fails > 0)


def test_a_tracker_that_is_not_installed_is_bad_input_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"trackio is not installed: pip install 'emo-jax\[trackio\]'"):
        loop.train(tiny_config(tmp_path, "--train.trackers=tensorboard,trackio"), tmp_path / "run")
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize("given", ["wandbs", "tensorboard,", "wandb trackio", ","])
def test_a_tracker_nobody_knows_is_refused(tmp_path, given):
    with pytest.raises(InputError, match="must be some of tensorboard, wandb, trackio, separated by commas"):
        tiny_config(tmp_path, f"--train.trackers={given}")


def test_no_tracker_is_a_choice(tmp_path):
    loop.train(tiny_config(tmp_path, "--train.steps=2", "--train.trackers="), tmp_path / "run")
    assert len(records(tmp_path / "run")) == 2
    assert not {"tensorboard", "trackers.json"} & {path.name for path in (tmp_path / "run").iterdir()}
