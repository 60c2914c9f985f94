"""A byte-level BPE of a tokenizer.json, as llama.cpp reads it from a GGUF file.

llama.cpp has its own code for splitting text before BPE, one for each known regular expression, chosen by a name in the file.
"""

from __future__ import annotations

import sys
from typing import Any

from emo_jax.checkpoints.checkpoint import Checkpoint
from emo_jax.convert.tensors import read_json
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.errors import InputError
from emo_jax.files import shortened

_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BEGIN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
# What splits the text: llama.cpp's name of it. (regular expression or None for GPT-2's, whether whole words skip the merges)
PRE_TOKENIZERS = {
    (None, False): "gpt-2",  # also what this package trains
    (_BEGIN + r"\p{N}{1,3}" + _END, False): "dbrx",  # dolma2, cl100k
    (_BEGIN + r"\p{N}{1,3}" + _END, True): "llama-bpe",
    (_BEGIN + r"\p{N}" + _END, False): "qwen2",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def require_tokenizer(found: Checkpoint) -> tuple[Tokenizer, dict[str, Any], str]:
    """(tokenizer, its file's content, llama.cpp's name of its pre-tokenizer). Raises `InputError` for one that llama.cpp would
    split otherwise."""
    path = found.run / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{found.run} has no tokenizer.json, without which llama.cpp reads no text")
    content, tokenizer = read_json(path), Tokenizer(path, found.config.data.eos_token)
    if content["model"].get("type") != "BPE" or content["model"].get("byte_fallback"):
        raise InputError(f"{path}: --format gguf needs a byte-level BPE, not {content['model'].get('type')}")
    normalizer = (content.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise InputError(f"{path}: llama.cpp knows no normalizer {normalizer}")
    if normalizer:
        print(f"warning: {path} brings text into the form NFC first; llama.cpp does not, so other text gets other tokens there",
              file=sys.stderr)
    pre = content.get("pre_tokenizer") or {}
    name = PRE_TOKENIZERS.get((_expression(pre), bool(content["model"].get("ignore_merges")))) if pre else None
    if name is None:
        raise InputError(f"{path}: llama.cpp knows no pre-tokenizer {shortened(str(pre))}; it knows those of GPT-2, dolma2 "
                         f"(cl100k), Llama 3 and Qwen2")
    return tokenizer, content, name


def _expression(pre: dict[str, Any]) -> str | None:
    """By which the text is split; None: GPT-2's. What is none of these gives a text that is in no table."""
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return None
        first = steps[0]
        whole = (first.get("behavior"), first.get("invert")) in (("Removed", True), ("Isolated", False))
        if len(steps) == 2 and first.get("type") == "Split" and whole and not last.get("use_regex", True):
            return first["pattern"].get("Regex", "")
    return ""


def add_tokenizer(writer: Any, known: tuple[Tokenizer, dict[str, Any], str], vocab_size: int) -> None:
    """`vocab_size`: of the model, which may have more rows than the tokenizer has tokens."""
    tokenizer, content, pre = known
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for token, i in content["model"]["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in content.get("added_tokens") or []:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.eos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    pad = tokenizer.token_id("<|pad|>")
    writer.add_pad_token_id(tokenizer.eos_id if pad is None else pad)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
