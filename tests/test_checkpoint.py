"""Checkpoints: exact on any mesh, kept as configured, and never read without a check."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from tiny_run import tiny_config

from emo_jax import compat, sharding
from emo_jax.checkpoints import checkpoint, description
from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.checkpoints.compatibility import require_same_data, require_same_model
from emo_jax.checkpoints.description import DamagedCheckpoint
from emo_jax.checkpoints.writer import CheckpointWriter
from emo_jax.config import CheckpointConfig, override
from emo_jax.errors import InputError, RunError
from emo_jax.train import bad_steps
from emo_jax.train.start import restore_state
from emo_jax.train.step import abstract_state, init_state


def mesh_of(config, **axes):
    return sharding.make_mesh(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **axes)))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def state(config):
    """A state without zeros, so that nothing is equal by chance."""
    mesh = mesh_of(config, data=2, fsdp=2, expert=2)
    state = init_state(config, mesh)
    return jax.tree.map(lambda x: jax.device_put((np.arange(x.size).reshape(x.shape) / 7 + 1).astype(x.dtype),
                                                 x.sharding), state)


def items_of(state):
    return {"params": state.params, "opt_state": state.opt_state}


def write(config, out, state, steps=(1,), losses=None, keep=CheckpointConfig(keep_every=0)):
    writer = CheckpointWriter(out, keep)
    for step in steps:
        writer.save(step, items_of(state), config, tokens=10 * step, source={"documents": 3}, position={"rows": [[step, 0]]},
                    loss=losses and losses[step])
    writer.close()
    return out


@pytest.mark.parametrize("axes", [dict(fsdp=8), dict(data=2, fsdp=1, tensor=2, expert=2), None])
def test_restored_exactly_on_another_mesh(config, state, tmp_path, axes):
    found = open_checkpoint(write(config, tmp_path, state, steps=(5,)))
    mesh = mesh_of(config, **axes) if axes else sharding.single_device_mesh()
    target = abstract_state(config, mesh)
    restored = restore_state(found, target)
    whole = state._replace(step=np.int32(5), recent=bad_steps.from_json(None, target.recent))
    for old, new, wanted in zip(*map(jax.tree.leaves, (whole, restored, target)), strict=True):
        np.testing.assert_array_equal(np.asarray(old), np.asarray(new))
        assert new.sharding == wanted.sharding
    assert found.config == config and found.meta["tokens"] == 50 and found.position() == {"rows": [[5, 0]]}
    assert found.meta["conventions"]["eos_owner"] == "own"
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
                 found.restore_params(mesh), restored.params)


def test_what_is_saved_is_the_state_at_save_time(config, state, tmp_path):
    """The next step donates the state's buffers while the save is still writing."""
    mesh = state.step.sharding.mesh
    with compat.set_mesh(mesh):
        mine = jax.tree.map(jnp.copy, state)
        expected = checkpoint.checksums(items_of(mine))
        writer = CheckpointWriter(tmp_path, CheckpointConfig())
        writer.save(0, items_of(mine), config, tokens=0, source={}, position={"rows": []})
        step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
        for _ in range(3):
            mine = step(mine)
        jax.block_until_ready(mine)
        writer.close()
    restored = restore_state(open_checkpoint(tmp_path), abstract_state(config, mesh))  # compares with the recorded checksums
    assert checkpoint.checksums(items_of(restored)) == expected


def test_one_chunk_per_layer_and_expert(config, state, tmp_path):
    out = write(config, tmp_path, state)
    store = tensorstore.open({"driver": "zarr", "kvstore": {
        "driver": "ocdbt", "base": f"file://{out}/checkpoints/1/params/", "path": "layers.moe.gate/"}}).result()
    assert store.shape == (2, 8, 32, 16) and store.chunk_layout.read_chunk.shape[:2] == (1, 1)


