"""`emo-jax goodput`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from emo_jax.commands import Command, Result


def add(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run, which may be going on")


def run(args: Namespace) -> Result:
    from emo_jax.train import goodput

    result = goodput.goodput(args.run)
    return Result(result, goodput.report(result))


COMMAND = Command("goodput", "which part of a run's wall time went into steps that count, and where the rest went", add, run, (
    "emo-jax goodput runs/tiny", "emo-jax goodput gs://bucket/runs/emo --json"))
