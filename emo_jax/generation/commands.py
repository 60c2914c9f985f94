"""What `emo-jax generate` does."""

from __future__ import annotations

import time
from typing import Any, Callable

import numpy as np

from emo_jax.data.tokenizer import Tokenizer
from emo_jax.errors import InputError
from emo_jax.generation.engine import Generator
from emo_jax.generation.opened import open_for_inference
from emo_jax.generation.sampling import Sampling
from emo_jax.subsets.choose import choose_for_prompt
from emo_jax.subsets.opened import Opened as OpenedModel

Write = Callable[[str], None]
AUTO = "auto"


def generate(path: str, prompts: list[str], max_new_tokens: int, sampling: Sampling, *, subset: str = "",
             keep: int = 0, step: int | None = None, overrides: list[str] = (), batch_size: int = 16,
             write: Write | None = None) -> dict[str, Any]:
    """Continues the prompts; an empty one begins a document. With one prompt and `write`, its text goes there piece by
    piece as it is made. `max_new_tokens` 0: 256, or what is left of a row. `subset`: a file, or AUTO for the `keep`
    experts of every layer that the prompts route to most."""
    sampling.check()
    if (subset == AUTO) != (keep > 0):
        raise InputError(f"--subset {AUTO} and --keep K go together")
    opened = open_for_inference(path, "" if subset == AUTO else subset, step, overrides)
    tokenizer, length = opened.tokenizer, opened.config.data.sequence_length
    ids = [tokenizer.encode(p).tolist() or [tokenizer.eos_id] for p in prompts]
    longest = max(map(len, ids))
    if longest >= length:
        raise InputError(f"a prompt of {longest} tokens leaves nothing of the {length} tokens of a row "
                         f"(data.sequence_length)")
    count = max_new_tokens or min(256, length - longest)
    allowed = opened.allowed
    if subset == AUTO:
        model = OpenedModel(opened.config, opened.mesh, opened.params, tokenizer, opened.checkpoint)
        allowed = choose_for_prompt(model, ids, keep).mask()
    generator = Generator(opened.config, opened.mesh, opened.params, opened.eos_ids, allowed, batch_size)
    made: list[list[int]] = [[] for _ in ids]
    printer = TextStream(tokenizer, ids[0]) if write and len(ids) == 1 else None
    if printer:
        write(prompts[0])
    started = time.monotonic()
    for row, tokens in generator.stream(ids, count, sampling):
        made[row].extend(tokens)
        if printer:
            write(printer.more(tokens))
    seconds = time.monotonic() - started
    if printer:
        write(printer.rest())
    total = sum(map(len, made))
    return {"checkpoint": str(opened.checkpoint.path), "tokens": total, "tokens_per_second": total / seconds,
            "completions": [{"prompt": p, "text": continuation(tokenizer, i, m), "tokens": m,
                             "finish_reason": "length" if len(m) == count else "stop"}
                            for p, i, m in zip(prompts, ids, made)]}


def continuation(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text that `tokens` add to a prompt."""
    before = tokenizer.decode(np.array(prompt))
    return tokenizer.decode(np.array([*prompt, *tokens]))[len(before):]


class TextStream:
    """Turns tokens into text piece by piece; a character of several tokens comes with the last of them."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self._tokenizer, self._prompt, self._tokens, self._written = tokenizer, prompt, [], 0

    def more(self, tokens: list[int]) -> str:
        self._tokens += tokens
        text = continuation(self._tokenizer, self._prompt, self._tokens)
        return "" if text.endswith("\ufffd") else self._new(text)

    def rest(self) -> str:
        return self._new(continuation(self._tokenizer, self._prompt, self._tokens))

    def _new(self, text: str) -> str:
        start, self._written = self._written, len(text)
        return text[start:]
