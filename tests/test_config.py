"""Configs: the published parameter counts, strict overrides, and rules that name fields and values."""

import dataclasses
import subprocess
import sys

import pytest

from emo_jax import config as lib
from emo_jax import model
from emo_jax.config import Config, MeshConfig, ModelConfig, RouterConfig, TrainConfig, load_config, override
from emo_jax.errors import InputError

PUBLISHED = {  # spec of the released checkpoints, less 16 dead router rows of width 2048 for the shared expert
    "emo_1b14b_1t": 13_568_641_024 - 16 * 2048, "stdmoe_1b14b_130b": 13_568_641_024 - 16 * 2048,
    "stdmoe_1b4b_130b": 3_901_818_880 - 16 * 2048, "dense_1b_130b": 1_484_851_200,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    assert model.num_params(load_config(name)) == PUBLISHED[name]


def test_every_config_loads_and_has_its_own_name():
    names = lib.config_names()
    assert {"emo_tiny", "stdmoe_tiny", "dense_tiny", "emo_small", "stdmoe_small", "emo_1b14b_anneal",
            "stdmoe_1b14b_anneal", "stdmoe_1b14b_emo_anneal"} <= set(names)
    assert [load_config(name).name for name in names] == names


@pytest.mark.parametrize("emo", ["emo_tiny", "emo_small", "emo_1b14b_1t", "emo_1b14b_130b"])
def test_the_standard_moe_differs_by_one_field(emo):
    differences = lib.difference(load_config("std" + emo.replace("emo", "moe", 1)), load_config(emo))
    assert set(differences) == {"name", "router.document_pool"}


def test_the_router_geometry_of_olmo_35_is_the_public_one():
    emo, standard = load_config("olmo35_small_emo"), load_config("olmo35_small_stdmoe")
    assert set(lib.difference(standard, emo)) == {"name", "router.document_pool"}
    m, r = emo.model, emo.router
    assert (m.num_routed_experts, m.routed_top_k, m.num_shared_experts) == (512, 16, 1)
    assert (r.pool_min, r.pool_max, r.pool_eval) == (16, 512, 512)
    assert emo.train.batch_size * emo.data.sequence_length == 16_777_216
    assert emo.train.steps * 16_777_216 == 3_003_121_664_000


def test_an_override_has_the_type_of_its_field_whatever_the_config_holds():
    config = Config(name="x", optimizer=lib.OptimizerConfig(weight_decay=0, clip_norm=2))
    changed = override(config, ["optimizer.weight_decay=0.5", "--model.experts_per_layer=" + "8," * 16, "data.path=3"])
    assert changed.optimizer.weight_decay == 0.5 and changed.optimizer.clip_norm == 2
    assert changed.model.experts_per_layer == (8,) * 16 and changed.data.path == "3"


def test_config_survives_json():
    config = load_config("emo_small", ["--train.steps=7", "router.document_pool=false"])
    assert lib.from_dict(__import__("json").loads(lib.dumps(config))) == config
    assert config.train.steps == 7 and not config.router.document_pool


@pytest.mark.parametrize("bad, message", [
    ("--train.stepz=5", "did you mean train.steps"),
    ("--steps=5", "did you mean train.steps"),
    ("--train.steps", "--a.b=value"),
    ("--train.steps=many", "an integer"),
    ("--router.document_pool=perhaps", "true or false"),
    ("--router.semantics=emo_v3", "'emo_v1', 'emo_v2'"),
    ("--optimizer.learning_rate=nan", "finite"),
    ("--model.top_k=200", "model.num_experts=128"),
    ("--router.pool_min=3", "router.pool_min=3"),
    ("--train.microbatches=3", "train.batch_size=1024"),
])
def test_a_bad_override_says_what_is_allowed(bad, message):
    with pytest.raises(InputError) as error:
        override(Config(name="x"), [bad])
    assert message in str(error.value)


@pytest.mark.parametrize("devices, changes, message", [
    (8, dict(mesh=MeshConfig(data=3)), "8 devices"),
    (8, dict(train=TrainConfig(batch_size=12)), "train.batch_size / train.microbatches=12"),
    (8, dict(mesh=MeshConfig(expert=8, fsdp=1), model=ModelConfig(num_experts=100)), "model.num_experts=100"),
    (8, dict(mesh=MeshConfig(tensor=8, fsdp=1), model=ModelConfig(num_kv_heads=4)), "model.num_kv_heads=4"),
    (8, dict(mesh=MeshConfig(expert=8, fsdp=1), router=RouterConfig(document_pool=False),
             model=ModelConfig(num_experts=0, num_shared_experts=0)), "needs experts"),
])
def test_a_mesh_that_does_not_fit_says_why(devices, changes, message):
    config = Config(name="x", **changes)
    with pytest.raises(InputError) as error:
        lib.mesh_shape(config, devices)
    assert message in str(error.value)


def test_the_number_of_fields_stays_small():
    assert len(lib.flatten(lib.to_dict(Config(name="x")))) <= 118


def test_a_file_is_a_config(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from emo_jax.config import derive\ndef config():\n    return derive('emo_tiny', 'mine', seed=3)\n")
    assert load_config(str(path)) == dataclasses.replace(load_config("emo_tiny"), name="mine", seed=3)
    with pytest.raises(InputError, match="did you mean emo_tiny"):
        load_config("emo_tny")


def test_importing_pulls_in_neither_tensorflow_nor_torch():
    code = ("import sys, emo_jax.cli, emo_jax.config; assert 'jax' not in sys.modules, 'the command line imports jax';"
            "import emo_jax.model, emo_jax.train.loop, emo_jax.data.pipeline;"
            "heavy = {'tensorflow', 'torch', 'transformers', 'matplotlib'} & set(sys.modules); assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)
