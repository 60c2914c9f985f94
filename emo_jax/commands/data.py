"""`emo-jax data ...`: the documents of a config."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import TYPE_CHECKING

from emo_jax import buckets
from emo_jax.commands import Command, Result, arguments
from emo_jax.errors import InputError

if TYPE_CHECKING:
    from emo_jax.config import Config


def _add_config(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", default="emo_tiny",
                        help=f"{arguments.CONFIG} (default: emo_tiny)")


def _add_run(parser: ArgumentParser) -> None:
    parser.add_argument("--run", metavar="DIR", help="use (or keep) the trained tokenizer of this run folder")


def _folder(path: str | None):
    """`path` as a context, or a folder that is deleted afterwards."""
    return contextlib.nullcontext(path) if path else tempfile.TemporaryDirectory()


def add_tokenize(parser: ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="token shards, manifest.json, tokenizer.json; the same "
                        "command goes on with what is unfinished there")
    parser.add_argument("--shards", type=arguments.at_least(1), metavar="N", help="how many token files (default: 16)")
    parser.add_argument("--shard", type=_part, default=(0, 1), metavar="I/N", help="only job I (from 0) of N that share the "
                        "work, such as $JOB_COMPLETION_INDEX/64 or $SLURM_ARRAY_TASK_ID/64; --shards is then N if not given")
    parser.add_argument("--processes", type=arguments.at_least(1), default=0, metavar="P", help="default: one a core")
    parser.add_argument("--runner", choices=("local", "beam"), default="local", help="beam: on Apache Beam instead of "
                        "processes of this machine (pip install 'emo-jax[beam]')")
    parser.add_argument("--beam-option", action="append", default=[], metavar="NAME=VALUE", help="such as "
                        "runner=DataflowRunner; may be repeated")
    parser.add_argument("--no-duplicates", action="store_true", help="of documents with the same text only the first")
    parser.add_argument("--min-tokens", type=arguments.at_least(0), default=1, metavar="A",
                        help="leave out shorter documents (default: 1: only empty ones)")
    parser.add_argument("--max-tokens", type=arguments.at_least(0), default=0, metavar="B", help="leave out longer ones")


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ArgumentTypeError(f"{text!r} must be I/N such as 0/64, with I from 0 to N - 1")
    return int(found[1]), int(found[2])


def tokenize(args: Namespace) -> Result:
    from emo_jax.config import load_config
    from emo_jax.data import tokenize as lib

    jobs = args.shard[1]
    if args.shards and args.shards < jobs:
        raise InputError(f"--shards {args.shards} is less than the {jobs} jobs of --shard")
    job = lib.open_tokenization(load_config(args.config, args.overrides), args.out, args.shards or (jobs if jobs > 1 else 0),
                                args.min_tokens, args.max_tokens, args.no_duplicates)
    result = lib.tokenize(job, args.processes, args.shard, args.beam_option if args.runner == "beam" else None)
    return Result(result, lib.report(result))


def add_verify(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="what `data tokenize` wrote")
    parser.add_argument("--sizes", action="store_true", help="only the sizes of the files, as `train` does: reads none of them")


def verify(args: Namespace) -> Result:
    from emo_jax.data.shards import MANIFEST, parse_manifest
    from emo_jax.data.verify import verify
    from emo_jax.files import folder_path

    folder = folder_path(args.folder, "DIR")
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} holds no {MANIFEST}: not what `emo-jax data tokenize` wrote, or not complete")
    manifest = parse_manifest(path.read_text(), str(path))
    size = verify(folder, manifest, not args.sizes)
    tokens, documents = sum(s.tokens for s in manifest.shards), sum(s.documents for s in manifest.shards)
    result = {"shards": len(manifest.shards), "documents": documents, "tokens": tokens, "bytes": size,
              "checksums": not args.sizes}
    return Result(result, f"{folder}: {len(manifest.shards)} shards, {documents:,} documents, {tokens:,} tokens, {size:,} "
                          f"bytes: {'sizes' if args.sizes else 'sizes and checksums'} are right")


def add_inspect(parser: ArgumentParser) -> None:
    _add_config(parser)
    _add_run(parser)
    parser.add_argument("--out", metavar="FILE.png", help="the lengths of the documents as a figure")


def inspect(args: Namespace) -> Result:
    from emo_jax.config import load_config
    from emo_jax.data import inspect as lib
    from emo_jax.files import given_path

    picture = given_path(args.out, "--out") if args.out else None
    if picture and picture.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--out {args.out} must end in .png, .svg or .pdf")
    with _folder(args.run) as folder:
        result = lib.inspect(load_config(args.config, args.overrides), folder)
    if picture:
        lib.save_picture(result, picture)
    return Result(result, lib.inspect_report(result, sys.stdout.isatty() and not args.json))


def add_window(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=f"{arguments.CONFIG} (default: that of --run)")
    parser.add_argument("--rows", type=_rows, required=True, metavar="A:B", help="rows A to B - 1 of the run, counted from 0; "
                        "the batch of the step that metrics.jsonl calls S is the rows (S - 1) * train.batch_size to S * "
                        "train.batch_size - 1")
    parser.add_argument("--run", metavar="DIR", help="the folder of the run: its config, its tokenizer, and its "
                        "checkpoints, from which rows of text are reached sooner than from the start")


def _rows(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ArgumentTypeError(f"{text!r} must be A:B such as 0:16, with A less than B")
    return int(found[1]), int(found[2])


def window(args: Namespace) -> Result:
    from emo_jax.config import load_config, override
    from emo_jax.data.tools import open_data
    from emo_jax.data.window import window, window_report

    if not args.config and not args.run:
        raise InputError("give CONFIG, or --run for that of a run")
    config = load_config(args.config, args.overrides) if args.config else override(_config_of(args.run), args.overrides)
    with _folder(args.run) as folder:
        position = _position(args.run, args.rows[0] // config.train.batch_size)
        rows = window(config, *open_data(config, folder), *args.rows, position)
    return Result({"rows": rows}, window_report(rows))


def _config_of(run: str) -> Config:
    from emo_jax.config import from_dict
    from emo_jax.files import given_path

    path = given_path(run, "--run") / "config.json"
    try:
        return from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, *buckets.errors(path)) as e:
        raise InputError(f"{path}: not the config of a run ({e})") from None


def _position(run: str | None, step: int) -> tuple[int, list] | None:
    """Where the rows stood at the last checkpoint of a run that is not after `step`."""
    from emo_jax.checkpoints import checkpoint
    from emo_jax.files import given_path

    folder = given_path(run or "", "--run") / checkpoint.FOLDER
    saved = [s for s in checkpoint.steps(folder) if s <= step] if run else []
    rows = checkpoint.read_step(folder / str(saved[-1])).position().get("rows") if saved else None
    return (saved[-1], rows) if rows else None


def add_bench(parser: ArgumentParser) -> None:
    _add_config(parser)
    _add_run(parser)
    parser.add_argument("--workers", type=arguments.at_least(0), nargs="+", default=[0, 1, 2], metavar="N",
                        help="processes that tokenize, or threads that read token files")
    parser.add_argument("--grain", action="store_true", help="token files: also Grain's ArrayRecord reader and packer, on the "
                        "same documents")


def bench(args: Namespace) -> Result:
    from emo_jax.config import load_config
    from emo_jax.data import bench as lib

    with _folder(args.run) as folder:
        results = lib.bench(load_config(args.config, args.overrides), folder, args.workers, against_grain=args.grain)
    return Result({"results": results}, lib.bench_report(results))


COMMANDS = (
    Command("data tokenize", "write all documents as token shards", add_tokenize, tokenize,
            ("emo-jax data tokenize emo_1b14b_1t --data.path='texts/*.jsonl.zst' --out tokens --no-duplicates",
             "emo-jax data tokenize emo_1b14b_1t --data.path=texts --out tokens --shards 1024 --shard 3/64"),
            "config"),
    Command("data verify", "check the files of token shards against their manifest", add_verify, verify,
            ("emo-jax data verify tokens",)),
    Command("data inspect", "what the documents are and how they look in rows", add_inspect, inspect,
            ("emo-jax data inspect emo_tiny --data.path='texts/*.jsonl.gz' --out lengths.png",), "config"),
    Command("data window", "the exact documents of any stretch of a run's rows", add_window, window,
            ("emo-jax data window --run runs/emo --rows 1024:1040",
             "emo-jax data window emo_tiny --data.path='texts/*.jsonl.gz' --rows 0:16 --json"), "config"),
    Command("data bench", "rows and tokens a second, against the disk, the tokenizer or Grain", add_bench, bench,
            ("emo-jax data bench emo_tiny --workers 0 2",
             "emo-jax data bench emo_1b14b_1t --data.path=tokens --workers 1 4 --grain"), "config"),
)
