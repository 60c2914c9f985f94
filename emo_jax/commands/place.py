"""`emo-jax place`: experts that work together on one expert-parallel shard."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from emo_jax.commands import Command, Result, arguments

_ROWS = {"shards": "shards that have the experts of a token",
         "crossing": "choices on another shard than the document",
         "crossing_at_home": "  with documents where their experts are",
         "copies": "rows sent of a token, once to each other shard",
         "copies_at_home": "  with documents where their experts are",
         "busiest": "load of the busiest shard over the mean",
         "busiest_of_batch": "  of each batch of documents"}


def add(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser)
    parser.add_argument("--shards", type=arguments.at_least(2), required=True, metavar="N", help="the size of mesh.expert")
    parser.add_argument("--data", default="", metavar="PATH", help="documents (default: those the run held out); some of them "
                        "choose, the others measure")
    parser.add_argument("--choose-share", type=_between(0, 1), default=0.5, metavar="X",
                        help="of the documents of every label that choose (default: 0.5)")
    parser.add_argument("--tokens", type=arguments.at_least(1000), default=200_000, metavar="N",
                        help="of text, at most (default: 200000)")
    parser.add_argument("--max-load", type=_between(1, 1000), default=1.1, metavar="X",
                        help="of the busiest shard over the mean, where the text chooses (default: 1.1)")
    parser.add_argument("--out", metavar="RUN", help="the same model with its experts in that order; parameters only")


def _between(low: float, high: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"{text!r} must be a number between {low:g} and {high:g}")
        return value

    return number


def run(args: Namespace) -> Result:
    from emo_jax.analysis.activations import expert_ids
    from emo_jax.analysis.placement import Choices, capacities, two_parts
    from emo_jax.analysis.text import LEAST_TOKENS, read_text
    from emo_jax.analysis.traffic import BATCH, compare
    from emo_jax.checkpoints.checkpoint import require_new
    from emo_jax.checkpoints.subset import require_experts
    from emo_jax.loaded import load
    from emo_jax.subsets.calibration import sample
    from emo_jax.surgery.permute import permute, require_movable

    loaded = load(args.checkpoint, args.overrides, step=args.step, data=args.data)
    require_experts(loaded.config)
    capacities(loaded.config, args.shards)
    if args.out:
        require_movable(loaded.saved)
        require_new(args.out)
    source, numbers = loaded.documents_to_score()
    numbers = sample(numbers, args.tokens // LEAST_TOKENS, args.seed or 0)
    parts = two_parts(source, numbers, args.choose_share, args.seed or 0)
    length, shares = loaded.config.data.sequence_length, (args.choose_share, 1 - args.choose_share)
    texts = [read_text(loaded.config, source, loaded.tokenizer, part, length, round(args.tokens * share))
             for part, share in zip(parts, shares)]
    placement, measures = compare(*(Choices(text, expert_ids(loaded, text)) for text in texts), loaded.config, args.shards,
                                  args.max_load)
    value = {"checkpoint": str(loaded.saved.path), "data": source.name, "shards": args.shards, "batch_documents": BATCH,
             "documents": [len(text.labels) for text in texts], "tokens": [len(text.tokens) for text in texts],
             "measures": measures, "out": None}
    if args.out:
        value["out"] = str(permute(loaded.saved, placement.order, args.out))
    return Result(value, _table(value))


def _table(value: dict[str, Any]) -> str:
    (_, documents), (_, tokens) = value["documents"], value["tokens"]
    lines = [f"{documents:,} documents, {tokens:,} tokens that did not choose; means of the layers, without pools; 95 %",
             f"{'':52} {'before':>22} {'after':>22} {'saved':>24}"]
    for key, title in _ROWS.items():
        m = value["measures"][key]
        lines.append(f"{title:52} {_cell(m['before']):>22} {_cell(m['after']):>22} {_cell(m['saved']):>24}")
    if value["out"]:
        lines.append(value["out"])
    return "\n".join(lines)


def _cell(m: dict[str, Any]) -> str:
    return f"{m['value']:.3f}" + (f" [{m['low']:.3f}, {m['high']:.3f}]" if m["low"] is not None else "")


COMMAND = Command("place", "which experts should lie on one expert-parallel shard, and what that saves", add, run, (
    "emo-jax place runs/emo --shards 8", "emo-jax place runs/emo --shards 8 --out runs/placed"),
    overrides="checkpoint", devices=True)
