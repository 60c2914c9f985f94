"""mlx-lm, which converts nothing: it reads the folder of an export."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from answers import PROMPT, TIMED, WRITTEN, of_logits, rows, save, timed
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
model, _ = load_model(Path(sys.argv[1]))


def write(prompt, count):
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=count)]


found = [of_logits(np.array(model(mx.array(row[None])).astype(mx.float32))[0], row) for row in rows()]
save(*zip(*found), [write(row[:PROMPT], WRITTEN) for row in rows()],
     timed(lambda: len(write(rows()[0, :PROMPT], TIMED))))
