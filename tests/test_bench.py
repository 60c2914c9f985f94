"""The benchmark of a step: what it says of the machine, and where it says the time goes. No figure is asserted."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from emo_jax import cli, machine
from emo_jax.bench import breakdown
from emo_jax.bench.breakdown import OTHER, SCOPES, instructions, scope_of

SMALL = ("--model.vocab_size=64", "--model.num_layers=2", "--model.d_model=32", "--model.num_heads=2", "--model.num_kv_heads=2",
         "--model.head_dim=16", "--model.d_ff=16", "--model.num_experts=4", "--model.top_k=2", "--router.pool_min=2",
         "--router.pool_max=4", "--train.batch_size=8", "--data.sequence_length=32", "--data.max_documents_per_row=8")


@pytest.fixture(scope="module")
def broken_down():
    """In a process of its own: it stays on one core."""
    made = subprocess.run([sys.executable, "-m", "emo_jax", "bench", "step", "--breakdown", "--rounds", "2", "--json", *SMALL],
                          capture_output=True, text=True, check=True,
                          env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"})
    return json.loads(made.stdout.splitlines()[-1])


def test_a_step_is_broken_down_by_the_scopes_of_the_model(broken_down):
    scopes = broken_down["scopes"]
    assert {"norm", "projections", "attention", "routing", "dispatch", "experts", "loss", "optimizer"} <= set(scopes)
    assert set(scopes) <= {*SCOPES, OTHER}
    assert all(s["seconds"] > 0 and s["bytes"] > 0 for s in scopes.values())
    assert 0 < broken_down["named"] <= 1.5 and len(broken_down["gaps"]) == breakdown.GAPS
    assert "furthest from their floor" in breakdown.report(broken_down)


def test_the_flops_of_projections_and_loss_are_those_of_their_matmuls(broken_down):
    tokens, D, L, V = 8 * 32, 32, 2, 64
    scopes = broken_down["scopes"]
    assert scopes["projections"]["flops"] == pytest.approx(3 * L * 4 * 2 * tokens * D * D)  # q, k, v, o, and their adjoints
    assert scopes["loss"]["flops"] == pytest.approx(3 * 2 * tokens * D * V)


def test_batched_matmuls_and_trips_of_loops_are_counted():
    batched = jax.jit(lambda a, b: jnp.einsum("hij,hjk->hik", a, b)).lower(jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6)))
    assert sum(w.flops for w in instructions(batched.compile().as_text()).values()) == 2 * 3 * 4 * 5 * 6
    looped = jax.jit(lambda a: jax.lax.fori_loop(0, 7, lambda _, x: x @ a, a)).lower(jnp.ones((64, 64)))
    assert sum(w.flops for w in instructions(looped.compile().as_text()).values()) == 7 * 2 * 64**3


def test_the_innermost_scope_counts():
    assert scope_of("jit(train_step)/transpose(jvp(while))/body/attention/norm/mul") == "norm"
    assert scope_of("jit(train_step)/jvp()/while/body/experts/dot_general") == "experts"
    assert scope_of("jit(train_step)/add") == OTHER


def test_time_of_what_an_instruction_calls_is_its_own():
    spent = {"a": 0.0, "b": 0.0, "c": 0.0}
    breakdown._own_times([(0.0, -10.0, "a"), (2.0, -3.0, "b"), (12.0, -1.0, "c")], spent)
    assert spent == pytest.approx({"a": 7e-9, "b": 3e-9, "c": 1e-9})


def test_every_benchmark_names_its_machine(capsys):
    assert cli.main(["bench", "moe", "--tokens", "64", "--experts", "4", "--rounds", "1", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)["machine"]
    assert about == machine.describe() and about["cores"] >= 1 and about["jax"] == jax.__version__
    assert str(about["cpu"]) in machine.summary(about)


@pytest.mark.parametrize("text, model, widest", [
    ("model name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx avx2 avx512f amx_tile\n", "Some CPU @ 2 GHz", "amx_tile"),
    ("model name\t: Old\nflags\t\t: fpu avx avx2\n", "Old", "avx2"),
    ("processor\t: 0\nFeatures\t: fp asimd sve\n", "", "sve")])
def test_processors_are_told_apart_by_what_they_execute(tmp_path, monkeypatch, text, model, widest):
    here = machine.code_key()
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    about = machine.describe()
    assert about["instruction_set"] == widest and (not model or about["cpu"] == model)
    assert machine.code_key() != here


def test_a_machine_without_cpuinfo_is_described_too(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    assert machine.describe()["instruction_set"] == "unknown" and machine.code_key()


@pytest.mark.skipif(machine.platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_commands_that_compute_take_huge_pages_and_leave_settings_of_ones_own():
    def huge_pages(**given):
        environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | given
        command = "bench moe --tokens 64 --experts 4 --rounds 1 --json".split()
        made = subprocess.run([sys.executable, "-m", "emo_jax", *command], env=environment, capture_output=True, text=True,
                              check=True)
        return json.loads(made.stdout.splitlines()[-1])["machine"]["huge_pages"]

    assert huge_pages() and not huge_pages(GLIBC_TUNABLES="glibc.malloc.check=0")
