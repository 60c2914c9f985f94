"""`emo-jax select`: the experts that a task needs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from emo_jax.commands import Command, Result, arguments


def add(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser)
    arguments.calibration(parser, required=True)
    keep = parser.add_mutually_exclusive_group(required=True)
    keep.add_argument("--keep", type=int, metavar="K", help="experts of every layer, shared ones included")
    keep.add_argument("--keep-per-layer", type=arguments.numbers, metavar="K,K,...", help="experts of each layer")
    keep.add_argument("--keep-total", type=int, metavar="N", help="over all layers, shared out by need")
    arguments.method(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the subset (JSON)")


def run(args: Namespace) -> Result:
    from emo_jax.loaded import load
    from emo_jax.subsets.budget import Budget
    from emo_jax.subsets.choose import choose_one

    loaded = load(args.checkpoint, args.overrides, step=args.step)
    budget = Budget(args.keep, args.keep_per_layer, args.keep_total)
    budget.check(loaded.config)
    text = arguments.calibration_text(loaded, args)
    chosen = choose_one(loaded, text, args.method, budget, **arguments.method_options(args))
    chosen.save(args.out)
    about = chosen.calibration
    return Result(chosen.describe() | {"out": args.out}, (
        f"{chosen.summary()}, chosen by {about['documents']} documents ({about['tokens']:,} tokens): {args.out}"))


COMMAND = Command("select", "choose the experts that a task needs", add, run, (
    "emo-jax select runs/tiny --calibration law.jsonl --keep 8 --out law.json",
    "emo-jax select runs/tiny --example 'The court held that' --keep 8 --method router --out law.json"),
    overrides="checkpoint", devices=True)
