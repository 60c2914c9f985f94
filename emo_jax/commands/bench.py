"""`emo-jax bench ...`: speed against the ideal of this machine."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from emo_jax.commands import Command, Result, arguments


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
    _add_rounds(parser)


def step(args: Namespace) -> Result:
    from emo_jax.bench import step as lib
    from emo_jax.config import load_config, override

    config = load_config(args.config, args.overrides) if args.config else override(lib.standard(), args.overrides)
    result = lib.step(config, args.rounds)
    return Result(result, lib.report(result))


def add_moe(parser: ArgumentParser) -> None:
    _add_kernel(parser, "tokens", "top-k", "experts", "d-model", "d-ff")


def moe(args: Namespace) -> Result:
    from emo_jax.bench import moe as lib
    from emo_jax.bench import shape

    result = lib.moe(**shape(lib.SMALL, lib.PUBLISHED, args), rounds=args.rounds, kernel=args.kernel)
    return Result(result, lib.report(result))


def add_attention(parser: ArgumentParser) -> None:
    parser.add_argument("--documents", type=arguments.at_least(1), default=4, metavar="N", help="in a row (default: 4)")
    _add_kernel(parser, "rows", "length", "heads", "head-dim")


def attention(args: Namespace) -> Result:
    from emo_jax.bench import attention as lib
    from emo_jax.bench import shape

    result = lib.attention(**shape(lib.SMALL, lib.PUBLISHED, args), documents=args.documents, rounds=args.rounds,
                           kernel=args.kernel)
    return Result(result, lib.report(result))


COMMANDS = (
    Command("bench step", "the training step, and EMO against the standard MoE", add_step, step,
            ("emo-jax bench step", "emo-jax bench step emo_small --rounds 5"), "config", logs=True),
    Command("bench moe", "the experts' grouped matmul against a dense one of equal FLOPs", add_moe, moe,
            ("emo-jax bench moe --experts 128 --top-k 8 --tokens 2048",), logs=True),
    Command("bench attention", "attention against the plain form and the FLOP floor", add_attention, attention,
            ("emo-jax bench attention --length 4096",), logs=True),
)
