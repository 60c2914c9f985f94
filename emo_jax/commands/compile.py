"""`emo-jax compile`: the training step ahead of time."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from emo_jax.commands import Command, Result, arguments


def add(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help=arguments.CONFIG)
    parser.add_argument("--topology", metavar="CHIP:GRID", help="a TPU slice, e.g. v5p:4x4x4, v5p-128, v6e:16x16, or "
                        "GPUs, e.g. h100:8, h200:4x8 (four hosts); needs emo-jax[tpu] or [cuda], but no TPU or GPU (default: "
                        "the devices of this machine)")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="so many of that slice, joined by a data center's "
                        "network; the config's mesh is that of one slice, its batch that of all (default: 1)")


def run(args: Namespace) -> Result:
    from emo_jax.aot import compile as aot
    from emo_jax.config import load_config

    result = aot.compile_config(load_config(args.config, args.overrides), args.topology, args.slices)
    return Result(result, aot.text(result))


COMMAND = Command("compile", "compile the training step ahead of time and say what bounds it", add, run, (
    "emo-jax compile emo_1b14b_1t --topology v5p-128 --train.remat=projections",
    "emo-jax compile emo_1b14b_1t --topology h100:8x8 --train.batch_size=256 --train.remat=full", "emo-jax compile emo_tiny"),
    overrides="config", logs=True)
