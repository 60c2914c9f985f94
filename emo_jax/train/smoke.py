"""`emo-jax smoke`: whether a config, its data and the machines below it are fit to start a long run, in four steps.

Every arm is a process of its own on every host, as a launcher would start it: two steps, two more from the checkpoint of the
first, all four in one go, and two of the other kind of router. Nothing here touches a device, so that those processes can.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from emo_jax import config as configs
from emo_jax.config import Config
from emo_jax.errors import InputError, RunError
from emo_jax.files import AnyPath, make_folder
from emo_jax.phases import phases

ARMS = ("parts", "whole", "twin")
SAVED_STEP, STEPS = 2, 4
CUT_NORMAL_VARIANCE = 0.9733  # of a standard normal cut at 3 standard deviations
LOSS_TOLERANCE, BALANCE = 0.25, (0.9, 1.6)
EXACT = ("loss", "grad_norm", "load_balancing_loss")


class Check(NamedTuple):
    name: str
    found: str
    expected: str
    passed: bool


def smoke(config: Config, out: str | AnyPath, say: Callable[[str], None]) -> list[Check]:
    """Runs the arms into folders of `out` and judges them. On several hosts each calls this. Raises `InputError` if there are
    such runs already, and `RunError` if a process ends with another status than 0."""
    folder = make_folder(out)
    if any((folder / arm).exists() for arm in ARMS):
        raise InputError(f"--out {folder} holds the runs of another `emo-jax smoke`; give a new folder")
    first = dataclasses.replace(phases(config)[0].config, stages=())
    # The rate must not depend on the last step, which differs from arm to arm.
    base = dataclasses.replace(
        first, optimizer=dataclasses.replace(first.optimizer, schedule="constant", start_step=-1),
        train=dataclasses.replace(first.train, batch_ramp="", log_every=1, eval_every=0, eval_tasks="", eval_subsets=False,
                                  trackers="", profile_steps="", init_from="",
                                  init_params_from=first.train.init_from or first.train.init_params_from,
                                  compilation_cache=first.train.compilation_cache or str(folder / "compilation_cache")),
        checkpoint=dataclasses.replace(first.checkpoint, every=SAVED_STEP, keep_last=STEPS, local=""))
    _run(base, folder / "parts", SAVED_STEP, say, "the first two steps")
    if not base.data.tokenizer:  # all arms read with one
        base = dataclasses.replace(base, data=dataclasses.replace(base.data, tokenizer=str(folder / "parts/tokenizer.json")))
    _run(base, folder / "parts", STEPS, say, "two more, from their checkpoint")
    _run(base, folder / "whole", STEPS, say, "all four in one go")
    parts, whole = _records(folder / "parts"), _records(folder / "whole")
    checks = [_finite(parts), *_restored(parts, whole), *_initial(base, parts[1])]
    if base.model.num_experts:
        other = dataclasses.replace(base.router, document_pool=not base.router.document_pool)
        name = "EMO" if other.document_pool else "standard MoE"
        _run(dataclasses.replace(base, router=other), folder / "twin", SAVED_STEP, say, f"two steps of its twin, {name}")
        checks += _twins(name, parts[1], _records(folder / "twin")[1])
    return checks


def _run(config: Config, out: AnyPath, steps: int, say: Callable[[str], None], what: str) -> None:
    say(f"smoke: {what}")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{config.name}.py"
        path.write_text("from emo_jax.config import from_dict\n\n\ndef config():\n"
                        f"    return from_dict({configs.to_dict(config)!r})\n")
        ended = subprocess.run([sys.executable, "-m", "emo_jax", "train", str(path), "--out", str(out)], stdout=sys.stderr)
    if ended.returncode:
        raise RunError(f"{what} ended with status {ended.returncode}; its messages are above")


def _records(run: AnyPath) -> dict[int, dict[str, Any]]:
    """What was logged of every step, by its number."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records if "grad_norm" in record}


def _finite(parts: dict[int, dict[str, Any]]) -> Check:
    values = [parts[step][key] for step in parts for key in ("loss", "grad_norm")]
    return Check("losses and gradient norms", f"{parts[STEPS]['loss']:.4f} after step {STEPS}", "finite",
                 all(map(math.isfinite, values)))


def _restored(parts: dict[int, dict[str, Any]], whole: dict[int, dict[str, Any]]) -> list[Check]:
    """A restore changes nothing."""
    keys = [key for key in EXACT if key in parts[STEPS]]
    differing = [f"{key} of step {step}: {parts[step][key]!r}, {whole[step][key]!r}"
                 for step in range(1, STEPS + 1) for key in keys if parts[step][key] != whole[step][key]]
    return [Check(f"steps {SAVED_STEP + 1} and {STEPS} after a restore", differing[0] if differing else "the same bits",
                  "those of an uninterrupted run", not differing)]


def _initial(config: Config, first: dict[str, Any]) -> list[Check]:
    """Where a new model begins: logits are normal with variance D init_std^2, so the loss is ln V + half of that."""
    if config.train.init_params_from:
        return []
    m = config.model
    expected = math.log(m.vocab_size) + 0.5 * CUT_NORMAL_VARIANCE * m.d_model * m.init_std**2
    checks = [Check("loss of step 1", f"{first['loss']:.3f}", f"{expected:.3f} within {LOSS_TOLERANCE}",
                    abs(first["loss"] - expected) <= LOSS_TOLERANCE)]
    if m.num_experts:
        low, high = BALANCE
        found = first["load_balancing_loss"]
        checks.append(Check("load-balancing loss of step 1", f"{found:.3f}", f"{low} to {high}", low <= found <= high))
    return checks


def _twins(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[Check]:
    """The same parameters and rows: only the pools differ, which at the start matter little."""
    return [Check(f"tokens of step 1 of the {name} twin", f"{theirs['tokens']:,}", f"{ours['tokens']:,}",
                  theirs["tokens"] == ours["tokens"]),
            Check(f"loss of step 1 of the {name} twin", f"{theirs['loss']:.3f}", f"{ours['loss']:.3f} within 0.05",
                  abs(theirs["loss"] - ours["loss"]) <= 0.05)]


def table(checks: Sequence[Check]) -> str:
    name, found = max(len(c.name) for c in checks), max(len(c.found) for c in checks)
    return "\n".join(f"{'passed' if c.passed else 'FAILED'}  {c.name:<{name}}  {c.found:<{found}}  expected {c.expected}"
                     for c in checks)
