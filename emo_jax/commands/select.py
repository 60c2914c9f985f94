"""`emo-jax select`: the experts that a task needs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from emo_jax.commands import Command, Result, arguments
from emo_jax.errors import InputError


def add(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser)
    arguments.calibration(parser, required=True, several=True)
    arguments.quotas(parser, "corpus")
    keep = parser.add_mutually_exclusive_group(required=True)
    keep.add_argument("--keep", type=int, metavar="K", help="experts of every layer, shared ones included; the same number for "
                      "all layers: in what is published of EMO every other budget loses")
    keep.add_argument("--keep-per-layer", type=arguments.numbers, metavar="K,K,...", help="experts of each layer, for "
                      "experiments (see --keep)")
    keep.add_argument("--keep-total", type=int, metavar="N", help="over all layers, shared out by need, for experiments (see "
                      "--keep)")
    arguments.method(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the subset (JSON)")


def run(args: Namespace) -> Result:
    from emo_jax.loaded import load
    from emo_jax.subsets.budget import Budget
    from emo_jax.subsets.choose import choose_one
    from emo_jax.subsets.compose import quota, quota_shares
    from emo_jax.subsets.report import coverage_table

    paths = args.calibration or [None]
    if len(paths) > 1 and args.keep is None:
        raise InputError("several --calibration go with --keep, the same number of experts for every layer")
    if len(paths) == 1 and args.quotas:
        raise InputError("--quotas goes with --calibration given more than once, a quota for each")
    quota_shares(len(paths), args.quotas)
    loaded = load(args.checkpoint, args.overrides, step=args.step)
    budget = Budget(args.keep, args.keep_per_layer, args.keep_total)
    budget.check(loaded.config)
    texts, options = [arguments.calibration_text(loaded, args, path) for path in paths], arguments.method_options(args)
    chosen, *others = [choose_one(loaded, text, args.method, budget, **options) for text in texts]
    if others:
        made = quota([chosen, *others], args.keep - chosen.num_shared, args.quotas)
        made.save(args.out)
        return Result(made.describe() | {"out": args.out}, f"{args.out}: {coverage_table(made)}")
    chosen.save(args.out)
    about = chosen.calibration
    return Result(chosen.describe() | {"out": args.out}, (
        f"{chosen.summary()}, chosen by {about['documents']} documents ({about['tokens']:,} tokens): {args.out}"))


COMMAND = Command("select", "choose the experts that a task needs", add, run, (
    "emo-jax select runs/tiny --calibration law.jsonl --keep 8 --out law.json",
    "emo-jax select runs/tiny --calibration law.jsonl --calibration code.jsonl --keep 12 --out both.json",
    "emo-jax select runs/tiny --example 'The court held that' --keep 8 --method router --out law.json"),
    overrides="checkpoint", devices=True)
