"""A layer in two halves, with what choosing experts wants to see between them.

    attend: x -> h = x + attention(norm(x)) and the normed input of the experts
    mix:    normed input -> output of the experts, and the statistics of a method by row and routed expert

Statistics are sums over the tokens of a row, fp32; padding never counts. Shapes as in `emo_jax.model`.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from emo_jax import compat, model
from emo_jax.kernels import grouped_matmul as gmm
from emo_jax.moe import dispatch, experts, routing
from emo_jax.sharding import ACTIVATIONS, AXES, TOKENS, gather_weight


class Statistics(NamedTuple):
    """Of one layer, by row [B, R]."""

    score: Float[Array, "B R"]
    count: Float[Array, "B R"]  # tokens that the score is a sum over


def block_of(layer_params: model.Params, run: model.Run) -> model.Block:
    c = run.config.model
    structure, _ = nnx.split(nnx.eval_shape(lambda: model.Block(c, model.Init(c, 0))))
    return nnx.merge(structure, layer_params)


def attend(layer_params: model.Params, x_BTD, rows: model.RowContext, run: model.Run):
    """(h, normed input of the experts), [B, T, D]."""
    return block_of(layer_params, run).attend(x_BTD, rows, run)[:2]


def mix(layer_params: model.Params, normed_BTD, rows: model.RowContext, allowed, run: model.Run, method: str):
    """(output of the experts [B, T, D], Statistics of the method)."""
    return METHODS[method](block_of(layer_params, run).moe, normed_BTD, rows, allowed, run)


def routing_of(layer_params: model.Params, normed_BTD, rows: model.RowContext, allowed, run: model.Run) -> Statistics:
    """The statistics of `router` without the experts."""
    return _router_statistics(block_of(layer_params, run).moe.route(normed_BTD, rows, None, allowed, run), rows)


# ---- methods --------------------------------------------------------------------------------------------------------


def _router(moe: model.MoE, normed, rows, allowed, run):
    """The router's probabilities over all routed experts."""
    y, route = moe(normed, rows, None, allowed, run)
    return y, _router_statistics(route, rows)


def _easy_ep(moe: model.MoE, normed, rows, allowed, run):
    """Norm of an expert's weighted output times how far the experts turn the token: max(0, 1 - cos(x, x + moe(x)))."""
    y, route, norms_BTk = _with_norms(moe, normed, rows, allowed, run)
    before, after = normed.astype(jnp.float32), (normed + y).astype(jnp.float32)
    lengths = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    turn_BT = jnp.maximum(1 - jnp.sum(before * after, axis=-1) / jnp.maximum(lengths, 1e-20), 0)
    return y, _by_expert(route, rows, norms_BTk * turn_BT[..., None], run)


def _reap(moe: model.MoE, normed, rows, allowed, run):
    """Norm of an expert's weighted output; the mean over its tokens is the criterion of REAP (arXiv 2510.13999)."""
    y, route, norms_BTk = _with_norms(moe, normed, rows, allowed, run)
    return y, _by_expert(route, rows, norms_BTk, run)


METHODS: dict[str, Callable] = {"router": _router, "easy_ep": _easy_ep, "reap": _reap}


def finish(method: str, score, count):
    """What experts are ranked by, [..., R], from sums over all rows."""
    return score if method == "easy_ep" else score / count.clip(1)


def _router_statistics(route: routing.Routing, rows: model.RowContext) -> Statistics:
    valid = (rows.router_segments > 0)[..., None]
    score = jnp.sum(jnp.where(valid, route.scores, 0.0), axis=1)
    return Statistics(score, jnp.broadcast_to(jnp.sum(valid, axis=1, dtype=jnp.float32), score.shape))


