"""`emo-jax train`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from emo_jax.commands import Command, Result, arguments


def add(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help=arguments.CONFIG)
    parser.add_argument("--out", required=True, metavar="DIR", help="checkpoints, metrics and the resolved config")
    parser.add_argument("--start-over", action="store_true", help="begin at step 0 in a folder whose checkpoints are gone, and "
                        "move its metrics aside; where there is a checkpoint, go on from it as always")


def run(args: Namespace) -> Result:
    from emo_jax.config import load_config

    config = load_config(args.config, args.overrides)
    from emo_jax.train import loop
    from emo_jax.train.evaluate import table

    evaluations = []
    if config.train.eval_subsets:
        from emo_jax.subsets.modularity import Modularity

        evaluations.append(Modularity.make)
    if config.train.eval_tasks:
        from emo_jax.harness import TaskEvaluation

        evaluations.append(TaskEvaluation.make)
    result = loop.train(config, args.out, evaluations, start_over=args.start_over, began=args.began)
    lines = [f"{'stopped at' if result['stopped'] else 'trained to'} step {result['step']} of {result['steps']}, "
             f"{result['tokens']:,} tokens; checkpoint {result['checkpoint']}"]
    if result["held_out"]:
        lines.append(table(result["held_out"]))
    return Result(result, "\n".join(lines), restart=bool(result["stopped"]))


COMMAND = Command("train", "train a config into a folder, or go on with it", add, run, (
    "emo-jax train emo_tiny --out runs/tiny",
    "emo-jax train emo_tiny --out runs/tiny --data.path='texts/*.jsonl.gz' --train.steps=2000"),
    overrides="config", logs=True)
