"""A process that dies, stops or fails does not leave the others hanging: they end within 30 s with the status that launchers
restart on, or that of the failure, and one line that names it."""

import os
import re
import signal
import time

import pytest
from tiny_run import config_file
from two_processes import start, start_command

from emo_jax.checkpoints import checkpoint

HOST = f"( on {os.uname().nodename})?"  # which is not known in the first seconds
# Two processes that exchange numbers, as a run does, without a model.
EXCHANGE = """
import sys, time
import numpy as np
from emo_jax import cli, ending, processes
from emo_jax.commands import Command
from emo_jax.errors import RunError

def run(args):
    ending.last_good = lambda: "the last good checkpoint is of step 7"
    step = 0
    began = time.monotonic()
    while time.monotonic() < began + 200:
        processes.gather(np.arange(3))
        step += 1
        print(step, flush=True) if step <= 3 else None
        if sys.argv[1] == "fail" and step == 3 and processes.jax.process_index() == 1:
            raise RunError("the documents are gone")
        if sys.argv[1] == "compute" and step == 3:
            time.sleep(200)

cli.COMMANDS = (Command("exchange", "exchange", lambda parser: None, run, (), devices=True),)
sys.exit(cli.main(["exchange"]))
"""


@pytest.fixture
def pair(request):
    """Both processes, which have exchanged something."""
    started = start_command(["-c", EXCHANGE, request.param], 2)
    for process in started:
        for _ in range(3):
            process.stdout.readline()
    yield started
    for process in started:
        process.kill()
        process.communicate()


def ended(process, seconds=30.0):
    """(exit status, what it wrote) of a process that ends within `seconds`."""
    began = time.monotonic()
    _, err = process.communicate(timeout=seconds + 30)
    assert time.monotonic() - began < seconds, err
    assert "Traceback" not in err and "stack trace" not in err, err
    return process.returncode, err


@pytest.mark.parametrize("pair", ["exchange"], indirect=True)
def test_a_killed_first_process_is_named(pair):
    """It has the coordinator; the other is in the middle of an exchange."""
    pair[0].kill()
    status, err = ended(pair[1])
    assert status == 75
    assert re.search(f"emo-jax exchange: process 0 of 2{HOST} is lost", err), err
    assert err.count("the last good checkpoint is of step 7") == 1


def test_a_killed_process_is_named_by_all_others():
    """Also by those that do not watch it: the first process, which does, tells them. All compute by themselves."""
    started = start_command(["-c", EXCHANGE, "compute"], 3)
    try:
        for process in started:
            for _ in range(3):
                process.stdout.readline()
        started[2].kill()
        for process in started[:2]:
            status, err = ended(process)
            assert status == 75 and re.search(f"process 2 of 3{HOST} is lost", err), err
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("pair", ["exchange"], indirect=True)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_stopped_process_is_named_and_ends_alike_when_it_wakes(pair, lost):
    pair[lost].send_signal(signal.SIGSTOP)
    status, err = ended(pair[1 - lost])
    assert status == 75 and re.search(f"process {lost} of 2{HOST} is lost: no sign of life for", err), err
    pair[lost].send_signal(signal.SIGCONT)
    status, err = ended(pair[lost])
    assert status == 75 and f"process {1 - lost} of 2" in err


@pytest.mark.parametrize("pair", ["fail"], indirect=True)
def test_a_failure_of_one_is_that_of_all(pair):
    assert ended(pair[1]) == (1, "emo-jax exchange: the documents are gone\n")
    status, err = ended(pair[0])
    assert status == 1 and re.search(f"process 1 of 2{HOST} ended: the documents are gone", err), err


def test_a_run_names_its_last_good_checkpoint(tmp_path):
    out = tmp_path / "run"
    started = start(str(config_file(tmp_path)), out, 2, "--train.steps=1000000", "--train.log_every=100",
                    "--checkpoint.every=20")
    try:
        deadline = time.monotonic() + 300
        while all(p.poll() is None for p in started) and time.monotonic() < deadline and not checkpoint.steps(
                out / "checkpoints"):
            time.sleep(0.1)
        started[0].kill()
        status, err = ended(started[1])
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert status == 75 and f"of step {max(checkpoint.steps(out / 'checkpoints'))} in {out / 'checkpoints'}. The same" in err


# A process of two that never meets the other, with limits of seconds: before they join, and at a barrier.
ALONE = """
import sys
from emo_jax import cli, processes
from emo_jax.commands import Command

processes.JOIN_S, processes.BARRIER_S = 3.0, 2

def run(args):
    if processes.jax.process_index() == 0:
        processes.wait_for_all("a place")
    import time
    time.sleep(10)

cli.COMMANDS = (Command("meet", "meet", lambda parser: None, run, (), devices=True),)
sys.exit(cli.main(["meet"]))
"""


def test_a_run_whose_other_process_never_starts_says_so_and_asks_for_a_restart():
    first, second = start_command(["-c", ALONE], 2)
    second.kill()
    second.communicate()
    status, err = ended(first)
    assert status == 75 and re.search(r"did not all come to localhost:\d+ within 3 s: one is lost", err), err


def test_a_place_that_a_process_does_not_come_to_is_named():
    started = start_command(["-c", ALONE], 2)
    status, err = ended(started[0])
    assert status == 75 and "not all processes came to 'a place' within 2 s" in err, err
    started[1].kill()
    started[1].communicate()
