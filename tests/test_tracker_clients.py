"""Weights & Biases and trackio, their real clients, offline: a run tells them its numbers, and goes on in the same run."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny_run import config_file, records

from emo_jax.train.tensorboard import tagged


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a run that lost its last steps, went on, and did them again, the folder of trackio)"""
    folder = tmp_path_factory.mktemp("trackers")
    env = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
    for steps in (4, 6):
        done = subprocess.run([sys.executable, "-m", "emo_jax", "train", str(config_file(folder)), "--out", str(folder / "run"),
                               "--json", f"--train.steps={steps}", "--train.trackers=wandb,trackio", "--checkpoint.every=2"],
                              env=env, check=True, capture_output=True, text=True)
        assert json.loads(done.stdout)["step"] == steps, done.stdout  # and nothing else
        assert "failed" not in done.stderr
        if steps == 4:
            shutil.rmtree(folder / "run" / "checkpoints" / "4")
    return folder / "run", folder / "trackio"


def name(out):
    return json.loads((out / "trackers.json").read_text())["name"]


def numbers(record):
    """Without the speeds, which differ where a step was done twice."""
    return {tag: value for tag, value in tagged(record) if not tag.startswith("speed/")}


def wandb_records(path):
    """Of an offline run: LevelDB's log format after 7 bytes, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:  # the end of a block is empty
            at += room
            continue
        size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        part, at = part + data[at + 7:at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            yield Record.FromString(part)
            part = b""


def test_wandb_has_the_numbers_of_a_run_and_of_its_restart(run):
    out, _ = run
    files = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{name(out)}.wandb"] * 2
    history = []
    for path in files:
        found = list(wandb_records(path))
        (about,) = [record.run for record in found if record.HasField("run")]
        assert (about.run_id, about.project) == (name(out), "emo_jax")
        for record in found:
            if record.HasField("history"):
                history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json)
                                for item in record.history.item})
    expected = [{"step": record["step"]} | numbers(record) for record in records(out)]
    told = [h for h in history if "loss/loss" in h]
    assert [{k: h[k] for k in e} for h, e in zip(told, expected, strict=True)] == expected
    assert [h["step"] for h in history if "held_out/loss" in h] == [4, 6]


def test_trackio_has_the_numbers_of_a_run_and_of_its_restart(run, monkeypatch):
    out, folder = run
    monkeypatch.setenv("TRACKIO_DIR", str(folder))
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("emo_jax") == [name(out)]
    logged = SQLiteStorage.get_logs("emo_jax", name(out))
    told = [log for log in logged if "loss/loss" in log]
    assert [(log["step"], {k: log[k] for k in expected}) for log, expected in zip(
        told, map(numbers, records(out)), strict=True)] == [(record["step"], numbers(record)) for record in records(out)]
    assert [log["step"] for log in logged if "held_out/loss" in log] == [4, 6]
