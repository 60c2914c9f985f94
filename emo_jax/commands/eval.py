"""`emo-jax eval`: held-out loss by label; with few experts beside the full model; tasks of lm-evaluation-harness."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from emo_jax.commands import Command, Result, arguments
from emo_jax.errors import InputError


def add(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser)
    parser.add_argument("--data", default="", metavar="PATH", help="documents (default: those the run held out)")
    parser.add_argument("--tasks", metavar="FILE_OR_NAMES", help="tasks of lm-evaluation-harness instead: names and YAML "
                        "files, separated by commas (with --subset: by that subset alone)")
    parser.add_argument("--num-fewshot", type=arguments.at_least(0), metavar="N",
                        help="examples before each question of a task")
    parser.add_argument("--limit", type=arguments.at_least(1), metavar="N", help="questions of each task")
    group = parser.add_argument_group("with few experts", "the full model beside each subset")
    group.add_argument("--subset", nargs="+", metavar="FILE", help="files of emo-jax select")
    group.add_argument("--keep", type=arguments.numbers, metavar="K,K,...", help="choose subsets of these sizes: for all text "
                       "by --calibration, or else for each label by half of its documents, scored on the other half")
    group.add_argument("--against", metavar="CKPT", help="another model beside it, e.g. the standard MoE; with --keep")
    group.add_argument("--out", metavar="DIR", help="where the figure and its numbers go; with --keep")
    arguments.method(group, "--select")
    arguments.calibration(group)


def run(args: Namespace) -> Result:
    if args.tasks:
        return _tasks(args)
    if args.subset and args.keep:
        raise InputError("give either --subset or --keep")
    return _subsets(args) if args.subset else _keep(args) if args.keep else _full(args)


def _full(args: Namespace) -> Result:
    from emo_jax.loaded import load
    from emo_jax.train.evaluate import table

    loaded = load(args.checkpoint, args.overrides, step=args.step, data=args.data)
    source, numbers = loaded.documents_to_score()
    found, evaluation = loaded.saved, loaded.evaluation(source, numbers)
    result = {"checkpoint": str(found.path), "step": found.step, "data": source.name,
              **evaluation.summary(*evaluation.losses(loaded.params, what="scoring"))}
    return Result(result, f"{result['checkpoint']} on {result['data']}\n{table(result)}")


def _tasks(args: Namespace) -> Result:
    if len(args.subset or []) > 1 or args.keep:
        raise InputError("--tasks goes with at most one --subset, and not with --keep")
    from emo_jax import harness

    result = harness.evaluate_tasks(args.checkpoint, args.tasks, subset=(args.subset or [""])[0], step=args.step,
                                    num_fewshot=args.num_fewshot, limit=args.limit, overrides=args.overrides)
    return Result(result, f"{result['checkpoint']}\n{harness.table(result)}")


def _subsets(args: Namespace) -> Result:
    """Every given subset, for all text."""
    from emo_jax.checkpoints.subset import load as load_subset
    from emo_jax.loaded import load
    from emo_jax.subsets.check import check_subsets
    from emo_jax.subsets.report import subset_table

    for flag in ("against", "out", "calibration", "example"):
        if getattr(args, flag):
            raise InputError(f"--{flag} goes with --keep; the subsets of --subset are chosen already")
    loaded = load(args.checkpoint, args.overrides, step=args.step, data=args.data)
    result = check_subsets(loaded, {path: load_subset(path, loaded.checkpoint) for path in args.subset})
    result |= {"checkpoint": str(loaded.saved.path)}
    return Result(result, subset_table(result))


def _keep(args: Namespace) -> Result:
    """Subsets of every size, of one model or two."""
    from emo_jax.files import make_folder, write_json
    from emo_jax.loaded import load
    from emo_jax.progress import is_primary
    from emo_jax.subsets import report

    models: dict[str, Any] = {}
    for path in (args.checkpoint, args.against) if args.against else (args.checkpoint,):
        loaded = load(path, args.overrides, step=args.step if path == args.checkpoint else None, data=args.data)
        name = loaded.config.name
        while name in models:
            name += "'"
        models[name] = _sizes(loaded, args)
    out, figure = make_folder(args.out) if args.out else None, None
    if out is not None:
        figure = report.save_figure(models, out / "keep_curve.png")
        if is_primary():
            write_json(out / "keep_curve.json", {"models": models})  # emo-jax analyze shows it
    text = report.curve_table(models) + (f"\n{figure}" if figure else "")
    return Result({"models": models, "figure": figure and str(figure)}, text)


def _sizes(loaded, args) -> dict[str, Any]:
    """Subsets of every size of --keep (the size of the whole model is the full model itself)."""
    from emo_jax.subsets.budget import Budget
    from emo_jax.subsets.check import check_own_labels, check_subsets
    from emo_jax.subsets.choose import choose

    keeps = [k for k in args.keep if k != loaded.config.model.num_experts]
    if not keeps:
        raise InputError(f"--keep {','.join(map(str, args.keep))}: give sizes below the "
                         f"{loaded.config.model.num_experts} experts of the model")
    options = arguments.method_options(args)
    if not (args.calibration or args.example):
        return check_own_labels(loaded, keeps, args.select, args.documents, **options)
    chosen = choose(loaded, arguments.calibration_text(loaded, args, args.calibration), args.select,
                    [Budget(keep=k) for k in keeps], **options)
    return check_subsets(loaded, {f"keep {k}": of_size[0] for k, of_size in zip(keeps, chosen)})


COMMAND = Command("eval", "held-out loss of a checkpoint by source label", add, run, (
    "emo-jax eval runs/tiny", "emo-jax eval runs/tiny --keep 16,8,4 --against runs/std --out figures",
    "emo-jax eval runs/tiny --subset law.json --data law.jsonl", "emo-jax eval runs/tiny --tasks arc_easy --num-fewshot 5"),
    overrides="checkpoint", devices=True)
