"""Norm of an expert's weighted output times how far the experts turn the token, max(0, 1 - cos(x, x + moe(x))): the sum over
the text (Easy-EP; the published selection script)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from emo_jax import model
from emo_jax.subsets.methods import Method
from emo_jax.subsets.sweep import Statistic, Sums, by_expert, norm, total


def collect(moe: model.MoE, normed_BTD: Array, rows: model.RowContext, allowed: Array | None,
            execution: model.Execution) -> tuple[Array, Sums]:
    y_BTD, route = moe(normed_BTD, rows, None, allowed, execution, norm)
    before_BTD, after_BTD = normed_BTD.astype(jnp.float32), (normed_BTD + y_BTD).astype(jnp.float32)
    lengths_BT = norm(before_BTD) * norm(after_BTD)
    turn_BT = jnp.maximum(1 - jnp.sum(before_BTD * after_BTD, axis=-1) / jnp.maximum(lengths_BT, 1e-20), 0)
    return y_BTD, by_expert(route, rows, route.seen * turn_BT[..., None], execution)


METHOD = Method(statistic=Statistic(collect, total))
