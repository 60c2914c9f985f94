"""Devices that hold other bits than they should are found and named."""

import jax
import numpy as np
import pytest
import tiny
from tiny_run import series, tiny_config

from emo_jax import model, sharding
from emo_jax.errors import RunError
from emo_jax.train import loop, replicas

MESH = dict(data=4, fsdp=2)


def with_a_flipped_bit(x: jax.Array, device: int, at: tuple, bit: int = 3) -> jax.Array:
    """`x` with one bit changed in what one device holds of it."""
    shards = []
    for shard in x.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id == device:
            data.view(np.uint32)[at] ^= np.uint32(1 << bit)
        shards.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(tiny.config(mesh=MESH))


@pytest.fixture(scope="module")
def params(mesh):
    return model.init_params(tiny.config(mesh=MESH), mesh)


def test_equal_replicas_pass(mesh, params):
    check = replicas.ReplicaCheck(mesh, every=2)
    for step in range(1, 9):
        check.after_step(step, params)
    check.before_save(9, params)


def test_a_flipped_bit_is_found_and_the_device_outvoted(mesh, params):
    """In one of the four copies of a shard of one layer."""
    gate = with_a_flipped_bit(params["layers"]["moe"]["gate"], device=5, at=(1, 2, 3, 4))
    damaged = params | {"layers": params["layers"] | {"moe": params["layers"]["moe"] | {"gate": gate}}}
    check = replicas.ReplicaCheck(mesh, every=1)
    check.after_step(1, damaged)
    with pytest.raises(RunError, match=r"after step 1 .*device 5 \(cpu, process 0 on .*\) differs from the others in "
                       r"layers.moe.gate of layer 1$") as error:
        check.after_step(5, params)
    assert "take the device" in error.value.advice
    with pytest.raises(RunError, match="device 5"):
        check.before_save(6, damaged)


def test_of_two_copies_both_are_named():
    config = tiny.config(mesh=dict(data=2, fsdp=4))
    mesh = sharding.make_mesh(config)
    params = model.init_params(config, mesh)
    damaged = params | {"head": with_a_flipped_bit(params["head"], device=6, at=(0, 0))}
    with pytest.raises(RunError, match="device 2 .*, device 6 .* one of them is wrong, in head$"):
        replicas.ReplicaCheck(mesh, every=1).before_save(3, damaged)


def test_repeats_that_differ_name_the_device():
    names = [replicas.Part(replicas.ROWS, None), replicas.Part("layers.q", 0)]
    first = np.arange(16, dtype=np.uint32).reshape(8, 2)
    again = first.copy()
    assert replicas.compare_repeats(first, again, names) == []
    again[3, 0] += 1
    (found,) = replicas.compare_repeats(first, again, names)
    assert found.part == names[0] and found.devices == (3,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("replicas")


RUN = ("mesh.data=8", "mesh.fsdp=1", "data.eval_fraction=0.0", "train.steps=8")


def test_a_run_with_a_corrupt_device_ends_and_saves_nothing_wrong(folder, tmp_path, monkeypatch):
    config = tiny_config(folder, *RUN, "checkpoint.every=2", "faults.check_replicas_every=3")
    one_step = loop.TrainingLoop._one_step

    def corrupted(self):
        one_step(self)
        if self.step == 5:
            final = with_a_flipped_bit(self.state.params["final_norm"], device=3, at=(7,))
            self.state = self.state._replace(params=self.state.params | {"final_norm": final})

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingLoop, "_one_step", corrupted)
        with pytest.raises(RunError, match="after step 6 .*device 3 .*final_norm.*the last good checkpoint is of step 4") as e:
            loop.train(config, tmp_path / "run")
        assert "take the device or its host out of the run" in str(e.value)
    loop.train(config, tmp_path / "run")
    loop.train(config, tmp_path / "other")
    assert series(tmp_path / "run") == series(tmp_path / "other")


def test_gradients_that_are_not_the_same_twice_end_the_run(folder, tmp_path, monkeypatch):
    config = tiny_config(folder, *RUN, "faults.repeat_step_every=2")
    loop.train(config, tmp_path / "run")
    loop.train(tiny_config(folder, *RUN), tmp_path / "other")
    assert series(tmp_path / "run") == series(tmp_path / "other")
    make, calls = replicas.RepeatCheck.__init__, []

    def make_flipping(self, *args):
        make(self, *args)
        right = self.hashes

        def flipping(*args):
            calls.append(0)
            return right(*args) + np.uint32(np.arange(8) == 2)[:, None] * (len(calls) == 4)

        self.hashes = flipping

    monkeypatch.setattr(replicas.RepeatCheck, "__init__", make_flipping)
    with pytest.raises(RunError, match="step 4, computed twice, are not the same: device 2 .* loss of its rows"):
        loop.train(config, tmp_path / "bad")
