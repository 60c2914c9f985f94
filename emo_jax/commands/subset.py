"""`emo-jax subset ...`: what to do with a subset."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from typing import Any

from emo_jax.commands import Command, Result, arguments
from emo_jax.errors import InputError


def add_show(parser: ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE")


def show(args: Namespace) -> Result:
    from emo_jax.checkpoints.subset import load
    from emo_jax.subsets.compose import similarity
    from emo_jax.subsets.report import coverage_table

    subsets = {path: load(path) for path in args.files}
    result: dict[str, Any] = {"subsets": [s.describe() | {"file": path} for path, s in subsets.items()]}
    lines = [f"{path}: {coverage_table(s)}" for path, s in subsets.items()]
    if len(subsets) > 1:
        result["similarity"] = similarity(list(subsets.values()))
        for name, table in result["similarity"].items():
            lines += [f"{name}:", *(" ".join(f"{x:6.3f}" for x in row) for row in table)] if table else []
    else:
        result["kept"] = [list(ids) for ids in next(iter(subsets.values())).kept]
        lines += [f"  layer {i}: {' '.join(map(str, ids))}" for i, ids in enumerate(result["kept"])]
    return Result(result, "\n".join(lines))


def add_extract(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser, step=False)
    parser.add_argument("--subset", required=True, metavar="FILE")
    parser.add_argument("--out", required=True, metavar="DIR")


def extract(args: Namespace) -> Result:
    from emo_jax import model
    from emo_jax.checkpoints.checkpoint import open_checkpoint
    from emo_jax.checkpoints.subset import load
    from emo_jax.surgery.extract import extract as write

    found = open_checkpoint(args.checkpoint)
    chosen = load(args.subset, found)
    path = write(found, chosen, args.out)
    counts = [model.num_params(c.config) for c in (open_checkpoint(path), found)]
    return Result({"checkpoint": str(path), "keep": chosen.experts_per_layer, "parameters": counts[0], "of": counts[1]},
                  f"{path}: {counts[0]:,} of {counts[1]:,} parameters; {chosen.summary()}")


def add_compose(parser: ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--how", choices=("union", "weighted", "need", "quota"), default="union", help="union; the best by "
                        "weighted mean score; what the worst-covered subset wants most, one after the other; or the best of "
                        "each subset up to its quota, and the best by mean score")
    parser.add_argument("--keep", type=int, metavar="K", help="experts of every layer, shared ones included; not for union")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="for weighted, one for each file")
    arguments.quotas(parser, "file")
    parser.add_argument("--out", required=True, metavar="FILE")


def compose(args: Namespace) -> Result:
    from emo_jax.checkpoints.subset import load
    from emo_jax.subsets.compose import needed, quota, union, weighted
    from emo_jax.subsets.report import coverage_table

    for option, how in (("weights", "weighted"), ("quotas", "quota")):
        if getattr(args, option) and args.how != how:
            raise InputError(f"--{option} goes with --how {how}, not {args.how}")
    subsets = [load(path) for path in args.files]
    if args.how == "union":
        if args.keep:
            raise InputError("--keep does not go with --how union, which keeps everything")
        made = union(subsets)
    else:
        routed = (args.keep or 0) - subsets[0].num_shared
        if not 0 < routed <= subsets[0].num_routed:
            raise InputError(f"--how {args.how} needs --keep between {subsets[0].num_shared + 1} and "
                             f"{subsets[0].num_routed + subsets[0].num_shared}, not {args.keep}")
        made = (weighted(subsets, routed, args.weights) if args.how == "weighted" else
                quota(subsets, routed, args.quotas) if args.how == "quota" else needed(subsets, routed))
    made.save(args.out)
    return Result(made.describe() | {"out": args.out}, f"{args.out}: {coverage_table(made)}")


def _alpha(text: str) -> float | None:
    """None: auto."""
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number or auto") from None


def add_merge(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser, step=False)
    parser.add_argument("--part", required=True, metavar="CKPT", help="what `subset finetune` trained, or an extracted model")
    parser.add_argument("--subset", metavar="FILE", help="default: subset.json in the folder of --part")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--alpha", type=_alpha, default=1.0, help="old + alpha (new - old), default: 1; auto: what "
                        "gains most on --label, with a twentieth of that as the most that other labels lose, on held-out text")
    parser.add_argument("--label", default="", help="that --alpha auto is chosen for")
    parser.add_argument("--router", action="store_true", help="of an extracted model, also the router columns of the experts")
    parser.add_argument("--shared", action="store_true", help="of an extracted model, also shared experts and everything "
                        "outside the experts")
    parser.add_argument("--data", default="", metavar="PATH", help="documents for the check (default: those the run held out)")
    parser.add_argument("--no-check", action="store_true", help="do not measure what the whole model lost by label")


def merge(args: Namespace) -> Result:
    from emo_jax.checkpoints.checkpoint import open_checkpoint
    from emo_jax.checkpoints.subset import load as load_subset
    from emo_jax.files import folder_path, remove_tree
    from emo_jax.loaded import load
    from emo_jax.subsets.check import compare
    from emo_jax.subsets.report import subset_table
    from emo_jax.surgery.coefficient import choose_alpha
    from emo_jax.surgery.merge import merge as write

    whole, part = open_checkpoint(args.checkpoint), open_checkpoint(args.part)
    chosen = load_subset(args.subset or part.run / "subset.json", whole)
    alpha, what = args.alpha, {"router": args.router, "shared": args.shared}
    result: dict[str, Any] = {}
    if alpha is not None and args.no_check:
        path = write(whole, part, chosen, args.out, alpha=alpha, **what)
        return Result({"checkpoint": str(path), "alpha": alpha}, str(path))
    before = load(whole, args.overrides, data=args.data)
    source, numbers = before.documents_to_score()
    evaluation = before.evaluation(source, numbers)
    if alpha is None:
        trial = folder_path(args.out) / "alpha_1"
        learnt = load(write(whole, part, chosen, trial, **what), args.overrides).params
        alpha, result["tried"] = choose_alpha(before, learnt, evaluation, args.label)
        remove_tree(trial)
    path = write(whole, part, chosen, args.out, alpha=alpha, **what)
    result |= {"checkpoint": str(path), "alpha": alpha}
    full = evaluation.losses(before.params, what="scoring the whole model")
    after = evaluation.losses(load(path, args.overrides).params, what="scoring the merged model")
    result |= {"data": source.name, "full": evaluation.summary(*full), "documents_left_out": 0, "subsets": [
        compare(evaluation, full, after) | {"name": "merged", "keep": "all", "share": 1.0, "method": "merge"}]}
    lines = [f"  alpha {t['alpha']:.2f}: {args.label} {-t['gain']:+.4f}, other labels {t['others']:+.4f}"
             for t in result.get("tried", ())]
    return Result(result, "\n".join([f"{path}, alpha {alpha}", *lines, subset_table(result)]))


def add_suggest(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser, step=False)
    arguments.calibration(parser, required=True)
    parser.add_argument("--tolerance", type=float, default=0.05, metavar="NATS", help="per token (default: 0.05)")
    arguments.method(parser, default="router")
    parser.add_argument("--out", required=True, metavar="FILE")


def suggest(args: Namespace) -> Result:
    from emo_jax.loaded import load
    from emo_jax.subsets.calibration import MAX_DOCUMENTS, halves, of_label
    from emo_jax.subsets.compose import suggest as find

    if not args.calibration:
        raise InputError("subset suggest needs --calibration with two documents or more: one part chooses, the other "
                         "is scored")
    loaded = load(args.checkpoint, args.overrides, data=args.calibration)
    source, numbers = loaded.documents_to_score()
    text, scored = halves(loaded.config, source, loaded.tokenizer, {"": of_label(source, numbers, args.label)},
                          args.documents or MAX_DOCUMENTS)
    best, tried = find(loaded, text, loaded.evaluation(source, scored), args.tolerance, args.method,
                       **arguments.method_options(args))
    best.save(args.out)
    lines = [f"  keep {t['keep']:4}  {t['loss']:.4f} nats/token ({t['difference']:+.4f})" for t in tried]
    return Result(best.describe() | {"out": args.out, "tried": tried}, "\n".join([f"{best.summary()}: {args.out}", *lines]))


def add_finetune(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser, step=False)
    parser.add_argument("--subset", required=True, metavar="FILE")
    parser.add_argument("--data", default="", metavar="PATH", help="documents (default: those of the run)")
    parser.add_argument("--label", default="", help="only documents of this label")
    parser.add_argument("--alone", action="store_true", help="extract the subset and train that (default: train it inside the "
                        "whole model, where every document's pool holds it)")
    parser.add_argument("--train-what", choices=("all", "experts", "no_router", "module", "module_experts"),
                        help="--optimizer.trainable")
    parser.add_argument("--out", required=True, metavar="DIR")


def finetune(args: Namespace) -> Result:
    from emo_jax.checkpoints.checkpoint import open_checkpoint
    from emo_jax.checkpoints.subset import load
    from emo_jax.surgery.finetune import finetune as train

    found = open_checkpoint(args.checkpoint)
    overrides = [f"optimizer.trainable={args.train_what}"] if args.train_what else []
    result = train(found, load(args.subset, found), args.out, args.data, overrides + args.overrides, alone=args.alone,
                   label=args.label)
    return Result(result, f"trained to step {result['step']} of {result['steps']}: {result['checkpoint']}")


def add_extend(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser, step=False)
    parser.add_argument("--experts", type=int, required=True, metavar="N")
    parser.add_argument("--init", choices=("copy", "jitter", "fresh", "most_used"), default="jitter", help="like other "
                        "experts, exactly or with noise (default); as in a new model; or the average of the two that --subset "
                        "scores highest, with noise")
    parser.add_argument("--subset", default="", metavar="FILE", help="whose scores --init most_used looks at")
    parser.add_argument("--not-forced", action="store_true", help="they must earn their place in a document's pool")
    parser.add_argument("--out", required=True, metavar="DIR")


def extend(args: Namespace) -> Result:
    from emo_jax.checkpoints.checkpoint import open_checkpoint
    from emo_jax.checkpoints.subset import load
    from emo_jax.surgery.extend import extend as write

    found = open_checkpoint(args.checkpoint)
    path = write(found, args.experts, args.out, init=args.init, forced=not args.not_forced,
                 subset=load(args.subset, found) if args.subset else None)
    return Result({"checkpoint": str(path), "experts": args.experts, "init": args.init}, (
        f"{path}: {args.experts} new experts in every layer ({args.init}); train them with the config beside it and "
        f"--train.init_params_from={path}"))


def add_disable(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser, step=False)
    parser.add_argument("--subset", required=True, metavar="FILE", help="whose routed experts are disabled")
    parser.add_argument("--data", default="", metavar="PATH", help="documents (default: those the run held out)")
    parser.add_argument("--out", metavar="FILE", help="the subset of everything else")


def disable(args: Namespace) -> Result:
    from emo_jax.checkpoints.subset import load as load_subset
    from emo_jax.checkpoints.subset import require_fits
    from emo_jax.loaded import load
    from emo_jax.subsets.check import check_subsets
    from emo_jax.subsets.compose import complement
    from emo_jax.subsets.report import subset_table

    loaded = load(args.checkpoint, args.overrides, data=args.data)
    rest = complement(load_subset(args.subset, loaded.checkpoint))
    require_fits(rest, loaded.config, f"everything but {args.subset}")
    if args.out:
        rest.save(args.out)
    result = check_subsets(loaded, {f"without {args.subset}": rest}) | {"checkpoint": str(loaded.saved.path)}
    return Result(result, subset_table(result))


COMMANDS = (
    Command("subset show", "what subsets keep, and how alike they are", add_show, show, ("emo-jax subset show law.json",)),
    Command("subset extract", "write the kept experts as a smaller checkpoint and config", add_extract, extract,
            ("emo-jax subset extract runs/tiny --subset law.json --out runs/law",)),
    Command("subset compose", "one subset from several", add_compose, compose,
            ("emo-jax subset compose law.json code.json --how need --keep 12 --out both.json",
             "emo-jax subset compose law.json code.json --how quota --keep 12 --quotas 0.5 0.25 --out both.json")),
    Command("subset merge", "put the experts of a (fine-tuned) extracted model back into the whole one", add_merge, merge,
            ("emo-jax subset merge runs/tiny --part runs/law --out runs/merged --alpha 0.5",), "checkpoint", devices=True),
    Command("subset suggest", "the smallest subset whose loss stays within a tolerance of the full model's", add_suggest,
            suggest, ("emo-jax subset suggest runs/tiny --calibration law.jsonl --tolerance 0.02 --out law.json",),
            "checkpoint", devices=True),
    Command("subset finetune", "train a subset, with the losses of pretraining; resumes from --out", add_finetune, finetune,
            ("emo-jax subset finetune runs/tiny --subset law.json --data law.jsonl --out runs/law --train.steps=200",),
            "config", devices=True, logs=True),
    Command("subset extend", "append new routed experts to every layer of a trained model", add_extend, extend,
            ("emo-jax subset extend runs/tiny --experts 4 --out runs/larger",)),
    Command("subset disable", "the model without the experts of a subset, and what that costs by label", add_disable, disable,
            ("emo-jax subset disable runs/tiny --subset law.json",), "checkpoint", devices=True),
)
