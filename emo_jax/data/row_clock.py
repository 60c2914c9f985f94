"""How long the parts of making rows take."""

from __future__ import annotations

import time

import numpy as np

from emo_jax.data.documents import Encoder, Source

PARTS = ("read", "tokenize", "pack")  # pack: and everything else


class RowClock:
    """Seconds since the last row. It is the `Encoder` that sources are given, to tell tokenizing from reading."""

    def __init__(self, tokenizer: Encoder):
        self._tokenizer = tokenizer
        self.eos_id, self.vocab_size, self.sha256 = tokenizer.eos_id, tokenizer.vocab_size, tokenizer.sha256
        self.start()

    def start(self) -> None:
        self._began, self._source, self._tokenize = time.perf_counter(), 0.0, 0.0

    def seconds(self) -> np.ndarray:
        """[3] of PARTS."""
        total = time.perf_counter() - self._began
        return np.array([self._source - self._tokenize, self._tokenize, total - self._source])

    def encoded(self, source: Source, document: int) -> np.ndarray:
        began = time.perf_counter()
        tokens = source.encoded(document, self)
        self._source += time.perf_counter() - began
        return tokens

    def encode_document(self, text: str) -> np.ndarray:
        began = time.perf_counter()
        tokens = self._tokenizer.encode_document(text)
        self._tokenize += time.perf_counter() - began
        return tokens
