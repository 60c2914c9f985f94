"""EMO routing: document pools, then top-k inside the pool (equations: EMO paper, section 3; published code's router).

All of it runs in the global view under jit, on sharded arrays, without host round trips; letters are those of
`emo_jax.model`. `route` and `document_pool` also take plain arrays, without a mesh.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from emo_jax.config import Config, RouterConfig
from emo_jax.sharding import BATCH, reshard, spec


class Semantics(NamedTuple):
    """The switches in which the published routers differ. Selection is the same in all: top-k inside the pool."""

    pool_softmax: bool  # softmax over the pool (published); else over all routed experts
    normalize: float | None  # p: divide the k weights by their p-norm
    restore_scale: bool  # multiply the weights by k
    aux_per_layer: bool  # divide the weights of the auxiliary losses by the number of layers


SEMANTICS = {
    "emo_v1": Semantics(pool_softmax=True, normalize=None, restore_scale=False, aux_per_layer=True),
    "emo_v2": Semantics(pool_softmax=False, normalize=1.0, restore_scale=True, aux_per_layer=False),
}


class Routing(NamedTuple):
    expert_ids: Int[Array, "B T k"]  # descending by score; ties: the lowest id first
    weights: Float[Array, "B T k"]  # fp32
    scores: Float[Array, "B T R"]  # fp32, what the load-balancing loss sees; outside the pool 0 (emo_v1)
    pool: Bool[Array, "B T R"]
    logsumexp: Float[Array, "B T"]  # fp32, of the logits that the scores are made of, for the router z-loss
    # The layer fills these in:
    buffer_load: NamedTuple | None = None  # see experts.BufferLoad
    seen: Float[Array, "B T k"] | None = None  # see experts.ExpertLayer.see_rows


def route(
    logits: Float[Array, "B T R"],
    segment_ids: Int[Array, "B T"],
    pool_sizes: Int[Array, "B N"] | None,
    top_k: int,
    semantics: str | Semantics = "emo_v1",
    forced_experts: int | Bool[Array, "R"] = 0,
    voters: Bool[Array, "B T"] | None = None,
) -> Routing:
    """Chooses `top_k` routed experts for every token, inside the pool of the token's document.

    `segment_ids`: row-local documents 1..N, 0 for padding. `pool_sizes[:, n - 1]`: size of the pool of document n, in
    routed experts; R or more is no constraint, and must not be below `top_k`. None: no pools (standard MoE).
    `forced_experts`: those that every pool holds on top of its size: a mask, or how many of the last ones. `voters`: pools are
    causal, for evaluation: see `causal_pool`.

    Rematerialisation that saves "routing" repeats no router matmul, vote or selection: the rest follows from what has that
    name element by element.
    """
    save = functools.partial(checkpoint_name, name="routing")
    rules = SEMANTICS[semantics] if isinstance(semantics, str) else semantics
    logits_BTR = save(logits.astype(jnp.float32))
    if pool_sizes is None:
        pool_BTR = jnp.ones_like(logits_BTR, dtype=bool)
    else:
        pool = document_pool if voters is None else functools.partial(causal_pool, voters=voters)
        pool_BTR = save(pool(jax.nn.softmax(logits_BTR), segment_ids, pool_sizes, forced_experts))
    pool_logits_BTR = jnp.where(pool_BTR, logits_BTR, -jnp.inf)
    score_logits_BTR = pool_logits_BTR if rules.pool_softmax else logits_BTR
    logsumexp_BT = jax.nn.logsumexp(score_logits_BTR, axis=-1)
    scores_BTR = jnp.exp(score_logits_BTR - logsumexp_BT[..., None])
    # Scores rise with the logits, so both semantics select the same experts.
    top_logits_BTk, expert_ids_BTk = map(save, jax.lax.top_k(jax.lax.stop_gradient(pool_logits_BTR), top_k))
    weights_BTk = selected(scores_BTR, expert_ids_BTk, jnp.exp(top_logits_BTk - logsumexp_BT[..., None]))
    if rules.normalize is not None:
        weights_BTk = weights_BTk / jnp.sum(weights_BTk**rules.normalize, -1, keepdims=True) ** (1 / rules.normalize)
    if rules.restore_scale:
        weights_BTk = weights_BTk * top_k
    return Routing(expert_ids_BTk, weights_BTk, scores_BTR, pool_BTR, logsumexp_BT)


def document_pool(
    router_probs: Float[Array, "B T R"], segment_ids: Int[Array, "B T"], pool_sizes: Int[Array, "B N"],
    forced_experts: int | Bool[Array, "R"] = 0,
) -> Bool[Array, "B T R"]:
    """The experts that the token's document may use: those with the largest sums of `router_probs` over the document,
    `pool_sizes` of them (ties: the lowest id first). Everything is allowed to padding, which never votes."""
    documents_BTN = one_hot_documents(segment_ids, pool_sizes.shape[1])
    votes_BNR = jnp.einsum("btn,btr->bnr", documents_BTN, jax.lax.stop_gradient(router_probs),
                           precision=jax.lax.Precision.HIGHEST, out_sharding=spec(BATCH, None, None))
    forced_R = _forced_mask(forced_experts, votes_BNR.shape[-1])
    pool_BNR = largest(jnp.where(forced_R, -1.0, votes_BNR), pool_sizes) | forced_R
    # Back to the tokens as a matmul with a 0/1 matrix: exact, and it shards and runs like any other matmul.
    return jnp.einsum("btn,bnr->btr", documents_BTN, (~pool_BNR).astype(jnp.float32),
                      out_sharding=spec(BATCH, "sequence", None)) < 0.5


def causal_pool(
    router_probs: Float[Array, "B T R"], segment_ids: Int[Array, "B T"], pool_sizes: Int[Array, "B N"],
    forced_experts: int | Bool[Array, "R"], voters: Bool[Array, "B T"],
) -> Bool[Array, "B T R"]:
    """`document_pool` from what a token may know: of its document, the `voters` up to the token itself. Where all vote, the
    pool of a document's last token is the document's."""
    R, segments_BT = router_probs.shape[-1], _rows(segment_ids, None)
    votes_BTR = jnp.where(_rows(voters, None)[..., None], _rows(jax.lax.stop_gradient(router_probs), None), 0.0)

    def add(before, after):  # sums that begin anew with each document, so that not even its rounding sees the ones before
        return jnp.where(after[1], after[0], before[0] + after[0]), before[1] | after[1]

    so_far_BTR = jax.lax.associative_scan(add, (votes_BTR, _begins(segments_BT)[..., None]), axis=1)[0]
    left_out_BN = (R - jnp.minimum(pool_sizes, R)).astype(jnp.float32)
    left_out_BT = jnp.einsum("btn,bn->bt", one_hot_documents(segment_ids, pool_sizes.shape[1]), left_out_BN,
                             precision=jax.lax.Precision.HIGHEST, out_sharding=spec(BATCH, "sequence"))
    forced_R = _forced_mask(forced_experts, R)
    return largest(jnp.where(forced_R, -1.0, _rows(so_far_BTR, "sequence")), R - left_out_BT.astype(jnp.int32)) | forced_R


def largest(values: Float[Array, "*any R"], counts: Int[Array, "*any"]) -> Bool[Array, "*any R"]:
    """The `counts` largest of the fp32 values (ties: the lowest index first), never a negative one. Their bits are in the order
    of the values, so 31 comparisons find the smallest that belongs to them: no row is sorted."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)

    def narrow(i, least):
        higher = least | jnp.left_shift(1, 30 - i)
        return jnp.where(jnp.sum(bits >= higher[..., None], axis=-1) >= counts, higher, least)

    least = jax.lax.fori_loop(0, 31, narrow, jnp.sum(jnp.zeros_like(bits), axis=-1))[..., None]
    more, equal = bits > least, bits == least
    room = counts[..., None] - jnp.sum(more, axis=-1, keepdims=True)
    return more | (equal & (jnp.cumsum(equal, axis=-1) <= room))


