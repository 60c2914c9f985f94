"""`emo-jax COMMAND`: the table of commands, and what all of them have in common: parsing, printing, exit statuses.

With --json a command's result is one JSON object on the last line of standard output; progress goes to standard error. Exit
status: 0 done, 1 the run failed, 2 wrong usage or bad input, 75 ended before it was done (the same command goes on).
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import logging
import re
import sys
import time
import traceback
from typing import Any, NoReturn

import emo_jax
from emo_jax import ending, failures, machine
from emo_jax.commands import (
    Command,
    analyze,
    bench,
    compile,
    completion,
    config,
    data,
    eval,
    export,
    generate,
    goodput,
    import_,
    place,
    plan,
    replay,
    select,
    smoke,
    study,
    subset,
    train,
)
from emo_jax.commands.arguments import take_overrides
from emo_jax.errors import InputError
from emo_jax.progress import is_primary

COMMANDS = (train.COMMAND, goodput.COMMAND, smoke.COMMAND, replay.COMMAND, eval.COMMAND, select.COMMAND, *subset.COMMANDS,
            *study.COMMANDS, analyze.COMMAND, place.COMMAND, generate.COMMAND, import_.COMMAND, export.COMMAND, config.COMMAND,
            *data.COMMANDS, *bench.COMMANDS, compile.COMMAND, plan.COMMAND, completion.COMMAND)
GROUPS = {"subset": "what to do with a subset", "study": "whether modules emerged",
          "data": "the documents of a config", "bench": "speed against the ideal of this machine"}


def main(argv: list[str] | None = None) -> int:
    """argv: as typed; None: this process is that command, to its end."""
    own, (argv, overrides) = argv is None, take_overrides(list(sys.argv[1:] if argv is None else argv))
    args = parser().parse_args(argv)
    if own and not args.debug:
        failures.hide_tracebacks()
    command: Command = args.command
    if own and (command.devices or command.logs):
        machine.use_huge_pages()
    logging.basicConfig(format="%(message)s")  # to standard error: warnings, and which kernels and dispatch were chosen
    logging.getLogger("emo_jax").setLevel(logging.INFO if command.logs or args.verbose else logging.WARNING)
    ending.report = functools.partial(_say, args)
    try:
        if overrides and not command.overrides:
            raise InputError(f"emo-jax {command.name} has no config to override: {' '.join(overrides)}")
        if command.overrides == "config" and args.seed is not None:
            overrides.append(f"--seed={args.seed}")
        args.overrides, args.began = overrides, machine.process_began() if own else time.time()
        if command.devices:
            from emo_jax import processes

            processes.start_distributed()
        result = command.run(args)
        if is_primary():
            print(json.dumps(result.value) if args.json else result.text, flush=True)
        status = ending.RESTART if result.restart else 0
        if liveness := _liveness():
            liveness.leave(status)
        return status
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stdout = None
        return 0
    except (Exception, KeyboardInterrupt) as e:
        if failures.may_be_of_another_process(e) and (liveness := _liveness()):
            liveness.await_verdict()
        return _fail(args, *failures.explain(e))


def _liveness() -> Any:
    """`emo_jax.liveness` if several processes were started: importing it here would import JAX for every command."""
    return sys.modules.get("emo_jax.liveness")


def _fail(args, status: int, message: str) -> int:
    if args.debug:
        traceback.print_exc()
    _say(args, status, message)
    if liveness := _liveness():
        liveness.fail(status, message)
    return status


def _say(args, status: int, message: str) -> None:
    print(f"emo-jax {args.command.name}: {message}", file=sys.stderr, flush=True)
    if args.json and is_primary():
        print(json.dumps({"error": message, "exit_status": status}), flush=True)


class _Parser(argparse.ArgumentParser):
    """Says what a mistyped command or choice may have meant."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            close = difflib.get_close_matches(found[1], re.findall(r"[\w.-]+", found[2]), n=2)
            message += f"; did you mean {' or '.join(close)}?" if close else ""
        super().error(message)


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="emo-jax", description=(emo_jax.__doc__ or "").partition("\n\n")[0])
    top.add_argument("--version", action="version", version=f"emo-jax {emo_jax.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    groups = {}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group and group not in groups:
            names = [c.name.split()[1] for c in COMMANDS if c.name.startswith(f"{group} ")]
            groups[group] = commands.add_parser(group, help=f"{GROUPS[group]}: {', '.join(names)}").add_subparsers(
                required=True, metavar="|".join(names))
        _add(top, groups[group] if group else commands, name, command)
    return top


def _add(top, commands, name: str, command: Command) -> None:
    more = "  --a.b=c overrides a field of the config, see `emo-jax config`." if command.overrides else ""
    one = commands.add_parser(name, help=command.summary,
                              description=f"{command.summary[0].upper()}{command.summary[1:]}.{more}",
                              epilog="\n  ".join(["examples:", *command.examples]),
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    one.set_defaults(command=command, parser=top)
    command.add(one)
    if command.overrides:
        one.add_argument("--seed", type=int, help="seed of parameters, data order and pools" if command.overrides == "config"
                         else "seed of what this command draws; the model's own stays")
    one.add_argument("--json", action="store_true", help="the result as one JSON object on the last line")
    one.add_argument("-v", "--verbose", action="store_true", help="also which kernels and dispatch were chosen")
    one.add_argument("--debug", action="store_true", help="where a failure came from, with the calls that led there")

