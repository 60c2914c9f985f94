"""What a person sees of a failure: one sentence with a reason, never a stack of calls (which `--debug` shows)."""

from __future__ import annotations

import errno
import logging
import sys
import threading
from collections.abc import Iterator

from emo_jax.ending import RESTART
from emo_jax.errors import InputError, RestartError, RunError
from emo_jax.files import shortened

FULL = ("No space left on device", "Disk quota exceeded")
EXCHANGES = ("Gloo ", "NCCL ", "coordination service")  # in messages of what a slow or lost process made fail
DEVICES = ("JaxRuntimeError", "XlaRuntimeError")  # names, as importing JAX takes seconds


def explain(e: BaseException) -> tuple[int, str]:
    """(exit status, message) of an exception that ended a command."""
    if isinstance(e, InputError):
        return 2, str(e)
    exchange = [x for x in _chain(e) if any(text in str(x) for text in EXCHANGES)]
    if isinstance(e, RunError):
        return RESTART if exchange or isinstance(e, RestartError) else 1, str(e)
    if isinstance(e, KeyboardInterrupt):
        return 1, "interrupted"
    if isinstance(e, MemoryError):
        return 1, f"out of memory: {e}"
    if isinstance(e, OSError) and e.errno is not None:
        what = {errno.ENOSPC: "; its disk is full", errno.EROFS: "; its disk can only be read"}.get(e.errno, "")
        return 1, f"{e.filename}: {e.strerror}{what}" if e.filename else f"{e.strerror}{what}"
    if any(text in str(e) for text in FULL):  # as the libraries that write arrays say it
        return 1, f"the disk is full: {_first_line(e)}"
    if exchange:
        return RESTART, f"the exchange between processes failed: {_first_line(exchange[-1])}"
    if "RESOURCE_EXHAUSTED" in str(e):
        return 1, (f"out of device memory: {_first_line(e)}\nmore devices, a larger train.microbatches, train.remat=full or a "
                   f"smaller train.batch_size need less")
    return 1, f"internal error: {_first_line(e)}; --debug shows where, please report it"


def may_be_of_another_process(e: BaseException) -> bool:
    """Whether it may come from one of several processes that was lost meanwhile: nobody thought of it, or it is of the
    devices, whose exchanges fail then."""
    if isinstance(e, (InputError, RestartError, KeyboardInterrupt)):
        return False
    status, message = explain(e)
    return status == RESTART or "internal error" in message or any(type(x).__name__ in DEVICES for x in _chain(e))


def _chain(e: BaseException | None) -> Iterator[BaseException]:
    """The exception and what it came from."""
    while e is not None:
        yield e
        e = e.__cause__ or e.__context__


def hide_tracebacks() -> None:
    """For the rest of this process: threads, destructors and loggers print none. What ends a command reaches `explain` in the
    main thread, from a thread that failed as well where its result is waited for."""
    threading.excepthook = _in_one_line
    sys.unraisablehook = lambda args: None
    logging.raiseExceptions = False  # a log that cannot be written ends nothing
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)  # which repeats what it raises
    make = logging.getLogRecordFactory()

    def without_stack(*args, **kwargs) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.exc_info = record.exc_text = record.stack_info = None
        return record

    logging.setLogRecordFactory(without_stack)


def _in_one_line(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread else "?"
    print(f"emo-jax: thread {name} ended: {_first_line(args.exc_value)}", file=sys.stderr, flush=True)


def _first_line(e: BaseException | None) -> str:
    return f"{type(e).__name__}: {shortened((str(e).strip() or 'no message').splitlines()[0], 400)}"
