"""Norm of an expert's output without the router's weight: the mean over its tokens (MAN, arXiv 2606.15716), which knows neither
how often nor how strongly an expert is chosen. Meant for experts that shall serve any task."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from emo_jax import model
from emo_jax.subsets.methods import Method
from emo_jax.subsets.sweep import Statistic, Sums, by_expert, mean, norm


def collect(moe: model.MoE, normed_BTD: Array, rows: model.RowContext, allowed: Array | None,
            execution: model.Execution, power: int = 1) -> tuple[Array, Sums]:
    y_BTD, route = moe(normed_BTD, rows, None, allowed, execution, norm)
    # What is seen is weight * expert(x). Choices of weight 0 do not count.
    norms_BTk = route.seen / jnp.where(route.weights > 0, route.weights, 1)
    return y_BTD, by_expert(route, rows, norms_BTk**power, execution)


METHOD = Method(statistic=Statistic(collect, mean))
