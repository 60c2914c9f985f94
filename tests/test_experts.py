"""Every dispatch strategy equals the dense oracle, forward and gradients, on any mesh and for any load of the experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jaxprs import equations

from emo_jax import sharding
from emo_jax.errors import InputError
from emo_jax.kernels import Kernel
from emo_jax.moe import dispatch, experts
from emo_jax.moe import dispatch_all_to_all as a2a
from emo_jax.moe.experts import Dispatch, ExpertLayer, say_where_experts_are_split
from emo_jax.rounding import round_up

B, T, D, F, E, CHOICES, SHARED = 8, 8, 16, 8, 8, 3, 1
ROUTED = E - SHARED

LOCAL, RINGS, RING, DENSE = Dispatch("local"), Dispatch("local", rings=True), Dispatch("ring"), Dispatch("dense")
ALL_TO_ALL = Dispatch("all_to_all", portable=True)
BLOCKED, BATCHED, REFERENCE, FUSED = Kernel("blocked"), Kernel("batched"), Kernel("reference"), Kernel("fused", interpret=True)
ONE_DEVICE = (1, 1, 1, 1, 1)


def table_and_tokens(seed=0):
    draw = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(0.3 * draw.normal(size=shape), jnp.float32)
    table = {"gate": array(E, D, F), "up": array(E, D, F), "down": array(E, F, D)}
    return table, array(B, T, D), jnp.abs(array(B, T, CHOICES)) + 0.1


def loads():
    """Name -> (expert ids [B, T, CHOICES], valid [B, T])."""
    draw = np.random.default_rng(1)
    anything = np.argsort(draw.random((B, T, ROUTED)), axis=-1)[..., :CHOICES]
    everything = np.ones((B, T), bool)
    return {
        "random, with padding": (anything, draw.random((B, T)) > 0.2),
        "all tokens on one expert": (np.zeros((B, T, 1), int), everything),
        "all tokens on the same experts": (np.broadcast_to(np.arange(CHOICES), (B, T, CHOICES)), everything),
        "empty experts": (np.argsort(draw.random((B, T, CHOICES)), axis=-1) + 2, everything),
        "a device without tokens": (anything, np.arange(B)[:, None] % 2 == np.zeros((1, T))),
    }


def run(strategy, kernel, shape, load, buffer_factor=0.0, whole_experts=True, call=lambda step, *args: step(*args),
        see_rows=None):
    """((value, (y, seen, BufferLoad)), gradients of the table, the tokens and the weights)"""
    (table, x, weights), (ids, valid) = table_and_tokens(), loads()[load]
    weights = weights[..., : ids.shape[-1]]

    def loss(table, x, weights, ids, valid):
        layer = ExpertLayer(SHARED, strategy, kernel, buffer_factor, see_rows)
        y, *others = experts.moe_experts(table, x, ids, weights, valid, layer)
        return jnp.sum(jnp.sin(y)), (y, *others)

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    args = (table, x, weights, jnp.asarray(ids, jnp.int32), jnp.asarray(valid))
    mesh = jax.make_mesh(shape, sharding.AXES, axis_types=(AxisType.Explicit,) * 5,
                         devices=jax.devices()[: int(np.prod(shape))])
    place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        spec = lambda name, a: sharding.parameter_spec(("moe", name), *((a.shape, mesh) if whole_experts else ()))
        table = {name: place(a, spec(name, a)) for name, a in table.items()}
        specs = (sharding.ACTIVATIONS,) * 3 + (sharding.TOKENS,)
        return call(step, table, *(place(a, spec) for a, spec in zip(args[1:], specs)))


@functools.cache
def oracle(load):
    return run(DENSE, REFERENCE, ONE_DEVICE, load)


def assert_equals_oracle(got, load):
    (_, (y, *_)), grads = got
    (_, (want, *_)), want_grads = oracle(load)
    np.testing.assert_allclose(y, want, atol=2e-6)
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5)


CASES = [
    (LOCAL, BLOCKED, ONE_DEVICE), (LOCAL, FUSED, ONE_DEVICE),
    (LOCAL, BLOCKED, (2, 2, 1, 2, 1)), (LOCAL, REFERENCE, (1, 4, 1, 1, 2)),
    (LOCAL, BATCHED, (2, 1, 1, 1, 2)), (LOCAL, BLOCKED, (1, 2, 4, 1, 1)),
    (RINGS, FUSED, (2, 1, 2, 2, 1)), (RINGS, BLOCKED, (1, 2, 4, 1, 1)),
    (RING, BLOCKED, (1, 2, 2, 1, 2)), (RING, FUSED, (2, 1, 2, 2, 1)),
    (ALL_TO_ALL, BLOCKED, (1, 2, 2, 2, 1)), (ALL_TO_ALL, FUSED, (1, 1, 4, 1, 2)),
]


@pytest.mark.parametrize("strategy, kernel, shape", CASES, ids=str)
def test_equals_the_dense_oracle(strategy, kernel, shape):
    load = "random, with padding"
    assert_equals_oracle(run(strategy, kernel, shape, load), load)


@pytest.mark.parametrize("strategy", [RING, LOCAL, RINGS], ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 2, 1, 1), (2, 2, 1, 2, 1)])
def test_experts_sharded_along_their_widths(shape, strategy):
    """As where the experts do not divide into fsdp x expert."""
    load = "random, with padding"
    assert_equals_oracle(run(strategy, BLOCKED, shape, load, whole_experts=False), load)


@pytest.mark.parametrize("load", [name for name in loads() if "random" not in name])
def test_skewed_loads(load):
    assert_equals_oracle(run(RING, BLOCKED, (1, 1, 4, 1, 1), load), load)


@pytest.mark.parametrize("load, kernel", [("all tokens on one expert", REFERENCE), ("all tokens on one expert", FUSED),
                                          ("all tokens on the same experts", REFERENCE), ("empty experts", REFERENCE)],
                         ids=str)
def test_all_to_all_falls_back_to_ring_when_the_buffer_is_too_small(load, kernel):
    got = run(ALL_TO_ALL, kernel, (1, 1, 4, 1, 1), load, buffer_factor=1.0)
    buffer_load = got[0][1][2]
    assert buffer_load.fallback == 1 and buffer_load.required_capacity_factor > 1
    assert_equals_oracle(got, load)


@pytest.mark.parametrize("load, buffer_factor", [("random, with padding", 3.0), ("all tokens on one expert", 4.0)])
def test_all_to_all_uses_a_bounded_buffer_when_the_load_fits(load, buffer_factor):
    got = run(ALL_TO_ALL, REFERENCE, (1, 1, 4, 1, 1), load, buffer_factor)
    buffer_load = got[0][1][2]
    ids, valid = loads()[load]
    busiest = np.bincount((ids[valid] // (E // 4)).ravel(), minlength=4).max()
    np.testing.assert_allclose(buffer_load.required_capacity_factor, busiest / (ids.size / 4))
    assert buffer_load.fallback == 0
    assert_equals_oracle(got, load)


@pytest.mark.parametrize("strategy, kernel, shape, buffer_factor", [
    (LOCAL, FUSED, (2, 1, 1, 2, 1), 0.0), (RINGS, BLOCKED, (1, 2, 2, 1, 1), 0.0), (RING, BLOCKED, (1, 1, 4, 2, 1), 0.0),
    (ALL_TO_ALL, BLOCKED, (1, 1, 4, 2, 1), 0.0), (ALL_TO_ALL, REFERENCE, (1, 1, 4, 1, 1), 1.0),
    (DENSE, BLOCKED, (1, 2, 2, 2, 1), 0.0)], ids=str)
def test_the_hook_sees_every_row_whole_under_every_strategy(strategy, kernel, shape, buffer_factor):
    """A number of every choice, in its place; padding has 0. (A buffer of 1.0 is too small: that layer falls back.)"""
    load = "random, with padding"
    squares = lambda rows: jnp.sum(rows**2, axis=-1)
    (_, (y, seen, buffer_load)), _ = run(strategy, kernel, shape, load, buffer_factor, see_rows=squares)
    (table, x, weights), (ids, valid) = table_and_tokens(), loads()[load]
    outputs = experts.swiglu(jnp.einsum("btd,edf->btef", x, jnp.concatenate([table["gate"], table["up"]], -1)))
    outputs = jnp.einsum("btef,efd->bted", outputs, table["down"])
    chosen = weights[..., None] * np.take_along_axis(outputs, ids[..., None], axis=2)
    np.testing.assert_allclose(seen, jnp.sum(chosen**2, -1) * valid[..., None], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(y, oracle(load)[0][1][0], atol=2e-6)
    assert buffer_load is None or buffer_load.fallback == (buffer_factor == 1.0)


def test_an_expert_gradient_is_a_sum_over_all_devices_that_served_it():
    """One token on each device, all on expert 0: its gradient is not that of any one device's token."""
    load = "all tokens on the same experts"
    for strategy, shape in [(LOCAL, (2, 4, 1, 1, 1)), (ALL_TO_ALL, (2, 2, 2, 1, 1))]:
        (_, _), (grads, _, _) = run(strategy, REFERENCE, shape, load)
        np.testing.assert_allclose(np.asarray(grads["down"])[0], oracle(load)[1][0]["down"][0], atol=1e-5)


