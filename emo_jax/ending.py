"""How a process of a run ends at once, from whichever thread notices that it has to: with a line that says why and where the
run can go on, and an exit status. The main thread may be waiting for something that never comes.

Commands and rooms put in what they know: `report` prints, `last_good` says where the run goes on, and of several processes
`before` tells the others.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

RESTART = 75  # EX_TEMPFAIL of sysexits.h: launchers restart on it
ASK_S = 5.0  # for an answer of `last_good`, which may have to look into a bucket


def _print(status: int, message: str) -> None:
    print(f"emo-jax: {message}", file=sys.stderr, flush=True)


report: Callable[[int, str], object] = _print
last_good: Callable[[], str] = str
before: Callable[[int, str], object] = lambda status, message: None
_lock = threading.Lock()


def end(message: str, status: int = RESTART) -> None:
    """Does not return. The first thread to come here has the word; others wait for the end."""
    with _lock:
        said = f"{message}; {where}" if (where := _asked()) else message
        report(status, said)
        before(status, said)
        os._exit(status)


def wait() -> None:
    """Returns unless another thread is ending this process."""
    with _lock:
        pass


def _asked() -> str:
    answer: list[str] = []
    asking = threading.Thread(target=lambda: answer.append(last_good()), daemon=True)
    asking.start()
    asking.join(ASK_S)
    return answer[0] if answer else ""
