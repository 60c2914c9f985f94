"""Losses, gradients and one optimizer step do not depend on the mesh, on microbatches, or on padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxprs import equations

from emo_jax import model, sharding
from emo_jax.data.documents import MAX_LABELS
from emo_jax.model import REMAT_POLICIES
from emo_jax.moe.experts import Dispatch
from emo_jax.train.step import Objective, Totals, init_state, make_train_step

MESHES = {
    "data": dict(data=8, fsdp=1), "fsdp": dict(fsdp=8), "expert": dict(fsdp=1, expert=8),
    "data fsdp expert": dict(data=2, fsdp=2, expert=2), "fsdp expert": dict(fsdp=2, expert=4),
    "fsdp tensor sequence": dict(fsdp=2, tensor=2, sequence=2), "data expert sequence": dict(data=2, expert=2, sequence=2,
                                                                                           fsdp=1),
}


def one_step(config, devices, rows=None):
    """(metrics, parameters) after one step from the initial state."""
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    state = init_state(config, mesh)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = make_train_step(config, mesh)(state, sharding.global_batch(mesh, rows or tiny.batch(config)))
    updates = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, before)
    return jax.tree.map(np.asarray, metrics), updates


def assert_same(a, b, tolerance=2e-5):
    """Metrics and parameter updates agree to fp32 rounding."""
    for name in a[0]:
        np.testing.assert_allclose(a[0][name], b[0][name], rtol=tolerance, atol=1e-6, err_msg=name)
    for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(x).max())

SELECTS_POOLS = "bitcast_convert_type"  # of `routing.largest`


@pytest.fixture(scope="module")
def reference():
    return one_step(tiny.config(), devices=1)


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_equal_one(reference, mesh):
    assert_same(reference, one_step(tiny.config(mesh=MESHES[mesh]), devices=8))


@pytest.mark.parametrize("dispatch, mesh", [("dense", dict(fsdp=8)), ("dense", dict(fsdp=2, expert=4)),
                                            ("local", dict(fsdp=2, expert=4))])
def test_other_strategies_agree(reference, dispatch, mesh):
    assert_same(reference, one_step(tiny.config(mesh=mesh, kernels=dict(dispatch=dispatch)), devices=8))


@pytest.mark.parametrize("remat", ["full", "moe"])
def test_rematerialisation_changes_nothing(reference, remat):
    assert_same(reference, one_step(tiny.config(train=dict(remat=remat)), devices=1), tolerance=1e-6)


@pytest.mark.parametrize("dispatch, exchange", [("ring", "all_gather"), ("all_to_all", "ragged_all_to_all")])
def test_rematerialisation_repeats_no_exchange_and_no_routing(dispatch, exchange):
    """Counted in the equations of loss and gradient. (Where the buffer overflows, ring's gathers are repeated: saving them
    would take the memory in every step.)"""
    config = tiny.config(mesh=dict(fsdp=1, expert=4))
    mesh = sharding.make_mesh(config, jax.devices()[:4])
    params, batch = model.init_params(config, mesh), sharding.global_batch(mesh, tiny.batch(config))

    def counts(remat):
        config = tiny.config(train=dict(remat=remat), mesh=dict(fsdp=1, expert=4))
        execution = model.Execution.of(config, mesh)
        execution = execution._replace(dispatch=Dispatch(dispatch))  # the real exchange, which CPUs cannot run
        objective = Objective(execution, Totals(jnp.float32(256), jnp.float32(256)), jnp.int32(0))
        with jax.set_mesh(mesh):
            found = equations(jax.value_and_grad(objective, has_aux=True), params, batch, None)
        exchanged = [e for e in found if e.primitive.name == exchange and "expert" in e.params["axis_name"]]
        return len(exchanged), *(sum(e.primitive.name == name for e in found) for name in ("top_k", SELECTS_POOLS))

    without = counts("none")
    assert {remat: counts(remat) for remat in REMAT_POLICIES if remat != "full"} == dict.fromkeys(
        REMAT_POLICIES.keys() - {"full"}, without)
    assert all(more > once for more, once in zip(counts("full"), without))


def test_microbatches_change_nothing_when_balanced_over_the_step(reference):
    accumulated = one_step(tiny.config(train=dict(microbatches=4)), devices=2)
    assert_same(reference, accumulated)


def test_losses_by_label_add_up_to_the_loss_and_change_nothing(reference):
    config = tiny.config(mesh=MESHES["fsdp tensor sequence"], train=dict(microbatches=2))
    rows = tiny.batch(config)
    rows["labels"] = np.where(rows["segment_ids"] > 0, rows["document_ids"] % 3 * 31, 0).astype(np.int32)
    metrics, updates = one_step(config, 8, rows)
    tokens = np.bincount(rows["labels"].ravel(), rows["loss_weights"].ravel(), MAX_LABELS)
    np.testing.assert_array_equal(metrics.pop("label_tokens"), tokens)
    nats = metrics.pop("label_nats")
    assert sorted(np.flatnonzero(nats)) == [0, 31, 62]
    np.testing.assert_allclose(nats.sum() / metrics["loss_tokens"], metrics["loss"], rtol=1e-6)
    assert_same(reference, (metrics, updates))
    weights = np.where(rows["labels"] == 31, rows.pop("loss_weights"), 0).astype(np.float32)  # this label alone
    alone, _ = one_step(tiny.config(), 1, {name: a for name, a in rows.items() if name != "labels"} | {"loss_weights": weights})
    np.testing.assert_allclose(nats[31] / tokens[31], alone["loss"], rtol=1e-5)


def test_balance_over_microbatches_is_another_loss(reference):
    per_microbatch, _ = one_step(tiny.config(train=dict(microbatches=4), router=dict(balance_scope="microbatch")), 1)
    assert per_microbatch["load_balancing_loss"] > reference[0]["load_balancing_loss"] * 1.01
    np.testing.assert_allclose(per_microbatch["loss"], reference[0]["loss"], rtol=1e-6)
    one, _ = one_step(tiny.config(router=dict(balance_scope="microbatch")), devices=1)
    np.testing.assert_allclose(one["load_balancing_loss"], reference[0]["load_balancing_loss"], rtol=1e-6)


def test_balance_over_shards_is_the_mean_of_local_losses():
    config = tiny.config(router=dict(balance_scope="shard", balance_shards=4))
    rows = tiny.batch(config, padding=0)
    local, _ = one_step(config, 1, rows)
    quarters = [one_step(tiny.config(train=dict(batch_size=2)), 1, {k: a[i : i + 2] for k, a in rows.items()})[0]
                for i in range(0, 8, 2)]
    np.testing.assert_allclose(local["load_balancing_loss"], np.mean([q["load_balancing_loss"] for q in quarters]),
                               rtol=1e-5)
    by_mesh, _ = one_step(tiny.config(router=dict(balance_scope="shard"), mesh=dict(data=4, fsdp=1)), 4, rows)
    np.testing.assert_allclose(by_mesh["load_balancing_loss"], local["load_balancing_loss"], rtol=1e-5)


def test_what_padding_holds_changes_nothing(reference):
    config = tiny.config()
    rows = tiny.batch(config)
    padding = rows["segment_ids"] == 0
    assert padding.any()
    for name in ("tokens", "targets"):
        rows[name] = np.where(padding, 63 - rows[name], rows[name])
    rows["document_ids"] = np.where(padding, 12345, rows["document_ids"])
    assert_same(reference, one_step(config, 1, rows), tolerance=1e-6)


@pytest.mark.parametrize("semantics, pools", [("emo_v2", True), ("emo_v1", False)])
def test_other_routers_on_a_mesh(semantics, pools):
    router = dict(semantics=semantics, document_pool=pools, eos_owner="next" if pools else "own")
    one = one_step(tiny.config(router=router), devices=1)
    assert_same(one, one_step(tiny.config(router=router, mesh=dict(fsdp=2, expert=2, sequence=2)), devices=8))


def test_a_dense_model_on_a_mesh():
    dense = dict(num_experts=0, num_shared_experts=0, top_k=0, d_ff=64)
    one = one_step(tiny.config(model=dense), devices=1)
    assert_same(one, one_step(tiny.config(model=dense, mesh=dict(data=2, fsdp=2, tensor=2)), devices=8))