@pytest.mark.parametrize("alignment", [1, 8])
def test_rows_and_slots_correspond_one_to_one(alignment):
    ids, valid = (jnp.asarray(a).reshape(B * T, *a.shape[2:]) for a in loads()["random, with padding"])
    first, count = 2, 4
    plan = dispatch.plan_dispatch(ids, valid, (first, count), alignment)
    here = (ids >= first) & (ids < first + count) & valid[:, None]
    rows = np.asarray(plan.row_of_slot)[here]
    assert len(set(rows)) == here.sum() and np.all(np.asarray(plan.row_of_slot)[~here] == len(plan.slot_of_row))
    np.testing.assert_array_equal(np.asarray(plan.slot_of_row)[rows], np.flatnonzero(here))
    ends = np.cumsum(plan.group_sizes)
    np.testing.assert_array_equal(np.searchsorted(ends, rows, side="right"), np.asarray(ids)[here] - first)
    assert np.all(np.asarray(plan.group_sizes) % alignment == 0)


def test_the_way_back_undoes_the_exchange():
    peers, local = 4, 2
    mesh = jax.make_mesh((peers,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:peers])
    counts = np.random.default_rng(2).integers(0, 4, (peers, peers * local))
    counts[1] = 0
    slots, room = int(counts.sum(1).max()) + 1, int(counts.sum()) + 8

    def there_and_back(counts):
        me = jax.lax.axis_index("expert")
        plan = a2a.plan_exchange(jax.lax.all_gather(counts[0], "expert"), me, 4)
        sent = 100 * me + jnp.arange(1, slots + 1)
        sent = jnp.where(jnp.arange(slots) < jnp.sum(counts), sent, 0)[:, None]
        rows = a2a.send(sent, plan, room, portable=True)
        return a2a.send_back(rows, plan, slots, portable=True) - sent, jnp.sum(rows != 0)[None], plan.group_sizes

    P = jax.sharding.PartitionSpec
    on_devices = jax.shard_map(there_and_back, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    difference, arrived, sizes = jax.jit(on_devices)(jnp.asarray(counts, jnp.int32))
    assert not np.any(difference)
    np.testing.assert_array_equal(arrived, counts.reshape(peers, peers, local).sum((0, 2)))
    np.testing.assert_array_equal(sizes, round_up(counts.sum(0), 4))


@pytest.mark.parametrize("strategy, shape", [(LOCAL, ONE_DEVICE), (RING, (1, 1, 4, 1, 1)),
                                             (Dispatch("all_to_all"), (1, 1, 4, 1, 1))], ids=str)
def test_no_adjoint_scatters_rows(strategy, shape):
    """One scatter writes the plan; the movements of rows, and their adjoints, are gathers. Tables have three dimensions."""
    written = [e.outvars[0].aval for e in run(strategy, REFERENCE, shape, "random, with padding", call=equations)
               if e.primitive.name.startswith("scatter")]
    assert [(a.ndim, a.dtype) for a in written if a.ndim < 3] == [(1, jnp.int32)]


def test_the_choice_of_strategy():
    choose = experts.choose_strategy
    exchange = Dispatch("all_to_all")
    assert [choose("auto", n, 7, "tpu") for n in (1, 4, 7, 8, 64)] == [LOCAL, RING, RING, exchange, exchange]
    assert choose("all_to_all", 2, 7, "cpu") == ALL_TO_ALL
    assert choose("local", 4, 7, "cpu") == choose("local", 1, 7, "tpu", sparse_cores=False) == LOCAL
    assert choose("local", 4, 7, "tpu", sparse_cores=False) == RINGS
    with pytest.raises(InputError, match="mesh.expert"):
        choose("all_to_all", 1, 7, "cpu")


def test_experts_in_parts_name_the_mesh_that_keeps_them_whole(caplog):
    for arguments in ((128, 128, "tpu"), (128, 256, "cpu"), (127, 256, "tpu"), (128, 256, "tpu")):
        say_where_experts_are_split(*arguments)
    (said,) = caplog.messages
    assert "256 devices hold parts of 128 experts" in said and "2 times mesh.data" in said
