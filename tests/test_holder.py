"""Two runs never write into one folder: who holds it, who is refused, and who may take it over. On a disk and in buckets."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from servers import BUCKET, with_buckets
from tiny_run import config_file, series, tiny_config

from emo_jax.errors import InputError
from emo_jax.files import given_path
from emo_jax.train import holder, loop
from emo_jax.train.holder import NAME, Holder, HolderLost, hold

HOLD = """
import sys, time
from emo_jax.train.holder import Holder
from emo_jax.files import given_path
Holder(given_path(sys.argv[1], "--out")).take()
print("held", flush=True)
time.sleep(200)
"""


@pytest.fixture
def quick(monkeypatch):
    """Signs of life, and patience, in tenths of seconds."""
    for name, seconds in {"BEAT_S": 0.2, "STALE_S": 1.5, "POLL_S": 0.2}.items():
        monkeypatch.setattr(holder, name, seconds)


@pytest.fixture(params=["disk", "gs", "s3"])
def folder(request, tmp_path):
    if request.param != "disk":
        with_buckets()
        return given_path(f"{request.param}://{BUCKET}/{tmp_path.name}", "--out")
    return tmp_path


def elsewhere(held):
    """As if it ran on another machine: only its signs of life say whether it is there."""
    held._me |= {"machine": "another", "host": "far"}
    return held


def test_a_second_run_is_refused_while_the_first_shows_signs_of_life(folder, quick):
    with hold(folder) as first:
        with pytest.raises(InputError, match=f"held by process {os.getpid()} on .* since 2.*which is alive"), hold(folder):
            pass
        first.confirm()
    assert not (folder / NAME).exists()
    with hold(folder):
        pass


def test_a_silent_holder_of_another_machine_is_taken_over_and_then_writes_nothing_more(folder, quick, monkeypatch):
    first = elsewhere(Holder(folder))
    with monkeypatch.context() as stopped:
        stopped.setattr(Holder, "_beat_on", lambda self: None)
        first.take()
    with hold(folder) as second:
        assert json.loads((folder / NAME).read_text())["id"] == second._me["id"]
        with pytest.raises(HolderLost, match=f"was taken over by process {os.getpid()} .*nothing more was written"):
            first.confirm()
        first.release()
        second.confirm()


def test_one_of_many_that_start_at_once_gets_the_folder(folder, quick):
    taken = [Holder(folder) for _ in range(4)]
    missing = taken[0]._read().stamp.generation
    assert [h._write(missing) for h in taken] == [True, False, False, False]


def test_a_write_that_was_answered_too_late_loses_nothing(folder):
    held = Holder(folder)
    assert held._write(held._read().stamp.generation)
    before = held._generation
    assert held._write(before)
    held._generation = before  # as if the last answer had not arrived
    held.confirm()
    held.release()
    assert not (folder / NAME).exists()


def test_the_folder_of_a_killed_process_is_taken_over_at_once(tmp_path, capfd):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.kill()  # and not waited for: a zombie holds nothing
    began = time.monotonic()
    while "has ended" not in holder._is_gone(json.loads((tmp_path / NAME).read_text())) and time.monotonic() < began + 10:
        time.sleep(0.05)
    with hold(tmp_path):
        assert f"was held by process {process.pid} on" in capfd.readouterr().err
    process.wait()


def test_a_holder_that_cannot_be_read_is_watched_like_any_other(tmp_path, quick, capfd):
    (tmp_path / NAME).write_bytes(b"\xff\x00[")
    with hold(tmp_path):
        pass
    assert "cannot be read" in capfd.readouterr().err


def test_a_second_train_changes_nothing_and_says_who_is_there(tmp_path):
    """The worst that was found: another learning rate on the same --out."""
    command = [sys.executable, "-m", "emo_jax", "train", str(config_file(tmp_path)), "--out", str(tmp_path / "run"),
               "--train.steps=100000", "--checkpoint.every=5"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoints" / "5").is_dir() and time.monotonic() < deadline:
            time.sleep(0.1)
        config = (tmp_path / "run" / "config.json").read_bytes()
        with pytest.raises(InputError, match=f"held by process {first.pid} on .*, which is alive; two runs cannot"):
            loop.train(tiny_config(tmp_path, "optimizer.learning_rate=0.5"), tmp_path / "run")
        assert (tmp_path / "run" / "config.json").read_bytes() == config and first.poll() is None
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 75
    finally:
        first.kill()
    steps = [step for step, _ in series(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1)) and not (tmp_path / "run" / NAME).exists()
