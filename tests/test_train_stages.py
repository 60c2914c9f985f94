"""A run of stages with a ramp of the batch size: what its steps do, and that it goes on from any of them."""

import shutil

import jax
import numpy as np
import optax
import pytest
from tiny_run import records, series, tiny_config

from emo_jax import config as lib
from emo_jax import sharding
from emo_jax.checkpoints import checkpoint
from emo_jax.config import Stage
from emo_jax.errors import InputError
from emo_jax.train.loop import train
from emo_jax.train.start import restore_state
from emo_jax.train.step import abstract_state

STAGES = (
    Stage(until=2),
    Stage(until=4, changes=("optimizer.schedule=linear", "optimizer.warmup_steps=0", "optimizer.final_fraction=0.0")),
    Stage(changes=("data.sequence_length=64", "router.document_pool=false"), reset_optimizer=True),
)
RAMP = ("train.batch_ramp=2:8", "train.batch_size=16")


def staged(folder, *overrides, stages=STAGES, steps=6):
    config = tiny_config(folder, "mesh.data=4", "mesh.fsdp=2", "checkpoint.every=1", "checkpoint.keep_last=9", *overrides)
    return lib.from_dict(lib.to_dict(config) | {"stages": stages and [vars(stage) for stage in stages],
                                                "train": vars(config.train) | {"steps": steps}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder):
    train(staged(folder, *RAMP), folder / "whole")
    return folder / "whole"


def test_every_stage_trains_as_it_says(whole):
    rows = [(r["tokens"], r["learning_rate"]) for r in records(whole)]
    tokens = np.diff([0, *(n for n, _ in rows)])
    np.testing.assert_array_equal(tokens, [8 * 32] * 2 + [16 * 32] * 2 + [16 * 64] * 2)
    np.testing.assert_allclose([rate for _, rate in rows], np.array([0.5, 1, 0.75, 0.5, 0.25, 0]) * 1e-2, atol=1e-9)
    sizes = np.array([r["pool_size_mean"] for r in records(whole)])
    assert (sizes[:4] < 7).all() and (sizes[4:] == 7).all()  # all of the routed experts


def test_checkpoints_tell_what_they_were_trained_with(whole):
    at = {step: checkpoint.open_checkpoint(whole, step) for step in (4, 5)}
    assert [at[4].config.data.sequence_length, at[5].config.data.sequence_length] == [32, 64]
    assert at[4].config.uses_pools and not at[5].config.uses_pools and not at[5].config.stages
    assert not at[5].meta["conventions"]["document_pool"] and at[5].run_config.stages == STAGES
    assert len(at[5].position()["rows"]) == 8  # streams, as the first batch had rows


def test_a_stage_can_begin_with_fresh_moments_without_disturbing_the_schedule(whole):
    found = checkpoint.open_checkpoint(whole, 5)
    mesh = sharding.single_device_mesh()
    parts = jax.tree.leaves(restore_state(found, abstract_state(found.config, mesh)).opt_state,
                            is_leaf=lambda s: isinstance(s, (optax.ScaleByAdamState, optax.ScaleByScheduleState)))
    counts = {type(part): int(part.count) for part in parts}
    assert counts == {optax.ScaleByAdamState: 1, optax.ScaleByScheduleState: 5}


@pytest.mark.parametrize("step", [3, 4])
def test_it_goes_on_exactly_from_inside_a_stage_and_from_a_boundary(folder, whole, tmp_path, step):
    out = shutil.copytree(whole, tmp_path / "run")
    for later in range(step + 1, 7):
        shutil.rmtree(out / "checkpoints" / str(later))
    assert train(staged(folder, *RAMP), out)["resumed_from"] == step
    for name in ("loss", "grad_norm", "tokens", "learning_rate", "loss_by_label"):
        assert series(out, name) == series(whole, name)
    ends = [checkpoint.open_checkpoint(path) for path in (out, whole)]
    assert ends[0].meta["checksums"] == ends[1].meta["checksums"] and ends[0].position() == ends[1].position()


def test_stages_that_change_nothing_change_nothing_and_one_can_follow_a_finished_run(folder, tmp_path):
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    train(staged(folder, stages=(), steps=3), plain)
    train(staged(folder, stages=(Stage(until=1), Stage()), steps=3), cut)
    assert series(plain) == series(cut)
    assert checkpoint.open_checkpoint(plain).meta["checksums"] == checkpoint.open_checkpoint(cut).meta["checksums"]
    longer = (Stage(until=3), Stage(changes=("data.packing=first_fit",)))
    assert train(staged(folder, stages=longer, steps=4), plain)["resumed_from"] == 3
    assert any(len(state) > 2 for state in checkpoint.open_checkpoint(plain).position()["rows"])  # rows that are open
    with pytest.raises(InputError, match="(?s)stages that begin before step 4.*a change from here on is a stage"):
        train(staged(folder, stages=(), steps=6), plain)


def test_all_phases_are_checked_before_the_first_step(folder, tmp_path):
    with pytest.raises(InputError, match="must divide train.batch_size / train.microbatches=6"):
        train(staged(folder, stages=(Stage(until=2), Stage(changes=("train.batch_size=6",)))), tmp_path / "a")
    with pytest.raises(InputError, match="train.batch_size=24: the run reads its documents in 16 streams"):
        train(staged(folder, RAMP[1], stages=(Stage(until=2), Stage(changes=("train.batch_size=24",)))), tmp_path / "b")
    with pytest.raises(InputError, match="no such file"):
        train(staged(folder, stages=(Stage(until=2), Stage(changes=("data.path=nowhere",)))), tmp_path / "b")
    assert not list((tmp_path / "b").glob("metrics*"))
