"""`emo-jax study run`: trains and measures every model of the study in processes of its own, then compares them all.

DIR/VARIANT/SEED is the folder of a training run and receives its measures.json; what its processes print goes to
DIR/VARIANT/SEED.log; DIR/tokenizer.json serves all models. A model that is measured is not touched again, one that was
stopped goes on from its checkpoint. This process starts no JAX backend, which would take a GPU's memory from the models.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emo_jax.buckets import is_url
from emo_jax.checkpoints.checkpoint import open_checkpoint
from emo_jax.config import Config, load_config
from emo_jax.data.order import split
from emo_jax.data.sources import open_source
from emo_jax.data.tokenizer import load_tokenizer
from emo_jax.errors import InputError, RunError
from emo_jax.files import make_folder
from emo_jax.study import transfer_report
from emo_jax.study.report import compare
from emo_jax.study.variants import ABLATIONS, MAIN, VARIANTS, fields
from emo_jax.train.signals import StopSignals

EMO_JAX = [sys.executable, "-m", "emo_jax"]
_POLL_S = 0.1


@dataclasses.dataclass
class Model:
    name: str
    folder: Path
    commands: list[list[str]]  # the arguments of emo-jax, command after command; those that began are taken away
    process: subprocess.Popen | None = None  # runs the present command
    core: int | None = None  # that the processes are pinned to

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def start_next(self) -> None:
        with self.log.open("a" if self.process else "w") as log:
            self.process = subprocess.Popen([*EMO_JAX, *self.commands.pop(0)], stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT)
        if self.core is not None:
            os.sched_setaffinity(self.process.pid, {self.core})


def run_study(base: str, out: str | Path, overrides: Sequence[str] = (), *, held_out: str = "",
              seeds: Sequence[int] = (0, 1, 2), ablation_seeds: Sequence[int] = (0,), variants: Sequence[str] = (),
              jobs: int = 1) -> dict[str, Any]:
    """Trains and measures what is not measured yet, and returns the result of `report.compare`.

    `variants` are trained with all `seeds`; () means EMO and the standard MoE with `seeds`, and the ablations with
    `ablation_seeds`. `held_out`: the documents to measure on; "" means those that the runs held out or left out. `jobs`:
    models at a time; several are pinned to a core each, since models that share all cores wait for one another.
    Raises `InputError` before anything is trained, and `RunError` with the logs of the models that failed once the others
    are finished.
    """
    if is_url(out):
        raise InputError(f"--out {out} is in a bucket; a study writes the logs of its runs to a local folder")
    given, out, config = out, Path(out).absolute(), load_config(base, list(overrides))
    pairs = [(variant, seed) for seed in seeds for variant in variants or MAIN]
    pairs += [] if variants else [(variant, seed) for seed in ablation_seeds for variant in ABLATIONS]
    models = []
    for variant, seed in pairs:
        folder, own = out / variant / str(seed), fields(variant, config)
        load_config(base, [*overrides, *own, f"--seed={seed}"])  # refuses a variant that cannot be trained
        if not (folder / "measures.json").exists():
            models.append(Model(f"{variant}, seed {seed}", folder, [
                ["train", base, "--out", str(folder), "--seed", str(seed), f"--data.tokenizer={out / 'tokenizer.json'}",
                 *overrides, *own],
                ["study", "measure", str(folder), "--methods", ",".join(VARIANTS[variant].methods),
                 "--documents", ",".join(map(str, VARIANTS[variant].documents)),
                 *(["--data", held_out] if held_out else []), "--out", str(folder / "measures.json")]]))
    _say(f"{len(models)} of {len(pairs)} models are to be trained and measured, {jobs} at a time")
    if models:
        _prepare(config, given, held_out, models)
        _finish(models, jobs)
    return compare(out)


def run_transfer(study: str | Path, labels: Sequence[str], overrides: Sequence[str] = (), *, arms: Sequence[str],
                 variants: Sequence[str] = MAIN, seeds: Sequence[int] = (0, 1, 2), keep: int = 0, held_out: str = "",
                 out: str | Path = "", jobs: int = 1) -> dict[str, Any]:
    """Trains and measures what is not measured yet of models that `run_study` trained into `study`/VARIANT/SEED, and returns
    the result of `transfer_report.compare`. keep: experts of the module; 0: a quarter. out: "" means `study`/transfer.

    Raises `InputError` before anything is trained, and `RunError` as `run_study`."""
    given = Path(study).absolute()
    out = Path(out).absolute() if out else given / "transfer"
    models = []
    for seed in seeds:
        for variant in variants:
            run = given / variant / str(seed)
            config = open_checkpoint(run).config
            number = keep or config.model.num_experts // 4
            for label in labels:
                folder = out / variant / str(seed) / label
                if not all((folder / f"{arm}.json").exists() for arm in arms):
                    models.append(Model(f"{variant}, seed {seed}, {label}", folder, [
                        ["study", "adapt", str(run), "--label", label, "--arms", ",".join(arms), "--keep", str(number),
                         *(["--data", held_out] if held_out else []), "--out", str(folder), *overrides]]))
                    make_folder(folder)
    _say(f"{len(models)} of {len(seeds) * len(variants) * len(labels)} modules are to be trained, {jobs} at a time")
    _finish(models, jobs)
    return transfer_report.compare(out)


def _say(message: str) -> None:
    print(f"study: {message}", file=sys.stderr, flush=True)


def _prepare(config: Config, out: str | Path, held_out: str, models: list[Model]) -> None:
    """Makes the folders and the tokenizer of all models. `InputError` for documents that cannot be read."""
    if held_out:
        try:
            open_source(dataclasses.replace(config.data, path=held_out, format="auto"))
        except InputError as e:
            raise InputError(f"--held-out: {e}") from None
    source = open_source(config.data)
    folder = make_folder(out)
    for model in models:
        make_folder(model.folder.parent)
    load_tokenizer(config, source, split(source, config.data, config.seed)[0], folder)


def _finish(models: list[Model], jobs: int) -> None:
    """Runs the commands of all models, `jobs` models at a time. A signal ends the processes; training saves before."""
    began, waiting, working, failed = time.monotonic(), list(models), [], []
    cores = sorted(os.sched_getaffinity(0)) if jobs > 1 and hasattr(os, "sched_setaffinity") else [None]
    free, stopping = [cores[i % len(cores)] for i in range(jobs)], False
    try:
        with StopSignals() as stop:
            while working or (waiting and not stop.requested):
                while waiting and free and not stop.requested:
                    model = waiting.pop(0)
                    model.core = free.pop(0)
                    working.append(model)
                    _say(f"{model.name} -> {model.folder}")
                    model.start_next()
                time.sleep(_POLL_S)
                if stop.requested and not stopping:
                    stopping = True
                    _say(f"{stop.requested}: {len(working)} models save and stop")
                    for model in working:
                        model.process.terminate()
                for model in [m for m in working if m.process.poll() is not None]:
                    if model.process.returncode == 0 and model.commands and not stop.requested:
                        model.start_next()
                        continue
                    working.remove(model)
                    free.append(model.core)
                    if not stop.requested:
                        failed += [model] if model.process.returncode else []
                        _say(f"{model.name} {'FAILED' if model.process.returncode else 'is measured'}, "
                             f"{len(waiting) + len(working)} models left, {time.monotonic() - began:.0f} s")
    finally:
        for model in working:
            model.process.kill()
            model.process.wait()
    if stop.requested:
        raise RunError(f"stopped by {stop.requested}; the same command goes on")
    if failed:
        raise RunError("\n".join(f"{model.name} failed: {model.log}" for model in failed))
