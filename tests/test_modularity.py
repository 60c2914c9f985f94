"""Watching modules emerge while a model trains: pools in evaluation, the figures, what is written, and that training stays."""

import dataclasses
import io
import struct

import jax
import matplotlib.image
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tiny_run import records, series, tiny_config
from two_processes import finish
from two_processes import start as start_processes

from emo_jax import model, plots, sharding
from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.compat import set_mesh
from emo_jax.data.evaluation import evaluation_rows
from emo_jax.loaded import LoadedModel
from emo_jax.subsets import modularity
from emo_jax.subsets import use as use_lib
from emo_jax.subsets.budget import Budget
from emo_jax.subsets.choose import choose
from emo_jax.subsets.modularity import Modularity
from emo_jax.subsets.use import Use
from emo_jax.train import start
from emo_jax.train.evaluate import Evaluation
from emo_jax.train.loop import train
from emo_jax.train.tensorboard import Picture

WATCHED = ("--train.steps=8", "--train.eval_every=4", "--train.eval_subsets=true", "--data.eval_fraction=0.3")


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


# ---- figures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watch(setup):
    config, mesh, documents, _ = setup
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_experts=17))
    params = model.init_params(config, mesh)
    moe = params["layers"]["moe"]
    moe |= {"router": 30 * moe["router"], "down": 100 * moe["down"]}  # so that it matters which expert is used
    found = Modularity.make(config, mesh, documents)
    assert found is not None
    return found, config, mesh, documents, params


def use_of(watch):
    found, _, mesh, _, params = watch
    return use_lib.use_of_documents(params, mesh, found._execution, found._text)


