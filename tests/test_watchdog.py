"""A run that stands still ends with the stacks of all its threads and workers; one that was only stopped itself does not. A
stopped or killed data worker is named, and a signal is obeyed while there are no rows."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from tiny_run import records, tiny_config, write_documents

from emo_jax.checkpoints import checkpoint
from emo_jax.data.waiting import Interrupted
from emo_jax.train import loop
from emo_jax.train.loop import train

# What a loop does, without a model: rows from two workers, each followed by a "step" that sleeps.
PROGRAM = """
import multiprocessing, sys, threading, time
from pathlib import Path
from emo_jax import ending
from emo_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from emo_jax.data.pipeline import make_train_iterator
from emo_jax.data.sources import open_source
from emo_jax.data.tokenizer import train_bpe
from emo_jax.errors import RestartError
from emo_jax.train import watchdog

def never_comes_back():
    time.sleep(200)

if __name__ == "__main__":
    out, standing, limit = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    watchdog.NAMED_S, watchdog.KILLED_S = 2.0, 4.0
    data = DataConfig(path=str(out / "documents.jsonl"), sequence_length=64, workers=2)
    config = Config(name="t", model=ModelConfig(vocab_size=300), train=TrainConfig(batch_size=8), data=data)
    source = open_source(data)
    tokenizer = train_bpe(source, range(len(source)), 300, out, data.eos_token)
    iterator = make_train_iterator(config, source, tokenizer)
    watch = watchdog.Watchdog(out, 0, limit)
    ending.last_good = lambda: "the last good checkpoint is of step 7"
    try:
        for step in range(20000):
            began = time.monotonic()
            watch.at(watchdog.DATA, long=step < 3)
            next(iterator)
            watch.at(f"step {step}")
            if step == 3:
                print(*sorted(p.pid for p in multiprocessing.active_children()), flush=True)
            never_comes_back() if standing == "step" and step == 3 else time.sleep(0.01)
            watch.stepped(began)
    except RestartError as e:
        print(e, flush=True)
        iterator.close()
        sys.exit(75)
"""


@pytest.fixture
def loop_process(request, tmp_path):
    """(process, its workers)"""
    write_documents(tmp_path / "documents.jsonl")
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen([sys.executable, str(tmp_path / "program.py"), str(tmp_path), *request.param],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])})
    line = process.stdout.readline()
    yield process, [int(pid) for pid in line.split()]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("loop_process", [("step", "2")], indirect=True)
def test_a_step_that_stands_still_ends_the_run_with_all_stacks(loop_process, tmp_path):
    process, workers = loop_process
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert re.search(r"step 3 takes more than \d+ s.*in .*hangs/.*-0.txt; the last good checkpoint is of step 7", err), err
    (written,) = (tmp_path / "hangs").iterdir()
    for text in (err, written.read_text()):
        assert "never_comes_back" in text and "relay" not in text
        for pid in workers:
            assert re.search(rf"data worker, process {pid} \(\w\):\n(.*\n)*.*File ", text), text


@pytest.mark.parametrize("loop_process", [("none", "3")], indirect=True)
def test_a_process_that_was_stopped_and_wakes_goes_on(loop_process):
    process, _ = loop_process
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(8)
    os.killpg(process.pid, signal.SIGCONT)
    time.sleep(3)
    assert process.poll() is None


@pytest.mark.parametrize("loop_process", [("none", "0")], indirect=True)
@pytest.mark.parametrize("by", [signal.SIGSTOP, signal.SIGKILL])
def test_a_worker_that_works_no_more_is_named(loop_process, by):
    process, workers = loop_process
    os.kill(workers[0], by)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "a data worker ended (killed by SIGKILL" in out
    if by == signal.SIGSTOP:
        assert f"data worker(s) stopped: process {workers[0]}" in err


def test_a_signal_is_obeyed_while_there_are_no_rows(tmp_path, monkeypatch):
    """The rows of step 3 never come: the run saves step 2, and goes on from there as if nothing had happened."""
    make = loop.batches_of

    def make_silent(*args):
        batches = make(*args)
        made = batches._iterator._iterator
        made[0] = Silent(made[0])
        return batches

    monkeypatch.setattr(loop, "batches_of", make_silent)
    result = train(tiny_config(tmp_path, "train.steps=4"), tmp_path / "run")
    assert (result["stopped"], result["step"], checkpoint.steps(tmp_path / "run" / "checkpoints")) == ("SIGTERM", 2, [2])
    monkeypatch.undo()
    train(tiny_config(tmp_path, "train.steps=4"), tmp_path / "run")
    train(tiny_config(tmp_path, "train.steps=4"), tmp_path / "whole")
    losses = [[(r["step"], r["loss"]) for r in records(tmp_path / run)] for run in ("run", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


class Silent(Iterator):
    """An iterator whose third item never comes; a scheduler has no patience."""

    def __init__(self, iterator):
        self._iterator, self._count = iterator, 0

    def __next__(self):
        self._count += 1
        if self._count == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            raise AssertionError(f"no {Interrupted.__name__}")
        return next(self._iterator)

    def close(self):
        self._iterator.close()