def test_retention_keeps_the_last_the_regular_and_the_best(config, state, tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: 3.0, 6: 3.5, 7: 2.5}
    keep = CheckpointConfig(keep_last=2, keep_every=3, keep_best=1)
    out = write(config, tmp_path, state, steps=range(1, 8), losses=losses, keep=keep)
    assert checkpoint.steps(out / "checkpoints") == [2, 3, 6, 7]
    writer = CheckpointWriter(out, keep)  # a restart remembers the losses
    assert writer.ranks_as_best(0.9) and not writer.ranks_as_best(1.1)
    writer.close()
    write(config, out, state, steps=(8, 9), losses={8: 2.0, 9: 2.0}, keep=keep)
    assert checkpoint.steps(out / "checkpoints") == [2, 3, 6, 8, 9]


def test_a_state_that_is_not_finite_is_not_saved(config, state, tmp_path):
    writer = CheckpointWriter(tmp_path, CheckpointConfig())
    head = state.params["head"]
    bad = np.asarray(head).copy()
    bad[3, 4] = np.inf
    broken = state._replace(params=state.params | {"head": jax.device_put(bad, head.sharding)})
    with pytest.raises(RunError, match="after step 1 is not finite"):
        writer.save(1, items_of(broken), config, tokens=0, source={}, position=None)
    writer.close()
    assert checkpoint.steps(tmp_path / "checkpoints") == []


def damage_arrays(step: Path):
    """Overwrites 64 bytes in the middle of every large data file."""
    for file in (step / "params").rglob("d/*"):
        content = bytearray(file.read_bytes())
        if len(content) > 10_000:
            content[len(content) // 2:len(content) // 2 + 64] = bytes(64)
            file.write_bytes(content)


def drop_array_file(step: Path):
    max((step / "opt_state" / "d").iterdir(), key=lambda p: p.stat().st_size).unlink()


def change_recorded_checksum(step: Path):
    """What a silent change of the arrays looks like."""
    found = description.read(step)
    found.meta["checksums"]["params"]["sum"] += 1
    description.write(step, description.sealed(found))


@pytest.mark.parametrize("damage", [damage_arrays, drop_array_file, change_recorded_checksum])
def test_damage_is_noticed(config, state, tmp_path, damage):
    out = write(config, tmp_path, state)
    damage(out / "checkpoints" / "1")
    with pytest.raises(DamagedCheckpoint, match="checkpoints/1: (params|opt_state)"):
        restore_state(open_checkpoint(out), abstract_state(config, state.step.sharding.mesh))


def test_damaged_description(config, state, tmp_path):
    out = write(config, tmp_path, state)
    (out / "checkpoints" / "1" / "meta" / "metadata").write_text("{")
    with pytest.raises(DamagedCheckpoint, match="meta cannot be read"):
        open_checkpoint(out)


def test_opened_by_run_folder_or_step(config, state, tmp_path):
    out = write(config, tmp_path, state, steps=(1, 2))
    by_run = open_checkpoint(out)
    assert by_run.step == 2 and by_run.run == out
    assert open_checkpoint(out / "checkpoints").path == open_checkpoint(out / "checkpoints" / "2").path == by_run.path
    assert open_checkpoint(out, step=1).step == 1
    with pytest.raises(InputError, match="no checkpoint of step 7.*steps 1, 2"):
        open_checkpoint(out, step=7)
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(out / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="expected a run folder"):
        open_checkpoint(tmp_path / "empty")


def test_another_model_or_stream_is_named_field_by_field(config, tmp_path):
    def given(*overrides):
        return override(config, list(overrides))

    other = given("model.d_ff=32", "router.eos_owner=next", "model.attention_scope=causal")
    with pytest.raises(InputError) as e:
        require_same_model(config, other, "run")
    for text in ("model.d_ff: 16 in the checkpoint, 32 given", "model.attention_scope",
                 "router.eos_owner: 'own' in the checkpoint, 'next' given"):
        assert text in str(e.value)
    with pytest.raises(InputError) as e:
        require_same_model(config, other, "run", anneal=True)
    assert "d_ff" in str(e.value) and "eos_owner" not in str(e.value) and "attention_scope" not in str(e.value)
    with pytest.raises(InputError, match="data.packing: 'concat_and_split' in the checkpoint, 'first_fit' given"):
        require_same_data(config, given("data.packing=first_fit"), 1, "run")
    require_same_data(config, given("train.steps=99", "train.batch_size=16", "data.workers=3", "data.path=/moved"), 1, "run")
