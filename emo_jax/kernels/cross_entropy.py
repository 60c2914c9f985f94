"""Cross entropy of the next token over a large vocabulary, without all logits in memory at once.

Tokens are taken in chunks; the logits of one chunk exist at a time. `cross_entropy` gives the losses of every token (for
evaluation). `training_loss` gives their weighted sum, and since that is linear in its cotangent, the gradients are made
in the forward pass from the same logits: three matmuls of the vocabulary's size instead of four.

Every device works on its own tokens with the gathered head; over `tensor` the vocabulary is sharded.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from emo_jax import compat
from emo_jax.rounding import ceil_div, equal_parts
from emo_jax.sharding import ACTIVATIONS, AXES, BATCH, TOKENS, parameter_spec


class LossSums(NamedTuple):
    objective: Float[Array, ""]  # sum of weights * (nll + z_weight * logsumexp^2); the only differentiable one
    nll: Float[Array, ""]  # sum of weights * nll, nats
    z: Float[Array, ""]  # sum of weights * logsumexp^2
    of_tokens: Float[Array, "B T"] | None = None  # weights * nll, where they are asked for


def chunk_tokens(platform: str) -> int:
    """Tokens of a device whose logits exist at the same time: on CPU, as many as its caches hold."""
    return 512 if platform == "cpu" else 4096


def training_loss(
    x: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"], weights: Float[Array, "B T"],
    z_weight: float, chunk_tokens: int, of_tokens: bool = False,
) -> LossSums:
    """Weighted sums over all tokens of the mesh. `head` is the fp32 master, multiplied in the dtype of `x`."""

    def device(x, head, targets, weights):
        # As varying over every axis: the adjoint sums the cotangents of devices that share an array.
        x, head, targets, weights = (compat.vary(a, AXES) for a in (x, _whole_head(head, x), targets, weights))
        *sums, nll = _objective(x.reshape(-1, x.shape[-1]), head, targets.reshape(-1), weights.reshape(-1), z_weight,
                                chunk_tokens, of_tokens)
        of_every_token = lax.psum(nll, "tensor").reshape(targets.shape) if of_tokens else None
        return *lax.psum(jnp.stack(sums), AXES), of_every_token

    return LossSums(*compat.shard_map(
        device, in_specs=(ACTIVATIONS, parameter_spec(("head",)), TOKENS, TOKENS),
        out_specs=(P(), P(), P(), TOKENS if of_tokens else None))(x, head, targets, weights))


def cross_entropy(
    x: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"], chunk_tokens: int
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(negative log-likelihood of the target in nats, logsumexp of the logits) of every token, fp32."""

    def device(x, head, targets):
        head = _whole_head(head, x)
        part = jax.checkpoint(lambda chunk: _losses(chunk[0], head, chunk[1])[1:], prevent_cse=False)
        nll, lse = lax.map(part, (_chunks(x.reshape(-1, x.shape[-1]), chunk_tokens),
                                  _chunks(targets.reshape(-1), chunk_tokens)))
        nll, lse = (a.reshape(targets.shape) for a in (nll, lse))
        return nll, lse

    return compat.shard_map(device, in_specs=(ACTIVATIONS, parameter_spec(("head",)), TOKENS),
                            out_specs=(TOKENS, TOKENS))(x, head, targets)


def divergence(
    before: Float[Array, "B T D"], head_before: Float[Array, "D V"], x: Float[Array, "B T D"], head: Float[Array, "D V"],
    weights: Float[Array, "B T"], chunk_tokens: int,
) -> Float[Array, ""]:
    """Weighted sum over all tokens of KL(p_before || p) = sum p_before (logit_before - logit) - lse_before + lse, nats, of two
    models' next token."""

    def device(before, head_before, x, head, weights):
        head_before, head = _whole_head(head_before, before), _whole_head(head, x)

        def of_chunk(chunk):
            none = jnp.full(chunk[2].shape, -1)  # no target
            (old, _, old_lse), (new, _, new_lse) = (_losses(x, h, none) for x, h in ((chunk[0], head_before), (chunk[1], head)))
            kl = lax.psum(jnp.sum(jnp.exp(old - old_lse[:, None]) * (old - new), axis=-1), "tensor") - old_lse + new_lse
            return jnp.sum(chunk[2] * kl)

        chunks = tuple(_chunks(a.reshape(-1, *a.shape[2:]), chunk_tokens) for a in (before, x, weights))
        return lax.psum(jnp.sum(lax.map(jax.checkpoint(of_chunk, prevent_cse=False), chunks)), (*BATCH, "sequence"))

    head_spec = parameter_spec(("head",))
    return compat.shard_map(device, in_specs=(ACTIVATIONS, head_spec, ACTIVATIONS, head_spec, TOKENS), out_specs=P())(
        before, head_before, x, head, weights)


