"""The gate before a long run: it passes a sound config, and names what is wrong with another."""

import json

import pytest
from tiny_run import config_file
from two_processes import start_command

from emo_jax import cli
from emo_jax.train import smoke


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return str(config_file(tmp_path_factory.mktemp("config")))


def test_four_steps_in_fresh_processes_pass_and_are_said(config, tmp_path, capfd):
    assert cli.main(["smoke", config, "--out", str(tmp_path / "smoke"), "--json"]) == 0
    out, err = capfd.readouterr()
    checks = {check["name"]: check for check in json.loads(out.splitlines()[-1])["checks"]}
    assert all(check["passed"] for check in checks.values())
    assert {"steps 3 and 4 after a restore", "loss of step 1", "load-balancing loss of step 1",
            "loss of step 1 of the standard MoE twin"} < set(checks)
    assert "resuming from step 2" in err and err.count("compiling the first step") == 4
    assert cli.main(["smoke", config, "--out", str(tmp_path / "smoke")]) == 2
    assert "holds the runs of another `emo-jax smoke`" in capfd.readouterr().err


def test_a_run_that_cannot_start_ends_it(config, tmp_path, capfd):
    assert cli.main(["smoke", config, "--out", str(tmp_path / "smoke"), "--data.path=nowhere"]) == 1
    err = capfd.readouterr().err
    assert "nowhere" in err and "the first two steps ended with status 2" in err


STEP = {"loss": 5.7, "grad_norm": 1.0, "load_balancing_loss": 1.1, "tokens": 256}


def test_a_restore_that_changes_a_bit_is_named():
    parts, whole = ({step: dict(STEP) for step in range(1, 5)} for _ in range(2))
    assert smoke._restored(parts, whole)[0].passed
    parts[3]["grad_norm"] += 1e-9
    check, = smoke._restored(parts, whole)
    assert not check.passed and "grad_norm of step 3" in check.found


@pytest.mark.parametrize("change, failed", [({"loss": 6.2}, ["loss of step 1"]), ({"loss": 5.4}, ["loss of step 1"]),
                                            ({"load_balancing_loss": 3.0}, ["load-balancing loss of step 1"]), ({}, [])])
def test_a_new_model_begins_near_the_entropy_of_a_guess(config, change, failed):
    from emo_jax.config import load_config

    assert [c.name for c in smoke._initial(load_config(config), STEP | change) if not c.passed] == failed


def test_a_twin_that_reads_other_rows_or_has_other_parameters_is_named():
    assert [c.passed for c in smoke._twins("EMO", STEP, STEP)] == [True, True]
    assert [c.passed for c in smoke._twins("EMO", STEP, STEP | {"tokens": 255, "loss": 5.9})] == [False, False]


DIFFERING = """
import sys
from emo_jax import cli, processes
from emo_jax.commands import Command

def run(args):
    import jax
    processes.require_same("config", {"a": 1})
    processes.require_same("config", {"a": 1, "train.steps": 7 + jax.process_index()})

cli.COMMANDS = (Command("compare", "compare", lambda parser: None, run, (), devices=True),)
sys.exit(cli.main(["compare"]))
"""


def test_hosts_that_were_started_with_different_configs_end_with_the_field_and_their_names(tmp_path):
    script = tmp_path / "differing.py"
    script.write_text(DIFFERING)
    started = start_command([str(script)], 2)
    errors = [p.communicate(timeout=100)[1] for p in started]
    assert started[1].returncode == 2
    assert "do not have the same config: train.steps is 8 in process 1 on" in errors[1] and "7 in process 0 on" in errors[1]
