"""What the transformer may and may not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from emo_jax import model, sharding
from emo_jax.moe import routing


def logits(config, batch, pool_sizes=None):
    mesh = sharding.single_device_mesh()
    execution, params = model.Execution.of(config, mesh), model.init_params(config, mesh)

    @jax.jit
    def forward(params, batch, pool_sizes):
        x, _ = model.forward(params, batch, execution, pool_sizes=pool_sizes)
        return model.logits(params, x, execution)

    with jax.set_mesh(mesh):
        batch = sharding.global_batch(mesh, batch)
        sizes = None if pool_sizes is None else sharding.reshard(jnp.asarray(pool_sizes), None, sharding.BATCH, None)
        return np.asarray(forward(params, batch, sizes))


def two_documents(config):
    batch = tiny.batch(config, padding=0)
    batch["segment_ids"] = np.where(np.arange(32) < 13, 1, 2)[None].repeat(8, 0).astype(np.int32)
    return batch


@pytest.mark.parametrize("kernel", ["blocked", "reference"])
def test_one_document_never_sees_another(kernel):
    config = tiny.config(kernels=dict(attention=kernel))
    batch = two_documents(config)
    sizes = np.full((2, 8, 8), 5, np.int32)
    before = logits(config, batch, sizes)
    batch["tokens"] = np.where(batch["segment_ids"] == 1, 63 - batch["tokens"], batch["tokens"])
    after = logits(config, batch, sizes)
    np.testing.assert_array_equal(before[:, 13:], after[:, 13:])
    assert np.abs(before[:, :13] - after[:, :13]).max() > 1e-3


def test_causal_attention_scope_sees_the_document_before():
    config = tiny.config(model=dict(attention_scope="causal"))
    batch = two_documents(config)
    before = logits(config, batch)
    batch["tokens"] = np.where(batch["segment_ids"] == 1, 63 - batch["tokens"], batch["tokens"])
    assert np.abs(before[:, 13:] - logits(config, batch)[:, 13:]).max() > 1e-5


def test_without_pools_no_token_sees_the_future():
    config = tiny.config()
    batch = two_documents(config)
    before = logits(config, batch)
    batch["tokens"][:, 20:] = 63 - batch["tokens"][:, 20:]
    np.testing.assert_array_equal(before[:, :20], logits(config, batch)[:, :20])


def test_models_that_share_parameters_start_equal():
    mesh = sharding.single_device_mesh()
    emo = model.init_params(tiny.config(), mesh)
    dense = model.init_params(tiny.config(model=dict(num_experts=0, num_shared_experts=0, top_k=0)), mesh)
    np.testing.assert_array_equal(emo["embedding"], dense["embedding"])
    np.testing.assert_array_equal(emo["layers"]["attention"]["q"], dense["layers"]["attention"]["q"])
    values = np.asarray(emo["layers"]["moe"]["gate"])
    assert abs(values.std() - 0.01973) < 1e-3 and np.abs(values).max() <= 0.06


def test_pool_sizes_follow_their_key_and_stay_in_their_bounds():
    config = tiny.config(router=dict(pool_min=4, pool_max=12)).router
    ids = jnp.arange(4000).reshape(40, 100)
    sizes = np.asarray(routing.draw_pool_sizes(config, 0, jnp.int32(3), 4, ids))
    assert sizes.min() == 4 and sizes.max() == 12
    counts = np.bincount(sizes.ravel())[4:]
    assert np.abs(counts / counts.mean() - 1).max() < 0.1  # uniform, both bounds included
    again = np.asarray(routing.draw_pool_sizes(config, 0, jnp.int32(3), 4, ids[:, ::-1]))
    np.testing.assert_array_equal(sizes, again[..., ::-1])  # a document keeps its size wherever it stands
    for other in (dict(seed=1, step=3), dict(seed=0, step=4)):
        drawn = routing.draw_pool_sizes(config, other["seed"], jnp.int32(other["step"]), 4, ids)
        assert np.mean(np.asarray(drawn) == sizes) < 0.3
    assert np.mean(sizes[0] == sizes[1]) < 0.3


def test_pool_scope_document_draws_one_size_for_all_layers():
    config = tiny.config(router=dict(pool_scope="document")).router
    sizes = np.asarray(routing.draw_pool_sizes(config, 0, jnp.int32(0), 3, jnp.arange(50)[None]))
    np.testing.assert_array_equal(sizes[0], sizes[2])
    assert len(np.unique(sizes)) > 5


def test_beta_pools_favour_large_sizes():
    uniform = tiny.config().router
    beta = tiny.config(router=dict(pool_distribution="beta")).router
    ids = jnp.arange(2000)[None]
    u, b = (np.asarray(routing.draw_pool_sizes(r, 0, jnp.int32(0), 1, ids)) for r in (uniform, beta))
    assert b.min() >= 4 and b.max() == 16
    np.testing.assert_allclose(b.mean(), 4 + 12 * 4 / 5, rtol=0.02)  # mean of Beta(4, 1) is 4/5
    assert u.mean() < b.mean()


def test_a_share_of_the_documents_has_no_pool_in_any_layer_and_the_others_keep_theirs():
    plain, free = (tiny.config(router=dict(pool_free=share)).router for share in (0.0, 0.3))
    ids = jnp.arange(4000)[None]
    before, after = (np.asarray(routing.draw_pool_sizes(r, 0, jnp.int32(5), 3, ids)) for r in (plain, free))
    none = after == routing.NO_POOL
    np.testing.assert_array_equal(none[0], none[2])
    np.testing.assert_allclose(none.mean(), 0.3, atol=0.03)
    np.testing.assert_array_equal(after[~none], before[~none])
    later = np.asarray(routing.draw_pool_sizes(free, 0, jnp.int32(6), 3, ids)) == routing.NO_POOL
    assert 0.2 < (later & none).mean() / none.mean() < 0.4  # drawn anew each step


def test_pools_grow_and_end_with_the_schedule():
    ids = jnp.arange(4000)[None]
    grows = tiny.config(router=dict(pool_min=4, pool_max=16, pool_grows=True)).router
    for progress, largest in ((0.0, 4), (0.5, 10), (1.0, 16)):
        sizes = np.asarray(routing.draw_pool_sizes(grows, 0, jnp.int32(0), 1, ids, jnp.float32(progress)))
        assert sizes.min() == 4 and sizes.max() == largest
    ends = tiny.config(router=dict(pool_off_from=0.8)).router
    for progress, off in ((0.79, False), (0.8, True), (1.0, True)):
        sizes = np.asarray(routing.draw_pool_sizes(ends, 0, jnp.int32(0), 1, ids, jnp.float32(progress)))
        assert (sizes == routing.NO_POOL).all() == (sizes == routing.NO_POOL).any() == off


def test_router_segments_follow_the_published_convention():
    mesh, rows = sharding.single_device_mesh(), np.array([[9, 1, 9, 2, 3, 9, 0, 0], [1, 2, 2, 3, 3, 3, 0, 0]], np.int32)
    with jax.set_mesh(mesh):
        tokens, segments = (sharding.place(row[None], mesh, sharding.TOKENS) for row in rows)  # 9 ends a document
        np.testing.assert_array_equal(routing.split_at_eos(segments, tokens, 9)[0], [1, 1, 2, 2, 2, 3, 0, 0])
