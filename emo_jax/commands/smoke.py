"""`emo-jax smoke`: the gate before a long run."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from emo_jax.commands import Command, Result, arguments


def add(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help=arguments.CONFIG)
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the runs, shared by all hosts")


def run(args: Namespace) -> Result:
    from emo_jax.config import load_config
    from emo_jax.errors import RunError
    from emo_jax.progress import say
    from emo_jax.train import smoke

    checks = smoke.smoke(load_config(args.config, args.overrides), args.out, say)
    text = smoke.table(checks)
    if failed := [check for check in checks if not check.passed]:
        say(text)
        raise RunError("; ".join(f"{c.name}: {c.found}, expected {c.expected}" for c in failed))
    return Result({"checks": [check._asdict() for check in checks]}, text)


COMMAND = Command("smoke", "four steps in fresh processes with a restore between: whether a run may start", add, run, (
    "emo-jax smoke emo_tiny --out runs/smoke",
    "emo-jax smoke emo_1b14b_1t --out gs://BUCKET/smoke --data.path=gs://BUCKET/tokens"), overrides="config")
