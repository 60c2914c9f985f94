"""Damages: something happens to the files of a stopped run, then it is started again. Either it goes on with exactly the
numbers of a run that nothing happened to, or it says what is wrong and does nothing."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fault_runs
from damage import damage
from fault_kills import TRACEBACKS, Lane, hang
from fault_runs import STEPS, differences, in_child, result

from emo_jax import cli
from emo_jax.files import absolute_path, remove_tree
from emo_jax.train import evaluate, loop

CUT = 2 * STEPS // 3  # steps of the run that is damaged; an evaluation ends it, so that it is the beginning of the whole one
BATCH = 40  # trials of one process


def damage_runs(lane: Lane, count: int, seed: str, folder: Path, until: float) -> Iterator[dict[str, Any]]:
    """What came of every damage until that time: {"kind": "damage", "fault", "problems", "ending": "went on" or "refused"}."""
    config = fault_runs.write_config(folder)
    undisturbed = in_child(_train_and_read, str(config), str(folder / "undisturbed"), STEPS)
    in_child(_train_and_read, str(config), str(folder / "cut"), CUT)
    done = 0
    while done < count and time.monotonic() < until:
        for found in _batch(lane, range(done, min(count, done + BATCH)), seed, folder, config, undisturbed):
            done += 1
            yield found


def _train_and_read(config: str, out: str, steps: int) -> dict[str, Any]:
    _main(config, out, Path(f"{out}.log"), steps)
    return result(out)


def _batch(lane: Lane, batch: range, seed: str, folder: Path, config: Path, undisturbed: dict) -> Iterator[dict[str, Any]]:
    """Trials of one process, as many as there are before it hangs or dies."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reading)
            os.environ |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"} | (lane.environment or {})
            with os.fdopen(writing, "w", 1) as file:
                for found in _trials(lane, batch, seed, folder, config, undisturbed):
                    file.write(json.dumps(found) + "\n")
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    done, buffer, problem = 0, b"", ""
    while done < len(batch) and not problem:
        if not select.select([reading], [], [], limit := hang())[0]:
            problem = f"hang: no end within {limit:.0f} s"
        elif more := os.read(reading, 1 << 16):
            *lines, buffer = (buffer + more).split(b"\n")
            done += len(lines)
            yield from map(json.loads, lines)
        else:
            problem = "traceback: the process died"
    if problem:
        os.kill(pid, 9)
        yield {"kind": "damage", "fault": f"trial {batch[done]}", "problems": [problem], "ending": "none"}
    os.waitpid(pid, 0)
    os.close(reading)


def _trials(lane: Lane, batch: range, seed: str, folder: Path, config: Path, undisturbed: dict) -> Iterator[dict[str, Any]]:
    _keep_compiled_steps()
    for number in batch:
        out = f"{lane.bucket}/damaged{number}" if lane.bucket else str(folder / f"damaged{number}")
        _copy(folder / "cut", out)
        fault = damage(random.Random(f"{seed}-{number}"), out)
        log, began = folder / f"damaged{number}.log", time.monotonic()
        status, problems = _main(str(config), out, log, STEPS), []
        said = log.read_text(errors="replace")
        if status == 0:
            problems = _differences(out, undisturbed, fault)
        elif status not in (1, 2) or "emo-jax train: " not in said:
            problems = [f"status: it ended with {status}"]
        if any(word in said for word in TRACEBACKS):
            problems.append("traceback: one was printed, or left out for an internal error")
        yield {"kind": "damage", "fault": fault, "problems": problems, "ending": "refused" if status else "went on",
               "seconds": round(time.monotonic() - began, 2), "number": number,
               "says": [line for line in said.splitlines() if "damaged" in line or "emo-jax train: " in line][:5],
               **({"said": [said[-3000:]]} if problems else {})}
        if not problems:
            remove_tree(absolute_path(out, "out"))
            log.unlink()


def _copy(source: Path, out: str) -> None:
    target = absolute_path(out, "out")
    remove_tree(target)
    if isinstance(target, Path):
        shutil.copytree(source, target)
    else:
        from emo_jax import buckets

        buckets.filesystem(out).put(f"{source}/", f"{out}/", recursive=True)


def _differences(out: str, undisturbed: dict, fault: str) -> list[str]:
    """As of `fault_runs.differences`. Where metrics.jsonl itself was hit, its records of before are what they are."""
    found, expected = result(out), undisturbed
    if "metrics.jsonl" in fault:
        found, expected = ({**x, **{kind: [r for r in x[kind] if r["step"] > CUT] for kind in ("train", "eval")}}
                           for x in (found, expected))
    return differences(found, expected)


def _keep_compiled_steps() -> None:
    """The same step functions for every trial: each would be the same after seconds of tracing."""
    for module, name in ((loop, "make_train_step"), (evaluate, "make_eval_step")):
        setattr(module, name, _once(getattr(module, name)))
    gc.freeze()  # data pipelines sweep the heap when they are closed


def _once(make: Callable[..., Any]) -> Callable[..., Any]:
    made: dict[str, Any] = {}

    def make_once(config, mesh, eos_id):
        key = f"{dataclasses.replace(config, train=dataclasses.replace(config.train, steps=STEPS))} {mesh} {eos_id}"
        if key not in made:
            made[key] = make(config, mesh, eos_id)
        return made[key]

    return make_once


def _main(config: str, out: str, log: Path, steps: int) -> int:
    """`emo-jax train` in this process, what it prints in `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    kept = [os.dup(1), os.dup(2)]
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        sys.argv = ["emo-jax", "train", config, "--out", out, f"--train.steps={steps}", "--checkpoint.every=4"]
        return cli.main()
    except BaseException:
        import traceback

        traceback.print_exc()
        return 70
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for number in (file, *kept):
            os.close(number)
