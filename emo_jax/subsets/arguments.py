"""The arguments of `emo-jax select`, `emo-jax subset ...` and of `emo-jax eval` with subsets. Imports nothing heavy."""

from __future__ import annotations

import argparse
from typing import Callable

METHODS = ("layerwise", "router", "easy_ep", "reap", "random")
CKPT = "a run's folder, its checkpoints/, or one step folder"


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be integers such as 64,32,16") from None


def add_select(commands, command: Callable) -> None:
    parser = command(commands, "select", _run("select"), "choose the experts that a task needs", config=True)
    parser.add_argument("checkpoint", metavar="CKPT", help=CKPT)
    _calibration(parser, required=True)
    keep = parser.add_mutually_exclusive_group(required=True)
    keep.add_argument("--keep", type=int, metavar="K", help="experts of every layer, shared ones included")
    keep.add_argument("--keep-per-layer", type=numbers, metavar="K,K,...", help="of each layer")
    keep.add_argument("--keep-total", type=int, metavar="N", help="over all layers, shared out by need")
    parser.add_argument("--method", choices=METHODS, default="layerwise")
    _layerwise(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the subset (JSON)")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """What `emo-jax eval` takes to score subsets beside the full model."""
    group = parser.add_argument_group("with few experts", "the full model beside each subset")
    group.add_argument("--subset", nargs="+", metavar="FILE", help="files of emo-jax select")
    group.add_argument("--keep", type=numbers, metavar="K,K,...", help="choose subsets of these sizes: for all text by "
                       "--calibration, or else for each label by half of its documents, scored on the other half")
    group.add_argument("--select", choices=METHODS, default="layerwise", help="how (default: layerwise)")
    group.add_argument("--against", metavar="CKPT", help="another model beside it, e.g. the standard MoE; with --keep")
    group.add_argument("--out", metavar="DIR", help="where the figure goes; with --keep")
    _calibration(group)
    _layerwise(group)


def add_subset(commands, command: Callable) -> None:
    names = "show|extract|compose|merge|suggest|finetune|extend|disable"
    group = commands.add_parser("subset", help=f"what to do with a subset: {names.replace('|', ', ')}")
    group = group.add_subparsers(required=True, metavar=names)

    def add(name: str, summary: str, config: bool = False, checkpoint: bool = True) -> argparse.ArgumentParser:
        parser = command(group, name, _run(name), summary, config=config)
        parser.set_defaults(command=f"subset {name}")
        if checkpoint:
            parser.add_argument("checkpoint", metavar="CKPT", help=CKPT)
        return parser

    show = add("show", "what subsets keep, and how alike they are", checkpoint=False)
    show.add_argument("files", nargs="+", metavar="FILE")

    extract = add("extract", "write the kept experts as a smaller checkpoint and config")
    extract.add_argument("--subset", required=True, metavar="FILE")
    extract.add_argument("--out", required=True, metavar="DIR")

    compose = add("compose", "one subset from several", checkpoint=False)
    compose.add_argument("files", nargs="+", metavar="FILE")
    compose.add_argument("--how", choices=("union", "weighted", "need"), default="union", help="union; the best by "
                         "weighted mean score; or what the worst-covered subset wants most, one after the other")
    compose.add_argument("--keep", type=int, metavar="K", help="budget of weighted and need, shared experts included")
    compose.add_argument("--weights", type=float, nargs="+", metavar="W", help="of weighted, one for each file")
    compose.add_argument("--out", required=True, metavar="FILE")

    merge = add("merge", "put the experts of a (fine-tuned) extracted model back into the whole one", config=True)
    merge.add_argument("--part", required=True, metavar="CKPT", help="the extracted or fine-tuned model")
    merge.add_argument("--subset", metavar="FILE", help="default: subset.json in the folder of --part")
    merge.add_argument("--out", required=True, metavar="DIR")
    merge.add_argument("--alpha", type=float, default=1.0, help="(1 - alpha) old + alpha new (default: 1)")
    merge.add_argument("--router", action="store_true", help="also the router columns of the experts")
    merge.add_argument("--shared", action="store_true", help="also shared experts and everything outside the experts")
    merge.add_argument("--data", metavar="PATH", help="documents for the check (default: those the run held out)")
    merge.add_argument("--no-check", action="store_true", help="do not measure what the whole model lost by label")

    suggest = add("suggest", "the smallest subset whose loss stays within a tolerance of the full model's", config=True)
    _calibration(suggest, required=True)
    suggest.add_argument("--tolerance", type=float, default=0.05, metavar="NATS", help="per token (default: 0.05)")
    suggest.add_argument("--method", choices=METHODS, default="router")
    _layerwise(suggest)
    suggest.add_argument("--out", required=True, metavar="FILE")

    finetune = add("finetune", "train a subset, with the losses of pretraining; resumes from --out", config=True)
    finetune.add_argument("--subset", required=True, metavar="FILE")
    finetune.add_argument("--data", metavar="PATH", help="documents (default: those of the run)")
    finetune.add_argument("--train-what", choices=("all", "experts", "no_router"), help="--optimizer.trainable")
    finetune.add_argument("--out", required=True, metavar="DIR")

    extend = add("extend", "append new routed experts to every layer of a trained model")
    extend.add_argument("--experts", type=int, required=True, metavar="N")
    extend.add_argument("--init", choices=("copy", "jitter", "fresh"), default="jitter")
    extend.add_argument("--not-forced", action="store_true", help="they must earn their place in a document's pool")
    extend.add_argument("--out", required=True, metavar="DIR")

    disable = add("disable", "the model without the experts of a subset, and what that costs by label", config=True)
    disable.add_argument("--subset", required=True, metavar="FILE", help="whose routed experts are disabled")
    disable.add_argument("--data", default="", metavar="PATH", help="documents (default: those the run held out)")
    disable.add_argument("--out", metavar="FILE", help="the subset of everything else")


def _calibration(parser, required: bool = False) -> None:
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--calibration", metavar="PATH", help="documents to choose by")
    source.add_argument("--example", action="append", metavar="TEXT", help="a text to choose by; may be repeated")
    parser.add_argument("--label", default="", help="only documents of this label choose")
    parser.add_argument("--documents", type=int, default=0, metavar="N", help="at most so many choose (default: 1000; "
                        "16 of each label where every label has its own subset)")


def _layerwise(parser) -> None:
    parser.add_argument("--layer-group", type=int, default=0, metavar="G", help="layerwise: recompute activations for "
                        "every G layers instead of keeping those of all the text (default: keep)")
    parser.add_argument("--activations-on-host", action="store_true", help="layerwise: keep them in host memory")


def _run(name: str) -> Callable:
    def run(args):
        from emo_jax.subsets import commands

        return getattr(commands, name)(args)

    return run
