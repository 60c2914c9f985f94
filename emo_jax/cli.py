"""`emo-jax COMMAND`: parses, calls one function per command, prints its result. No logic, no heavy imports.

Each command has an `add_X(commands)` that declares its arguments, and a function of the parsed arguments that returns
(result, text): the JSON object that `--json` prints on the last line of standard output, and what it prints without.
Progress goes to standard error. Exit status: 0 done, 1 the run failed, 2 wrong usage or bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import sys
import tempfile
from typing import Any, Callable

import emo_jax
from emo_jax.errors import InputError, RunError
from emo_jax.study import commands as study_commands
from emo_jax.subsets import arguments as subset_arguments

Result = tuple[dict[str, Any], str]
_OVERRIDE = re.compile(r"--\w+(\.\w+)+(=.*)?", re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    argv, overrides = _take_overrides(list(sys.argv[1:] if argv is None else argv))
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")  # to standard error: warnings, and which kernels and dispatch were chosen
    logging.getLogger("emo_jax").setLevel(logging.INFO)
    try:
        if overrides and not args.takes_overrides:
            raise InputError(f"emo-jax {args.command} has no config to override: {' '.join(overrides)}")
        args.overrides = overrides + ([f"--seed={args.seed}"] if getattr(args, "seed", None) is not None else [])
        result, text = args.function(args)
        _print(args, result, text)
        return 0
    except InputError as e:
        return _fail(args, 2, str(e))
    except RunError as e:
        return _fail(args, 1, str(e))
    except KeyboardInterrupt:
        return _fail(args, 1, "interrupted")
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stdout = None
        return 0
    except MemoryError as e:
        return _fail(args, 1, f"out of memory: {e}")
    except Exception as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return _fail(args, 1, f"out of device memory: {str(e).splitlines()[0]}\nmore devices, a larger "
                     f"train.microbatches, train.remat=full or a smaller train.batch_size need less")


def _take_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Splits off `--a.b=c` and `--a.b c`, wherever they stand."""
    rest, overrides = [], []
    while argv:
        item = argv.pop(0)
        if not _OVERRIDE.fullmatch(item):
            rest.append(item)
        elif "=" not in item and argv and not argv[0].startswith("--"):
            overrides.append(f"{item}={argv.pop(0)}")
        else:
            overrides.append(item)
    return rest, overrides


def _print(args, result: dict[str, Any], text: str) -> None:
    if _is_primary():
        print(json.dumps(result) if args.json else text, flush=True)


def _fail(args, status: int, message: str) -> int:
    print(f"emo-jax {args.command}: {message}", file=sys.stderr, flush=True)
    if args.json and _is_primary():
        print(json.dumps({"error": message, "exit_status": status}), flush=True)
    return status


