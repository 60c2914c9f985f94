"""Auxiliary losses of the router, and the counts they are made of.

They are functions of global arrays: under jit on a mesh the counts are sums over all data shards, so that the
load-balancing loss is exactly global for one all-reduce of R numbers. They also take plain arrays, without a mesh.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emo_jax.moe.routing import is_chosen
from emo_jax.sharding import spec


def expert_counts(
    expert_ids: Int[Array, "B T k"], mask: Bool[Array, "B T"], num_routed: int, groups: int = 1
) -> Float[Array, "groups R"]:
    """Tokens sent to each routed expert, by group of rows; `mask` is False for padding. No gradient."""
    chosen_BRT = is_chosen(expert_ids, num_routed) & mask[:, None]
    return group_rows(jnp.sum(chosen_BRT, axis=-1, dtype=jnp.float32), groups)


def load_balancing_loss(
    scores: Float[Array, "B T R"], counts: Float[Array, "*groups R"], mask: Bool[Array, "B T"], top_k: int,
    divisor: Float[Array, "..."] | float, tokens: Float[Array, "..."] | float | None = None,
) -> Float[Array, "*groups"]:
    """R/k * sum_e (counts_e / divisor) * mean_tokens(scores_e); 1 at uniform load.

    `counts` are those of the scope over which experts are balanced (all data shards and microbatches of the optimizer
    step) and `divisor` the tokens in it. The gradient flows through `scores` only. (EMO paper, load balancing; global
    batch: arXiv 2501.11873.)

    The mean is over `tokens` tokens, by default those of the mask: with the tokens of the whole step, the losses of its
    microbatches add up to that of the step. `counts` with a leading axis are those of groups of rows, each of which gets
    its own loss (`divisor` and `tokens` [groups, 1]).
    """
    R = counts.shape[-1]
    sums_BR = jnp.sum(jnp.where(mask[..., None], scores, 0.0), axis=1)
    sums = group_rows(sums_BR, *counts.shape[:-1]).reshape(counts.shape)
    mean_scores = sums / (jnp.sum(mask) if tokens is None else tokens)
    return R / top_k * jnp.sum(jax.lax.stop_gradient(counts / divisor) * mean_scores, axis=-1)


def router_z_loss(
    logsumexp: Float[Array, "B T"], mask: Bool[Array, "B T"], divisor: Float[Array, ""] | float
) -> Float[Array, ""]:
    """sum_tokens logsumexp(logits)^2 / divisor (arXiv 2202.08906 eq. 5), on the logits that the scores are made of."""
    return jnp.sum(jnp.where(mask, jnp.square(logsumexp), 0.0)) / divisor


def group_rows(per_row: Float[Array, "B *rest"], groups: int = 1) -> Float[Array, "groups *rest"]:
    """Sums over consecutive rows."""
    if groups == 1:
        return jnp.sum(per_row, axis=0, keepdims=True)
    B = per_row.shape[0]
    member_gB = jnp.arange(B) // (B // groups) == jnp.arange(groups)[:, None]
    return jnp.einsum("gb,b...->g...", member_gB.astype(per_row.dtype), per_row, precision=jax.lax.Precision.HIGHEST,
                      out_sharding=spec(*[None] * per_row.ndim))
