"""The router's probabilities over all routed experts: the mean over the text."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from emo_jax import model
from emo_jax.moe import routing
from emo_jax.subsets.methods import Method
from emo_jax.subsets.sweep import Statistic, Sums, mean


def collect(moe: model.MoE, normed_BTD: Array, rows: model.RowContext, allowed: Array | None,
            execution: model.Execution) -> tuple[Array, Sums]:
    y_BTD, route = moe(normed_BTD, rows, None, allowed, execution)
    return y_BTD, probabilities(route, rows)


def probabilities(route: routing.Routing, rows: model.RowContext) -> Sums:
    valid = (rows.router_segments > 0)[..., None]
    score_BR = jnp.sum(jnp.where(valid, route.scores, 0.0), axis=1)
    return Sums(score_BR, jnp.broadcast_to(jnp.sum(valid, axis=1, dtype=jnp.float32), score_BR.shape))


METHOD = Method(statistic=Statistic(collect, mean))
