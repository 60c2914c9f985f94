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
from emo_jax.subsets import choose, methods, sweep
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


def choices(m, ids):
    """What the experts of every layer do with a text, by a plain computation with every expert on every token: (ids of the
    chosen ones [T, k], their weights [T, k], norms of the outputs [E, T] in float64)."""

    @jax.jit
    def one_layer(x, batch, i):
        rows, layer = model.row_context(batch, m.execution), sweep.layer_at(m.params, i)
        block = sweep.block_of(layer, m.execution)
        h, normed = block.attend(x, rows, m.execution)[:2]
        y, route = block.moe(normed, rows, None, None, m.execution)
        return h + y, (normed[0], route.expert_ids[0], route.weights[0])

    def silu(a):
        return a / (1 + np.exp(-a))

    found = []
    with compat.set_mesh(m.mesh):
        batch = sharding.global_batch(m.mesh, from_tokens([ids]).fields)
        x = jax.jit(lambda e, b: model.embed(e, b["tokens"], m.execution.dtype))(m.params["embedding"], batch)
        for i in range(3):
            x, out = one_layer(x, batch, i)
            normed, experts, weights = map(np.asarray, out)
            gate, up, down = (np.asarray(m.params["layers"]["moe"][n], np.float64)[i] for n in ("gate", "up", "down"))
            outputs = (silu(normed @ gate) * (normed @ up)) @ down  # [E, T, D]
            found.append((experts, weights, np.linalg.norm(outputs, axis=-1)))
    return found


CRITERIA = {  # of the weights and norms of an expert's tokens
    "reap": lambda weights, norms: np.mean(weights * norms),
    "man": lambda weights, norms: np.mean(norms),
    "msan": lambda weights, norms: np.mean(norms**2),
    "gated_ean": lambda weights, norms: np.sum(weights * norms),
}


def test_criteria_are_what_their_formulas_say(tiny):
    """Of two texts, each in a group of its own, with padding."""
    texts = PROMPTS[:2]
    rows = from_tokens(texts, length=40)
    groups = Calibration(rows.fields, np.arange(2), ("a", "b"), ({}, {}))
    scores = {method: sweep.one_sweep(tiny, groups, method) for method in CRITERIA}
    unused = 0
    for group, ids in enumerate(texts):
        for layer, (experts, weights, norms) in enumerate(choices(tiny, ids)):
            for e in range(15):
                t, j = np.nonzero(experts == e)
                unused += not len(t)
                for method, criterion in CRITERIA.items():
                    want = criterion(weights[t, j], norms[e, t]) if len(t) else 0
                    np.testing.assert_allclose(scores[method][group, layer, e], want, rtol=1e-4, err_msg=method)
    assert unused > 0 and len({tuple(np.argsort(s[0, 0])) for s in scores.values()}) == len(CRITERIA)


def test_means_without_the_gate_do_not_see_how_small_it_is(tiny):
    """A sharper router chooses the same experts; in the first layer, with the same outputs."""
    sharp = opened(tiny.config, params=jax.tree.map(np.asarray, tiny.params))
    sharp.params["layers"]["moe"]["router"] = sharp.params["layers"]["moe"]["router"] * 15
    weights = choices(sharp, PROMPTS[0])[0][1]
    assert 0 < weights.min() < 1e-25
    for method in ("man", "msan"):
        want, got = (sweep.one_sweep(m, from_tokens(PROMPTS[:1]), method)[0, 0] for m in (tiny, sharp))
        np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("method", methods.NAMES)
def test_every_method_keeps_the_same_number_in_every_layer(tiny, method):
    assert choose.choose_one(tiny, from_tokens(PROMPTS[:2]), method, Budget(keep=6)).experts_per_layer == [6, 6, 6]


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
    for method in ("router", "easy_ep", "msan"):
        np.testing.assert_allclose(sweep.one_sweep(eight, from_tokens(PROMPTS, 32), method),
                                   sweep.one_sweep(one, from_tokens(PROMPTS, 32), method), rtol=2e-4, atol=1e-7)
    routed = np.full((1, 3), 5)
    assert (layerwise.layerwise(eight, from_tokens(PROMPTS, 32), routed, on_host=True)[0]
            == layerwise.layerwise(one, from_tokens(PROMPTS, 32), routed)[0]).all()


@pytest.mark.parametrize("method", ["easy_ep", "reap", "man"])
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
                            ({"calibration": {"subsets": [3]}}, "list of objects subsets"),
                            ({"calibration": {"subsets": [{"coverage": 1e999}]}}, "coverage from 0 to 1"),
                            ({"kept": content["kept"][:2], "scores": None}, "2 layers")]:
        (tmp_path / "bad.json").write_text(json.dumps(content | change))
        with pytest.raises(InputError, match=message):
            subset.load(tmp_path / "bad.json", tiny.config)
    with pytest.raises(InputError, match="--keep: layer 0 keeps 1 experts"):
        Budget(keep=1).check(tiny.config)
    with pytest.raises(InputError, match="3 layers"):
        Budget(per_layer=(4, 4)).check(tiny.config)
