"""Norm of an expert's weighted output: the mean over its tokens is the criterion of REAP (arXiv 2510.13999)."""

from __future__ import annotations

from jaxtyping import Array

from emo_jax import model
from emo_jax.subsets.methods import Method
from emo_jax.subsets.sweep import Statistic, Sums, by_expert, mean, norm


def collect(moe: model.MoE, normed_BTD: Array, rows: model.RowContext, allowed: Array | None,
            execution: model.Execution) -> tuple[Array, Sums]:
    y_BTD, route = moe(normed_BTD, rows, None, allowed, execution, norm)
    return y_BTD, by_expert(route, rows, route.seen, execution)


METHOD = Method(statistic=Statistic(collect, mean))
