"""Compiled programs: where they are kept, and which configs share them."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from tiny_run import CACHE, tiny_config

from emo_jax import compilation, machine
from emo_jax.bench.step import random_batch
from emo_jax.config import flatten, override, to_dict
from emo_jax.sharding import global_batch, single_device_mesh
from emo_jax.train import step

OTHER = {  # another value for every field that programs do not depend on
    "name": "other", "data.path": "/nowhere", "data.workers": 1, "data.eval_fraction": 0.2, "data.packing": "first_fit",
    "checkpoint.every": 7, "checkpoint.keep_best": 0, "faults.hang_seconds": 9.0, "faults.check_replicas_every": 3,
    "train.steps": 77, "train.log_every": 5, "train.eval_every": 3, "train.eval_rows": 9, "train.compilation_cache": "/cache"}


def test_configs_that_differ_in_what_no_program_depends_on_share_their_programs(tmp_path):
    config = tiny_config(tmp_path)
    other = override(config, [f"{key}={value}" for key, value in OTHER.items()])
    mesh = single_device_mesh()
    assert step.make_train_step(config, mesh) is step.make_train_step(other, mesh)
    assert step.make_eval_step(config, mesh) is step.make_eval_step(other, mesh)
    assert step.make_train_step(config, mesh) is not step.make_train_step(override(config, ["--seed=1"]), mesh)


def test_what_is_traced_does_not_depend_on_the_fields_that_are_left_out(tmp_path):
    config = tiny_config(tmp_path)
    other = override(config, [f"{key}={value}" for key, value in OTHER.items()])
    mesh, traced = single_device_mesh(), []
    batch = global_batch(mesh, random_batch(config, documents=3))
    for c in (other, compilation.program_config(config)):
        lowered = step._train_step.__wrapped__(c, mesh, -1).lower(step.abstract_state(c, mesh), batch)
        traced.append(lowered.as_text())
    assert traced[0] == traced[1]


@pytest.mark.parametrize("change", [
    "model.top_k=2", "router.pool_max=5", "optimizer.learning_rate=0.5", "kernels.attention=reference", "train.remat=full",
    "data.max_documents_per_row=4", "data.sequence_length=16", "faults.skip_sigma=0", "train.microbatches=2",
    "train.output_z_weight=0", "seed=4"])
def test_every_other_field_counts(tmp_path, change):
    config = tiny_config(tmp_path)
    assert compilation.program_config(config) != compilation.program_config(override(config, [change]))


def test_a_rate_that_falls_depends_on_the_steps_of_the_run(tmp_path):
    config = tiny_config(tmp_path, "--optimizer.schedule=cosine")
    assert compilation.program_config(config) != compilation.program_config(override(config, ["--train.steps=77"]))


def test_only_fields_of_these_sections_are_left_out(tmp_path):
    """A field that is new is kept until somebody shows that programs do not depend on it."""
    config = tiny_config(tmp_path)
    changed = flatten(to_dict(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=99, eval_every=3))))
    kept = flatten(to_dict(compilation.program_config(config)))
    assert {key.partition(".")[0] for key in changed if changed[key] != kept.get(key)} <= {
        "name", "data", "checkpoint", "train", "faults", "stages"}


def test_programs_are_kept_by_kind_of_processor_where_caches_are(tmp_path):
    found = _fresh_process("from emo_jax.compilation import keep_programs; keep_programs(); import jax, json\n"
                           "jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()\n"
                           "print(json.dumps(jax.config.jax_compilation_cache_dir))", XDG_CACHE_HOME=str(tmp_path))
    assert found == str(tmp_path / "emo_jax" / "compiled" / machine.code_key())
    assert any(name.name.endswith("-cache") for name in (tmp_path / "emo_jax" / "compiled" / machine.code_key()).iterdir())


def test_a_folder_of_ones_own_and_one_that_jax_was_given(tmp_path):
    keep = ("from emo_jax.compilation import keep_programs; keep_programs({!r}); import jax, json\n"
            "print(json.dumps(jax.config.jax_compilation_cache_dir))")
    assert _fresh_process(keep.format(str(tmp_path / "mine"))) == str(tmp_path / "mine" / machine.code_key())
    assert _fresh_process(keep.format(str(tmp_path / "mine")), JAX_COMPILATION_CACHE_DIR="/given") == "/given"


def _fresh_process(code: str, **environment: str):
    clean = {name: value for name, value in os.environ.items() if name not in {key.upper() for key in CACHE}}
    made = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True)
    return json.loads(made.stdout.splitlines()[-1])
