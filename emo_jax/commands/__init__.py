"""The commands of `emo-jax`, one file each (a group of commands is one file): arguments and what is done with them.

A command declares its arguments in `add(parser)` and does its work in `run(args)`, which returns a `Result`. Modules import
nothing heavy at the top, because every start of `emo-jax` reads them all; `run` imports what it needs. What is computed is in
the rooms below; here is only what a person typed, and what a person sees.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


class Result(NamedTuple):
    value: dict[str, Any]  # what --json prints
    text: str  # what is printed without it
    restart: bool = False  # it stopped before it was done: exit status 75


@dataclass(frozen=True)
class Command:
    name: str  # with its group, if it is in one: "subset merge"
    summary: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Result]
    examples: tuple[str, ...]
    # Whose fields `--a.b=c` overrides: of a config that the command makes, whose seed is then `--seed`; or of a checkpoint's,
    # whose seed stays, and `--seed` is that of the command's own draws.
    overrides: Literal["", "config", "checkpoint"] = ""
    devices: bool = False  # whether it opens a checkpoint to compute: then the processes of one run join before it
    logs: bool = False  # whether it always says which kernels were chosen, not only with --verbose
