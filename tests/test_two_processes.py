"""A run of two real processes, which exchange gradients over the network (gloo): trains, stops, and goes on, also as
one process."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_run import config_file, records, series
from two_processes import finish, start, start_command

from emo_jax.checkpoints import checkpoint


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return str(config_file(tmp_path_factory.mktemp("config")))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that ended because one of its processes was told to stop, and its last step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    started = start(config, out, 2, "--train.steps=1000000", "--train.log_every=3", "--checkpoint.every=3",
                    "--checkpoint.keep_last=1000")
    deadline = time.monotonic() + 300
    while all(p.poll() is None for p in started) and time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and len(records(out)) >= 2:
            started[1].send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    result = finish(started, 75)
    assert result["stopped"] and result["step"] == max(checkpoint.steps(out / "checkpoints")) >= 6
    return out, result["step"]


@pytest.fixture
def cut(whole, tmp_path):
    """The same run as if it had been killed after its first checkpoint."""
    out = shutil.copytree(whole[0], tmp_path / "run")
    for step in checkpoint.steps(out / "checkpoints")[1:]:
        shutil.rmtree(out / "checkpoints" / str(step))
    return out


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on_bit_identically(config, whole, cut):
    out, steps = whole
    result = finish(start(config, cut, 2, f"--train.steps={steps}", "--train.log_every=3"))
    assert (result["resumed_from"], result["step"]) == (3, steps)
    assert series(cut)[:len(series(out))] == series(out)  # the last step is logged, but not the one of a stop
    ends = [checkpoint.open_checkpoint(run) for run in (out, cut)]
    assert ends[0].meta["checksums"] == ends[1].meta["checksums"] and ends[0].position() == ends[1].position()


def test_one_process_goes_on_with_the_same_documents(config, whole, cut):
    out, steps = whole
    result = finish(start(config, cut, 1, f"--train.steps={steps}", "--train.log_every=3"))
    assert (result["resumed_from"], result["step"]) == (3, steps)
    np.testing.assert_allclose([v for _, v in series(cut)][:len(series(out))], [v for _, v in series(out)], rtol=1e-5)
    assert checkpoint.open_checkpoint(cut).position() == checkpoint.open_checkpoint(out).position()


def test_copies_of_parameters_are_read_once_by_all_processes_together(config, tmp_path):
    run, script = tmp_path / "run", str(Path(__file__).with_name("restore_counted.py"))
    larger = ("--model.d_model=256", "--model.d_ff=128", "--model.num_experts=16")
    finish(start(config, run, 1, "--train.steps=1", "--train.eval_rows=4", *larger))
    counted = {}
    for processes in (1, 2):
        started = start_command([script, str(run), '{"data": 4, "fsdp": 1}'], processes)
        said = [json.loads(p.communicate(timeout=200)[0].splitlines()[-1]) for p in started]
        assert all(one["as_asked"] and one["what_was_saved"] for one in said)
        counted[processes] = sum(one["read"] for one in said)
    assert counted[2] < 1.3 * counted[1]
