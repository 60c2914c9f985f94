"""The next token of every row."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from emo_jax.errors import InputError


class Sampling(NamedTuple):
    temperature: float = 0.0  # 0: the most probable token (ties: the lowest id)
    top_p: float = 1.0  # from the most probable tokens that together reach this probability
    seed: int = 0

    def check(self) -> Sampling:
        """Raises `InputError`."""
        if not (self.temperature == 0 or 1e-30 <= self.temperature <= 1e30):
            raise InputError(f"--temperature {self.temperature} must be 0 (greedy) or a number from 1e-30 to 1e30")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p} must be more than 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed} must be in 0..2^32 - 1")
        return self

    @property
    def kind(self) -> str:
        """What is compiled; the numbers themselves are arguments."""
        return "greedy" if self.temperature == 0 else "full" if self.top_p == 1 else "top_p"


def sample(
    logits: Float[Array, "B V"], kind: str, temperature: Float[Array, ""] | float, top_p: Float[Array, ""] | float,
    seed: UInt[Array, ""] | int, row: Int[Array, "B"], position: Int[Array, "B"]
) -> Int[Array, "B"]:
    """A row's draw depends on (seed, row, position) alone, not on the batch it is in."""
    if kind == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if kind == "top_p":
        logits = jnp.where(nucleus(logits, top_p), logits, -jnp.inf)

    def draw(row, position, logits):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
        return jax.random.categorical(key, logits)

    return jax.vmap(draw)(row, position, logits).astype(jnp.int32)


def nucleus(logits: Float[Array, "B V"], top_p: Float[Array, ""] | float) -> Bool[Array, "B V"]:
    """Whether a token is among the most probable ones that together reach `top_p`; at least one is."""
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    count = jnp.maximum(jnp.sum(before < top_p, axis=-1, keepdims=True), 1)  # 0 where top_p is none in float32
    return logits >= jnp.take_along_axis(ordered, count - 1, axis=-1)
