"""`emo-jax study ...`: whether modules emerged."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from typing import Any

from emo_jax.commands import Command, Result, arguments
from emo_jax.errors import InputError
from emo_jax.study.variants import ABLATIONS, MAIN, VARIANTS
from emo_jax.subsets import methods


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def _seeds(text: str) -> tuple[int, ...]:
    return arguments.numbers(",".join(_words(text)))


def add_run(parser: ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/study", metavar="DIR", help="a folder for each model (default: runs/study)")
    parser.add_argument("--held-out", default="", metavar="FILE", help="labelled documents to measure on (default: those that "
                        "the runs held out)")
    parser.add_argument("--seeds", type=_seeds, default=(0, 1, 2), metavar="N,N,...", help="(default: 0,1,2)")
    parser.add_argument("--ablation-seeds", type=_seeds, default=(0,), metavar="N,N,...", help="for "
                        f"{', '.join(ABLATIONS)} (default: 0)")
    parser.add_argument("--variants", type=_words, default=(), metavar="V,V,...", help="these, with all --seeds "
                        f"(default: {', '.join(MAIN)} with --seeds, and some with --ablation-seeds). "
                        + " ".join(f"{name}: {variant.sentence}" for name, variant in VARIANTS.items()))
    parser.add_argument("--jobs", type=arguments.at_least(1), default=1, metavar="N", help="models at a time (default: 1)")
    parser.add_argument("--base", default="study_cpu", metavar="CONFIG", help="what variants are made of (default: study_cpu)")
    parser.add_argument("--gpu", dest="base", action="store_const", const="study_gpu", help="--base study_gpu")


def run(args: Namespace) -> Result:
    from emo_jax.study.run import run_study

    if args.seed is not None:
        raise InputError("study run trains with --seeds N,N,..., not --seed")
    return _compared(run_study(args.base, args.out, args.overrides, held_out=args.held_out, seeds=args.seeds,
                               ablation_seeds=args.ablation_seeds, variants=args.variants, jobs=args.jobs))


def _methods(text: str) -> tuple[str, ...]:
    given = tuple(text.split(","))
    if not set(given) <= set(methods.NAMES):
        raise argparse.ArgumentTypeError(f"{text!r} must be some of {','.join(methods.NAMES)}")
    return given


def add_measure(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser, step=False)
    parser.add_argument("--data", default="", metavar="PATH", help="labelled documents (default: those held out and left out)")
    parser.add_argument("--methods", type=_methods, default=("router",), metavar="M,M,...",
                        help=f"of choosing experts: {', '.join(methods.NAMES)} (default: router)")
    parser.add_argument("--documents", type=arguments.numbers, default=(50,), metavar="N,N,...", help="documents of each label "
                        "that choose: all methods with the largest number, the first method also with the others (default: 50)")
    parser.add_argument("--no-activations", action="store_true", help="losses only: half of the time")
    parser.add_argument("--out", required=True, metavar="FILE", help="the measures (JSON)")


def measure(args: Namespace) -> Result:
    from emo_jax.files import write_result
    from emo_jax.progress import is_primary
    from emo_jax.study import measure as lib

    if min(args.documents) < 1:
        raise InputError(f"--documents {','.join(map(str, args.documents))}: numbers must be positive")
    result = lib.measure(args.checkpoint, args.data, args.methods, args.documents, args.overrides,
                         activations=not args.no_activations)
    if is_primary():
        write_result(args.out, result)
    lines = [f"full model: {result['full']['trained']:.4f} nats/token"]
    lines += [f"{r['share']:.1%} kept ({r['method']}, {r['documents']} documents): {r['trained']:+.4f}"
              for r in result["subsets"]]
    return Result(result | {"out": args.out}, "\n".join([*lines, f"measures: {args.out}"]))


def add_report(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--main", default="emo", metavar="VARIANT")
    parser.add_argument("--baseline", default="stdmoe", metavar="VARIANT")


def report(args: Namespace) -> Result:
    from emo_jax.study import report as lib

    return _compared(lib.compare(args.folder, args.main, args.baseline))


def _arms(text: str) -> tuple[str, ...]:
    from emo_jax.study.arms import ARMS

    if unknown := set(_words(text)) - set(ARMS):
        raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(ARMS)}")
    return _words(text)


def _add_ways(parser: ArgumentParser) -> None:
    from emo_jax.study.arms import ARMS

    parser.add_argument("--arms", type=_arms, default=tuple(ARMS), metavar="A,A,...", help="ways to train it (default: all). "
                        + "; ".join(f"{name}: {arm.sentence}" for name, arm in ARMS.items()))
    parser.add_argument("--keep", type=arguments.at_least(0), default=0, metavar="K", help="experts of the module, shared ones "
                        "included (default: a quarter)")


def add_transfer(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="of `emo-jax study run`")
    parser.add_argument("--labels", type=_words, required=True, metavar="L,L,...", help="trained on one after the other")
    _add_ways(parser)
    parser.add_argument("--variants", type=_words, default=MAIN, metavar="V,V,...", help=f"(default: {','.join(MAIN)})")
    parser.add_argument("--seeds", type=_seeds, default=(0, 1, 2), metavar="N,N,...", help="(default: 0,1,2)")
    parser.add_argument("--held-out", default="", metavar="FILE", help="labelled documents to choose and measure by (default: "
                        "those that the runs held out or left out)")
    parser.add_argument("--jobs", type=arguments.at_least(1), default=1, metavar="N", help="modules at a time (default: 1)")
    parser.add_argument("--out", default="", metavar="DIR", help="(default: transfer/ in DIR)")


def transfer(args: Namespace) -> Result:
    from emo_jax.study.run import run_transfer

    return _compared(run_transfer(args.folder, args.labels, args.overrides, arms=args.arms, variants=args.variants,
                                  seeds=args.seeds, keep=args.keep, held_out=args.held_out, out=args.out, jobs=args.jobs))


def add_adapt(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser, step=False)
    parser.add_argument("--label", required=True, help="that the module is chosen for and trained on")
    _add_ways(parser)
    parser.add_argument("--data", default="", metavar="PATH", help="labelled documents to choose and measure by (default: "
                        "those held out and left out)")
    parser.add_argument("--out", required=True, metavar="DIR", help="an ARM.json for each way")


def adapt(args: Namespace) -> Result:
    from emo_jax.study.transfer import transfer as train

    rows = train(args.checkpoint, args.label, args.arms, args.out, keep=args.keep, data=args.data, overrides=args.overrides)
    return Result({"arms": rows, "out": args.out}, "\n".join(
        f"{r['arm']}: {r['subset']:+.4f} in the subset's view, {r['full']:+.4f} in the whole model, other labels "
        f"{r['others']:+.4f}" for r in rows))


def _compared(result: dict[str, Any]) -> Result:
    text = result.pop("text")
    return Result(result, text + (f"\n\n{result['figure']}" if result["figure"] else ""))


COMMANDS = (
    Command("study run", "train the variants, measure them and compare them: study.md, study.png; what is finished is not done "
            "again, --a.b=c changes a field of all variants", add_run, run,
            ("emo-jax study run --variants emo,stdmoe --seeds 0 --jobs 2", "emo-jax study run --gpu --out runs/study_gpu"),
            "checkpoint"),
    Command("study measure", "loss with few experts by label, and what experts tell of the text", add_measure, measure,
            ("emo-jax study measure runs/tiny --data held_out.jsonl --out measures.json",), "checkpoint", devices=True),
    Command("study transfer", "train a module of each model in several ways, put it back, and compare what the whole model "
            "gains and forgets: transfer.md, transfer.png; what is finished is not done again", add_transfer, transfer,
            ("emo-jax study transfer runs/study --labels latin,law_us --jobs 2",), "config"),
    Command("study adapt", "the same of one model and label", add_adapt, adapt,
            ("emo-jax study adapt runs/tiny --label law --arms all_divergence,whole_divergence --out runs/law",), "config",
            devices=True),
    Command("study report", "compare the models of DIR/VARIANT/SEED/measures.json: study.md, study.png", add_report, report,
            ("emo-jax study report runs/study",)),
)
