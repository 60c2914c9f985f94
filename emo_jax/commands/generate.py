"""`emo-jax generate`: continue prompts."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from typing import Any

from emo_jax.commands import Command, Result, arguments
from emo_jax.errors import InputError

AUTO = "auto"
NEW_TOKENS = 256  # where a row has room for them


def add(parser: ArgumentParser) -> None:
    arguments.checkpoint(parser)
    parser.add_argument("--prompt", required=True, nargs="+", type=arguments.unicode_text, metavar="TEXT",
                        help="an empty one begins a document; of several, each is printed under a line of its own")
    parser.add_argument("--max-new-tokens", type=arguments.at_least(0), default=0, metavar="N",
                        help=f"default: {NEW_TOKENS}, or what a row has left")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the most probable token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="the most probable tokens up to P")
    parser.add_argument("--subset", default="", metavar="FILE", help="a file of emo-jax select: use its experts only; auto: "
                        "each prompt uses the --keep experts that it routes to most itself")
    parser.add_argument("--keep", type=arguments.at_least(0), default=0, metavar="K", help="experts of every layer, with "
                        "--subset auto")
    parser.add_argument("--batch-size", type=arguments.at_least(1), default=16, metavar="N", help="prompts at a time")


def run(args: Namespace) -> Result:
    from emo_jax.generation.sampling import Sampling
    from emo_jax.loaded import load
    from emo_jax.progress import is_primary, say
    from emo_jax.subsets.choose import choose_for_prompts

    sampling = Sampling(args.temperature, args.top_p, args.seed or 0).check()
    if (args.subset == AUTO) != (args.keep > 0):
        raise InputError(f"--subset {AUTO} and --keep K go together")
    loaded = load(args.checkpoint, args.overrides, step=args.step, mesh="experts",
                  subset=None if args.subset in ("", AUTO) else args.subset)
    tokenizer, length = loaded.tokenizer, loaded.config.data.sequence_length
    prompts = [tokenizer.encode(p).tolist() or [tokenizer.eos_id] for p in args.prompt]
    longest = max(map(len, prompts))
    if longest >= length:
        raise InputError(f"--prompt: {longest} tokens leave nothing of the {length} tokens of a row (data.sequence_length)")
    count = args.max_new_tokens or min(NEW_TOKENS, length - longest)
    own = choose_for_prompts(loaded, prompts, args.keep) if args.subset == AUTO else []
    if own or loaded.subset:
        say(f"with {(loaded.subset or own[0]).summary()}: {'those of each prompt' if own else args.subset}")
    masks = [subset.mask() for subset in own] or None

    def write(piece: str) -> None:
        if is_primary():
            print(piece, end="", flush=True)

    shown = len(prompts) == 1 and not args.json  # as it is made
    stream, written, made = tokenizer.stream(prompts[0]), "", [[] for _ in prompts]
    write(args.prompt[0] if shown else "")
    started = time.monotonic()
    for row, tokens in loaded.generator(None, args.batch_size).stream(prompts, count, sampling, allowed=masks):
        made[row].extend(tokens)
        if shown:
            written += (piece := stream(tokens))
            write(piece)
    seconds = time.monotonic() - started
    completions: list[dict[str, Any]] = [
        {"prompt": prompt, "text": tokenizer.continuation(ids, tokens), "tokens": tokens,
         "finish_reason": "length" if len(tokens) == count else "stop"}
        for prompt, ids, tokens in zip(args.prompt, prompts, made)]
    for completion, subset in zip(completions, own):
        completion["experts"] = subset.kept
    write(completions[0]["text"][len(written):] if shown else "")  # a character that the last token left unfinished
    total = sum(map(len, made))
    result = {"checkpoint": str(loaded.saved.path), "tokens": total, "tokens_per_second": total / seconds,
              "completions": completions}
    texts = [f"--- {i + 1} of {len(completions)}\n{c['prompt']}{c['text']}" for i, c in enumerate(completions)]
    return Result(result, "" if shown else "\n".join(texts))  # shown already; this ends its line


COMMAND = Command("generate", "continue prompts", add, run, (
    "emo-jax generate runs/tiny --prompt 'Once upon a time' --max-new-tokens 40",
    "emo-jax generate runs/tiny --prompt 'The court' --subset auto --keep 8 --temperature 0.8 --top-p 0.9 --seed 1"),
    overrides="checkpoint", devices=True)
