"""A run of two real processes, which exchange gradients over the network (gloo): trains, stops, and goes on, also as
one process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_run import config_file, records, series

from emo_jax.checkpoints import checkpoint


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return str(config_file(tmp_path_factory.mktemp("config")))


def start(config, out, processes, *overrides):
    """`emo-jax train` as `processes` processes with four devices in all."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}"}
    if processes > 1:
        env |= {"EMO_JAX_COORDINATOR": f"localhost:{port}", "EMO_JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, "-m", "emo_jax", "train", config, "--out", str(out), "--json", *overrides]
    return [subprocess.Popen(command, env=env | ({"EMO_JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(processes)]


def finish(started):
    """The result that the first process prints; the others print none."""
    try:
        outputs = [p.communicate(timeout=400) for p in started]
    finally:
        for p in started:
            p.kill()
    assert [p.returncode for p in started] == [0] * len(started), "\n".join(err for _, err in outputs)
    assert not any(line.startswith("{") for out, _ in outputs[1:] for line in out.splitlines())
    return json.loads(outputs[0][0].splitlines()[-1])


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
    result = finish(started)
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
    assert series(cut) == series(out)
    ends = [checkpoint.open_checkpoint(run) for run in (out, cut)]
    assert ends[0].meta["checksums"] == ends[1].meta["checksums"] and ends[0].position() == ends[1].position()


def test_one_process_goes_on_with_the_same_documents(config, whole, cut):
    out, steps = whole
    result = finish(start(config, cut, 1, f"--train.steps={steps}", "--train.log_every=3"))
    assert (result["resumed_from"], result["step"]) == (3, steps)
    np.testing.assert_allclose([v for _, v in series(cut)], [v for _, v in series(out)], rtol=1e-5)
    assert checkpoint.open_checkpoint(cut).position() == checkpoint.open_checkpoint(out).position()
