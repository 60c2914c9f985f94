"""`emo-jax config`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from emo_jax.commands import Command, Result, arguments


def add(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=f"{arguments.CONFIG} (default: list them)")


def run(args: Namespace) -> Result:
    from emo_jax import config as lib

    if args.config is None:
        names = lib.config_names()
        return Result({"configs": names}, "\n".join(names))
    resolved = lib.load_config(args.config, args.overrides)
    changed = lib.difference(resolved)
    text = lib.dumps(resolved) + "\ndiffers from the default in:\n" + "\n".join(
        f"  {key} = {new!r} (default {old!r})" for key, (old, new) in changed.items())
    return Result({"config": lib.to_dict(resolved), "difference": {key: {"default": old, "value": new}
                                                                   for key, (old, new) in changed.items()}}, text)


COMMAND = Command("config", "the resolved config, and what differs from the default", add, run, (
    "emo-jax config", "emo-jax config emo_1b14b_1t --train.batch_size=512"), overrides="config")