def _is_primary() -> bool:
    """Of several processes one prints. Asks JAX only where it is started: asking would start it."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


# ---- declaring ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="emo-jax", description=emo_jax.__doc__)
    parser.add_argument("--version", action="version", version=f"emo-jax {emo_jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser


def _command(commands, name: str, run: Callable[[argparse.Namespace], Result], summary: str,
             config: bool = False) -> argparse.ArgumentParser:
    """A command with `--json`; with `config`, one that also takes `--seed N` and `--a.b=c`."""
    usage = "  --a.b=c overrides a field of the config, see `emo-jax config`." if config else ""
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.{usage}")
    parser.set_defaults(function=run, takes_overrides=config, command=name)
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on the last line")
    if config:
        parser.add_argument("--seed", type=int, help="of parameters, data order and pools")
    return parser


def add_train(commands) -> None:
    parser = _command(commands, "train", train, "train a config into a folder, or go on with it", config=True)
    parser.add_argument("config", metavar="CONFIG", help="a file of configs/, or its name")
    parser.add_argument("--out", required=True, metavar="DIR", help="checkpoints, metrics and the resolved config")


def add_eval(commands) -> None:
    parser = _command(commands, "eval", evaluate, "held-out loss of a checkpoint by source label", config=True)
    parser.add_argument("checkpoint", metavar="CKPT", help="a run's folder, its checkpoints/, or one step folder")
    parser.add_argument("--data", default="", metavar="PATH", help="documents (default: those the run held out)")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--tasks", metavar="FILE_OR_NAMES", help="tasks of lm-evaluation-harness instead: names and YAML "
                        "files, separated by commas (with --subset: by that subset alone)")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question of a task")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each task")
    subset_arguments.add_eval_arguments(parser)


def add_select(commands) -> None:
    subset_arguments.add_select(commands, _command)


def add_subset(commands) -> None:
    subset_arguments.add_subset(commands, _command)


def add_study(commands) -> None:
    study_commands.add(commands, _command)


def add_generate(commands) -> None:
    parser = _command(commands, "generate", generate, "continue prompts", config=True)
    parser.add_argument("checkpoint", metavar="CKPT", help="a run's folder, its checkpoints/, or one step folder")
    parser.add_argument("--prompt", required=True, nargs="+", metavar="TEXT", help="one is printed as it is made")
    parser.add_argument("--max-new-tokens", type=int, default=0, metavar="N", help="default: 256, or what a row has left")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the most probable token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="the most probable tokens up to P")
    parser.add_argument("--subset", default="", metavar="FILE", help="of emo-jax select: use its experts only; auto: the "
                        "--keep experts that the prompts themselves (all together) route to most")
    parser.add_argument("--keep", type=int, default=0, metavar="K", help="experts of every layer, with --subset auto")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at a time")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")


def add_config(commands) -> None:
    parser = _command(commands, "config", config, "the resolved config, and what differs from the default", config=True)
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a file of configs/, or its name (default: list)")


def add_data(commands) -> None:
    group = commands.add_parser("data", help="tokenize, inspect or time the documents of a config")
    group = group.add_subparsers(required=True, metavar="tokenize|inspect|bench")
    tokenize = _command(group, "tokenize", data_tokenize, "write all documents as token ids", config=True)
    tokenize.add_argument("--out", required=True, metavar="DIR", help="tokens.npy, offsets.npy, documents.json")
    inspect = _command(group, "inspect", data_inspect, "what the documents are and how they look in a row", config=True)
    bench = _command(group, "bench", data_bench, "rows and tokens a second by worker processes", config=True)
    bench.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    for parser in (tokenize, inspect, bench):
        parser.set_defaults(command=f"data {parser.prog.split()[-1]}")
        parser.add_argument("config", metavar="CONFIG", nargs="?", default="emo_tiny",
                            help="a file of configs/, or its name (default: emo_tiny)")
    for parser in (inspect, bench):
        parser.add_argument("--run", metavar="DIR", help="use (or keep) the trained tokenizer of this run folder")


def add_bench(commands) -> None:
    group = commands.add_parser("bench", help="speed against the ideal of this machine")
    group = group.add_subparsers(required=True, metavar="step|moe|attention")
    step = _command(group, "step", bench_step, "the training step, and EMO against the standard MoE", config=True)
    step.add_argument("config", metavar="CONFIG", nargs="?", help="default: a small step for CPUs")
    moe = _command(group, "moe", bench_moe, "the experts' grouped matmul against a dense one of equal FLOPs")
    attention = _command(group, "attention", bench_attention, "attention against the plain form and the FLOP floor")
    attention.add_argument("--documents", type=int, default=4, metavar="N", help="of a row (default: 4)")
    for parser, flags in ((moe, ("tokens", "top-k", "experts", "d-model", "d-ff")),
                          (attention, ("rows", "length", "heads", "head-dim"))):
        for flag in flags:
            parser.add_argument(f"--{flag}", type=int, metavar="N", help="default: small on CPU, else the published model's")
        parser.add_argument("--kernel", default="auto")
    for parser in (step, moe, attention):
        parser.add_argument("--rounds", type=int, default=10)
        parser.set_defaults(command=f"bench {parser.prog.split()[-1]}")


def add_import(commands) -> None:
    parser = _command(commands, "import", import_, "turn a published checkpoint (Hugging Face folder, or the trainer's "
                      "state dict in safetensors) into a run folder", config=True)
    parser.add_argument("source", metavar="HF_DIR", help="config.json and *.safetensors, tokenizer.json if there is one")
    parser.add_argument("--out", required=True, metavar="DIR", help="the new run folder; an import goes on where it stopped")
    parser.add_argument("--config", default="", metavar="CONFIG", help="of training, and of a state dict's model")


def add_export(commands) -> None:
    parser = _command(commands, "export", export, "write a checkpoint for transformers and vLLM")
    parser.add_argument("checkpoint", metavar="CKPT", help="a run's folder, its checkpoints/, or one step folder")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--format", default="hf", choices=("hf", "qwen2_moe", "deepseek", "llama"),
                        help="hf: the published architecture (remote code). qwen2_moe (or deepseek), llama: the same "
                        "function of MoE and dense models in stock transformers and vLLM")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                        help="auto: as imported, else float32")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")


def add_compile(commands) -> None:
    parser = _command(commands, "compile", compile_step, "compile the training step ahead of time and say what bounds it",
                      config=True)
    parser.add_argument("config", metavar="CONFIG", help="a file of configs/, or its name")
    parser.add_argument("--topology", metavar="CHIP:GRID", help="a TPU slice, e.g. v5p:4x4x4, v5p-128, v6e:16x16; needs "
                        "emo-jax[tpu] but no TPU (default: the devices of this machine)")


COMMANDS = [add_train, add_eval, add_select, add_subset, add_study, add_generate, add_import, add_export, add_config, add_data,
            add_bench, add_compile]


# ---- running --------------------------------------------------------------------------------------------------------


def train(args) -> Result:
    from emo_jax.config import load_config

    config = load_config(args.config, args.overrides)
    from emo_jax import sharding

    sharding.start_distributed()
    from emo_jax.train import loop

    evaluations = []
    if config.train.eval_subsets:
        from emo_jax.subsets.modularity import Modularity

        evaluations.append(Modularity.make)
    if config.train.eval_tasks:
        from emo_jax.harness import TaskEvaluation

        evaluations.append(TaskEvaluation.make)
    result = loop.train(config, args.out, evaluations)
    lines = [f"{'stopped at' if result['stopped'] else 'trained to'} step {result['step']} of {result['steps']}, "
             f"{result['tokens']:,} tokens; checkpoint {result['checkpoint']}"]
    if result["held_out"]:
        from emo_jax.train.evaluate import table

        lines.append(table(result["held_out"]))
    return result, "\n".join(lines)


def evaluate(args) -> Result:
    if args.tasks:
        return evaluate_tasks(args)
    if args.subset or args.keep:
        from emo_jax.subsets import commands

        return commands.evaluate(args)
    from emo_jax import sharding

    sharding.start_distributed()
    from emo_jax.train.evaluate import evaluate_checkpoint, table

    result = evaluate_checkpoint(args.checkpoint, args.data, args.step, args.overrides)
    return result, f"{result['checkpoint']} on {result['data']}\n{table(result)}"


def evaluate_tasks(args) -> Result:
    from emo_jax import sharding

    sharding.start_distributed()
    if len(args.subset or []) > 1 or args.keep:
        raise InputError("--tasks goes with at most one --subset, and not with --keep")
    from emo_jax import harness

    result = harness.evaluate_tasks(args.checkpoint, args.tasks, subset=(args.subset or [""])[0], step=args.step,
                                    num_fewshot=args.num_fewshot, limit=args.limit, overrides=args.overrides)
    return result, f"{result['checkpoint']}\n{harness.table(result)}"


def generate(args) -> Result:
    from emo_jax import sharding

    sharding.start_distributed()
    from emo_jax.generation import commands
    from emo_jax.generation.sampling import Sampling

    def write(piece: str) -> None:
        if _is_primary():
            print(piece, end="", flush=True, file=sys.stdout)

    overrides = [o for o in args.overrides if not o.startswith("--seed=")]
    result = commands.generate(args.checkpoint, args.prompt, args.max_new_tokens,
                               Sampling(args.temperature, args.top_p, args.seed or 0), subset=args.subset,
                               keep=args.keep, step=args.step, overrides=overrides, batch_size=args.batch_size,
                               write=None if args.json else write)
    if len(args.prompt) == 1:
        return result, ""  # written already; this ends its line
    return result, "\n".join(f"{c['prompt']}{c['text']}\n" for c in result["completions"])


def import_(args) -> Result:
    from emo_jax.convert.importing import import_checkpoint

    result = import_checkpoint(args.source, args.out, args.config, args.overrides)
    return result, f"{result['parameters']:,} parameters ({result['layout']}, {result['dtype']}) in {result['checkpoint']}"


def export(args) -> Result:
    from emo_jax.convert.exporting import export_checkpoint

    result = export_checkpoint(args.checkpoint, args.out, args.format, args.dtype, args.step)
    return result, (f"{result['tensors']:,} tensors, {result['bytes'] / 1e9:.2f} GB ({result['architecture']}, "
                    f"{result['dtype']}) in {result['out']}")


def compile_step(args) -> Result:
    from emo_jax.aot import compile as aot
    from emo_jax.config import load_config

    result = aot.compile_config(load_config(args.config, args.overrides), args.topology)
    return result, aot.text(result)


def config(args) -> Result:
    from emo_jax import config as lib

    if args.config is None:
        names = lib.config_names()
        return {"configs": names}, "\n".join(names)
    resolved = lib.load_config(args.config, args.overrides)
    changed = lib.difference(resolved)
    text = lib.dumps(resolved) + "\ndiffers from the default in:\n" + "\n".join(
        f"  {key} = {new!r} (default {old!r})" for key, (old, new) in changed.items())
    return {"config": lib.to_dict(resolved), "difference": {k: {"default": a, "value": b}
                                                            for k, (a, b) in changed.items()}}, text


def data_tokenize(args) -> Result:
    from emo_jax.config import load_config
    from emo_jax.data import commands

    result = commands.tokenize(load_config(args.config, args.overrides), args.out)
    return result, f"{result['documents']:,} documents, {result['tokens']:,} tokens in {result['out']}"


def data_inspect(args) -> Result:
    from emo_jax.config import load_config
    from emo_jax.data import commands

    with _folder(args.run) as folder:
        result = commands.inspect(load_config(args.config, args.overrides), folder)
    return result, commands.inspect_report(result)


def data_bench(args) -> Result:
    from emo_jax.config import load_config
    from emo_jax.data import commands

    with _folder(args.run) as folder:
        results = commands.bench(load_config(args.config, args.overrides), folder, args.workers)
    return {"results": results}, "\n".join(
        f"{r['workers']} workers: {r['rows_per_second']:,.1f} rows/s, {r['tokens_per_second']:,.0f} tokens/s, "
        f"{r['padding']:.1%} padding, {r['startup_seconds']:.1f} s to start" for r in results)


def bench_step(args) -> Result:
    from emo_jax.bench import step
    from emo_jax.config import load_config, override

    config = load_config(args.config, args.overrides) if args.config else override(step.standard(), args.overrides)
    result = step.step(config, args.rounds)
    return result, step.report(result)


def bench_moe(args) -> Result:
    from emo_jax.bench import moe, shape

    result = moe.moe(**shape(moe.SMALL, moe.PUBLISHED, args), rounds=args.rounds, kernel=args.kernel)
    return result, moe.report(result)


def bench_attention(args) -> Result:
    from emo_jax.bench import attention, shape

    result = attention.attention(**shape(attention.SMALL, attention.PUBLISHED, args), documents=args.documents,
                                 rounds=args.rounds, kernel=args.kernel)
    return result, attention.report(result)


def _folder(path: str | None):
    """`path` as a context, or a folder that is deleted afterwards."""
    return contextlib.nullcontext(path) if path else tempfile.TemporaryDirectory()
