"""The run that faults happen to: so small that a process is at its first step after two seconds, started by forking a process
that has imported everything and computed nothing; and what two such runs are compared by.

Nothing here may start a thread or a JAX backend in the process that forks: what needs one is done by `in_child`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or tempfile.mkdtemp(prefix="emo_jax_faults_")
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": CACHE,
               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}

import grain  # noqa: E402, F401  here, so that no child imports it
import orbax.checkpoint  # noqa: E402, F401
import tensorboardX  # noqa: E402, F401

from emo_jax import cli  # noqa: E402
from emo_jax.checkpoints.checkpoint import FOLDER, open_checkpoint, steps  # noqa: E402
from emo_jax.files import absolute_path  # noqa: E402
from emo_jax.train import loop, start  # noqa: E402, F401

STEPS = 24
CONFIG = '''
from emo_jax.config import *

def config():
    return Config(
        name="tiny",
        model=ModelConfig(vocab_size=300, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=8,
                          num_experts=4, num_shared_experts=1, top_k=2),
        router=RouterConfig(pool_min=2, pool_max=3),
        kernels=KernelConfig(attention="reference", grouped_matmul="reference"),
        data=DataConfig(path={path!r}, sequence_length=16, max_documents_per_row=4, eval_fraction=0.1, workers=0),
        optimizer=OptimizerConfig(schedule="constant", warmup_steps=2, learning_rate=1e-2),
        train=TrainConfig(steps={steps}, batch_size=4, log_every=1, eval_every=8, eval_rows=4, remat="none"),
        checkpoint=CheckpointConfig(every=2, keep_last=3))
'''
WORDS = {"color": "red green blue gray pink".split(), "count": "one two six ten".split()}
# Parts of the names of what two runs differ in.
CLOCK = ("tokens_per_second", "seconds", "mfu", "wait", "blocked", "slowest_host", "device_memory")


def write_config(folder: Path) -> Path:
    """The config, with documents beside it that 24 steps read once and begin again."""
    draw, path = random.Random(0), folder / "documents.jsonl"
    with path.open("w") as file:
        for i in range(60):
            label = ("color", "count")[i % 2]
            text = " ".join(draw.choice(WORDS[label]) for _ in range(draw.randint(3, 12)))
            file.write(json.dumps({"text": text, "source": label}) + "\n")
    config = folder / "tiny.py"
    config.write_text(CONFIG.format(path=str(path), steps=STEPS))
    return config


# ---- processes ------------------------------------------------------------------------------------------------------


class Process:
    """`emo-jax train CONFIG --out OUT ...` as a forked process that leads a session of its own, its output in `log`."""

    def __init__(self, argv: list[str], log: Path, environment: dict[str, str]):
        self.log, self.status, self.ended = log, None, 0.0
        self.began = time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            _run_and_exit(argv, log, environment)

    def poll(self) -> int | None:
        """The exit status, or minus the signal that ended it; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status, self.ended = os.waitstatus_to_exitcode(status), time.monotonic()
        return self.status

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def clean(self) -> None:
        """Ends whatever is left of it, such as data workers."""
        self.send(signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def says(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _run_and_exit(argv: list[str], log: Path, environment: dict[str, str]) -> None:
    status = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ |= environment
        os.environ.setdefault("GLIBC_TUNABLES", "")  # a fork cannot begin its program anew to set it
        try:
            sys.argv = ["emo-jax", *argv]
            status = cli.main()
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        threading._shutdown()  # what the end of an interpreter does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def start_run(config: Path, out: str | Path, processes: int, logs: Path, *overrides: str,
              environment: dict[str, str] | None = None) -> list[Process]:
    """One run as so many processes, with one device (four in all, of two and four)."""
    devices = 4 // processes if processes > 1 else 1
    shared = (environment or {}) | {"XLA_FLAGS": f"--xla_backend_optimization_level=0 "
                                                 f"--xla_force_host_platform_device_count={devices}"}
    if processes > 1:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            shared |= {"EMO_JAX_COORDINATOR": f"localhost:{s.getsockname()[1]}", "EMO_JAX_NUM_PROCESSES": str(processes)}
    argv = ["train", str(config), "--out", str(out), *overrides]
    return [Process(argv, logs / f"{i}.log", shared | ({"EMO_JAX_PROCESS_ID": str(i)} if processes > 1 else {}))
            for i in range(processes)]


def in_child(function: Callable[..., Any], *args: Any, environment: dict[str, str] | None = None) -> Any:
    """`function(*args)`, which is JSON, computed by a forked process: threads and a backend that it starts end with it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reading)
            os.environ |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"} | (environment or {})
            with os.fdopen(writing, "w") as file:
                file.write(json.dumps(function(*args)))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(pid, 0)
    if not text:
        raise RuntimeError(f"{function.__name__}{args} failed, see above")
    return json.loads(text)


# ---- what a run has come to -----------------------------------------------------------------------------------------


def without_clock(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if not any(part in k for part in CLOCK)}


def result(out: str) -> dict[str, Any]:
    """Everything by which two runs of the same config are compared: every number of metrics.jsonl but for times; of every
    checkpoint that is reported good, whether it loads, the place in the documents, the tokens and the sums of all bits."""
    folder = absolute_path(out, "--out")
    records = [without_clock(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found, unreadable = {}, []
    for step in steps(folder / FOLDER):
        try:
            checkpoint = open_checkpoint(folder, step)
            load(checkpoint)
            found[str(step)] = {"position": checkpoint.position(), "tokens": checkpoint.meta["tokens"],
                                "checksums": checkpoint.meta["checksums"]}
        except Exception as e:
            unreadable.append(f"{step}: {e}")
    return {"train": [r for r in records if "loss" in r and "eval" not in r], "eval": [r for r in records if "eval" in r],
            "checkpoints": found, "unreadable": unreadable}


def load(checkpoint: Any) -> None:
    """Restores all of it onto one device. Raises `DamagedCheckpoint`."""
    from emo_jax import compat, sharding
    from emo_jax.train.step import abstract_state

    mesh = sharding.single_device_mesh()
    with compat.set_mesh(mesh):
        start.restore_state(checkpoint, abstract_state(checkpoint.config, mesh))


def differences(found: dict[str, Any], undisturbed: dict[str, Any]) -> list[str]:
    """What is not as in the undisturbed run, by kind: "losses", "documents", "parameters", "evaluations", "checkpoints"."""
    wrong = []
    end, last = ({} if not x["checkpoints"] else x["checkpoints"][max(x["checkpoints"], key=int)] for x in (found, undisturbed))
    if found["train"] != undisturbed["train"]:
        wrong.append(f"losses: {_first(found['train'], undisturbed['train'])}")
    if (end.get("position"), end.get("tokens")) != (last["position"], last["tokens"]):
        wrong.append(f"documents: {end.get('position')} and not {last['position']}")
    if end.get("checksums") != last["checksums"]:
        wrong.append(f"parameters: {end.get('checksums')} and not {last['checksums']}")
    if found["eval"] != undisturbed["eval"]:
        wrong.append(f"evaluations: {_first(found['eval'], undisturbed['eval'])}")
    if found["unreadable"]:
        wrong.append(f"checkpoints: {found['unreadable']}")
    return wrong


def _first(found: list[dict], expected: list[dict]) -> str:
    for a, b in zip(found, expected):
        if a != b:
            return "; ".join(f"{k}={a.get(k)} and not {b.get(k)}" for k in {**a, **b} if a.get(k) != b.get(k))[:300]
    return (f"{len(found)} records, of steps {[r['step'] for r in found]}, and not {len(expected)}")[:300]
