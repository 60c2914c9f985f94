"""`emo-jax config`."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from emo_jax.commands import Command, Result, arguments

if TYPE_CHECKING:
    from emo_jax.config import Config


def add(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=f"{arguments.CONFIG} (default: list them)")


def run(args: Namespace) -> Result:
    from emo_jax import config as lib
    from emo_jax.kernels.compiler_options import PLATFORMS

    if args.config is None:
        names = lib.config_names()
        return Result({"configs": names}, "\n".join(names))
    resolved = lib.load_config(args.config, args.overrides)
    changed = lib.difference(resolved)
    parts = _parts(resolved)
    text = lib.dumps(resolved) + "\ndiffers from the default in:\n" + "\n".join(
        f"  {key} = {new!r} (default {old!r})" for key, (old, new) in changed.items())
    if len(parts) > 1:
        text += "\n\nparts of the run:\n" + "\n".join(
            f"  steps {p['first_step']:,} to {p['until']:,} (stage {p['stage']}), learning rate by the schedule of steps "
            f"{p['schedule'][0]:,} to {p['schedule'][1]:,}" + ", fresh moments" * p["reset_optimizer"]
            + "".join(f"\n    {key} = {value!r}" for key, value in p["changes"].items()) for p in parts)
    text += "\n\nXLA options of the training step, set by the command itself:\n" + "\n".join(
        f"  {platform}\n" + "\n".join(f"    {o.name}={o.value}: {o.reason}" for o in options)
        for platform, options in PLATFORMS.items())
    return Result({"config": lib.to_dict(resolved), "parts": parts, "difference": {
        key: {"default": old, "value": new} for key, (old, new) in changed.items()},
        "xla_options": {platform: {o.name: o.value for o in options} for platform, options in PLATFORMS.items()}}, text)


def _parts(config: Config) -> list[dict[str, Any]]:
    """What the phases of a run differ in from its config."""
    from emo_jax.config import difference
    from emo_jax.phases import phases

    plain = dataclasses.replace(config, stages=(), train=dataclasses.replace(config.train, batch_ramp=""))
    of_schedule = ("train.steps", "optimizer.start_step")
    return [{"first_step": p.first_step, "until": p.until, "stage": p.stage, "reset_optimizer": p.resets_optimizer,
             "schedule": [max(p.config.optimizer.start_step, 0), p.config.train.steps],
             "changes": {key: new for key, (_, new) in difference(p.config, plain).items() if key not in of_schedule}}
            for p in phases(config)]


COMMAND = Command("config", "the resolved config, and what differs from the default", add, run, (
    "emo-jax config", "emo-jax config emo_1b14b_1t --train.batch_size=512"), overrides="config")
