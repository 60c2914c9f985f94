"""Text -> token ids: any `tokenizer.json` of the Hugging Face tokenizers library, or a BPE trained on the documents."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import tokenizers

from emo_jax.config import Config
from emo_jax.data.documents import Source
from emo_jax.data.order import DocumentNumbers, mix
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, absolute_path, given_path, make_folder, reason, replacing
from emo_jax.progress import say

TRAINING_BYTES = 10_000_000  # a new BPE is trained on that much text
LONG_TEXT = 3_000_000  # characters: seconds


class Tokenizer:
    """path: a tokenizer.json or a folder that holds one. Special tokens written out in a text are plain text to it,
    so that no document can forge the end of a document. content: of the file, read if it is not given; a pickled copy has it,
    so that worker processes read no file."""

    def __init__(self, path: str | AnyPath, eos_token: str, content: bytes | None = None):
        self.path, self.eos_token = absolute_path(path, "data.tokenizer"), eos_token
        if content is None:
            if self.path.is_dir():
                self.path = self.path / "tokenizer.json"
            content = _read(self.path)
        self.content = content
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as e:  # the library raises plain Exception
            raise InputError(f"data.tokenizer={str(self.path)!r}: not a tokenizer.json ({e})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        eos_id = self._tokenizer.token_to_id(eos_token)
        if eos_id is None:
            special = [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]
            raise InputError(f"data.eos_token={eos_token!r} is no token of {self.path}; its special tokens "
                             f"are {special}")
        self.eos_id = eos_id
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.content).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """[n] int32, without an end-of-document token."""
        return np.array(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    def encode_document(self, text: str) -> np.ndarray:
        """[n + 1] int32: the text and the end-of-document token."""
        if len(text) > LONG_TEXT:
            say(f"tokenizing a document of {len(text):,} characters")
        ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        ids.append(self.eos_id)
        return np.array(ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts at once, without end-of-document tokens: faster than one by one."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def continuation(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """The text that `tokens` add to a prompt."""
        before = self.decode(np.asarray(prompt))
        return self.decode(np.array([*prompt, *tokens]))[len(before):]

    def stream(self, prompt: Sequence[int]) -> Callable[[Sequence[int]], str]:
        """A function that takes the next tokens after a prompt and gives their text; a character of several tokens comes with
        the last of them."""
        decoder = tokenizers.decoders.DecodeStream(ids=list(prompt), skip_special_tokens=False)
        return lambda tokens: "".join(decoder.step(self._tokenizer, int(t)) or "" for t in tokens)

    def token_bytes(self, vocab_size: int | None = None) -> np.ndarray:
        """[V] int32: UTF-8 bytes of text that each id stands for; 0 for special tokens and ids without a token."""
        sizes = np.zeros(vocab_size or self.vocab_size, np.int32)
        size_of = _byte_counter(json.loads(self._tokenizer.to_str()))
        added = self._tokenizer.get_added_tokens_decoder()
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in added:
                sizes[i] = 0 if added[i].special else len(added[i].content.encode())
            else:
                sizes[i] = size_of(token)
        return sizes

    def __reduce__(self):
        return Tokenizer, (self.path, self.eos_token, self.content)


def _read(path: AnyPath) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"data.tokenizer={str(path)!r}: no such file; expected a tokenizer.json") from None
    except Exception as e:  # those of a bucket are of many kinds
        raise InputError(f"data.tokenizer={str(path)!r}: cannot be read ({reason(e)})") from None


def load_tokenizer(config: Config, source: Source, train_indices: DocumentNumbers | Sequence[int],
                   cache_dir: str | AnyPath) -> Tokenizer:
    """The tokenizer of a run: data.tokenizer, else the one in `cache_dir`, else one trained on the documents and kept
    there. `InputError` if it has more tokens than the model."""
    own = source.tokenizer
    if own is not None:
        tokenizer = own
    elif config.data.tokenizer:
        tokenizer = Tokenizer(config.data.tokenizer, config.data.eos_token)
    else:
        tokenizer = train_bpe(source, train_indices, config.model.vocab_size, cache_dir, config.data.eos_token)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(f"model.vocab_size={config.model.vocab_size} is less than the {tokenizer.vocab_size} tokens "
                         f"of {tokenizer.path}")
    return tokenizer


def train_bpe(source: Source, indices: DocumentNumbers | Sequence[int], vocab_size: int, cache_dir: str | AnyPath,
              eos_token: str) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens from a sample of the documents `indices`, saved as
    `cache_dir`/tokenizer.json; if that is there, it is used."""
    path = given_path(cache_dir, "the folder of the tokenizer,") / "tokenizer.json"
    if path.is_file():
        return Tokenizer(path, eos_token)
    if vocab_size < 257:
        raise InputError(f"model.vocab_size={vocab_size}: a byte-level BPE has at least 257 tokens (bytes and end)")
    sample = _sample(source, indices)
    print(f"training a tokenizer of {vocab_size:,} tokens on {len(sample):,} documents "
          f"({sum(map(len, sample)) / 1e6:.1f} million characters)", file=sys.stderr, flush=True)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[eos_token], show_progress=False, max_token_length=32,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(sample, trainer, length=len(sample))
    make_folder(path.parent, "the folder of the tokenizer,")
    with replacing(path, f".{os.getpid()}.tmp") as temporary:
        temporary.write_bytes(tokenizer.to_str().encode())
    return Tokenizer(path, eos_token)


def _sample(source: Source, indices: DocumentNumbers | Sequence[int]) -> list[str]:
    """Texts of up to TRAINING_BYTES characters from documents all over the source; the same at every call."""
    total, texts, size = len(indices), [], 0
    order = np.arange(total)
    if total > 100_000:
        order = np.unique(mix(0, np.arange(100_000, dtype=np.uint64)) % np.uint64(total))
    for i in order[np.argsort(mix(1, order.astype(np.uint64)), kind="stable")]:
        texts.append(source[indices[int(i)]].text[:100_000])
        size += len(texts[-1])
        if size >= TRAINING_BYTES:
            break
    return texts


def _byte_counter(spec: dict):
    """A function token -> number of UTF-8 bytes, from how the tokenizer writes bytes in its tokens."""
    parts = [spec.get("pre_tokenizer") or {}, spec.get("decoder") or {}]
    parts += [p for part in parts for p in part.get("pretokenizers", []) + part.get("decoders", [])]
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        return len  # one character for each byte
    prefix = (spec.get("model") or {}).get("continuing_subword_prefix") or ""

    def size_of(token: str) -> int:
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return 1  # a byte that has no token of its own
        text = token.removeprefix(prefix) if prefix else token
        return len(text.replace("▁", " ").encode())

    return size_of
