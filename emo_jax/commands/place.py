"""`emo-jax place`: experts that work together on one expert-parallel shard."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from emo_jax.commands import Command, Result, arguments
from emo_jax.errors import InputError

_ROWS = {"crossing_home": "choices that leave the shard where the document's rows lie", "shards": "shards that a token needs",
         "busiest": "load of the busiest shard over the mean"}


def add(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser)
    parser.add_argument("--shards", type=arguments.at_least(2), required=True, metavar="N", help="the size of mesh.expert")
    parser.add_argument("--data", default="", metavar="PATH", help="documents (default: those the run held out); half of them "
                        "choose, the other half measures")
    parser.add_argument("--tokens", type=arguments.at_least(1000), default=200_000, metavar="N",
                        help="of text, at most (default: 200000)")
    parser.add_argument("--max-load", type=float, default=1.1, metavar="X",
                        help="of the busiest shard over the mean, where the text chooses (default: 1.1)")
    parser.add_argument("--out", metavar="RUN", help="the same model with its experts in that order")


def run(args: Namespace) -> Result:
    from emo_jax.analysis.activations import collect
    from emo_jax.analysis.placement import capacities, compare
    from emo_jax.analysis.text import read_text
    from emo_jax.checkpoints.subset import require_experts
    from emo_jax.loaded import load
    from emo_jax.subsets.calibration import sample
    from emo_jax.surgery.permute import permute

    loaded = load(args.checkpoint, args.overrides, step=args.step, data=args.data)
    require_experts(loaded.config)
    capacities(loaded.config, args.shards)
    source, numbers = loaded.documents_to_score()
    if len(numbers) < 2:
        raise InputError(f"{source.name}: two documents are needed, one to choose by and one to measure")
    half = set(sample(numbers, len(numbers) // 2, args.seed or 0).tolist())
    texts = [read_text(loaded.config, source, loaded.tokenizer, [i for i in numbers if (int(i) in half) == chooses],
                       loaded.config.data.sequence_length, args.tokens // 2) for chooses in (True, False)]
    placement, found = compare(*(collect(loaded, text) for text in texts), loaded.config, args.shards, args.max_load)
    value = {"checkpoint": str(loaded.saved.path), "data": source.name, "shards": args.shards,
             "tokens": [len(text.tokens) for text in texts], "measures": found, "out": None}
    if args.out:
        value["out"] = str(permute(loaded.saved, placement.order, args.out))
    return Result(value, _table(value))


def _table(value: dict[str, Any]) -> str:
    lines = [f"{'':60} {'before':>24} {'after':>24} {'saved':>24}"]
    for key, title in _ROWS.items():
        m = value["measures"][key]
        lines.append(f"{title:60}" + "".join(f" {_cell(m[side]):>24}" for side in ("before", "after", "saved")))
    if value["out"]:
        lines.append(value["out"])
    return "\n".join(lines)


def _cell(m: dict[str, Any]) -> str:
    return f"{m['value']:.3f}" + (f" [{m['low']:.3f}, {m['high']:.3f}]" if m["low"] is not None else "")


COMMAND = Command("place", "which experts should lie on one expert-parallel shard, and what that saves", add, run, (
    "emo-jax place runs/emo --shards 8", "emo-jax place runs/emo --shards 8 --out runs/placed"),
    overrides="checkpoint", devices=True)
