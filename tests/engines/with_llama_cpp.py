"""llama.cpp, by llama-cpp-python; keys and values are kept in float32, as float16 would be another function."""

import sys

import numpy as np
from answers import PROMPT, TIMED, WRITTEN, of_logits, rows, save, timed
from llama_cpp import GGML_TYPE_F32, Llama

tokens = rows()
model = Llama(sys.argv[1], n_ctx=max(tokens.shape[1], PROMPT + TIMED), logits_all=True, verbose=False, use_mmap=False,
              type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)


def logits(row):
    model.reset()
    model.eval(row.tolist())
    return np.array(model.scores[:len(row)])


def write(prompt, count):
    model.reset()
    made = []
    for token in model.generate(prompt.tolist(), temp=0.0, repeat_penalty=1.0):
        made.append(token)
        if len(made) == count:
            return made


found = [of_logits(logits(row), row) for row in tokens]
save(*zip(*found), [write(row[:PROMPT], WRITTEN) for row in tokens], timed(lambda: len(write(tokens[0, :PROMPT], TIMED))))
