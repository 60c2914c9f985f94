"""What a script of this folder answers: `python with_ENGINE.py MODEL ROWS.npy ANSWERS.npz`.

ROWS: int32 [n, T] tokens. Answers: `argmax` [n, T], the most probable next token after each; `logprob` [n, T - 1], of the token
that follows; `greedy` [n, 24], what is written after the first 16 tokens; and of the process: `peak` bytes of memory, and
`written` tokens a second when one row is continued. Runs in the engine's own environment: numpy and the engine alone.
"""

import resource
import sys
import time

import numpy as np

PROMPT, WRITTEN, TIMED = 16, 24, 128


def rows():
    return np.load(sys.argv[2])


def of_logits(logits, tokens):
    """(argmax, logprob) of logits [T, V]."""
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return logits.argmax(-1), np.take_along_axis(logprobs[:-1], tokens[1:, None], -1)[:, 0]


def timed(write):
    """Tokens a second of `write()`, the second time, which returns how many it wrote."""
    write()
    start = time.perf_counter()
    count = write()
    return count / (time.perf_counter() - start)


def save(argmax, logprob, greedy, written=0.0):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":
        peak *= 1024
    np.savez(sys.argv[3], argmax=np.asarray(argmax, np.int64), logprob=np.asarray(logprob, np.float64),
             greedy=np.asarray(greedy, np.int64), peak=peak, written=written)
