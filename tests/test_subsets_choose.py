"""Choosing experts: the golden selections of the published pipeline, and what must not change a choice."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from subset_models import FIXTURES, opened, published, tiny_config

from emo_jax import compat, model, sharding
from emo_jax.checkpoints import subset
from emo_jax.config import KernelConfig, MeshConfig
from emo_jax.errors import InputError
from emo_jax.subsets import choose, sweep
from emo_jax.subsets.budget import Budget
from emo_jax.subsets.calibration import Calibration, from_tokens
from emo_jax.subsets.methods import layerwise

GOLDEN = np.load(FIXTURES / "selection_hf_tiny_emo.npz")
PROMPTS = [ids[:n] for ids, n in zip(GOLDEN["input_ids"], GOLDEN["attention_mask"].sum(axis=1))]


@pytest.fixture(scope="module")
def tiny():
    return published()


def routed(keep):
    """Published keep sets [L, k] hold the shared expert as their last id."""
    return tuple(tuple(sorted(row[row < 15].tolist())) for row in keep)


def logits_of(m, allowed=None):
    ids = GOLDEN["fixed_input_ids"][:1].astype(np.int32)
    with compat.set_mesh(m.mesh):
        batch = sharding.global_batch(m.mesh, from_tokens(ids).fields)
        x, _ = model.forward(m.params, batch, m.execution, allowed=allowed)
        return np.asarray(model.logits(m.params, x, m.execution))


def test_logits_equal_the_published_model(tiny):
    np.testing.assert_allclose(logits_of(tiny), GOLDEN["unpruned_logits_row0"], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("keep", [2, 4, 8])
def test_layerwise_equals_the_published_greedy_selection(tiny, keep):
    found = choose.choose_one(tiny, from_tokens(PROMPTS), "layerwise", Budget(keep=keep))
    assert found.kept == routed(GOLDEN[f"greedy{keep}_keep"])
    np.testing.assert_allclose(found.score_array(), GOLDEN[f"greedy{keep}_avg_probs"][:, :15], rtol=2e-5, atol=1e-7)
    want = GOLDEN[f"greedy{keep}_pruned_logits"]
    np.testing.assert_allclose(logits_of(tiny, found.mask())[:, -want.shape[1]:], want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keep", [2, 4, 8])
def test_easy_ep_equals_the_published_selection(tiny, keep):
    found = choose.choose_one(tiny, from_tokens(PROMPTS), "easy_ep", Budget(keep=keep))
    assert found.kept == routed(GOLDEN[f"easyep{keep}_keep"])
    np.testing.assert_allclose(found.score_array(), GOLDEN["easyep_scores"][:, :15], rtol=1e-4)
    want = GOLDEN[f"easyep{keep}_pruned_logits"]
    np.testing.assert_allclose(logits_of(tiny, found.mask())[:, -want.shape[1]:], want, rtol=1e-3, atol=1e-3)


def test_router_equals_the_published_single_pass(tiny):
    found = choose.choose_one(tiny, from_tokens(PROMPTS), "router", Budget(keep=8))
    np.testing.assert_allclose(found.score_array(), GOLDEN["onepass_avg_probs"][:, :15], rtol=2e-5)
    assert found.kept == routed(GOLDEN["onepass8_keep"])


def test_reap_is_the_mean_weighted_norm(tiny):
    """Against a plain computation with every expert on every token."""
    ids = PROMPTS[0]
    scores = sweep.one_sweep(tiny, from_tokens([ids]), "reap")[0]

    @jax.jit
    def one_layer(x, batch, i):
        rows, layer = model.row_context(batch, tiny.execution), sweep.layer_at(tiny.params, i)
        block = sweep.block_of(layer, tiny.execution)
        h, normed = block.attend(x, rows, tiny.execution)[:2]
        y, route = block.moe(normed, rows, None, None, tiny.execution)
        return h + y, (normed[0], route.expert_ids[0], route.weights[0])

    def silu(a):
        return a / (1 + np.exp(-a))

    with compat.set_mesh(tiny.mesh):
        batch = sharding.global_batch(tiny.mesh, from_tokens([ids]).fields)
        x = jax.jit(lambda e, b: model.embed(e, b["tokens"], tiny.execution.dtype))(tiny.params["embedding"], batch)
        for i in range(3):
            x, out = one_layer(x, batch, i)
            normed, experts, weights = map(np.asarray, out)
            gate, up, down = (np.asarray(tiny.params["layers"]["moe"][n])[i] for n in ("gate", "up", "down"))
            outputs = (silu(normed @ gate) * (normed @ up)) @ down  # [E, T, D]
            norms = np.linalg.norm(outputs, axis=-1)
            for e in range(15):
                t, j = np.nonzero(experts == e)
                want = np.mean(weights[t, j] * norms[e, t]) if len(t) else 0
                np.testing.assert_allclose(scores[i, e], want, rtol=1e-4)


def test_padding_batching_and_other_groups_change_nothing(tiny):
    rows = from_tokens(PROMPTS, length=40)
    alone = {m: sweep.one_sweep(tiny, from_tokens(PROMPTS[:3]), m)[0] for m in ("router", "easy_ep")}
    groups = Calibration(rows.fields, np.array([0] * 3 + [1] * 7), ("a", "b"), ({}, {}))
    for method, scores in alone.items():
        np.testing.assert_allclose(sweep.one_sweep(tiny, groups, method)[0], scores, rtol=1e-5, atol=1e-8)
    both = choose.choose(tiny, groups, "layerwise", [Budget(keep=5)])[0]
    assert both[0].kept == choose.choose_one(tiny, from_tokens(PROMPTS[:3]), "layerwise", Budget(keep=5)).kept
    assert both[1].kept == choose.choose_one(tiny, from_tokens(PROMPTS[3:]), "layerwise", Budget(keep=5)).kept


def test_layerwise_runs_every_layer_once_and_recomputing_agrees(tiny, monkeypatch):
    passes = []
    steps = layerwise._layer_steps

    def counted(execution):
        first, advance = steps(execution)
        return (lambda *a: (passes.append(0), first(*a))[1],
                lambda p, i, *a: (passes.append(i + 1), advance(p, i, *a))[1])

    monkeypatch.setattr(layerwise, "_layer_steps", counted)
    routed = np.full((1, 3), 7)
    masks, scores = layerwise.layerwise(tiny, from_tokens(PROMPTS), routed)
    assert passes == [0] * 3 + [1] * 3 + [2] * 3  # three batches: one forward sweep in all
    for options in (dict(layer_group=1), dict(on_host=True)):
        again, scores_again = layerwise.layerwise(tiny, from_tokens(PROMPTS), routed, **options)
        assert (again == masks).all()
        np.testing.assert_allclose(scores_again, scores, rtol=1e-5)


def test_a_mesh_of_eight_devices_gives_the_same_scores():
    one = opened(tiny_config(num_shared_experts=2))
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
    config = dataclasses.replace(one.config, mesh=mesh)
    eight = opened(config, jax.devices()[:8], jax.tree.map(np.asarray, one.params))
    for method in ("router", "easy_ep"):
        np.testing.assert_allclose(sweep.one_sweep(eight, from_tokens(PROMPTS, 32), method),
                                   sweep.one_sweep(one, from_tokens(PROMPTS, 32), method), rtol=2e-4, atol=1e-7)
    routed = np.full((1, 3), 5)
    assert (layerwise.layerwise(eight, from_tokens(PROMPTS, 32), routed, on_host=True)[0]
            == layerwise.layerwise(one, from_tokens(PROMPTS, 32), routed)[0]).all()


@pytest.mark.parametrize("method", ["easy_ep", "reap"])
@pytest.mark.parametrize("dispatch", ["local", "ring", "all_to_all", "dense"])
def test_contributions_agree_under_every_dispatch(method, dispatch):
    one = opened(tiny_config(num_shared_experts=2))
    config = dataclasses.replace(one.config, mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
                                 kernels=KernelConfig(dispatch=dispatch))
    eight = opened(config, jax.devices()[:8], jax.tree.map(np.asarray, one.params))
    np.testing.assert_allclose(sweep.one_sweep(eight, from_tokens(PROMPTS, 32), method),
                               sweep.one_sweep(one, from_tokens(PROMPTS, 32), method), rtol=2e-4, atol=1e-7)


def test_a_total_goes_to_the_layers_that_need_it(tiny):
    found = choose.choose_one(tiny, from_tokens(PROMPTS), "router", Budget(total=24))
    assert sum(found.experts_per_layer) == 24 and min(found.experts_per_layer) >= 4
    scores = found.score_array()
    kept = sum(s[m].sum() for s, m in zip(scores, found.mask()))
    uniform = choose.choose_one(tiny, from_tokens(PROMPTS), "router", Budget(keep=8))
    assert kept > sum(s[m].sum() for s, m in zip(scores, uniform.mask()))
    by_layer = choose.choose_one(tiny, from_tokens(PROMPTS), "layerwise", Budget(per_layer=(4, 6, 9)))
    assert by_layer.experts_per_layer == [4, 6, 9]


def test_random_is_reproducible_and_nested(tiny):
    small, large = (s[0] for s in choose.choose(tiny, from_tokens(PROMPTS), "random", [Budget(keep=4), Budget(keep=8)]))
    assert (small.mask() <= large.mask()).all() and small.mask().sum() == 9
    assert small.kept == choose.choose_one(tiny, from_tokens(PROMPTS), "random", Budget(keep=4)).kept


def test_a_file_keeps_everything_and_says_what_is_wrong(tiny, tmp_path):
    found = choose.choose_one(tiny, from_tokens(PROMPTS), "router", Budget(keep=6))
    found.save(tmp_path / "s.json")
    again = subset.load(tmp_path / "s.json", tiny.config)
    assert again.kept == found.kept and again.calibration["tokens"] == sum(map(len, PROMPTS))
    np.testing.assert_allclose(again.score_array(), found.score_array(), rtol=1e-6)
    content = json.loads((tmp_path / "s.json").read_text())
    for change, message in [({"kept": [[0, 99]] * 3}, "kept\\[0\\]"), ({"version": 9}, "version=9"),
                            ({"num_routed": 20, "scores": None}, "of a model with"),
                            ({"kept": content["kept"][:2], "scores": None}, "2 layers")]:
        (tmp_path / "bad.json").write_text(json.dumps(content | change))
        with pytest.raises(InputError, match=message):
            subset.load(tmp_path / "bad.json", tiny.config)
    with pytest.raises(InputError, match="--keep: layer 0 keeps 1 experts"):
        Budget(keep=1).check(tiny.config)
    with pytest.raises(InputError, match="3 layers"):
        Budget(per_layer=(4, 4)).check(tiny.config)
