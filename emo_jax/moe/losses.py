"""Auxiliary losses of the router, and the counts they are made of.

They are functions of global arrays: under jit on a mesh the counts are sums over all data shards, so that the
load-balancing loss is exactly global for one all-reduce of R numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emo_jax.sharding import BATCH, spec


def expert_counts(
    expert_ids: Int[Array, "B T k"], mask: Bool[Array, "B T"], num_routed: int, groups: int = 1
) -> Float[Array, "groups R"]:
    """Tokens sent to each routed expert, by group of rows; `mask` is False for padding. No gradient."""
    chosen = (expert_ids[..., None] == jnp.arange(num_routed)) & mask[..., None, None]
    return _by_group(jnp.sum(chosen, axis=(1, 2), dtype=jnp.float32), groups)


def load_balancing_loss(
    scores: Float[Array, "B T R"],
    counts: Float[Array, "groups R"],
    mask: Bool[Array, "B T"],
    top_k: int,
    divisor: Float[Array, "groups"] | float,
) -> Float[Array, ""]:
    """R/k * sum_e (counts_e / divisor) * mean_tokens(scores_e), averaged over the groups; 1 at uniform load.

    `counts` are those of the scope over which experts are balanced (the whole optimizer step: one group) and `divisor` the
    tokens in it. The gradient flows through `scores` only. (EMO paper eq. 5; global batch: arXiv 2501.11873.)
    """
    groups, num_routed = counts.shape
    score_sums = _by_group(jnp.sum(jnp.where(mask[..., None], scores, 0.0), axis=1), groups)
    tokens = _by_group(jnp.sum(mask, axis=1, dtype=jnp.float32), groups)
    mean_scores = score_sums / jnp.maximum(tokens, 1.0)[:, None]
    fraction = jax.lax.stop_gradient(counts) / jnp.reshape(divisor, (-1, 1))
    return num_routed / top_k * jnp.mean(jnp.sum(fraction * mean_scores, axis=-1))


def router_z_loss(
    logsumexp: Float[Array, "B T"], mask: Bool[Array, "B T"], divisor: Float[Array, ""] | float
) -> Float[Array, ""]:
    """sum_tokens logsumexp(logits)^2 / divisor (arXiv 2202.08906 eq. 5), on the logits that the scores are made of."""
    return jnp.sum(jnp.where(mask, jnp.square(logsumexp), 0.0)) / divisor


def _by_group(per_row: jax.Array, groups: int) -> jax.Array:
    """[B, ...] -> [groups, ...]: sums over consecutive rows."""
    if groups == 1:
        return jnp.sum(per_row, axis=0, keepdims=True)
    member = (jnp.arange(per_row.shape[0]) // (per_row.shape[0] // groups) == jnp.arange(groups)[:, None])
    replicated = spec(*[None] * per_row.ndim)
    return jnp.einsum("gb,b...->g...", member.astype(per_row.dtype), per_row, precision=jax.lax.Precision.HIGHEST,
                      out_sharding=replicated)
