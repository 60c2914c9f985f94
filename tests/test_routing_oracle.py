"""Routing and router losses reproduce the published code's numbers, gradients included."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emo_jax.moe import losses
from emo_jax.moe.routing import SEMANTICS, Semantics, document_pool, route

FIXTURES = Path(__file__).parent / "fixtures"
INDEX = json.loads((FIXTURES / "router_index.json").read_text())
TOLERANCE = 1e-5


def case_v1(data, settings):
    segments = data["doc_ids"] + 1
    pools = None
    if settings["kind"] == "emo":
        pools = np.zeros((segments.shape[0], segments.max()), np.int32)
        for (row, start, _), size in zip(data["docs"], data["pool_sizes"]):
            pools[row, segments[row, start] - 1] = size
    return segments, pools, SEMANTICS["emo_v1"]


def case_v2(data, settings):
    segments = data["segment_ids"] - data["segment_ids"].min() + 1
    rules = Semantics(False, settings.get("normalize_expert_weights"), bool(settings.get("restore_weight_scale")), False)
    if "pool_draw" in data:
        return segments, data["pool_draw"][:, : segments.max()].astype(np.int32), rules
    if "pool_size_per_token" in data:
        return segments, np.full((segments.shape[0], segments.max()), data["pool_size_per_token"].flat[0]), rules
    return segments, None, rules


@pytest.mark.parametrize("name", sorted(INDEX))
def test_router_equals_published(name):
    data, settings = np.load(FIXTURES / f"{name}.npz"), INDEX[name]
    shared = settings.get("num_shared_experts", 0)
    k, num_routed = settings["top_k"] - shared, settings["num_experts"] - shared
    segments, pools, rules = (case_v2 if "2_small" in name else case_v1)(data, settings)
    mask = jnp.ones(segments.shape, bool)
    divisor = float(data["loss_div_factor"]) if "loss_div_factor" in data else segments.size
    training = "out_lb_loss" in data

    def objective(x, weight):
        logits = jnp.einsum("btd,rd->btr", x, weight[:num_routed])
        r = route(logits, jnp.asarray(segments), None if pools is None else jnp.asarray(pools), k, rules)
        counts = losses.expert_counts(r.expert_ids, mask, num_routed)[0]
        lb = losses.load_balancing_loss(r.scores, counts, mask, k, divisor)
        z = losses.router_z_loss(r.logsumexp, mask, divisor)
        weights = jnp.concatenate([r.weights, jnp.ones((*segments.shape, shared))], axis=-1)
        total = jnp.sum(weights * data["cotangent"])
        if training:
            total += settings["lb_loss_weight"] * lb + settings["z_loss_weight"] * z
        return total, (r, counts, lb, z)

    (total, (r, counts, lb, z)), (grad_x, grad_w) = jax.value_and_grad(objective, (0, 1), has_aux=True)(
        jnp.asarray(data["x"]), jnp.asarray(data["router_weight"]))

    np.testing.assert_array_equal(r.expert_ids, data["out_expert_indices"][..., :k])
    np.testing.assert_array_equal(counts, data["out_batch_size_per_expert"][:num_routed])
    np.testing.assert_allclose(r.weights, data["out_expert_weights"][..., :k], atol=TOLERANCE)
    for mask_name in ("pool_mask", "out_pool_mask"):
        if mask_name in data:
            np.testing.assert_array_equal(r.pool, data[mask_name])
    if training:
        np.testing.assert_allclose(lb, data["out_lb_loss"], rtol=TOLERANCE)
        np.testing.assert_allclose(z, data["out_z_loss"], rtol=TOLERANCE)
        np.testing.assert_allclose(total, data["out_total"], rtol=TOLERANCE, atol=TOLERANCE)
    if "out_grad_x" in data:
        np.testing.assert_allclose(grad_x, data["out_grad_x"], atol=TOLERANCE * np.abs(data["out_grad_x"]).max())
        np.testing.assert_allclose(grad_w, data["out_grad_weight"],
                                   atol=TOLERANCE * np.abs(data["out_grad_weight"]).max())


def test_ties_go_to_the_lowest_id():
    logits = jnp.zeros((1, 4, 8))
    r = route(logits, jnp.ones((1, 4), jnp.int32), jnp.full((1, 1), 3), 2)
    np.testing.assert_array_equal(r.pool[0, 0], [True] * 3 + [False] * 5)
    np.testing.assert_array_equal(r.expert_ids[0, 0], [0, 1])


def test_pool_as_large_as_the_table_is_no_constraint():
    logits = jax.random.normal(jax.random.key(0), (2, 16, 8))
    segments = jnp.repeat(jnp.arange(1, 5), 4)[None].repeat(2, 0)
    for size in (8, 9, 100):
        free, pooled = route(logits, segments, None, 3), route(logits, segments, jnp.full((2, 4), size), 3)
        assert bool(pooled.pool.all())
        np.testing.assert_array_equal(free.weights, pooled.weights)
        np.testing.assert_array_equal(free.expert_ids, pooled.expert_ids)


def test_a_document_pool_depends_on_its_own_tokens_only():
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (1, 12, 16)))
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    sizes = jnp.array([[4, 6]])
    pool = document_pool(probs, segments, sizes)
    np.testing.assert_array_equal(pool.sum(-1)[0], [4] * 5 + [6] * 4 + [16] * 3)
    others_changed = probs.at[:, 5:].set(probs[:, 5:][..., ::-1])  # document 2 and padding
    np.testing.assert_array_equal(pool[:, :5], document_pool(others_changed, segments, sizes)[:, :5])


def test_no_gradient_reaches_experts_outside_the_pool():
    logits = jax.random.normal(jax.random.key(1), (1, 8, 16))
    segments = jnp.ones((1, 8), jnp.int32)

    def objective(logits):
        r = route(logits, segments, jnp.array([[5]]), 3)
        counts = losses.expert_counts(r.expert_ids, segments > 0, 16)[0]
        balance = losses.load_balancing_loss(r.scores, counts, segments > 0, 3, 8.0)
        return jnp.sum(r.weights**2) + balance + losses.router_z_loss(r.logsumexp, segments > 0, 8.0), r.pool

    grads, pool = jax.grad(objective, has_aux=True)(logits)
    assert float(jnp.abs(jnp.where(pool, 0, grads)).max()) == 0
    assert float(jnp.abs(jnp.where(pool, grads, 0)).max()) > 0


def test_load_balancing_loss_is_one_at_uniform_load():
    scores = jnp.full((2, 8, 4), 0.25)
    ids = jnp.stack([jnp.arange(8) % 4, (jnp.arange(8) + 1) % 4], -1)[None].repeat(2, 0)
    mask = jnp.ones((2, 8), bool)
    loss = losses.load_balancing_loss(scores, losses.expert_counts(ids, mask, 4)[0], mask, 2, 16.0)
    np.testing.assert_allclose(loss, 1.0, rtol=1e-6)
