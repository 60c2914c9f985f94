"""`emo-jax study ...`: whether modules emerged."""

from __future__ import annotations

import argparse

from emo_jax.commands import Command, Result, arguments
from emo_jax.errors import InputError
from emo_jax.subsets import methods


def _methods(text: str) -> tuple[str, ...]:
    given = tuple(text.split(","))
    if not set(given) <= set(methods.NAMES):
        raise argparse.ArgumentTypeError(f"{text!r} must be some of {','.join(methods.NAMES)}")
    return given


def add_measure(parser) -> None:
    arguments.checkpoint(parser, step=False)
    parser.add_argument("--data", default="", metavar="PATH", help="labelled documents (default: those held out and left out)")
    parser.add_argument("--methods", type=_methods, default=("router",), metavar="M,M,...",
                        help=f"of choosing experts: {', '.join(methods.NAMES)} (default: router)")
    parser.add_argument("--documents", type=arguments.numbers, default=(50,), metavar="N,N,...", help="of each label that "
                        "choose: all methods with the largest number, the first method also with the others (default: 50)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the measures (JSON)")


def measure(args) -> Result:
    from emo_jax.files import write_result
    from emo_jax.progress import is_primary
    from emo_jax.study import measure as lib

    if min(args.documents) < 1:
        raise InputError(f"--documents {','.join(map(str, args.documents))}: numbers must be positive")
    result = lib.measure(args.checkpoint, args.data, args.methods, args.documents, args.overrides)
    if is_primary():
        write_result(args.out, result)
    lines = [f"full model: {result['full']['trained']:.4f} nats/token"]
    lines += [f"{r['share']:.1%} kept ({r['method']}, {r['documents']} documents): {r['trained']:+.4f}"
              for r in result["subsets"]]
    return Result(result | {"out": args.out}, "\n".join([*lines, f"measures: {args.out}"]))


def add_report(parser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--main", default="emo", metavar="VARIANT")
    parser.add_argument("--baseline", default="stdmoe", metavar="VARIANT")


def report(args) -> Result:
    from emo_jax.study import report as lib

    result = lib.compare(args.folder, args.main, args.baseline)
    text = result.pop("text")
    return Result(result, text + (f"\n\n{result['figure']}" if result["figure"] else ""))


COMMANDS = (
    Command("study measure", "loss with few experts by label, and what experts tell of the text", add_measure, measure,
            ("emo-jax study measure runs/tiny --data held_out.jsonl --out measures.json",), "checkpoint", devices=True),
    Command("study report", "compare the models of DIR/VARIANT/SEED/measures.json: study.md, study.png", add_report, report,
            ("emo-jax study report runs/study",)),
)
