"""`emo-jax replay`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from emo_jax.commands import Command, Result, arguments


def add(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run; nothing is written there")
    parser.add_argument("--step", type=arguments.at_least(1), required=True, metavar="S", help="as metrics.jsonl counts them")
    parser.add_argument("--times", type=arguments.at_least(1), default=1, metavar="N",
                        help="compute its gradients so often and compare them bit for bit")


def run(args: Namespace) -> Result:
    from emo_jax.train import replay

    result = replay.replay(args.run, args.step, args.times, args.overrides)
    return Result(result, replay.report(result))


COMMAND = Command("replay", "a step of a run again from the checkpoint before it, taken apart", add, run, (
    "emo-jax replay runs/tiny --step 1200", "emo-jax replay runs/tiny --step 1200 --times 3 --json"),
    overrides="checkpoint", devices=True)
