"""`emo-jax bench ...`: speed against the ideal of this machine."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from emo_jax.commands import Command, Result, arguments


def _result(found: dict[str, Any], report: Callable[[dict[str, Any]], str]) -> Result:
    """With the machine that the figures are about."""
    from emo_jax import machine

    about = machine.describe()
    return Result(found | {"machine": about}, f"{report(found)}\n{machine.summary(about)}")


def _add_rounds(parser: ArgumentParser) -> None:
    parser.add_argument("--rounds", type=arguments.at_least(1), default=10)


def _add_kernel(parser: ArgumentParser, *sizes: str) -> None:
    for size in sizes:
        parser.add_argument(f"--{size}", type=arguments.at_least(1), metavar="N",
                            help="default: small on CPU, else the published model's")
    parser.add_argument("--kernel", default="auto")
    _add_rounds(parser)


def add_step(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="default: a small step for CPUs")
    parser.add_argument("--breakdown", action="store_true", help="where the time goes, on one core of a CPU")
    _add_rounds(parser)


def step(args: Namespace) -> Result:
    if args.breakdown and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before XLA makes its threads
    from emo_jax.bench import breakdown
    from emo_jax.bench import step as lib
    from emo_jax.config import load_config, override

    config = load_config(args.config, args.overrides) if args.config else override(lib.standard(), args.overrides)
    if args.breakdown:
        return _result(breakdown.breakdown(config, args.rounds), breakdown.report)
    result = lib.step(config, args.rounds)
    return _result(result, lib.report)


def add_moe(parser: ArgumentParser) -> None:
    _add_kernel(parser, "tokens", "top-k", "experts", "d-model", "d-ff")


def moe(args: Namespace) -> Result:
    from emo_jax.bench import moe as lib
    from emo_jax.bench import shape

    result = lib.moe(**shape(lib.SMALL, lib.PUBLISHED, args), rounds=args.rounds, kernel=args.kernel)
    return _result(result, lib.report)


def add_attention(parser: ArgumentParser) -> None:
    parser.add_argument("--documents", type=arguments.at_least(1), default=4, metavar="N", help="in a row (default: 4)")
    _add_kernel(parser, "rows", "length", "heads", "head-dim")


def attention(args: Namespace) -> Result:
    from emo_jax.bench import attention as lib
    from emo_jax.bench import shape

    result = lib.attention(**shape(lib.SMALL, lib.PUBLISHED, args), documents=args.documents, rounds=args.rounds,
                           kernel=args.kernel)
    return _result(result, lib.report)


COMMANDS = (
    Command("bench step", "the training step, and EMO against the standard MoE", add_step, step,
            ("emo-jax bench step", "emo-jax bench step emo_small --rounds 5"), "config", logs=True),
    Command("bench moe", "the experts' grouped matmul against a dense one of equal FLOPs", add_moe, moe,
            ("emo-jax bench moe --experts 128 --top-k 8 --tokens 2048",), logs=True),
    Command("bench attention", "attention against the plain form and the FLOP floor", add_attention, attention,
            ("emo-jax bench attention --length 4096",), logs=True),
)