def _by_expert(route: routing.Routing, rows: model.RowContext, values_BTk, run: model.Run) -> Statistics:
    """Sums of a value of every choice, and the number of choices, by row and expert."""
    R = run.config.model.num_routed_experts
    valid = (rows.router_segments > 0)[..., None, None]
    chosen = (route.expert_ids[..., None] == jnp.arange(R)) & (route.weights > 0)[..., None] & valid  # [B, T, k, R]
    return Statistics(jnp.sum(jnp.where(chosen, values_BTk[..., None], 0.0), axis=(1, 2)),
                      jnp.sum(chosen, axis=(1, 2), dtype=jnp.float32))


# ---- experts with the norms of their outputs ------------------------------------------------------------------------


def _with_norms(moe: model.MoE, normed, rows, allowed, run):
    """(output, routing, |weight * expert(x)| of every choice [B, T, k] fp32)."""
    route = moe.route(normed, rows, None, allowed, run)
    weights = {name: gather_weight(getattr(moe, name)[...], run.dtype, *spec) for name, spec in _TABLE.items()}
    y, norms = _experts_and_norms(weights, normed, route.expert_ids, route.weights, rows.router_segments > 0,
                                  run.config.model.num_shared_experts, run.grouped_matmul)
    return y, route, norms


_TABLE = {"gate": ("expert", None, "tensor"), "up": ("expert", None, "tensor"), "down": ("expert", "tensor", None)}


def _experts_and_norms(table, x: Float[Array, "B T D"], ids: Int[Array, "B T k"], weights: Float[Array, "B T k"],
                       valid: Bool[Array, "B T"], num_shared: int, kernel: str):
    """As `moe.experts.moe_experts`, by all-gather over `expert`, with one more number of every row of the buffer."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = dict(mesh.shape)

    def device(table, x, ids, weights, valid):
        shape = x.shape
        x, ids, weights, valid = (a.reshape(-1, *a.shape[2:]) for a in (x, ids, weights, valid))
        x, ids, weights, valid, gate, up, down = (
            compat.vary(a, AXES) for a in (x, ids, weights, valid, table["gate"], table["up"], table["down"]))
        gate_up = jnp.concatenate([gate, up], axis=-1)
        everyone = [jax.lax.all_gather(a, "expert", tiled=True) for a in (x, ids, weights, valid)]
        y, norms = _local(*everyone, gate_up, down, jax.lax.axis_index("expert") * gate.shape[0], kernel)
        y, norms = (jax.lax.pmean(jax.lax.psum_scatter(a, "expert", tiled=True), "tensor") for a in (y, norms))
        if num_shared:
            shared = experts._shared_experts(x, gate_up[-num_shared:], down[-num_shared:], axes)
            y = y + jax.lax.psum(shared, "tensor")
        return y.reshape(shape), norms.reshape(*shape[:2], -1)

    def _local(x, ids, weights, valid, gate_up, down, first, kernel):
        plan = dispatch.plan_dispatch(ids, valid, (first, down.shape[0]), gmm.ROW_ALIGNMENT[kernel],
                                      gmm.BUFFER_ALIGNMENT[kernel])
        hidden = experts.swiglu(gmm.grouped_matmul(dispatch.gather_tokens(x, plan), gate_up, plan.group_sizes, kernel))
        hidden = hidden * dispatch.slots_to_rows(weights, plan)[:, None].astype(x.dtype)
        out = jax.lax.psum(gmm.grouped_matmul(hidden, down, plan.group_sizes, kernel), "tensor")
        norms = jnp.linalg.norm(out.astype(jnp.float32), axis=-1)
        return dispatch.combine(out, plan), norms.at[plan.row_of_slot].get(mode="fill", fill_value=0)

    specs = {name: P(*spec) for name, spec in _TABLE.items()}
    return compat.shard_map(
        device, in_specs=(specs, ACTIVATIONS, ACTIVATIONS, ACTIVATIONS, TOKENS), out_specs=(ACTIVATIONS, ACTIVATIONS),
        check_vma=kernel not in gmm.PALLAS)(table, x, ids, weights, valid)
