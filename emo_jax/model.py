"""The EMO transformer, top to bottom.

Shape legend:
    B rows   T tokens of a row   D model width   H query heads   G key/value heads   K head width   V vocabulary
    L layers   E experts, shared ones included   R routed experts   k routed experts of a token   F expert hidden width
    N documents of a row   S slots of a key/value cache

Pre-norm blocks, h = x + attention(norm(x)), y = h + moe(norm(h)); RMSNorm in fp32, rotary positions (half rotation) that
count through the packed row, no biases, untied embedding and head. The standard MoE (`router.document_pool=False`) and
the dense model (`model.num_experts=0`) differ by that field.

`flax.nnx` modules hold parameters and initialisation; outside them parameters are a nested dict of arrays, whose layer
parameters are stacked on a leading L axis and scanned over. Auxiliary losses are returned.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from emo_jax import sharding
from emo_jax.config import Config, ModelConfig
from emo_jax.kernels import attention as attention_kernels
from emo_jax.kernels import cross_entropy as ce
from emo_jax.kernels import grouped_matmul as gmm
from emo_jax.kernels.cached_attention import cached_attention
from emo_jax.kernels.compiler_options import has_sparse_cores
from emo_jax.moe import routing
from emo_jax.moe.experts import choose_strategy, moe_experts
from emo_jax.sharding import BATCH, gather_weight, reshard, spec

Params = dict[str, Any]

# What the backward pass keeps of a layer instead of recomputing it, by the names that checkpoint_name gives. In units of
# one bf16 [tokens, D] array a layer: attention 1, attention_qkv 3, residual 1, moe_rows k, moe_hidden 2kF/D, routing 0.2;
# and under expert parallelism moe_exchanged, the size of the expert axis (ring) or k (all_to_all).
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "moe": jax.checkpoint_policies.save_only_these_names("routing", "moe_exchanged", "moe_rows", "moe_out"),
    "attention": jax.checkpoint_policies.save_only_these_names("routing", "moe_exchanged", "attention"),
    "projections": jax.checkpoint_policies.save_only_these_names(
        "routing", "moe_exchanged", "attention", "attention_qkv", "residual"),
    "light": jax.checkpoint_policies.save_only_these_names(
        "routing", "moe_exchanged", "attention", "attention_qkv", "residual", "moe_hidden"),
}


class Init:
    """Makes parameters: fp32, truncated normal cut at 3 standard deviations, each from a key of the seed and its own name,
    so that parameters which two models have in common start equal."""

    def __init__(self, config: ModelConfig, seed: int, prefix: str = "", layers: int | None = None):
        self.config, self.seed, self.prefix, self.layers = config, seed, prefix, layers

    def within(self, name: str, layers: int | None = None) -> Init:
        return Init(self.config, self.seed, f"{self.prefix}{name}.", layers or self.layers)

    def weight(self, name: str, *shape: int) -> nnx.Param:
        key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(f"{self.prefix}{name}".encode()))
        values = jax.random.truncated_normal(key, -3.0, 3.0, self._stacked(shape), jnp.float32)
        return nnx.Param(self.config.init_std * values)

    def ones(self, *shape: int) -> nnx.Param:
        return nnx.Param(jnp.ones(self._stacked(shape), jnp.float32))

    def _stacked(self, shape):
        return shape if self.layers is None else (self.layers, *shape)


class RowContext(NamedTuple):
    """What every layer needs to know of the rows, computed once."""

    segments: Int[Array, "B T"]  # documents for attention; all ones for attention_scope=causal
    router_segments: Int[Array, "B T"]  # documents for the router, 0 for padding
    rotary: tuple[Float[Array, "B T K/2"], Float[Array, "B T K/2"]]  # cos and sin


class Run(NamedTuple):
    """Static choices of one compiled function."""

    config: Config
    dtype: Any
    attention: str
    grouped_matmul: str
    dispatch: str


class KVCache(NamedTuple):
    """Keys and values of the tokens so far. Rows are aligned at their ends: shorter ones begin with padding (segment 0)."""

    k: Float[Array, "L B G S K"]
    v: Float[Array, "L B G S K"]
    segments: Int[Array, "B S"]  # 0: padding, or not in use yet
    length: Int[Array, ""]  # slots in use


class Attention(nnx.Module):
    def __init__(self, c: ModelConfig, init: Init):
        D, H, G, K = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
        self.q, self.k, self.v = init.weight("q", D, H, K), init.weight("k", D, G, K), init.weight("v", D, G, K)
        self.o = init.weight("o", H, K, D)

    def __call__(self, x_BTD, rows: RowContext, run: Run, past=None):
        """(output, (keys, values) of these tokens). `past`: those of a cache, [B, G, S, K], and its segments [B, S]."""
        q, k, v = (jnp.einsum("btd,dhk->bthk", x_BTD, gather_weight(w[...], run.dtype, None, "tensor", None))
                   for w in (self.q, self.k, self.v))
        q, k = rotate(q, rows.rotary), rotate(k, rows.rotary)
        # Under sequence sharding a device attends with its own queries to the keys of the whole row.
        k, v = (reshard(a, BATCH, None, "tensor", None) for a in (k, v))
        q, k, v = (checkpoint_name(a, "attention_qkv") for a in (q, k, v))
        if past is not None:
            past_k, past_v, past_segments = past
            out = cached_attention(q, k, v, past_k, past_v, rows.segments, past_segments)
        else:
            out = attention_kernels.attention(q, k, v, rows.segments, reshard(rows.segments, BATCH, None), run.attention)
        o = gather_weight(self.o[...], run.dtype, "tensor", None, None)
        return jnp.einsum("bthk,hkd->btd", out, o, out_sharding=spec(BATCH, "sequence", None)), (k, v)


class MoE(nnx.Module):
    def __init__(self, c: ModelConfig, init: Init):
        E, D, F = c.num_experts, c.d_model, c.d_ff
        self.router = init.weight("router", D, c.num_routed_experts)
        self.gate, self.up = init.weight("gate", E, D, F), init.weight("up", E, D, F)
        self.down = init.weight("down", E, F, D)

    def route(self, x_BTD, rows: RowContext, pool_sizes, allowed, run: Run) -> routing.Routing:
        c = run.config
        router = gather_weight(self.router[...], jnp.float32, None, None)
        logits = jnp.einsum("btd,dr->btr", x_BTD.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
        if allowed is not None:
            logits = jnp.where(allowed, logits, -1e30)
        return routing.route(logits, rows.router_segments, pool_sizes, c.model.routed_top_k, c.router.semantics,
                             c.router.forced_experts)

    def __call__(self, x_BTD, rows: RowContext, pool_sizes, allowed, run: Run):
        route = self.route(x_BTD, rows, pool_sizes, allowed, run)
        valid = rows.router_segments > 0
        table = {"gate": self.gate[...], "up": self.up[...], "down": self.down[...]}
        c = run.config
        y, load = moe_experts(table, x_BTD, route.expert_ids, route.weights, valid, strategy=run.dispatch,
                              num_shared=c.model.num_shared_experts, kernel=run.grouped_matmul,
                              buffer_factor=c.kernels.buffer_factor)
        return checkpoint_name(y, "moe_out"), route._replace(buffer_load=load)


class MLP(nnx.Module):
    def __init__(self, c: ModelConfig, init: Init):
        self.gate, self.up = init.weight("gate", c.d_model, c.d_ff), init.weight("up", c.d_model, c.d_ff)
        self.down = init.weight("down", c.d_ff, c.d_model)

    def __call__(self, x_BTD, run: Run):
        gate, up = (jnp.einsum("btd,df->btf", x_BTD, gather_weight(w[...], run.dtype, None, "tensor"))
                    for w in (self.gate, self.up))
        down = gather_weight(self.down[...], run.dtype, "tensor", None)
        return jnp.einsum("btf,fd->btd", jax.nn.silu(gate) * up, down, out_sharding=spec(BATCH, "sequence", None))


class Block(nnx.Module):
    """One layer; of a stack of L layers when its parameters carry a leading L axis."""

    def __init__(self, c: ModelConfig, init: Init):
        self.attention_norm, self.mlp_norm = init.ones(c.d_model), init.ones(c.d_model)
        self.attention = Attention(c, init.within("attention"))
        if c.num_experts:
            self.moe = MoE(c, init.within("moe"))
        else:
            self.mlp = MLP(c, init.within("mlp"))

    def attend(self, x_BTD, rows: RowContext, run: Run, past=None):
        """(h, the normed input of the experts, keys and values)."""
        eps = run.config.model.norm_eps
        y_BTD, kv = self.attention(rms_norm(x_BTD, self.attention_norm[...], eps), rows, run, past)
        h_BTD = checkpoint_name(x_BTD + y_BTD, "residual")
        return h_BTD, rms_norm(h_BTD, self.mlp_norm[...], eps), kv

    def __call__(self, x_BTD, rows: RowContext, pool_sizes, allowed, run: Run, past=None):
        h_BTD, normed, kv = self.attend(x_BTD, rows, run, past)
        if run.config.model.num_experts:
            y_BTD, route = self.moe(normed, rows, pool_sizes, allowed, run)
        else:
            y_BTD, route = self.mlp(normed, run), None
        return h_BTD + y_BTD, route, kv


class Transformer(nnx.Module):
    def __init__(self, c: ModelConfig, seed: int):
        init = Init(c, seed)
        self.embedding = init.weight("embedding", c.vocab_size, c.d_model)
        self.layers = Block(c, init.within("layers", layers=c.num_layers))
        self.final_norm = init.ones(c.d_model)
        self.head = init.weight("head", c.d_model, c.vocab_size)


# ---- parameters -----------------------------------------------------------------------------------------------------


def init_params(config: Config, mesh: jax.sharding.Mesh) -> Params:
    """New parameters, made in place on the mesh; their values do not depend on it."""
    abstract = abstract_params(config)
    make = jax.jit(lambda: nnx.to_pure_dict(nnx.state(Transformer(config.model, config.seed))),
                   out_shardings=sharding.parameter_shardings(abstract, mesh))
    with jax.set_mesh(mesh):
        return make()


def abstract_params(config: Config, mesh: jax.sharding.Mesh | None = None) -> Params:
    """Shapes and dtypes of the parameters, and their shardings on `mesh`, without allocating any."""
    abstract = nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(Transformer(config.model, config.seed))))
    return abstract if mesh is None else sharding.abstract(abstract, mesh)


def num_params(config: Config) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


# ---- forward --------------------------------------------------------------------------------------------------------


def static_choices(config: Config, mesh: jax.sharding.Mesh) -> Run:
    """Dtype and kernels for the devices of `mesh`, each choice logged once."""
    device = mesh.devices.flat[0]
    platform = device.platform
    dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}.get(
        config.train.compute_dtype, jnp.float32 if platform == "cpu" else jnp.bfloat16)
    attention = attention_kernels.choose(config.kernels.attention, platform, config.model.head_dim, mesh.shape["sequence"])
    return Run(config, dtype, attention,
               gmm.choose(config.kernels.grouped_matmul, platform),
               choose_strategy(config.kernels.dispatch, mesh.shape["expert"], config.model.routed_top_k, platform,
                               has_sparse_cores(device)))


def forward(
    params: Params,
    batch: dict[str, Array],
    run: Run,
    *,
    pool_sizes: Int[Array, "L B N"] | None = None,
    allowed: Array | None = None,
    eos_id: int = -1,
    per_layer=lambda x, route, rows: None,
) -> tuple[Float[Array, "B T D"], Any]:
    """The final normed activations, and what `per_layer(x [B, T, D], routing, rows)` returned in every layer (stacked).

    `batch` needs tokens, segment_ids and positions [B, T]. `pool_sizes`: of every layer and document of the row, None for
    no pools. `allowed` bool [L, R], or [L, B, 1, R] by row: routed experts that may be used at all, None for all.
    """
    rows = row_context(batch, run.config, eos_id)
    x_BTD, outputs, _ = _layers(params, batch["tokens"], rows, run, pool_sizes, allowed, per_layer)
    return x_BTD, outputs


def extend(
    params: Params, batch: dict[str, Array], cache: KVCache, run: Run, allowed: Array | None = None
) -> tuple[Float[Array, "B T D"], KVCache]:
    """`forward` for the next T tokens of rows whose earlier tokens are in the cache, and the cache with these added.
    Without pools, as in published inference. mesh.sequence must be 1."""
    segments = batch["segment_ids"]
    rows = RowContext(segments, segments,
                      rotary_angles(batch["positions"], run.config.model.head_dim, run.config.model.rope_theta))
    x_BTD, _, (k, v) = _layers(params, batch["tokens"], rows, run, None, allowed, lambda *_: None, cache)
    put = jax.lax.dynamic_update_slice
    slot, zero = cache.length, jnp.zeros_like(cache.length)
    k, v = (put(old, new.swapaxes(2, 3), (zero, zero, zero, slot, zero)) for old, new in ((cache.k, k), (cache.v, v)))
    segments = put(cache.segments, reshard(segments, BATCH, None), (zero, slot))
    return x_BTD, KVCache(k, v, segments, slot + batch["tokens"].shape[1])


def _layers(params, tokens, rows: RowContext, run: Run, pool_sizes, allowed, per_layer, cache: KVCache | None = None):
    """(final normed activations, what `per_layer` returned, keys and values [L, B, T, G, K] if there is a cache)."""
    c = run.config
    x_BTD = embed(params["embedding"], tokens, run.dtype)
    structure, _ = nnx.split(nnx.eval_shape(lambda: Block(c.model, Init(c.model, 0))))

    def layer(x_BTD, inputs):
        layer_params, sizes, mask, past = inputs
        past = None if past is None else (*past, cache.segments)
        x_BTD, route, kv = nnx.merge(structure, layer_params)(x_BTD, rows, sizes, mask, run, past)
        return x_BTD, (per_layer(x_BTD, route, rows), None if past is None else kv)

    policy = REMAT_POLICIES[c.train.remat]
    if policy is not None:
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    past = None if cache is None else (cache.k, cache.v)
    inputs = (params["layers"], pool_sizes, allowed_experts(c.model, allowed), past)
    x_BTD, (outputs, kv) = jax.lax.scan(layer, x_BTD, inputs)
    return rms_norm(x_BTD, params["final_norm"], c.model.norm_eps), outputs, kv


def allowed_experts(m: ModelConfig, allowed: Array | None) -> Array | None:
    """`allowed` without the experts that layers of a pruned model lack."""
    if not m.experts_per_layer:
        return allowed
    routed = jnp.asarray(m.experts_per_layer) - m.num_shared_experts
    present = jnp.arange(m.num_routed_experts) < routed[:, None]
    return present if allowed is None else allowed & jnp.expand_dims(present, tuple(range(1, allowed.ndim - 1)))


def row_context(batch: dict[str, Array], c: Config, eos_id: int) -> RowContext:
    segments = batch["segment_ids"]
    causal = c.model.attention_scope == "causal"
    return RowContext(jnp.ones_like(segments) if causal else segments, router_segments(batch, c, eos_id),
                      rotary_angles(batch["positions"], c.model.head_dim, c.model.rope_theta))


def router_segments(batch: dict[str, Array], c: Config, eos_id: int) -> Int[Array, "B T"]:
    """The documents of a row as the router sees them; `eos_id` matters for `router.eos_owner=next` only."""
    if c.router.eos_owner == "next":
        return routing.router_segments(batch["segment_ids"], batch["tokens"], eos_id)
    return batch["segment_ids"]


def embed(embedding, tokens, dtype):
    table = gather_weight(embedding, dtype, None, None)
    return table.at[tokens].get(out_sharding=spec(BATCH, "sequence", None))


def token_losses(params: Params, x_BTD, targets, run: Run) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(cross entropy of every target in nats, logsumexp of its logits), fp32."""
    return ce.cross_entropy(x_BTD, params["head"], targets, run.config.kernels.loss_chunk_tokens)


def loss_sums(params: Params, x_BTD, targets, weights: Float[Array, "B T"], run: Run) -> ce.LossSums:
    """Sums over all tokens, of weights * nll and of weights * logsumexp^2, and the two added with the config's weight."""
    c = run.config
    return ce.training_loss(x_BTD, params["head"], targets, weights, c.train.output_z_weight, c.kernels.loss_chunk_tokens)


def logits(params: Params, x_BTD, run: Run) -> Float[Array, "B T V"]:
    head = gather_weight(params["head"], run.dtype, None, "tensor")
    return jnp.einsum("btd,dv->btv", x_BTD, head, preferred_element_type=jnp.float32)


# ---- pieces ---------------------------------------------------------------------------------------------------------


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)


def rotary_angles(positions: Int[Array, "B T"], head_dim: int, theta: float):
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T H K"], rotary) -> Float[Array, "B T H K"]:
    """Rotary position embedding in fp32: dimension i of the first half turns with dimension i of the second."""
    cos, sin = (a[:, :, None, :] for a in rotary)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
