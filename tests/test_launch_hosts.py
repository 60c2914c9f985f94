"""What starts a command again on one host, and several processes on one machine."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import LAUNCH, ROOT, TRAIN, program, run, wait_until
from tiny_run import config_file, series

# ---- again.sh -------------------------------------------------------------------------------------------------------

NEXT = "set -- $STATUSES; shift $EMO_JAX_ATTEMPT; [ $1 = kill ] && kill -KILL $$; exit $1"


@pytest.mark.parametrize("statuses, ended, said", [
    ("0", 0, ""),
    ("75 75 0", 0, "ended with 75; starting it again"),
    ("kill 0", 0, "ended with 137; starting it again"),
    ("1 1 75 0", 0, "failure 2 of at most 2 in a row"),
    ("1 1 1 0", 1, "failed (1) 3 times in a row"),
    ("2 0", 2, "the same command would fail again"),
    ("127 0", 127, "the same command would fail again"),
    ("75 75 75 75 0", 75, "ended with 75: not started again")])
def test_a_command_is_started_again_by_its_status(tmp_path, statuses, ended, said):
    record = tmp_path / "status"
    result = run("bash", LAUNCH / "again.sh", "--pause", 0, "--failures", 2, "--restarts", 3, "--record", record, "bash", "-c",
                 NEXT, status=ended, STATUSES=statuses)
    assert said in result.stderr and record.read_text() == f"{ended}\n"


@pytest.mark.parametrize("arguments", [(), ("--pause", "soon", "true"), ("--again", "true")])
def test_again_refuses_wrong_usage(arguments):
    assert "again.sh:" in run("bash", LAUNCH / "again.sh", *arguments, status=2).stderr


@pytest.mark.parametrize("command, ended", [
    ("trap 'exit 75' TERM; echo ready; while :; do sleep 0.05; done", 75),  # it saves
    ("echo ready; exec sleep 300", 143)])
def test_a_signal_is_handed_on_and_ends_the_restarts(command, ended):
    started = subprocess.Popen(["bash", str(LAUNCH / "again.sh"), "--pause", "0", "bash", "-c", command],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "ready\n"
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=60)
    assert started.returncode == ended and f"told to stop; the command ended with {ended}" in said


def test_a_signal_between_two_starts_ends_the_restarts():
    started = subprocess.Popen(["bash", str(LAUNCH / "again.sh"), "--pause", "300", "bash", "-c", "exit 75"],
                               stderr=subprocess.PIPE, text=True)
    assert "starting it again" in started.stderr.readline()
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) == 75


# ---- local.sh -------------------------------------------------------------------------------------------------------


def test_a_local_dry_run_prints_every_process():
    lines = run("bash", LAUNCH / "local.sh", "--processes", 3, "--devices", 2, "--slices", 3, "--dry-run", *TRAIN, "--out",
                "a folder", XLA_FLAGS=None).stdout.splitlines()
    assert [shlex.split(line) for line in lines] == [
        ["env", "JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=2", "EMO_JAX_SLICES=3",
         "EMO_JAX_NUM_PROCESSES=3", "EMO_JAX_COORDINATOR=localhost:PORT", f"EMO_JAX_PROCESS_ID={i}", "emo-jax", *TRAIN, "--out",
         "a folder"] for i in range(3)]


@pytest.mark.parametrize("arguments, said", [
    ((), "no command"), (("--devices", "many", "train"), "--devices needs a number"),
    (("--hosts", "2", "train"), "unknown option"), (("--slices", "3", "train"), "--slices 3 must divide"),
    (("--processes", "0", "train"), "may be 0"), (("--kill-one", "3", "train"), "--kill-one needs an --out")])
def test_local_refuses_wrong_usage(arguments, said):
    assert said in run("bash", LAUNCH / "local.sh", *arguments, status=2).stderr


@pytest.mark.parametrize("statuses, ended", [(("0 0",), 0), (("1 2",), 2), (("kill 75", "0 0"), 0)])
def test_processes_end_and_start_together(tmp_path, statuses, ended):
    program(tmp_path / "emo-jax", f'''#!/usr/bin/env bash
echo "$EMO_JAX_COORDINATOR $EMO_JAX_PROCESS_ID" >> {tmp_path}/started
statuses=({" ".join(shlex.quote(s) for s in statuses)})
export STATUSES=${{statuses[$EMO_JAX_ATTEMPT]}}
EMO_JAX_ATTEMPT=$EMO_JAX_PROCESS_ID exec bash -c {shlex.quote(NEXT)}
''')
    run("bash", LAUNCH / "local.sh", "train", status=ended, PATH=f"{tmp_path}:{os.environ['PATH']}", EMO_JAX_ATTEMPT=None)
    started = [line.split() for line in (tmp_path / "started").read_text().splitlines()]
    assert sorted(index for _, index in started) == sorted("01" * len(statuses))
    assert len({coordinator for coordinator, _ in started}) == len(statuses)  # another port every time


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_local_run_that_is_stopped_leaves_nothing_behind(tmp_path, how):
    program(tmp_path / "emo-jax", f"""#!/usr/bin/env bash
trap 'echo saved; exit 75' TERM
sleep 300 &
echo $! >> {tmp_path}/workers
wait""")
    started = subprocess.Popen(["bash", str(LAUNCH / "local.sh"), "train"], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # where pytest ignores it
    workers = tmp_path / "workers"
    wait_until(lambda: workers.exists() and len(workers.read_text().split()) == 2)
    started.send_signal(how)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == 75 and sorted(said.splitlines()) == ["[0] saved", "[1] saved"]
    for worker in workers.read_text().split():
        wait_until(lambda: not Path("/proc", worker, "exe").exists())  # killed, as is seen a moment later


def test_a_local_run_whose_process_is_killed_has_the_losses_of_an_undisturbed_one(tmp_path):
    command = ["bash", LAUNCH / "local.sh", "--processes", 2, "--devices", 4, "--slices", 2]
    train = ["train", config_file(tmp_path), "--json", "--train.steps=16", "--train.log_every=4", "--checkpoint.every=2"]
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    run(*command, *train, "--out", tmp_path / "whole", **env)
    result = run(*command, "--kill-one", 0, *train, "--out", tmp_path / "killed", **env)
    assert "killing process 1 with SIGKILL" in result.stderr and "ended with 75; starting it again" in result.stderr
    assert re.search(r"^\[0\] .*process 1 of 2.* is lost", result.stdout, re.MULTILINE)
    assert series(tmp_path / "killed") == series(tmp_path / "whole")
    assert json.loads(result.stdout.splitlines()[-1].removeprefix("[0] "))["resumed_from"] >= 2
