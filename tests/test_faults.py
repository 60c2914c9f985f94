"""The short form of the proof by many faults (see `faults`), and disks that cannot be written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fault_runs
import pytest
from tiny_run import records, tiny_config

from emo_jax.train import loop

TESTS = Path(__file__).parent
CACHE = {"JAX_COMPILATION_CACHE_DIR": fault_runs.CACHE}


def test_kills_and_damages_change_no_number():
    """The long form: `python tests/faults.py --seed N --kills 500 --damages 500 --bucket`."""
    argv = ["--seed=1", "--kills=2", "--damages=3", "--processes=1", "--hosts=0"]
    found = subprocess.run([sys.executable, str(TESTS / "faults.py"), *argv], capture_output=True, text=True, timeout=900,
                           env=os.environ | CACHE)
    result = json.loads(found.stdout.splitlines()[-1])
    assert not result["failed"] and not any(result["problems"].values()), found.stdout[-5000:]
    assert found.returncode == 0 and (result["kills"], result["damages"]) == (2, 3) and result["finished_runs"] >= 1


@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk of its own at a folder, with options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> Path:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], capture_output=True)
        if made.returncode:
            pytest.skip("this user cannot mount a disk")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def train(folder, out, *overrides):
    config = fault_runs.write_config(folder)
    env = os.environ | CACHE | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run([sys.executable, "-m", "emo_jax", "train", str(config), "--out", str(out), *overrides],
                          capture_output=True, text=True, timeout=300, env=env)


def test_a_disk_that_another_process_fills_ends_a_run_in_a_sentence(disk, tmp_path):
    """Each save takes some of it, and nothing is deleted."""
    out = disk("size=6m") / "run"
    found = train(tmp_path, out, "--train.steps=4000", "--train.eval_every=0", "--checkpoint.every=20",
                  "--checkpoint.keep_last=10000")
    assert found.returncode == 1 and "Traceback" not in found.stderr and "internal error" not in found.stderr
    assert "emo-jax train: " in found.stderr.splitlines()[-1] and "disk" in found.stderr.splitlines()[-1]


def test_a_disk_that_can_only_be_read_is_refused(disk, tmp_path):
    out = disk("size=1m", "ro") / "run"
    found = train(tmp_path, out)
    assert found.returncode == 2
    assert found.stderr == f"emo-jax train: --out {out} cannot be written: Read-only file system\n"


def test_an_evaluation_that_a_stop_came_before_is_made_up_for(tmp_path, monkeypatch):
    """Of the step at which it stopped; at the last step there is nothing to stop."""
    evaluations = ("train.eval_every=2", "train.steps=4")
    loop.train(tiny_config(tmp_path, *evaluations), tmp_path / "whole")
    monkeypatch.setattr(loop.StopSignals, "requested", "SIGTERM", raising=False)
    monkeypatch.setattr(loop.StopSignals, "requested_after", lambda self, step: step in (2, 4))
    monkeypatch.setattr(loop.StopSignals, "__init__", lambda self: None)
    monkeypatch.setattr(loop.StopSignals, "__enter__", lambda self: self)
    monkeypatch.setattr(loop.StopSignals, "__exit__", lambda *_: None)
    ends = [loop.train(tiny_config(tmp_path, *evaluations), tmp_path / "run")]
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(True)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:  # killed after it was made up for, before the next checkpoint
        file.writelines(line for line in lines if '"eval"' in line and json.loads(line)["step"] == 2)
    ends.append(loop.train(tiny_config(tmp_path, *evaluations), tmp_path / "run"))
    assert [(end["stopped"], end["step"]) for end in ends] == [("SIGTERM", 2), (None, 4)]
    for kind in (False, True):
        found, whole = (map(fault_runs.without_clock, records(tmp_path / name, kind)) for name in ("run", "whole"))
        assert list(found) == list(whole)
