"""`emo-jax bench step --breakdown`: where the time of a step goes on a CPU, by the named scopes of the model.

XLA's profiler times every instruction of the program; the program's text says which scope an instruction belongs to, how many
FLOPs its matmuls have, and which bytes it must move. On one core, where instructions run one after another: beside each other
they wait for each other, and threads that help with one are not named.
"""

from __future__ import annotations

import glob
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emo_jax import sharding
from emo_jax.aot.hlo import Module
from emo_jax.bench import interleaved, matmul, step
from emo_jax.compilation import keep_programs
from emo_jax.config import Config
from emo_jax.errors import InputError
from emo_jax.train.step import init_state, make_train_step

SCOPES = ("embedding", "norm", "projections", "attention", "routing", "dispatch", "experts", "mlp", "loss", "optimizer")
OTHER = "other"
GAPS = 10  # instructions that are named
_CONTROL = ("while", "call", "conditional", "tuple", "get-tuple-element", "parameter", "constant", "bitcast")


def breakdown(config: Config | None, rounds: int) -> dict[str, Any]:
    """Seconds, FLOPs and bytes of every scope of one training step of `config` (default: `step.standard()`), and the
    instructions that are furthest from their floor: FLOPs at the rate of a dense matmul or bytes at that of a copy,
    whichever takes longer. Raises `InputError` for a platform whose profile names instructions otherwise."""
    if jax.default_backend() != "cpu":
        raise InputError("--breakdown is for CPUs; on TPU and GPU look at a trace of the profiler")
    config = config or step.standard()
    keep_programs(config.train.compilation_cache)
    mesh = sharding.make_mesh(config)
    batch = sharding.global_batch(mesh, step.random_batch(config, documents=4))
    train_step, state = make_train_step(config, mesh), init_state(config, mesh)
    work = instructions(train_step.lower(state, batch).compile().as_text())
    box = [state]

    def run():
        box[0], metrics = train_step(box[0], batch)
        return metrics

    (dense, dense_flops), (copy, copied) = matmul(), _copy()
    times = interleaved({"step": run, "matmul": dense, "copy": copy}, rounds)
    spent = [thread_seconds(run) for _ in range(rounds)]
    seconds = {name: float(np.median([s.get(name, 0.0) for s in spent])) for name in work}
    rates = dense_flops / float(np.median(times["matmul"])), copied / float(np.median(times["copy"]))

    def total(scope: str) -> dict[str, float]:
        names = [name for name, w in work.items() if w.scope == scope]
        return {"seconds": sum(seconds[n] for n in names), "flops": sum(work[n].flops for n in names),
                "bytes": sum(work[n].bytes for n in names), "floor": sum(_floor(work[n], rates) for n in names)}

    scopes = {scope: found for scope in (*SCOPES, OTHER) if (found := total(scope))["seconds"]}
    gaps = sorted(work, key=lambda name: _floor(work[name], rates) - seconds[name])[:GAPS]
    whole = float(np.median(times["step"]))
    return {"rounds": rounds, "seconds": whole, "named": sum(s["seconds"] for s in scopes.values()) / whole,
            "matmul_flops_per_second": rates[0], "copy_bytes_per_second": rates[1], "scopes": scopes,
            "gaps": [{"instruction": name, "scope": work[name].scope, "operation": work[name].operation,
                      "seconds": seconds[name], "floor": _floor(work[name], rates)} for name in gaps]}


def report(r: dict[str, Any]) -> str:
    row = "{:<12} {:>9} {:>7} {:>9} {:>9} {:>9}".format
    lines = [f"one core, {r['seconds']:.2f} s a step, {r['named']:.0%} of it in named instructions; floor: a dense matmul's "
             f"{r['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s, a copy's {r['copy_bytes_per_second'] / 1e9:,.1f} GB/s",
             row("scope", "seconds", "share", "floor", "GFLOP", "GB")]
    lines += [row(name, f"{s['seconds']:.3f}", f"{s['seconds'] / r['seconds']:.1%}", f"{s['floor']:.3f}",
                  f"{s['flops'] / 1e9:.1f}", f"{s['bytes'] / 1e9:.2f}")
              for name, s in sorted(r["scopes"].items(), key=lambda item: -item[1]["seconds"])]
    lines += ["", "furthest from their floor (seconds, floor):"]
    lines += [f"{g['seconds']:7.3f} {g['floor']:7.3f}  {g['scope']:<12} {g['instruction']}  {g['operation']}"
              for g in r["gaps"]]
    return "\n".join(lines)


def _floor(work: Work, rates: tuple[float, float]) -> float:
    return max(work.flops / rates[0], work.bytes / rates[1])


def _copy() -> tuple[Callable[[], object], int]:
    """(a copy of an array larger than caches, the bytes it reads and writes)"""
    a = jnp.ones((64, 1 << 20), jnp.float32)
    add = jax.jit(lambda a: a + 1)
    return lambda: add(a), 2 * a.nbytes


class Work(NamedTuple):
    """What an instruction is to the step, all its executions together."""

    scope: str
    operation: str  # the end of its op_name
    flops: float  # of matmuls
    bytes: float  # moved at least: operands and results once


def instructions(text: str) -> dict[str, Work]:
    """{instruction: its work in one step} of a compiled program."""
    module, found = Module(text), {}
    _walk(module, module.entry, 1, found)
    return found


def _walk(module: Module, computation: str, times: int, found: dict[str, Work]) -> None:
    for i in module.computations[computation]:
        if i.opcode == "while":
            _walk(module, i.called("body"), times * (module.trip_count(computation, i) or 1), found)
        elif i.opcode == "call":
            _walk(module, i.called("to_apply"), times, found)
        if i.opcode not in _CONTROL:
            name = _op_name(i.attributes)
            found[i.name] = Work(scope_of(name), name[-60:], times * module.matmul_flops(computation, i),
                                 times * module.moved_bytes(computation, i))


def scope_of(op_name: str) -> str:
    """The innermost of `SCOPES` in the path of an instruction."""
    inside = [part for part in re.findall(r"[\w.]+", op_name) if part in SCOPES]
    return inside[-1] if inside else OTHER


def _op_name(attributes: str) -> str:
    found = re.search(r'op_name="([^"]*)"', attributes)
    return found[1] if found else ""


def thread_seconds(run: Callable[[], object]) -> dict[str, float]:
    """{instruction: seconds on all threads while `run()` ran}; what an instruction calls is its own."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        profile = jax.profiler.ProfileData.from_file(path)
    spent: dict[str, float] = defaultdict(float)
    for line in (line for plane in profile.planes for line in plane.lines):
        _own_times(sorted((e.start_ns, -e.duration_ns, e.name) for e in line.events), spent)
    return spent


def _own_times(events: list[tuple[float, float, str]], spent: dict[str, float]) -> None:
    """Adds the time of each event of one thread without that of the events inside it."""
    open_events: list[tuple[float, str]] = []
    for start, minus, name in events:
        while open_events and open_events[-1][0] <= start:
            open_events.pop()
        if open_events:
            spent[open_events[-1][1]] += minus / 1e9
        spent[name] -= minus / 1e9
        open_events.append((start - minus, name))
