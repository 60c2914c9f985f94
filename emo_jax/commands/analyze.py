"""`emo-jax analyze`: what the experts of a model became, in numbers and in a page."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from emo_jax.commands import Command, Result, arguments
from emo_jax.errors import InputError


def add(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser)
    parser.add_argument("against", nargs="?", default="", metavar="CKPT2", help="another model, token by token beside it, e.g. "
                        "the standard MoE")
    parser.add_argument("--data", default="", metavar="PATH", help="labelled documents (default: those the run held out)")
    parser.add_argument("--out", required=True, metavar="DIR", help="report.html, analysis.json, figures/, tables/, cards/; "
                        "the same command goes on where it was interrupted")
    parser.add_argument("--tokens", type=arguments.at_least(1000), default=200_000, metavar="N",
                        help="of text, at most (default: 200000)")
    parser.add_argument("--tokens-per-document", type=arguments.at_least(8), default=100, metavar="N",
                        help="the first so many of each document (default: 100, as published)")
    parser.add_argument("--clusters", type=arguments.at_least(2), default=32, metavar="C",
                        help="of tokens (default: 32, as published)")
    parser.add_argument("--features", default="all", metavar="all|LAYER|document", help="what is clustered: tokens by "
                        "the router probabilities of all layers (default), or of one; or whole documents")
    parser.add_argument("--subset", nargs="+", default=[], metavar="FILE", help="files of emo-jax select for CKPT, to look "
                        "at as modules")
    parser.add_argument("--removal-tokens", type=arguments.at_least(0), default=4096, metavar="N", help="by which the cost of "
                        "removing each cluster's experts is measured; 0: not at all (default: 4096)")
    parser.add_argument("--null-tokens", type=arguments.at_least(0), default=20_000, metavar="N", help="by which the same "
                        "network with routers drawn at random is measured; 0: not at all (default: 20000)")


def run(args: Namespace) -> Result:
    from emo_jax.analysis.analyze import analyze, local_folder
    from emo_jax.analysis.looked import Options
    from emo_jax.analysis.report import text_table
    from emo_jax.checkpoints.subset import load as load_subset
    from emo_jax.loaded import load

    if args.clusters > 255:
        raise InputError(f"--clusters {args.clusters}: at most 255")
    out = local_folder(args.out)
    models = [load(args.checkpoint, args.overrides, step=args.step, data=args.data)]
    if args.against:
        models.append(load(args.against, args.overrides, data=args.data))
    subsets = {Path(path).stem: load_subset(path, models[0].saved) for path in args.subset}
    options = Options(args.tokens, args.tokens_per_document, args.clusters, args.features, args.removal_tokens,
                      args.null_tokens, args.seed or 0)
    found = analyze(models, out, options, subsets, _keep_curves(out))
    page = str(out / "report.html")
    value = {"report": page, "data": found["data"], "difference": found["difference"],
             "models": {one["name"]: one["measures"] for one in found["models"]},
             "random_router": found["random_router"] and found["random_router"]["measures"]}
    return Result(value, f"{text_table(found)}\n\nreport: {page}")


def _keep_curves(out: Path) -> dict[str, Any]:
    """What `emo-jax eval --keep --out` left in the same folder."""
    path = out / "keep_curve.json"
    try:
        models = json.loads(path.read_text())["models"] if path.exists() else {}
        return {name: {"rows": [_point(row) for row in result["subsets"]]} for name, result in models.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not what emo-jax eval --keep --out writes; move it away") from None


def _point(row: dict[str, Any]) -> dict[str, Any]:
    low, high = row["interval"] or (None, None)
    return {"share": row["share"], "keep": row["keep"], "difference": row["difference"], "low": low, "high": high}


COMMAND = Command("analyze", "what the experts became: clusters, coverage, modularity in numbers, and a page", add, run, (
    "emo-jax analyze runs/tiny --out report", "emo-jax analyze runs/tiny runs/std --data held_out.jsonl --out report"),
    overrides="checkpoint", devices=True)