def first_tokens(segment_ids: Int[Array, "B T"], count: Int[Array, ""] | int) -> Bool[Array, "B T"]:
    """The first `count` tokens of every document of a row."""
    segments_BT = _rows(segment_ids, None)
    index_T = jnp.arange(segments_BT.shape[1])
    return index_T - jax.lax.cummax(jnp.where(_begins(segments_BT), index_T, 0), axis=1) < count


def _begins(segments_BT: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    return jnp.pad(jnp.diff(segments_BT, axis=1) != 0, ((0, 0), (1, 0)), constant_values=True)


def _rows(x: Array, axis: str | None) -> Array:
    """[B, T, ...] with rows cut over this axis of the mesh, if there is one; None: whole ones."""
    return x if spec() is None else reshard(x, BATCH, axis, *(None,) * (x.ndim - 2))


def _forced_mask(forced_experts: int | Bool[Array, "R"], R: int) -> Bool[Array, "R"]:
    return jnp.arange(R) >= R - forced_experts if isinstance(forced_experts, int) else forced_experts


def one_hot_documents(segment_ids: Int[Array, "B T"], max_documents: int) -> Float[Array, "B T N"]:
    return (segment_ids[..., None] == jnp.arange(1, max_documents + 1)).astype(jnp.float32)


def is_chosen(expert_ids: Int[Array, "*B T k"], num_routed: int) -> Bool[Array, "*B R T"]:
    """Whether a token chose an expert. Choice by choice and tokens last: on TPU an eighth of the cycles of a reduction over
    [B, T, k, R], as then no number of a token is spread over the lanes of a register."""
    experts_R1 = jnp.arange(num_routed)[:, None]
    return functools.reduce(jnp.logical_or, [ids[..., None, :] == experts_R1 for ids in jnp.moveaxis(expert_ids, -1, 0)])


@jax.custom_vjp
def selected(scores: Float[Array, "B T R"], expert_ids: Int[Array, "B T k"],
             values: Float[Array, "B T k"]) -> Float[Array, "B T k"]:
    """`values`, which are `scores` at `expert_ids`: what is known needs no gather. Its adjoint is a masked sum, choice by
    choice, instead of a scatter, and goes to `scores`."""
    return values


def _selected_adjoint(saved, d_BTk):
    scores_BTR, ids_BTk = saved
    experts_R1 = jnp.arange(scores_BTR.shape[-1])[:, None]
    choices = zip(jnp.moveaxis(ids_BTk, -1, 0), jnp.moveaxis(d_BTk, -1, 0))
    d_BRT = functools.reduce(jnp.add, [jnp.where(ids[:, None] == experts_R1, d[:, None], 0.0) for ids, d in choices])
    return jnp.swapaxes(jax.lax.optimization_barrier(d_BRT), 1, 2), None, None  # else every user of it computes it anew


selected.defvjp(lambda scores, expert_ids, values: (values, (scores, expert_ids)), _selected_adjoint)


def split_at_eos(segment_ids: Int[Array, "B T"], tokens: Int[Array, "B T"], eos_id: int) -> Int[Array, "B T"]:
    """Documents as the published router sees them (`router.eos_owner=next`): an EOS token opens the next document,
    except in the first position of a row; a document may be that one token. Padding stays 0."""
    opens_BT = (tokens == eos_id) & (jnp.arange(tokens.shape[1]) > 0)
    opened_BT = reshard(jnp.cumsum(reshard(opens_BT, BATCH, None), axis=1), BATCH, "sequence")  # needs the whole row
    return jnp.where(segment_ids > 0, 1 + opened_BT, 0)


def module_mask(config: Config) -> Bool[np.ndarray, "L R"] | None:
    """The routed experts that every pool holds on top of its size; None if there are none."""
    m, r = config.model, config.router
    if not (r.module or r.forced_experts):
        return None
    mask = np.zeros((m.num_layers, m.num_routed_experts), bool)
    mask[:, m.num_routed_experts - r.forced_experts:] = True
    for layer, experts in enumerate(r.module):
        mask[layer, [int(e) for e in experts.split()]] = True
    return mask


NO_POOL = 2**31 - 1  # a size


def draw_pool_sizes(
    config: RouterConfig, seed: int, step: Int[Array, ""] | int, layers: int, document_ids: Int[Array, "B N"],
    progress: Float[Array, ""] | float = 0.0,
) -> Int[Array, "L B N"]:
    """Pool sizes of one optimizer step, from a stateless key of (seed, step, layer, document id): they do not change
    with the mesh, the number of hosts, microbatching, rematerialisation or a resume.

    `uniform`: integers of [pool_min, pool_max], both included, as published. `beta`: min + (max - min) u^(1/a), which is
    Beta(a, 1) and favours large pools. `pool_scope=document` gives one size to all layers of a document. `progress`: the part
    of the learning rate's schedule that is over, for `pool_grows` and `pool_off_from`.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    lo, hi = config.pool_min, config.pool_max
    if config.pool_grows:
        hi = lo + jnp.round((hi - lo) * jnp.clip(progress, 0, 1)).astype(jnp.int32)

    def size(layer, document):
        u = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, layer), document))
        if config.pool_distribution == "uniform":
            return jnp.minimum(lo + jnp.floor(u * (hi - lo + 1)).astype(jnp.int32), hi)
        return jnp.round(lo + (hi - lo) * u ** (1 / config.pool_beta)).astype(jnp.int32)

    def is_free(document):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, layers), document)) < config.pool_free

    key_of_layer_L = jnp.arange(layers) if config.pool_scope == "layer" else jnp.zeros(layers, jnp.int32)
    over_documents = jax.vmap(jax.vmap(size, in_axes=(None, 0)), in_axes=(None, 0))
    sizes_LBN = jax.vmap(over_documents, in_axes=(0, None))(key_of_layer_L, document_ids)
    if config.pool_free:
        sizes_LBN = jnp.where(jax.vmap(jax.vmap(is_free))(document_ids), NO_POOL, sizes_LBN)
    return sizes_LBN if config.pool_off_from == 1 else jnp.where(progress >= config.pool_off_from, NO_POOL, sizes_LBN)