def test_use_is_summed_over_the_tokens_of_each_document_of_a_row(watch):
    found, config, mesh, _, params = watch
    text, use, R = found._text, use_of(watch), config.model.num_routed_experts

    @jax.jit
    def routed(params, batch):
        return model.forward(params, batch, found._execution,
                             per_layer=lambda x, route, rows: (route.scores, route.expert_ids))[1]

    expected = []
    with set_mesh(mesh):
        for batch, groups in text.batches(mesh, 64):
            scores, ids = (np.asarray(x) for x in routed(params, batch))
            for row, segments in enumerate(np.asarray(batch["segment_ids"])):
                for n in range(1, segments.max() + 1):
                    counts = [np.bincount(layer[row, segments == n].ravel(), minlength=R) for layer in ids]
                    expected.append((groups[row], (segments == n).sum(), scores[:, row, segments == n].sum(axis=1), counts))
    groups, tokens, probabilities, choices = (np.array(x) for x in zip(*expected))
    assert np.bincount(groups).min() > 1 and len(groups) == sum(about["documents"] for about in text.about)
    np.testing.assert_array_equal(use.groups, groups)
    np.testing.assert_array_equal(use.tokens, tokens)
    np.testing.assert_allclose(use.probabilities, probabilities, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(use.choices, choices)


def test_gaps_are_those_of_pools_of_the_routed_experts_and_subsets_those_that_the_router_method_chooses(watch):
    found, config, mesh, documents, params = watch
    result, losses = found(params), found._evaluation.losses

    def loss(*args, **kwargs):
        nats, tokens = losses(params, *args, **kwargs)
        return nats.sum() / tokens.sum()

    assert result["loss"] == pytest.approx(loss(), rel=1e-6)
    gaps = {"25%": loss(pool_size=4) - loss(), "12.5%": loss(pool_size=2) - loss()}
    assert result["selective_gap"] == pytest.approx(gaps, abs=1e-5) and abs(gaps["25%"] - gaps["12.5%"]) > 1e-3
    causal = {"25%": loss(pool_size=4, pool_tokens=32) - loss(), "12.5%": loss(pool_size=2, pool_tokens=32) - loss()}
    assert result["selective_gap_causal"] == pytest.approx(causal, abs=1e-5) and abs(causal["25%"] - gaps["25%"]) > 1e-4
    loaded = LoadedModel(config, mesh, params, documents.tokenizer)
    for share, keep in ((0.25, 4), (0.125, 3)):
        masks = [s.mask() for s in choose(loaded, found._text, "router", [Budget(keep=keep)])[0]]
        rows = np.stack([masks[found._text.names.index(label)] for label in found._evaluation.labels], axis=1)
        np.testing.assert_array_equal(found._masks(use_of(watch), share), rows)
        assert list(result["loss_at"].values())[share == 0.125] == pytest.approx(loss(rows), rel=1e-6)


def documents_that_use(probabilities, groups, tokens=100.0):
    """`Use` of documents whose tokens choose two experts by these probabilities [D, R], in one layer."""
    p = np.asarray(probabilities, float)[:, None] * tokens
    return Use(np.asarray(groups), np.full(len(p), tokens), p, 2 * p)


def test_label_information_is_none_where_documents_have_experts_of_their_own_but_labels_have_not():
    groups = np.arange(160) % 2
    own = modularity.figures(documents_that_use(np.random.default_rng(0).dirichlet(np.full(8, 0.3), 160), groups), 0)
    assert own["mutual_information"].item() > 0.005 and abs(own["label_information"].item()) < 0.02
    apart = modularity.figures(documents_that_use(np.eye(2)[groups].repeat(4, axis=1) / 4, groups), 0)
    np.testing.assert_allclose(apart["mutual_information"], np.log(2))
    assert 0.95 * np.log(2) < apart["label_information"].item() < np.log(2)


def test_effective_experts_and_top_shares_know_their_extremes_and_leave_short_documents_out():
    even, one = np.full(8, 1 / 8), np.eye(8)[3]
    assert use_lib.effective(np.array([even, one, [0.5, 0.5, 0, 0, 0, 0, 0, 0]])) == pytest.approx([8, 1, 2])
    assert use_lib.top_share(np.array([even, one, [0.1, 0.3, 0.2, 0.4, 0, 0, 0, 0]]), 0.25) == pytest.approx([0.25, 1, 0.7])
    use = documents_that_use([even, one], [0, 1])
    assert modularity.figures(use, 0)["effective_experts"].item() == pytest.approx(4.5)
    short = use._replace(tokens=np.array([100.0, 5.0]))
    assert modularity.figures(short, 0)["effective_experts"].item() == pytest.approx(8)


def test_the_picture_shows_the_use_and_draws_labels_of_any_text():
    draw = lambda p: matplotlib.image.imread(io.BytesIO(modularity.heatmap(documents_that_use(p, [0, 1]), ["$x_{", "a\nb"])))
    alike, apart = draw(np.full((2, 4), 0.25)), draw([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    assert alike.shape == apart.shape and np.mean(np.any(alike != apart, axis=2)) > 0.1


def test_without_matplotlib_there_are_the_figures_and_a_hint(setup, monkeypatch, capsys):
    config, mesh, documents, params = setup
    monkeypatch.setattr(plots, "available", lambda: False)
    result = Modularity.make(config, mesh, documents)(params)
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert "label_information" in result and not any(isinstance(value, Picture) for value in result.values())


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(folder):
    train(tiny_config(folder, *WATCHED), folder / "whole", [Modularity.make])
    return folder / "whole"


def checksums(out):
    return open_checkpoint(out).meta["checksums"]


def test_watching_changes_nothing_of_the_training(folder, whole):
    train(tiny_config(folder, *WATCHED, "--train.eval_subsets=false"), folder / "plain")
    assert series(folder / "plain") == series(whole) and checksums(folder / "plain") == checksums(whole)
    assert [r["step"] for r in records(whole, evaluation=True) if r["eval"] == "subsets"] == [4, 8]


def test_a_resumed_run_finds_the_same_figures(folder, whole):
    for steps in (4, 8):
        train(tiny_config(folder, *WATCHED, f"--train.steps={steps}"), folder / "cut", [Modularity.make])
    assert series(folder / "cut") == series(whole) and checksums(folder / "cut") == checksums(whole)
    assert records(folder / "cut", evaluation=True) == records(whole, evaluation=True)


def events(out):
    """What the event files hold, in TensorBoard's record format: length, checksum, message, checksum."""
    for file in sorted((out / "tensorboard").iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            size = struct.unpack("<Q", content[at:at + 8])[0]
            event = event_pb2.Event.FromString(content[at + 12:at + 12 + size])
            yield from ((event.step, value) for value in event.summary.value)
            at += size + 16


def test_curves_are_grouped_by_topic_and_the_use_by_labels_is_a_picture_at_every_evaluation(whole):
    found = list(events(whole))
    tags = {value.tag for _, value in found}
    assert {tag.split("/")[0] for tag in tags} == {"loss", "optimizer", "routing", "speed", "data", "loss_by_label", "held_out",
                                                   "modularity"}
    assert {"loss/loss", "optimizer/grad_norm", "routing/router_entropy/layer_01", "speed/tokens_per_second",
            "data/tokens_by_label/color", "loss_by_label/count", "held_out/loss", "modularity/label_information",
            "modularity/label_information_layers/layer_00", "modularity/selective_gap/12.5_", "modularity/loss_at/25_",
            "modularity/selective_gap_causal/25_",
            "modularity/effective_experts", "modularity/top_share/25_"} <= tags
    last = next(r for r in records(whole, evaluation=True) if r["eval"] == "subsets" and r["step"] == 8)
    written = {value.tag: value.simple_value for step, value in found if step == 8}
    assert written["modularity/selective_gap/12.5_"] == pytest.approx(last["selective_gap"]["12.5%"], rel=1e-5)
    pictures = [(step, value.image) for step, value in found if value.tag == "modularity/experts_of_labels"]
    assert [step for step, _ in pictures] == [4, 8] and "experts_of_labels" not in last
    for _, image in pictures:
        pixels = matplotlib.image.imread(io.BytesIO(image.encoded_image_string))
        assert pixels.shape[:2] == (image.height, image.width)
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50


def test_two_processes_find_what_one_finds_and_one_writes(folder, whole, tmp_path):
    finish(start_processes(str(folder / "tiny.py"), tmp_path / "two", 2, *WATCHED, "--train.steps=4"))
    one, two = (next(r for r in records(out, evaluation=True) if r["eval"] == "subsets") for out in (whole, tmp_path / "two"))
    assert one["step"] == two["step"] == 4
    for name in ("loss", "label_information", "effective_experts"):
        assert two[name] == pytest.approx(one[name], rel=1e-3)
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    assert sum(value.tag == "modularity/experts_of_labels" for _, value in events(tmp_path / "two")) == 1
