"""Cross entropy of the next token over a large vocabulary, without all logits in memory at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emo_jax.sharding import BATCH, spec


def cross_entropy(
    x: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"], chunks: int
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(negative log-likelihood of the target in nats, logsumexp of the logits), fp32. The logits of one of `chunks` parts
    of every row exist at a time; the backward pass recomputes them. `chunks` must divide T."""
    if chunks == 1:
        return _whole(x, head, targets)
    B, T = targets.shape
    x_chunks = jnp.moveaxis(x.reshape(B, chunks, T // chunks, -1), 1, 0)
    target_chunks = jnp.moveaxis(targets.reshape(B, chunks, T // chunks), 1, 0)
    part = jax.checkpoint(lambda chunk: _whole(chunk[0], head, chunk[1]), prevent_cse=False)
    nll, lse = jax.lax.map(part, (x_chunks, target_chunks))
    return tuple(jnp.moveaxis(a, 0, 1).reshape(B, T) for a in (nll, lse))


def num_chunks(tokens_per_device: int, row: int, chunk_tokens: int) -> int:
    """The smallest divisor of the row length that keeps a device's chunk at or below `chunk_tokens` tokens."""
    wanted = max(1, -(-tokens_per_device // chunk_tokens))
    return next(n for n in range(min(wanted, row), row + 1) if row % n == 0)


def _whole(x, head, targets):
    logits = jnp.einsum("btd,dv->btv", x, head, preferred_element_type=jnp.float32,
                        out_sharding=spec(BATCH, "sequence", "tensor"))
    lse = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum instead of a gather: it works on a vocabulary sharded over `tensor`, and its adjoint is no scatter.
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    return lse - jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1), lse
