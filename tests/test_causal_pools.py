"""Pools that a token may know of in evaluation: no future, no other document, the same on any mesh, padded or not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from emo_jax import model, sharding
from emo_jax.config import RouterConfig
from emo_jax.errors import InputError
from emo_jax.moe.routing import causal_pool, document_pool, first_tokens, largest, route
from emo_jax.train.step import make_eval_step

SEGMENTS = np.array([[1] * 9 + [2] * 7 + [0] * 4, [1] * 3 + [2] * 1 + [3] * 16])  # [B, T]
SIZES = np.array([[5, 6, 0], [4, 5, 6]])
R, ALL = 16, 99


def probabilities(seed=0):
    return jax.nn.softmax(2 * jax.random.normal(jax.random.key(seed), (*SEGMENTS.shape, R)))


def pool(probs, voters=ALL, forced=0):
    segments, sizes = jnp.asarray(SEGMENTS), jnp.asarray(SIZES)
    return np.asarray(jax.jit(lambda probs, n: causal_pool(probs, segments, sizes, forced, first_tokens(segments, n)))(
        probs, voters))


@pytest.mark.parametrize("voters", [ALL, 4])
@pytest.mark.parametrize("forced", [0, 2])
def test_a_pool_is_made_of_the_votes_so_far_of_the_first_tokens_of_the_document(voters, forced):
    probs = np.asarray(probabilities(), np.float64)
    found = pool(probabilities(), voters, forced)
    for row, (segments, sizes) in enumerate(zip(SEGMENTS, SIZES)):
        for t, n in enumerate(segments):
            start = int(np.argmax(segments == n))
            votes = probs[row, start:min(t + 1, start + voters), :R - forced].sum(axis=0)
            expected = np.ones(R, bool) if n == 0 else np.isin(np.arange(R), [
                *np.argsort(-votes)[:sizes[n - 1]], *range(R - forced, R)])
            np.testing.assert_array_equal(found[row, t], expected)


def test_at_its_last_token_a_document_has_the_pool_of_all_its_votes():
    last = np.diff(SEGMENTS, axis=1, append=0) != 0
    whole = np.asarray(document_pool(probabilities(), jnp.asarray(SEGMENTS), jnp.asarray(SIZES)))
    np.testing.assert_array_equal(pool(probabilities())[last], whole[last])
    assert np.any(pool(probabilities()) != whole)


def test_the_largest_are_those_of_a_stable_sort_whatever_the_values():
    values = np.array([[0, 0, 0, 0], [1e-40, 0, 2e-40, 1e-38], [3, 3, 7, 3], [np.inf, 1, 1, 0.5]], np.float32)
    for count in range(6):
        expected = np.argsort(np.argsort(-values, axis=-1, kind="stable"), axis=-1) < count
        np.testing.assert_array_equal(largest(jnp.asarray(values), jnp.full(4, count)), expected)
    np.testing.assert_array_equal(largest(jnp.array([[-1.0, 0, 2]]), jnp.array([3])), [[False, True, True]])


def test_a_size_of_all_experts_is_no_constraint_and_one_token_always_gets_its_own_choice():
    logits = jax.random.normal(jax.random.key(1), (*SEGMENTS.shape, R))
    segments, sizes = jnp.asarray(SEGMENTS), jnp.asarray(SIZES)
    voters = first_tokens(segments, ALL)
    choose = jax.jit(lambda sizes: route(logits, segments, sizes, 3, voters=voters))
    free, wide, small = choose(None), choose(sizes + 2**30), choose(sizes)
    np.testing.assert_array_equal(free.expert_ids, wide.expert_ids)
    np.testing.assert_allclose(free.weights, wide.weights, rtol=1e-5)
    begins = np.diff(SEGMENTS, axis=1, prepend=0) > 0
    np.testing.assert_array_equal(small.expert_ids[begins], free.expert_ids[begins])
    assert np.any(small.expert_ids != free.expert_ids)


@pytest.mark.parametrize("voters", [ALL, 4])
def test_votes_to_come_and_other_documents_change_no_pool(voters):
    before, other = pool(probabilities(), voters), probabilities(seed=1)
    after = pool(probabilities().at[:, 12:].set(other[:, 12:]), voters)
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert np.any(before[1] != after[1]) == (voters == ALL)  # row 1: token 12 is the eighth of its document
    first = np.array(SEGMENTS == 1)[..., None]
    np.testing.assert_array_equal(np.where(first, 0, before), np.where(first, 0, pool(jnp.where(first, other, probabilities()),
                                                                                    voters)))
    padding = np.array(SEGMENTS == 0)[..., None]
    np.testing.assert_array_equal(before, pool(jnp.where(padding, other, probabilities()), voters))


# ---- losses ---------------------------------------------------------------------------------------------------------


def configured(**sections):
    return tiny.config(router=dict(pool_eval=4, pool_eval_tokens=32), **sections)


def parameters(config, mesh):
    params = model.init_params(config, mesh)
    moe = params["layers"]["moe"]
    moe |= {"router": 30 * moe["router"], "down": 100 * moe["down"]}  # so that it matters which expert is used
    return params


@functools.cache
def losses_with_pools():
    """(params, batch, pool_tokens) -> [B, T] nats with pools of 4; mesh; params"""
    config, mesh = tiny.config(), sharding.single_device_mesh()
    execution = model.Execution.of(config, mesh)

    @jax.jit
    def losses(params, batch, pool_tokens):
        shape = (config.model.num_layers, len(batch["tokens"]), execution.documents_per_row)
        sizes = sharding.reshard(jnp.full(shape, 4), None, sharding.BATCH, None)
        x, _ = model.forward(params, batch, execution, pool_sizes=sizes, pool_tokens=pool_tokens)
        return model.token_losses(params, x, batch["targets"], execution)[0]

    return losses, mesh, parameters(config, mesh)


def token_losses(batch, pool_tokens):
    losses, mesh, params = losses_with_pools()
    with jax.set_mesh(mesh):
        return np.asarray(losses(params, sharding.global_batch(mesh, batch), pool_tokens))


def test_no_loss_sees_tokens_to_come_unless_the_whole_document_votes():
    batch = tiny.batch(tiny.config(), padding=0)
    batch["segment_ids"] = np.where(np.arange(32) < 13, 1, 2)[None].repeat(8, 0).astype(np.int32)
    changed = batch | {"tokens": np.where(np.arange(32) < 20, batch["tokens"], 63 - batch["tokens"]).astype(np.int32)}
    for pool_tokens, leaks in ((None, True), (ALL, False), (3, False), (10, False)):
        before, after = (token_losses(b, pool_tokens) for b in (batch, changed))
        assert np.any(before[:, :20] != after[:, :20]) == leaks
    other = batch | {"tokens": np.where(np.arange(32) < 13, 63 - batch["tokens"], batch["tokens"]).astype(np.int32)}
    for pool_tokens in (ALL, 3):
        before, after = (token_losses(b, pool_tokens) for b in (batch, other))
        assert np.any(before != after)
        np.testing.assert_array_equal(before[:, 13:], after[:, 13:])


def row_losses(config, devices, rows=None, **pools):
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    batch = sharding.global_batch(mesh, rows or tiny.batch(config))
    return np.asarray(make_eval_step(config, mesh)(parameters(config, mesh), batch, **pools)["loss_sum"])


@pytest.fixture(scope="module")
def one_device():
    return row_losses(configured(), 1)


@pytest.mark.parametrize("mesh", [dict(fsdp=2, tensor=2, sequence=2), dict(fsdp=2, expert=4), dict(fsdp=1, sequence=8)],
                         ids=["sequence", "experts", "sequence alone"])
def test_eight_devices_equal_one(one_device, mesh):
    np.testing.assert_allclose(row_losses(configured(mesh=mesh), 8), one_device, rtol=2e-5)


def test_what_padding_holds_changes_nothing(one_device):
    rows = tiny.batch(configured())
    padding = rows["segment_ids"] == 0
    assert padding.any()
    rows["tokens"] = np.where(padding, 63 - rows["tokens"], rows["tokens"])
    np.testing.assert_array_equal(row_losses(configured(), 1, rows), one_device)


def test_the_config_says_which_votes_make_the_pools_of_evaluation(one_device):
    document = tiny.config()
    np.testing.assert_array_equal(one_device, row_losses(document, 1, pool_size=np.int32(4), pool_tokens=np.int32(32)))
    first = tiny.config(router=dict(pool_eval=4, pool_eval_tokens=3))
    np.testing.assert_array_equal(row_losses(first, 1), row_losses(document, 1, pool_size=np.int32(4), pool_tokens=np.int32(3)))
    of_all = row_losses(tiny.config(router=dict(pool_eval=4)), 1)
    np.testing.assert_array_equal(of_all, row_losses(first, 1, pool_size=np.int32(4)))  # a size of its own has votes of its own
    assert len({a.sum() for a in (one_device, row_losses(first, 1), of_all, row_losses(document, 1))}) == 4
    with pytest.raises(InputError, match="pool_eval_tokens=3 needs router.pool_eval"):
        dataclasses.replace(document, router=RouterConfig(pool_eval_tokens=3))


def test_end_tokens_that_open_the_next_document_vote_there():
    config = configured()
    config = dataclasses.replace(config, router=dataclasses.replace(config.router, eos_owner="next"))
    mesh, rows = sharding.single_device_mesh(), tiny.batch(config)
    rows["tokens"][:, 10] = 5
    execution = model.Execution.of(config, mesh, eos_id=5)
    with jax.set_mesh(mesh):
        voters = np.asarray(model.row_context(sharding.global_batch(mesh, rows), execution, 2).voters)
    assert np.all(voters[:, 10]) and np.all(voters[:, 11] | (rows["tokens"][:, 11] == 5))
    assert np.all(voters[:, 0])
