"""Several TPU slices: the outer part of the data axis, and what has to cross the network between them."""

from types import SimpleNamespace

import jax
import pytest
import tiny
from test_sharded_step import assert_same, one_step

from emo_jax import model, processes, sharding
from emo_jax.aot import compile as aot
from emo_jax.aot.hlo import replica_groups
from emo_jax.config import mesh_shape
from emo_jax.errors import InputError


@pytest.fixture
def two_slices(monkeypatch):
    monkeypatch.setenv("EMO_JAX_SLICES", "2")


def test_the_config_describes_one_slice_and_data_counts_them(two_slices):
    mesh = sharding.make_mesh(tiny.config(mesh=dict(data=2, fsdp=2)))
    assert mesh.shape["data"] == 4 and mesh.shape["fsdp"] == 2
    first, second = mesh.devices[:2], mesh.devices[2:]
    assert {d.id for d in first.flat} == {0, 1, 2, 3} and {d.id for d in second.flat} == {4, 5, 6, 7}


def test_a_mesh_that_does_not_fit_a_slice_says_so(two_slices, monkeypatch):
    with pytest.raises(InputError, match="4 devices of a slice"):
        sharding.make_mesh(tiny.config(mesh=dict(fsdp=8)))
    with pytest.raises(InputError, match="slices x mesh.data x mesh.fsdp x mesh.expert=6 must divide"):
        mesh_shape(tiny.config(mesh=dict(fsdp=1)), 6, 6)
    monkeypatch.setenv("EMO_JAX_SLICES", "3")
    with pytest.raises(InputError, match="EMO_JAX_SLICES=3 does not divide the 8 devices"):
        sharding.make_mesh(tiny.config())


def test_devices_are_told_apart_by_the_slice_that_they_say():
    devices = [SimpleNamespace(platform="tpu", id=i, slice_index=(i + 1) % 2) for i in range(6)]
    assert [[d.id for d in one] for one in sharding.slices_of(devices)] == [[1, 3, 5], [0, 2, 4]]
    with pytest.raises(InputError, match="the slices have 2, 3 devices"):
        sharding.slices_of(devices[:5])
    assert len(sharding.slices_of([SimpleNamespace(platform="gpu", id=i, slice_index=i) for i in range(2)])) == 1


def test_a_step_on_two_slices_equals_one_on_one_device(two_slices, monkeypatch):
    on_slices = one_step(tiny.config(mesh=dict(fsdp=2, expert=2)), devices=8)
    monkeypatch.delenv("EMO_JAX_SLICES")
    assert_same(one_step(tiny.config(), devices=1), on_slices)


@pytest.mark.parametrize("mesh", [dict(fsdp=4), dict(fsdp=2, expert=2)], ids=str)
def test_one_reduction_of_each_device_s_part_of_the_gradient_crosses_the_network(two_slices, mesh):
    config = tiny.config(mesh=mesh)
    devices = jax.devices()[:8]
    compiled, _ = aot.compile_step(config, devices)
    report = aot.report(config, devices, compiled)
    assert report["slices"] == 2 and report["mesh"]["data"] == 2
    crossing = sum(c["wire_bytes"] for c in report["collectives"] if c["between_slices"] and c["kind"] == "all-reduce")
    gradient = sum(leaf.size * 4 for leaf in jax.tree.leaves(model.abstract_params(config))) / 4  # of a device of one slice
    assert 0.5 * gradient < crossing < 1.5 * gradient  # the rest: the small weights that every device holds, sums of routers


def test_groups_of_devices_in_every_form_that_xla_prints():
    rows, columns = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert replica_groups("replica_groups={{0,1,2,3},{4,5,6,7}}, to") == rows
    assert replica_groups("replica_groups=[2,4]<=[8], dimensions={0}") == rows
    assert replica_groups("replica_groups=[4,2]<=[2,4]T(1,0), x") == columns
    assert replica_groups("replica_groups=mesh['a'=2,'b'=4] {'b'}, x") == rows
    assert replica_groups("replica_groups=mesh['a'=2,'b'=4] {'a'}, x") == columns
    assert replica_groups("source_target_pairs={{0,4},{1,5}}") == [[0, 4], [1, 5]]
    assert replica_groups("replica_groups={}, x") == []


def test_slices_need_a_topology():
    with pytest.raises(InputError, match="--slices 2"):
        aot.compile_config(tiny.config(), None, 2)


@pytest.mark.parametrize("environment, on_vm, detected, joins", [
    ({"MEGASCALE_NUM_SLICES": "2"}, False, ("host0:8482", 2, 1, None), True),  # two slices of one host each
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, ("a:8482", 2, 1, None), True),
    ({}, True, ("host0:8482", 16, 3, None), True),  # a TPU VM: the names of its slice are in the metadata alone
    ({}, True, ("host0:8482", 1, 0, None), False),
    ({}, False, ("host0:8482", 2, 0, None), False),
], ids=["slices of one host", "GKE", "TPU VMs", "one TPU VM", "no TPU"])
def test_hosts_of_tpus_join(monkeypatch, environment, on_vm, detected, joins):
    joined = []
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "_on_tpu_vm", lambda: on_vm)
    monkeypatch.setattr(processes, "_detected", lambda: detected)
    monkeypatch.setattr(processes, "_join", lambda *found: joined.append(found))
    processes.start_distributed()
    assert joined == ([detected] if joins else [])
