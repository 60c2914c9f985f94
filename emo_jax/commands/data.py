"""`emo-jax data ...`: the documents of a config."""

from __future__ import annotations

import contextlib
import tempfile
from argparse import ArgumentParser, Namespace

from emo_jax.commands import Command, Result, arguments


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
    parser.add_argument("--out", required=True, metavar="DIR", help="tokens.npy, offsets.npy, documents.json")


def tokenize(args: Namespace) -> Result:
    from emo_jax.config import load_config
    from emo_jax.data import tools

    result = tools.tokenize(load_config(args.config, args.overrides), args.out)
    return Result(result, f"{result['documents']:,} documents, {result['tokens']:,} tokens in {result['out']}")


def add_inspect(parser: ArgumentParser) -> None:
    _add_config(parser)
    _add_run(parser)


def inspect(args: Namespace) -> Result:
    from emo_jax.config import load_config
    from emo_jax.data import tools

    with _folder(args.run) as folder:
        result = tools.inspect(load_config(args.config, args.overrides), folder)
    return Result(result, tools.inspect_report(result))


def add_bench(parser: ArgumentParser) -> None:
    _add_config(parser)
    _add_run(parser)
    parser.add_argument("--workers", type=arguments.at_least(0), nargs="+", default=[0, 1, 2], metavar="N")


def bench(args: Namespace) -> Result:
    from emo_jax.config import load_config
    from emo_jax.data import tools

    with _folder(args.run) as folder:
        results = tools.bench(load_config(args.config, args.overrides), folder, args.workers)
    return Result({"results": results}, "\n".join(
        f"{r['workers']} workers: {r['rows_per_second']:,.1f} rows/s, {r['tokens_per_second']:,.0f} tokens/s, "
        f"{r['padding']:.1%} padding, {r['startup_seconds']:.1f} s to start" for r in results))


COMMANDS = (
    Command("data tokenize", "write all documents as token ids", add_tokenize, tokenize,
            ("emo-jax data tokenize emo_tiny --data.path='texts/*.jsonl.gz' --out tokens",), "config"),
    Command("data inspect", "what the documents are and how they look in a row", add_inspect, inspect,
            ("emo-jax data inspect emo_tiny --data.path='texts/*.jsonl.gz'",), "config"),
    Command("data bench", "rows and tokens a second by worker processes", add_bench, bench,
            ("emo-jax data bench emo_tiny --workers 0 2",), "config"),
)
