"""A run that is stopped and goes on is the run that was never stopped."""

import os
import shutil
import signal

import numpy as np
import pytest
from tiny_run import records, series, tiny_config

from emo_jax import sharding
from emo_jax.checkpoints import checkpoint
from emo_jax.train import metrics
from emo_jax.train.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def seen(monkeypatch):
    """The tokens of every batch of the test, in order."""
    batches, place = [], sharding.global_batch

    def record(mesh, local):
        batches.append(local["tokens"].copy())
        return place(mesh, local)

    monkeypatch.setattr(sharding, "global_batch", record)
    return batches


@pytest.fixture(scope="module")
def whole(folder):
    """A run of 8 steps without a stop, its batches in `whole.npy`."""
    batches, place = [], sharding.global_batch
    sharding.global_batch = lambda mesh, local: (batches.append(local["tokens"].copy()), place(mesh, local))[1]
    try:
        result = train(tiny_config(folder, "mesh.data=2", "mesh.expert=2"), folder / "whole")
    finally:
        sharding.global_batch = place
    assert result["step"] == 8 and result["stopped"] is None
    return np.stack(batches)


@pytest.fixture(scope="module")
def stopped(folder, whole):
    """The same run after a SIGTERM in its fifth step."""
    patch = pytest.MonkeyPatch()
    add = metrics.Log.add

    def add_and_signal(self, step, values):
        add(self, step, values)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(metrics.Log, "add", add_and_signal)
    result = train(tiny_config(folder, "mesh.data=2", "mesh.expert=2"), folder / "stopped")
    patch.undo()
    assert (result["step"], result["stopped"]) == (5, "SIGTERM")
    assert checkpoint.steps(folder / "stopped" / "checkpoints") == [5]
    return folder / "stopped"


def test_resumed_on_the_same_mesh_it_is_bit_identical(folder, whole, stopped, seen, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "run")
    with (out / "metrics.jsonl").open("a") as file:  # what a kill after the save leaves behind
        file.write('{"step": 6, "loss": 0}\n{"step": 7, "lo')
    result = train(tiny_config(folder, "mesh.data=2", "mesh.expert=2"), out)
    assert result["resumed_from"] == 5
    for name in ("loss", "grad_norm", "tokens", "learning_rate", "expert_load_max"):
        assert series(out, name) == series(folder / "whole", name)
    assert records(out, evaluation=True) == records(folder / "whole", evaluation=True)
    np.testing.assert_array_equal(np.stack(seen), whole[5:])
    final = [checkpoint.open_checkpoint(path).meta["checksums"] for path in (out, folder / "whole")]
    assert final[0] == final[1]  # parameters and optimizer, bit for bit


def test_on_another_mesh_the_rows_are_the_same_and_the_loss_is_to_rounding(folder, whole, stopped, seen, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "run")
    train(tiny_config(folder), out)  # fsdp 8
    np.testing.assert_array_equal(np.stack(seen), whole[5:])
    np.testing.assert_allclose([loss for _, loss in series(out)], [loss for _, loss in series(folder / "whole")],
                               rtol=1e-5)


def test_a_finished_run_is_left_alone(folder, whole):
    before = (folder / "whole" / "metrics.jsonl").read_text()
    result = train(tiny_config(folder, "mesh.data=2", "mesh.expert=2"), folder / "whole")
    assert result["step"] == 8 and (folder / "whole" / "metrics.jsonl").read_text() == before
