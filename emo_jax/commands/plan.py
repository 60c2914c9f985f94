"""`emo-jax plan`: meshes, microbatches and rematerialisation that fit a slice, ranked, with time and cost to a token budget."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from typing import Any

from emo_jax.commands import Command, Result, arguments

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def tokens(text: str) -> float:
    unit = text[-1:].upper() if text[-1:].upper() in _UNITS else ""
    try:
        number = float(text[:-1] if unit else text) * _UNITS[unit]
    except ValueError:
        number = 0.0
    if not 0 < number < 1e20:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of tokens such as 300B or 1T")
    return number


def price(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} must be a price of 0 or more")
    return number


def add(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help=arguments.CONFIG)
    parser.add_argument("--topology", metavar="CHIP:GRID", required=True,
                        help="a TPU slice, e.g. v5p:4x4x4, v5p-128, v6e:16x16")
    parser.add_argument("--slices", type=arguments.at_least(1), default=1, metavar="N", help="so many of that slice, joined "
                        "by a data center's network: the outer part of the data axis (default: 1)")
    parser.add_argument("--tokens", type=tokens, metavar="N", help="the budget, e.g. 300B or 1T (default: the config's)")
    parser.add_argument("--chip-hour-price", type=price, metavar="P", help="what a chip costs an hour; then costs are shown")
    parser.add_argument("--best", type=arguments.at_least(1), default=8, metavar="N",
                        help="how many meshes to show (default: 8)")
    parser.add_argument("--verify", type=arguments.at_least(0), default=0, metavar="N", help="compile the best N as "
                        "`emo-jax compile` does, minutes each; needs emo-jax[tpu] but no TPU")
    parser.add_argument("--scaling", action="store_true", help="instead: bytes and memory of a device against 8 to 1024 "
                        "devices, by strategy")


def run(args: Namespace) -> Result:
    from emo_jax.aot import topology as topologies
    from emo_jax.config import load_config

    config = load_config(args.config, args.overrides)
    topologies.parse(args.topology)
    if args.verify:
        topologies.without_devices()  # before JAX starts
    from emo_jax.plan import scaling, search, text, verify

    if args.scaling:
        rows = scaling.table(config, args.topology)
        return Result(rows, scaling.text(rows))
    given = [f"--{item.removeprefix('--')}" for item in args.overrides]
    found = search.search(config, args.topology, args.slices, given)
    budget = args.tokens or config.train.steps * config.train.batch_size * config.data.sequence_length
    result: dict[str, Any] = text.report(config, args.topology, args.slices, found, budget, args.chip_hour_price)
    printed = text.text(result, args.best)
    if args.verify:
        result["verified"] = verify.verify(found.best[:args.verify], args.topology, args.slices)
        printed += f"\n\n{verify.text(result['verified'])}"
    return Result(result, printed)


COMMAND = Command("plan", "what fits a TPU slice: meshes, microbatches and remat, ranked, with time and cost", add, run, (
    "emo-jax plan emo_1b14b_1t --topology v5p-128 --tokens 1T --chip-hour-price 4.2",
    "emo-jax plan emo_1b14b_1t --topology v6e-256 --train.batch_size=2048 --verify 1",
    "emo-jax plan emo_1b14b_1t --topology v5p-128 --scaling"), overrides="config")
