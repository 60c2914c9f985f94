"""`emo-jax completion`: what a shell needs to complete commands and flags."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from emo_jax.commands import Command, Result
from emo_jax.errors import InputError


def add(parser: ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def run(args: Namespace) -> Result:
    try:
        import shtab
    except ImportError:
        raise InputError("completion needs shtab: pip install 'emo-jax[completion]'") from None
    script = shtab.complete(args.parser, args.shell)
    return Result({"script": script}, script)


COMMAND = Command("completion", "print the completion of commands and flags for a shell", add, run,
                  ('eval "$(emo-jax completion bash)"',))