# ---- one device -----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _objective(x, head, targets, weights, z_weight, chunk_tokens, of_tokens):
    """`LossSums` of tokens x [T, D]; every device of `tensor` returns its share of the sums, and of every token's."""
    return _objective_forward(x, head, targets, weights, z_weight, chunk_tokens, of_tokens)[0]


def _objective_forward(x, head, targets, weights, z_weight, chunk_tokens, of_tokens):
    share = lax.axis_size("tensor")

    def chunk(carry, inputs):
        sums, d_head = carry
        x, targets, weights = inputs
        logits, nll, lse = _losses(x, head, targets)
        # d objective / d logits = weights * ((1 + 2 z lse) softmax - one_hot)
        probs = jnp.exp(logits - lse[:, None]) * (weights * (1 + 2 * z_weight * lse))[:, None]
        d_logits = jnp.where(_is_target(logits, targets), probs - weights[:, None], probs).astype(x.dtype)
        d_x = lax.dot_general(d_logits, head, (((1,), (1,)), ((), ()))).astype(x.dtype)
        d_head += _over_tokens(x, d_logits)
        nll_sum, z_sum = jnp.sum(weights * nll) / share, jnp.sum(weights * jnp.square(lse)) / share
        sums += jnp.stack([nll_sum + z_weight * z_sum, nll_sum, z_sum])
        return (sums, d_head), (d_x, weights * nll / share if of_tokens else None)

    start = tuple(compat.vary_like(jnp.zeros(s, jnp.float32), x, head, targets, weights) for s in ((3,), head.shape))
    inputs = tuple(_chunks(a, chunk_tokens) for a in (x, targets, weights))
    (sums, d_head), (d_x, nll) = lax.scan(chunk, start, inputs)
    sums = LossSums(*sums, nll.reshape(targets.shape) if of_tokens else None)
    return sums, (d_x.reshape(x.shape), d_head.astype(head.dtype))


def _objective_backward(z_weight, chunk_tokens, of_tokens, saved, d_sums):
    gradients = ((d * d_sums.objective).astype(d.dtype) for d in saved)
    # Together: else d_head may wait, in fp32, until the layers' backward passes, which start from d_x, are done.
    return *lax.optimization_barrier(tuple(gradients)), None, None


_objective.defvjp(_objective_forward, _objective_backward)


def _losses(x, head, targets):
    """(logits [n, V], nll [n], logsumexp [n]), fp32, of one chunk."""
    logits = lax.dot_general(x, head, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    top = lax.pmax(lax.stop_gradient(jnp.max(logits, axis=-1)), "tensor")
    sums = jnp.stack([jnp.sum(jnp.exp(logits - top[:, None]), axis=-1), _target_logits(logits, targets)])
    sums = lax.psum(sums, "tensor")
    lse = top + jnp.log(sums[0])
    return logits, lse - sums[1], lse


def _over_tokens(x, y):
    """[T, D] and [T, V] -> [D, V], fp32. XLA's fast matmuls of CPUs take rows times columns only."""
    multiply = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
    return lax.platform_dependent(
        x, y, cpu=lambda x, y: multiply(lax.optimization_barrier(x.T), y, (((1,), (0,)), ((), ()))),
        default=lambda x, y: multiply(x, y, (((0,), (0,)), ((), ()))))


def _target_logits(logits, targets):
    """[n, V] -> [n], 0 where another device of `tensor` has the target. A masked sum, whose adjoint is no scatter; CPUs would
    write all of what is summed."""

    def gather(logits, targets):
        local = targets - lax.axis_index("tensor") * logits.shape[1]
        here = (local >= 0) & (local < logits.shape[1])
        return jnp.where(here, logits[jnp.arange(len(local)), jnp.where(here, local, 0)], 0.0)

    def masked_sum(logits, targets):
        return jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)

    return lax.platform_dependent(logits, targets, cpu=gather, default=masked_sum)


def _is_target(logits, targets):
    first = lax.axis_index("tensor") * logits.shape[1]
    return first + jnp.arange(logits.shape[1]) == targets[:, None]


def _chunks(a, chunk_tokens):
    """[T, ...] -> [n, T / n, ...] with the smallest n that keeps a chunk at or below `chunk_tokens`."""
    n = equal_parts(len(a), ceil_div(len(a), chunk_tokens))
    return a.reshape(n, -1, *a.shape[1:])


def _whole_head(head, x):
    """Cast first, then gathered over the FSDP axes; the adjoint reduces the gradient to its shards, then over the rest."""
    return lax.all_gather(compat.vary(head.astype(x.dtype), ("data", "sequence")), ("fsdp", "expert"), axis=0, tiled=True)
