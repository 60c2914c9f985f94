"""The parts of a run: its stages, its learning rate through them, the ramp of its batch size, and what is refused."""

import json

import numpy as np
import pytest

from emo_jax import config as lib
from emo_jax.checkpoints.compatibility import require_same_data
from emo_jax.config import Config, OptimizerConfig, Stage, TrainConfig
from emo_jax.errors import InputError
from emo_jax.phases import phase_at, phases, trained_config
from emo_jax.train.optimizer import learning_rate

LONG = Stage(changes=("data.sequence_length=8192", "router.document_pool=false", "model.rope_theta=8e6"), reset_optimizer=True)
DECAY = Stage(until=80, changes=("optimizer.schedule=linear", "optimizer.warmup_steps=0", "optimizer.final_fraction=0.0"))


def config(*stages, ramp="", steps=100, **fields):
    return Config(name="run", train=TrainConfig(steps=steps, batch_size=16, batch_ramp=ramp), stages=stages,
                  optimizer=OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="constant"), **fields)


def test_a_run_without_stages_is_one_phase_with_its_own_config():
    c = config()
    (phase,) = phases(c)
    assert phase.config is c and (phase.first_step, phase.until) == (0, 100)


def test_stages_and_ramp_cut_the_run_and_changes_hold_for_later_stages():
    c = config(Stage(until=50, changes=("train.batch_size=32",)), DECAY, LONG, ramp="10:4,60:8")
    found = [(p.first_step, p.until, p.stage, p.config.train.batch_size, p.config.data.sequence_length, p.starts_stage,
              p.resets_optimizer) for p in phases(c)]
    assert found == [(0, 10, 0, 4, 4096, True, False), (10, 50, 0, 8, 4096, False, False), (50, 60, 1, 8, 4096, True, False),
                     (60, 80, 1, 32, 4096, False, False), (80, 100, 2, 32, 8192, True, True)]
    last = phase_at(c, 100).config
    assert not last.stages and not last.train.batch_ramp and last.optimizer.schedule == "linear" and not last.uses_pools
    assert trained_config(c, 80).model.rope_theta == 5e5 and phase_at(c, 80).config.model.rope_theta == 8e6
    assert [p.until for p in phases(config(ramp="10:4,500:8"))] == [10, 100]  # a ramp may be longer than the run


def test_a_schedule_runs_from_the_stage_that_sets_it_to_the_next_that_does():
    def rates(*stages):
        return np.concatenate([learning_rate(p.config)(np.arange(p.first_step, p.until)) for p in phases(config(*stages))])

    trunk = rates(Stage(until=50), Stage(until=80, changes=("data.sequence_length=512",)), LONG)
    np.testing.assert_array_equal(trunk, rates())  # stages that set no field of it leave it alone
    decayed = rates(Stage(until=50), DECAY, LONG)
    np.testing.assert_array_equal(decayed[:50], trunk[:50])
    np.testing.assert_allclose(decayed[50:], 1 - np.arange(1, 51) / 50, atol=1e-6)  # through LONG, to the end
    again = rates(Stage(until=50), DECAY, Stage(changes=("optimizer.warmup_steps=4", "optimizer.learning_rate=0.5")))
    np.testing.assert_allclose(again[50:80], 1 - np.arange(1, 31) / 30, atol=1e-6)
    np.testing.assert_allclose(again[80:84], [0.125, 0.25, 0.375, 0.5], atol=1e-6)
    assert again[-1] == 0


def test_a_config_with_stages_survives_json_and_its_fields_can_be_overridden():
    c = config(Stage(until=50), DECAY, LONG, ramp="10:4")
    assert lib.from_dict(json.loads(lib.dumps(c))) == c
    changed = lib.override(c, ["--stages.0.until=40", "stages.1.changes=optimizer.schedule=cosine;data.mixture=a:1,b:2",
                               "stages.2.reset_optimizer=false"])
    assert changed.stages[0].until == 40 and changed.stages[1].changes[1] == "data.mixture=a:1,b:2"
    assert lib.difference(changed, c).keys() == {"stages.0.until", "stages.1.changes", "stages.2.reset_optimizer"}
    old = json.loads(lib.dumps(config()))
    del old["stages"], old["train"]["batch_ramp"]  # what an older version saved
    assert lib.from_dict(old) == config()


@pytest.mark.parametrize("stages, ramp, message", [
    ((Stage(until=70), Stage(until=60), Stage()), "", "stages.1.until=60 must be a step after 70.*before train.steps=100"),
    ((Stage(), Stage()), "", "stages.0.until=0 must be a step after 0"),
    ((Stage(until=50),), "", "stages.0.until=50 must be 0 or train.steps=100"),
    ((Stage(changes=("model.d_model=4",)),), "", "stages.0.changes: 'model.d_model=4': a stage can change data"),
    ((Stage(changes=("seed=1",)),), "", "a stage can change"),
    ((Stage(changes=("data.tokenizer=x",)),), "", "one tokenizer"),
    ((Stage(until=5), Stage(changes=("data.packin=x",))), "", "stages.1: .*did you mean data.packing"),
    ((Stage(until=5), Stage(changes=("train.microbatches=3",))), "", "stages.1: .*train.microbatches=3 must divide"),
    ((Stage(changes=("optimizer.trainable=experts",)),), "", "another form of state"),
    ((), "10:a", "train.batch_ramp='10:a' must be STEP:ROWS"),
    ((), "10:4,10:8", "ever higher steps"),
    (("x",), "", "stages=.*must be a tuple of Stage"),
    ((Stage(until="3"),), "", "stages.0.until='3' must be int"),
])
def test_a_bad_stage_or_ramp_says_what_is_allowed(stages, ramp, message):
    with pytest.raises(InputError, match=message):
        config(*stages, ramp=ramp)


def test_only_what_is_to_come_may_change():
    begun = config(Stage(until=50), Stage(until=80, changes=("data.packing=first_fit",)), Stage(), ramp="10:4")
    require_same_data(begun, config(Stage(until=50), Stage(changes=("data.packing=first_fit",))), 60, "it")
    require_same_data(begun, config(Stage(until=50), LONG), 50, "it")  # the second stage has not begun
    require_same_data(config(), config(Stage(until=60), LONG), 60, "it")
    with pytest.raises(InputError, match=r"stage 1: data.packing: 'first_fit' in the checkpoint, 'concat_and_split' given"):
        require_same_data(begun, config(Stage(until=50), Stage()), 51, "it")
    with pytest.raises(InputError, match=r"stages that begin before step 60: at \[0, 50\] in the checkpoint, at \[0\] given"):
        require_same_data(begun, config(), 60, "it")
    with pytest.raises(InputError, match="data.sequence_length: 4096 in the checkpoint, 8192 given"):
        require_same_data(config(), config(Stage(changes=LONG.changes)), 1, "it")
