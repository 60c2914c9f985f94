"""Auxiliary losses of the router, and the counts they are made of.

They are functions of global arrays: under jit on a mesh the counts are sums over all data shards, so that the
load-balancing loss is exactly global for one all-reduce of R numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emo_jax.sharding import spec


def expert_counts(
    expert_ids: Int[Array, "B T k"], mask: Bool[Array, "B T"], num_routed: int, groups: int = 1
) -> Float[Array, "groups R"]:
    """Tokens sent to each routed expert, by group of rows; `mask` is False for padding. No gradient."""
    chosen = (expert_ids[..., None] == jnp.arange(num_routed)) & mask[..., None, None]
    return group_rows(jnp.sum(chosen, axis=(1, 2), dtype=jnp.float32), groups)


def score_sums(
    scores: Float[Array, "B T R"], mask: Bool[Array, "B T"], groups: int = 1
) -> Float[Array, "groups R"]:
    """Sums of the routers' scores over the tokens, by group of rows."""
    return group_rows(jnp.sum(jnp.where(mask[..., None], scores, 0.0), axis=1), groups)


def load_balancing_loss(
    scores: Float[Array, "B T R"], counts: Float[Array, "R"], mask: Bool[Array, "B T"], top_k: int, divisor: float
) -> Float[Array, ""]:
    """R/k * sum_e (counts_e / divisor) * mean_tokens(scores_e); 1 at uniform load.

    `counts` are those of the scope over which experts are balanced (all data shards and microbatches of the optimizer
    step) and `divisor` the tokens in it. The gradient flows through `scores` only. (EMO paper, load balancing; global
    batch: arXiv 2501.11873.)
    """
    mean_scores = score_sums(scores, mask)[0] / jnp.sum(mask)
    return balance(counts / divisor, mean_scores, top_k)


def balance(fraction: Float[Array, "*layers R"], mean_scores: Float[Array, "*layers R"], top_k: int):
    """R/k * sum_e fraction_e * mean_scores_e, with no gradient through the fractions."""
    num_routed = fraction.shape[-1]
    return num_routed / top_k * jnp.sum(jax.lax.stop_gradient(fraction) * mean_scores, axis=-1)


def router_z_loss(
    logsumexp: Float[Array, "B T"], mask: Bool[Array, "B T"], divisor: Float[Array, ""] | float
) -> Float[Array, ""]:
    """sum_tokens logsumexp(logits)^2 / divisor (arXiv 2202.08906 eq. 5), on the logits that the scores are made of."""
    return jnp.sum(jnp.where(mask, jnp.square(logsumexp), 0.0)) / divisor


def group_rows(per_row: jax.Array, groups: int) -> jax.Array:
    """[B, ...] -> [groups, ...]: sums over consecutive rows."""
    if groups == 1:
        return jnp.sum(per_row, axis=0, keepdims=True)
    member = (jnp.arange(per_row.shape[0]) // (per_row.shape[0] // groups) == jnp.arange(groups)[:, None])
    replicated = spec(*[None] * per_row.ndim)
    return jnp.einsum("gb,b...->g...", member.astype(per_row.dtype), per_row, precision=jax.lax.Precision.HIGHEST,
                      out_sharding=replicated)
