"""A layer in two halves, with what choosing experts wants to see between them.

    attend: x -> h = x + attention(norm(x)) and the normed input of the experts
    mix:    normed input -> output of the experts, and the statistics of a method by row and routed expert

Statistics are sums over the tokens of a row, fp32; padding never counts. Shapes as in `emo_jax.model`.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from emo_jax import model
from emo_jax.moe import routing


class Statistics(NamedTuple):
    """What one layer adds up, by row [B, R]."""

    score: Float[Array, "B R"]
    count: Float[Array, "B R"]  # tokens that the score is a sum over


def block_of(layer_params: model.Params, execution: model.Execution) -> model.Block:
    c = execution.config.model
    structure, _ = nnx.split(nnx.eval_shape(lambda: model.Block(c, model.Init(c, 0))))
    return nnx.merge(structure, layer_params)


def attend(layer_params: model.Params, x_BTD, rows: model.RowContext, execution: model.Execution):
    """(h, normed input of the experts), [B, T, D]."""
    return block_of(layer_params, execution).attend(x_BTD, rows, execution)[:2]


def mix(layer_params: model.Params, normed_BTD, rows: model.RowContext, allowed, execution: model.Execution, method: str):
    """(output of the experts [B, T, D], Statistics of the method)."""
    return METHODS[method](block_of(layer_params, execution).moe, normed_BTD, rows, allowed, execution)


def routing_of(layer_params: model.Params, normed_BTD, rows: model.RowContext, allowed,
               execution: model.Execution) -> Statistics:
    """The statistics of `router` without the experts."""
    return _router_statistics(block_of(layer_params, execution).moe.route(normed_BTD, rows, None, allowed, execution), rows)


# ---- methods --------------------------------------------------------------------------------------------------------


def _router(moe: model.MoE, normed_BTD, rows, allowed, execution):
    """The router's probabilities over all routed experts."""
    y_BTD, route = moe(normed_BTD, rows, None, allowed, execution)
    return y_BTD, _router_statistics(route, rows)


def _easy_ep(moe: model.MoE, normed_BTD, rows, allowed, execution):
    """Norm of an expert's weighted output times how far the experts turn the token: max(0, 1 - cos(x, x + moe(x)))."""
    y_BTD, route = moe(normed_BTD, rows, None, allowed, execution, _norm)
    before_BTD, after_BTD = normed_BTD.astype(jnp.float32), (normed_BTD + y_BTD).astype(jnp.float32)
    lengths_BT = _norm(before_BTD) * _norm(after_BTD)
    turn_BT = jnp.maximum(1 - jnp.sum(before_BTD * after_BTD, axis=-1) / jnp.maximum(lengths_BT, 1e-20), 0)
    return y_BTD, _by_expert(route, rows, route.seen * turn_BT[..., None], execution)


def _reap(moe: model.MoE, normed_BTD, rows, allowed, execution):
    """Norm of an expert's weighted output; the mean over its tokens is the criterion of REAP (arXiv 2510.13999)."""
    y_BTD, route = moe(normed_BTD, rows, None, allowed, execution, _norm)
    return y_BTD, _by_expert(route, rows, route.seen, execution)


def _norm(rows_D) -> Array:
    """Length of every row, fp32."""
    return jnp.linalg.norm(rows_D.astype(jnp.float32), axis=-1)


METHODS: dict[str, Callable] = {"router": _router, "easy_ep": _easy_ep, "reap": _reap}


def finish(method: str, score, count):
    """What experts are ranked by, [..., R], from sums over all rows."""
    return score if method == "easy_ep" else score / count.clip(1)


def _router_statistics(route: routing.Routing, rows: model.RowContext) -> Statistics:
    valid = (rows.router_segments > 0)[..., None]
    score_BR = jnp.sum(jnp.where(valid, route.scores, 0.0), axis=1)
    return Statistics(score_BR, jnp.broadcast_to(jnp.sum(valid, axis=1, dtype=jnp.float32), score_BR.shape))


def _by_expert(route: routing.Routing, rows: model.RowContext, values_BTk, execution: model.Execution) -> Statistics:
    """Sums of a value of every choice, and the number of choices, by row and expert."""
    R = execution.config.model.num_routed_experts
    valid = (rows.router_segments > 0)[..., None, None]
    chosen_BTkR = (route.expert_ids[..., None] == jnp.arange(R)) & (route.weights > 0)[..., None] & valid
    return Statistics(jnp.sum(jnp.where(chosen_BTkR, values_BTk[..., None], 0.0), axis=(1, 2)),
                      jnp.sum(chosen_BTkR, axis=(1, 2), dtype=jnp.float32))
