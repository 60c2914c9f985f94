"""Arguments that several commands share, and what their values may be."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from emo_jax.errors import InputError
from emo_jax.subsets import methods

if TYPE_CHECKING:
    from emo_jax.loaded import LoadedModel
    from emo_jax.subsets.calibration import Calibration

CONFIG = "a file of configs/, or its name"
_OVERRIDE = re.compile(r"--\w+(\.\w+)+(=.*)?", re.DOTALL)
CKPT = "a run's folder, its checkpoints/, or one step folder"


def take_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
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


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be integers such as 64,32,16") from None


def at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer of {least} or more")
        return value

    return integer


def unicode_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text") from None
    return text


def checkpoint(parser: argparse.ArgumentParser, step: bool = True) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help=CKPT)
    if step:
        parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")


def calibration(parser: argparse._ActionsContainer, required: bool = False, several: bool = False) -> None:
    """`several`: --calibration is a list."""
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--calibration", metavar="PATH", help="documents to choose by" + (
        "; given more than once, one subset for several corpora: each is guaranteed its best experts (--quotas)" if several
        else ""), action="append" if several else "store")
    source.add_argument("--example", action="append", type=unicode_text, metavar="TEXT",
                        help="a text to choose by; may be repeated")
    parser.add_argument("--label", default="", help="only documents of this label choose")
    parser.add_argument("--documents", type=at_least(0), default=0, metavar="N", help="at most so many choose (default: "
                        "1000; 16 of each label where every label has its own subset)")


def quotas(parser: argparse._ActionsContainer, each: str) -> None:
    parser.add_argument("--quotas", type=float, nargs="+", metavar="Q", help=f"the share of --keep that each {each} is "
                        f"guaranteed of its own best experts (default: equal shares)")


def method(parser: argparse._ActionsContainer, flag: str = "--method", default: str = "layerwise") -> None:
    parser.add_argument(flag, choices=methods.NAMES, default=default, help=f"how experts are chosen (default: {default})")
    parser.add_argument("--layer-group", type=at_least(0), default=0, metavar="G", help="layerwise: recompute activations "
                        "for every G layers instead of keeping those of all the text (default: keep)")
    parser.add_argument("--activations-on-host", action="store_true", help="layerwise: keep them in host memory")


def method_options(args: argparse.Namespace) -> dict:
    """What `choose` wants of these arguments."""
    seed = args.seed or 0
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed} must be in 0..2^63 - 1")
    return {"layer_group": args.layer_group, "on_host": args.activations_on_host, "seed": seed}


def calibration_text(loaded: LoadedModel, args: argparse.Namespace, path: str | None) -> Calibration:
    """The `Calibration` of a path of --calibration, or of --example."""
    from emo_jax.data.documents import Examples
    from emo_jax.subsets import calibration as lib

    if path is not None:
        return lib.open_calibration(loaded.config, loaded.tokenizer, path, args.label, args.documents)
    if not all(args.example):
        raise InputError("--example is empty; give a text")
    source = Examples("--example", args.example)
    return lib.from_source(loaded.config, source, loaded.tokenizer, {"": range(len(source))})
