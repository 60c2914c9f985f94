"""`emo-jax study ...`: arguments, and arguments -> (result, text). Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Callable

from emo_jax.errors import InputError
from emo_jax.study.variants import MAIN, VARIANTS
from emo_jax.subsets.arguments import CKPT, METHODS, numbers

Result = tuple[dict[str, Any], str]


def add(commands, command: Callable) -> None:
    group = commands.add_parser("study", help="whether modules emerged: train variants, measure a model, compare many")
    group = group.add_subparsers(required=True, metavar="run|measure|report")
    whole = command(group, "run", run, "train the variants, measure them and compare them: study.md, study.png; what is "
                    "finished is not done again. --a.b=c changes a field of all variants")
    whole.add_argument("--out", default="runs/study", metavar="DIR", help="a folder for each model (default: runs/study)")
    whole.add_argument("--held-out", default="", metavar="FILE", help="labelled documents to measure on (default: those "
                       "that the runs held out)")
    whole.add_argument("--seeds", type=_seeds, default=(0, 1, 2), metavar="N,N,...", help="(default: 0,1,2)")
    whole.add_argument("--ablation-seeds", type=_seeds, default=(0,), metavar="N,N,...", help="for all variants but "
                       f"{' and '.join(MAIN)} (default: 0)")
    whole.add_argument("--variants", type=_words, default=(), metavar="V,V,...", help="these, with all --seeds "
                       f"(default: {', '.join(MAIN)} with --seeds, and the rest with --ablation-seeds). "
                       + " ".join(f"{name}: {variant.sentence}" for name, variant in VARIANTS.items()))
    whole.add_argument("--jobs", type=int, default=1, metavar="N", help="models at a time (default: 1)")
    whole.add_argument("--base", default="study_cpu", metavar="CONFIG", help="what variants are made of (default: study_cpu)")
    whole.add_argument("--gpu", dest="base", action="store_const", const="study_gpu", help="--base study_gpu")
    whole.set_defaults(takes_overrides=True)
    one = command(group, "measure", measure, "loss with few experts by label, and what experts tell of the text",
                  config=True)
    one.add_argument("checkpoint", metavar="CKPT", help=CKPT)
    one.add_argument("--data", default="", metavar="PATH", help="labelled documents (default: those held out and left out)")
    one.add_argument("--methods", type=_methods, default=("router",), metavar="M,M,...",
                     help=f"how experts are chosen: {', '.join(METHODS)} (default: router)")
    one.add_argument("--documents", type=numbers, default=(50,), metavar="N,N,...", help="how many of each label "
                     "choose: all methods with the largest number, the first also with the others (default: 50)")
    one.add_argument("--out", required=True, metavar="FILE", help="the measures (JSON)")
    many = command(group, "report", report, "compare the models of DIR/VARIANT/SEED/measures.json: study.md, study.png")
    many.add_argument("folder", metavar="DIR")
    many.add_argument("--main", default="emo", metavar="VARIANT")
    many.add_argument("--baseline", default="stdmoe", metavar="VARIANT")
    for parser in (whole, one, many):
        parser.set_defaults(command=f"study {parser.prog.split()[-1]}")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def _seeds(text: str) -> tuple[int, ...]:
    return numbers(",".join(_words(text)))


def _methods(text: str) -> tuple[str, ...]:
    given = tuple(text.split(","))
    if not set(given) <= set(METHODS):
        raise argparse.ArgumentTypeError(f"{text!r} must be some of {','.join(METHODS)}")
    return given


def run(args) -> Result:
    from emo_jax.study.run import run_study

    return _compared(run_study(args.base, args.out, args.overrides, held_out=args.held_out, seeds=args.seeds,
                               ablation_seeds=args.ablation_seeds, variants=args.variants, jobs=args.jobs))


def measure(args) -> Result:
    from emo_jax import sharding
    from emo_jax.study import measure as lib
    from emo_jax.train import hosts

    sharding.start_distributed()
    if min(args.documents) < 1:
        raise InputError(f"--documents {','.join(map(str, args.documents))}: numbers must be positive")
    result = lib.measure(args.checkpoint, args.data, args.methods, args.documents, args.overrides)
    out = Path(args.out)
    if hosts.is_primary():
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary = out.with_name(out.name + ".tmp")
            temporary.write_text(json.dumps(result) + "\n")
            temporary.replace(out)
        except OSError as e:
            raise InputError(f"--out {out} cannot be written: {e.strerror}") from None
    lines = [f"full model: {result['full']['trained']:.4f} nats/token"]
    lines += [f"{r['share']:.1%} kept ({r['method']}, {r['documents']} documents): {r['trained']:+.4f}"
              for r in result["subsets"]]
    return result | {"out": str(out)}, "\n".join([*lines, f"measures: {out}"])


def report(args) -> Result:
    from emo_jax.study import report as lib

    return _compared(lib.compare(args.folder, args.main, args.baseline))


def _compared(result: dict[str, Any]) -> Result:
    text = result.pop("text")
    return result, text + (f"\n\n{result['figure']}" if result["figure"] else "")
