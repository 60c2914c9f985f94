"""Watching modules emerge while a model trains: pools in evaluation, the figures, what is written, and that training stays."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_run import tiny_config

from emo_jax import model, sharding
from emo_jax.compat import set_mesh
from emo_jax.data.evaluation import evaluation_rows
from emo_jax.train import start
from emo_jax.train.evaluate import Evaluation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def setup(folder):
    """(config, mesh, documents, parameters with routers that prefer experts)"""
    config = tiny_config(folder, "--data.eval_fraction=0.3", "--train.eval_rows=16")
    mesh = sharding.make_mesh(config)
    params = model.init_params(config, mesh)
    params["layers"]["moe"]["router"] = 30 * params["layers"]["moe"]["router"]
    return config, mesh, start.open_documents(config, folder), params


def evaluation_of(config, mesh, documents):
    rows = evaluation_rows(config, documents.evaluated, documents.tokenizer, documents.held_out)
    return Evaluation(config, mesh, rows, documents.tokenizer), rows


@pytest.mark.parametrize("document_pool", [True, False])
def test_a_pool_size_is_that_of_every_document_and_layer_whatever_the_model(setup, document_pool):
    config, mesh, documents, params = setup
    config = dataclasses.replace(config, router=dataclasses.replace(config.router, document_pool=document_pool))
    evaluation, rows = evaluation_of(config, mesh, documents)
    m, execution = config.model, model.Execution.of(config, mesh, documents.tokenizer.eos_id)

    @jax.jit
    def reference(params, fields, sizes):
        x, used = model.forward(params, fields, execution, pool_sizes=sizes,
                                per_layer=lambda x, route, rows: route.pool.sum(axis=-1))
        return used, model.token_losses(params, x, fields["targets"], execution)[0] * fields["loss_weights"]

    fields = {name: np.concatenate([f[name] for _, f in rows]) for name in rows[0][1]}
    assert fields["segment_ids"].max() > 1
    for size in (2, 4):
        sizes = np.full((m.num_layers, len(evaluation.labels), execution.documents_per_row), size, np.int32)
        with set_mesh(mesh):
            placed = {name: sharding.place(x, mesh, sharding.TOKENS) for name, x in fields.items()}
            used, nats = reference(params, placed, sharding.place(sizes, mesh, sharding.P(None, sharding.BATCH)))
        assert np.all(np.asarray(used)[:, fields["segment_ids"] > 0] == size)
        np.testing.assert_allclose(evaluation.losses(params, pool_size=size)[0], np.asarray(nats).sum(axis=1), rtol=1e-5)


def test_small_pools_are_raised_to_the_top_k_and_whole_ones_are_none(setup):
    config, mesh, documents, params = setup
    evaluation, _ = evaluation_of(config, mesh, documents)
    plain, tokens = evaluation.losses(params)
    of = {size: evaluation.losses(params, pool_size=size)[0] for size in (1, 2, 3, 7, 100)}
    np.testing.assert_array_equal(of[1], of[2])
    assert np.abs(of[2] - of[3]).max() > 1e-3
    for whole in (7, 100):
        np.testing.assert_allclose(of[whole], plain, rtol=1e-6)
    assert tokens.sum() > 0


def test_a_pool_is_made_of_the_allowed_experts(setup):
    config, mesh, documents, params = setup
    evaluation, _ = evaluation_of(config, mesh, documents)
    allowed = np.zeros((config.model.num_layers, config.model.num_routed_experts), bool)
    allowed[:, [1, 4, 5]] = True
    np.testing.assert_allclose(evaluation.losses(params, allowed, pool_size=3)[0], evaluation.losses(params, allowed)[0],
                               rtol=1e-6)


def test_other_pool_sizes_compile_nothing_anew(setup):
    config, mesh, documents, params = setup
    evaluation, _ = evaluation_of(config, mesh, documents)
    evaluation.losses(params, pool_size=2)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None)
    before = evaluation.losses(params, pool_size=3)[0].sum()
    assert not compiled and before != evaluation.losses(params, pool_size=4)[0].sum()
