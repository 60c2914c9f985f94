"""The EMO transformer, top to bottom.

Shape legend of the package. Arrays in bodies carry theirs as a suffix (x_BTD); annotated parameters do without.
    B rows   T tokens of a row   D model width   H query heads   G key/value heads   W head width   V vocabulary
    S keys that queries attend to: a whole row's, or the slots of a cache   N documents of a row   L layers
    E experts, shared ones included   R routed experts   k routed experts of a token   F expert hidden width
    e experts of a device   Q rows of its buffer   X devices of the mesh axis `expert`   M microbatches

Pre-norm blocks, h = x + attention(norm(x)), y = h + moe(norm(h)); RMSNorm in fp32, rotary positions (half rotation) that
count through the packed row, no biases, untied embedding and head. The standard MoE (`router.document_pool=False`) and
the dense model (`model.num_experts=0`) differ by that field.

`flax.nnx` modules hold parameters and initialisation; outside them parameters are a nested dict of arrays, whose layer
parameters are stacked on a leading L axis and scanned over. Auxiliary losses are returned.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from emo_jax import sharding
from emo_jax.compilation import program_config
from emo_jax.config import Config, ModelConfig
from emo_jax.kernels import Kernel
from emo_jax.kernels import attention as attention_kernels
from emo_jax.kernels import cross_entropy as ce
from emo_jax.kernels import grouped_matmul as gmm
from emo_jax.kernels.cached_attention import cached_attention
from emo_jax.kernels.compiler_options import has_sparse_cores
from emo_jax.kernels.rotary import Rotary, rotary_angles, rotate
from emo_jax.moe import routing
from emo_jax.moe.experts import Dispatch, ExpertLayer, choose_strategy, moe_experts, say_where_experts_are_split
from emo_jax.sharding import ACTIVATIONS, BATCH, gather_weight, reshard

Params = dict[str, Any]

# What the backward pass keeps of a layer instead of recomputing it, by the names that checkpoint_name gives. In units of
# one bf16 [tokens, D] array a layer: attention 1, attention_qkv 3, residual 1, moe_rows k, moe_hidden 2kF/D, routing 0.2;
# and under expert parallelism moe_exchanged, the size of the expert axis (ring) or k (all_to_all). All keep expert_counts:
# R numbers, whose sum over the mesh is not repeated.
SAVED = {
    "full": (),
    "moe": ("routing", "moe_exchanged", "moe_rows", "moe_out"),
    "attention": ("routing", "moe_exchanged", "attention"),
    "projections": ("routing", "moe_exchanged", "attention", "attention_qkv", "residual"),
    "light": ("routing", "moe_exchanged", "attention", "attention_qkv", "residual", "moe_hidden"),
}
REMAT_POLICIES = {"none": None} | {
    name: jax.checkpoint_policies.save_only_these_names("expert_counts", *saved) for name, saved in SAVED.items()}


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
    rotary: Rotary
    voters: Bool[Array, "B T"] | None = None  # of causal pools; None: every token votes for its whole document


class Execution(NamedTuple):
    """The static choices of one compiled function."""

    config: Config
    dtype: Any
    attention: Kernel
    grouped_matmul: Kernel
    dispatch: Dispatch
    loss_chunk_tokens: int
    eos_id: int = -1  # for `router.eos_owner=next`
    balance_groups: int = 1  # groups of rows that experts are balanced in

    @classmethod
    def of(cls, config: Config, mesh: jax.sharding.Mesh, eos_id: int = -1) -> Execution:
        """Dtype and kernels for the devices of `mesh`, each choice logged once."""
        device, c = mesh.devices.flat[0], config
        platform = device.platform
        dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}.get(
            c.train.compute_dtype, jnp.float32 if platform == "cpu" else jnp.bfloat16)
        shards = c.router.balance_shards or sharding.batch_shards(mesh)
        if c.model.num_experts:
            say_where_experts_are_split(c.model.num_experts, mesh.shape["fsdp"] * mesh.shape["expert"], platform)
        return cls(
            c, dtype, attention_kernels.choose(c.kernels.attention, platform, c.model.head_dim, mesh.shape["sequence"]),
            gmm.choose(c.kernels.grouped_matmul, platform),
            choose_strategy(c.kernels.dispatch, mesh.shape["expert"], c.model.routed_top_k, platform,
                            has_sparse_cores(device)),
            c.kernels.loss_chunk_tokens or ce.chunk_tokens(platform), eos_id,
            shards if c.router.balance_scope == "shard" else 1)

    @property
    def documents_per_row(self) -> int:
        """The static bound N; the document that a row's last EOS token opens (`eos_owner=next`) comes on top."""
        return self.config.data.max_documents_per_row + (self.config.router.eos_owner == "next")


class KVCache(NamedTuple):
    """Keys and values of the tokens so far. Rows are aligned at their ends: shorter ones begin with padding (segment 0)."""

    k: Float[Array, "L B G S W"]
    v: Float[Array, "L B G S W"]
    segments: Int[Array, "B S"]  # 0: padding, or not in use yet
    length: Int[Array, ""]  # slots in use


class Attention(nnx.Module):
    def __init__(self, c: ModelConfig, init: Init):
        D, H, G, W = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
        self.q, self.k, self.v = init.weight("q", D, H, W), init.weight("k", D, G, W), init.weight("v", D, G, W)
        self.o = init.weight("o", H, W, D)

    def __call__(self, x_BTD, rows: RowContext, execution: Execution, past=None):
        """(output, (keys, values) of these tokens). `past`: those of a cache, [B, G, S, W], and its segments [B, S]."""
        with jax.named_scope("projections"):
            q_BTHW, k_BTGW, v_BTGW = (
                jnp.einsum("btd,dhw->bthw", x_BTD, gather_weight(w[...], execution.dtype, None, "tensor", None))
                for w in (self.q, self.k, self.v))
        by_matmul = execution.attention.name == "splash"  # on TPU
        q_BTHW, k_BTGW = (rotate(a, rows.rotary, by_matmul) for a in (q_BTHW, k_BTGW))
        # Under sequence sharding a device attends with its own queries to the keys of the whole row.
        k_BTGW, v_BTGW = (reshard(a, BATCH, None, "tensor", None) for a in (k_BTGW, v_BTGW))
        q_BTHW, k_BTGW, v_BTGW = (checkpoint_name(a, "attention_qkv") for a in (q_BTHW, k_BTGW, v_BTGW))
        if past is not None:
            past_k_BGSW, past_v_BGSW, past_segments_BS = past
            out_BTHW = cached_attention(q_BTHW, k_BTGW, v_BTGW, past_k_BGSW, past_v_BGSW, rows.segments, past_segments_BS)
        else:
            out_BTHW = attention_kernels.attention(q_BTHW, k_BTGW, v_BTGW, rows.segments,
                                                   reshard(rows.segments, BATCH, None), execution.attention)
        with jax.named_scope("projections"):
            o_HWD = gather_weight(self.o[...], execution.dtype, "tensor", None, None)
            return jnp.einsum("bthw,hwd->btd", out_BTHW, o_HWD, out_sharding=ACTIVATIONS), (k_BTGW, v_BTGW)


class MoE(nnx.Module):
    def __init__(self, c: ModelConfig, init: Init):
        E, D, F = c.num_experts, c.d_model, c.d_ff
        self.router = init.weight("router", D, c.num_routed_experts)
        self.gate, self.up = init.weight("gate", E, D, F), init.weight("up", E, D, F)
        self.down = init.weight("down", E, F, D)

    @jax.named_scope("routing")
    def route(self, x_BTD: Float[Array, "B T D"], rows: RowContext, pools: tuple[Array, Array | None] | None,
              allowed: Array | np.ndarray | None, execution: Execution) -> routing.Routing:
        c = execution.config
        router_DR = gather_weight(self.router[...], jnp.float32, None, None)
        logits_BTR = jnp.einsum("btd,dr->btr", x_BTD.astype(jnp.float32), router_DR, precision=jax.lax.Precision.HIGHEST)
        if allowed is not None:
            logits_BTR = jnp.where(allowed, logits_BTR, -1e30)
        sizes_BN, forced_R = pools or (None, None)
        return routing.route(logits_BTR, rows.router_segments, sizes_BN, c.model.routed_top_k, c.router.semantics,
                             0 if forced_R is None else forced_R, rows.voters)

    def __call__(self, x_BTD, rows: RowContext, pools, allowed, execution: Execution, see_rows=None):
        """(output, routing). `pools`: None, or sizes [B, N] and what all pools hold beside that, [R]. `see_rows`: the hook of
        `ExpertLayer`; what it saw is in the routing."""
        route = self.route(x_BTD, rows, pools, allowed, execution)
        table = {"gate": self.gate[...], "up": self.up[...], "down": self.down[...]}
        c = execution.config
        layer = ExpertLayer(c.model.num_shared_experts, execution.dispatch, execution.grouped_matmul,
                            c.kernels.buffer_factor, see_rows)
        y_BTD, seen_BTk, load = moe_experts(table, x_BTD, route.expert_ids, route.weights, rows.router_segments > 0, layer)
        return checkpoint_name(y_BTD, "moe_out"), route._replace(buffer_load=load, seen=seen_BTk)


class MLP(nnx.Module):
    def __init__(self, c: ModelConfig, init: Init):
        self.gate, self.up = init.weight("gate", c.d_model, c.d_ff), init.weight("up", c.d_model, c.d_ff)
        self.down = init.weight("down", c.d_ff, c.d_model)

    @jax.named_scope("mlp")
    def __call__(self, x_BTD, execution: Execution):
        gate_BTF, up_BTF = (jnp.einsum("btd,df->btf", x_BTD, gather_weight(w[...], execution.dtype, None, "tensor"))
                            for w in (self.gate, self.up))
        down_FD = gather_weight(self.down[...], execution.dtype, "tensor", None)
        return jnp.einsum("btf,fd->btd", jax.nn.silu(gate_BTF) * up_BTF, down_FD, out_sharding=ACTIVATIONS)


class Block(nnx.Module):
    """One layer; of a stack of L layers when its parameters carry a leading L axis."""

    def __init__(self, c: ModelConfig, init: Init):
        self.attention_norm, self.mlp_norm = init.ones(c.d_model), init.ones(c.d_model)
        self.attention = Attention(c, init.within("attention"))
        if c.num_experts:
            self.moe = MoE(c, init.within("moe"))
        else:
            self.mlp = MLP(c, init.within("mlp"))

    @jax.named_scope("attention")
    def attend(self, x_BTD: Float[Array, "B T D"], rows: RowContext, execution: Execution,
               past: tuple[Array, ...] | None = None) -> tuple[Array, Array, Any]:
        """(h, the normed input of the experts, keys and values)."""
        eps = execution.config.model.norm_eps
        y_BTD, kv = self.attention(rms_norm(x_BTD, self.attention_norm[...], eps), rows, execution, past)
        h_BTD = checkpoint_name(x_BTD + y_BTD, "residual")
        return h_BTD, rms_norm(h_BTD, self.mlp_norm[...], eps), kv

    def __call__(self, x_BTD, rows: RowContext, pools, allowed, execution: Execution, past=None):
        h_BTD, normed_BTD, kv = self.attend(x_BTD, rows, execution, past)
        if execution.config.model.num_experts:
            y_BTD, route = self.moe(normed_BTD, rows, pools, allowed, execution)
        else:
            y_BTD, route = self.mlp(normed_BTD, execution), None
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
    with jax.set_mesh(mesh):
        return _init(program_config(config), mesh)()


@functools.lru_cache(maxsize=4)
def _init(config: Config, mesh: jax.sharding.Mesh) -> Any:
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(Transformer(config.model, config.seed))),
                   out_shardings=sharding.parameter_shardings(abstract_params(config), mesh))


def abstract_params(config: Config, mesh: jax.sharding.Mesh | None = None) -> Params:
    """Shapes and dtypes of the parameters, and their shardings on `mesh`, without allocating any."""
    abstract = nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(Transformer(config.model, config.seed))))
    return abstract if mesh is None else sharding.abstract(abstract, mesh)


def num_params(config: Config) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


# ---- forward --------------------------------------------------------------------------------------------------------


def forward(
    params: Params,
    batch: dict[str, Array],
    execution: Execution,
    *,
    pool_sizes: Int[Array, "L B N"] | None = None,
    pool_tokens: Int[Array, ""] | int | None = None,
    allowed: Array | np.ndarray | None = None,
    per_layer: Callable[..., Any] = lambda x, route, rows: None,
    layer_inputs: tuple[Array, ...] = (),
) -> tuple[Float[Array, "B T D"], Any]:
    """The final normed activations, and what `per_layer(x [B, T, D], routing, rows, *layer_inputs)` returned in every layer
    (stacked; each of `layer_inputs` has a leading axis L, whose part it gets).

    `batch` needs tokens, segment_ids and positions [B, T]. `pool_sizes`: one for every layer and document of the row, None
    for no pools. `pool_tokens`: only so many first tokens of a document vote, for none before them; None: the whole document,
    as in training. `allowed` bool [L, R], or [L, B, 1, R] by row: routed experts that may be used at all, None for all.
    """
    rows = row_context(batch, execution, pool_tokens)
    x_BTD, outputs, _ = _layers(params, batch["tokens"], rows, execution, pool_sizes, allowed, per_layer, layer_inputs)
    return x_BTD, outputs


def forward_with_cache(
    params: Params, batch: dict[str, Array], cache: KVCache, execution: Execution, allowed: Array | np.ndarray | None = None
) -> tuple[Float[Array, "B T D"], KVCache]:
    """`forward` for the next T tokens of rows whose earlier tokens are in the cache, and the cache with these added.
    Without pools, as in published inference. mesh.sequence must be 1."""
    segments_BT, m = batch["segment_ids"], execution.config.model
    rows = RowContext(segments_BT, segments_BT, rotary_angles(batch["positions"], m.head_dim, m.rope_theta))
    x_BTD, _, (k_LBTGW, v_LBTGW) = _layers(params, batch["tokens"], rows, execution, None, allowed, lambda *_: None, (), cache)
    put = jax.lax.dynamic_update_slice
    slot, zero = cache.length, jnp.zeros_like(cache.length)
    k_LBGSW, v_LBGSW = (put(old_LBGSW, new_LBTGW.swapaxes(2, 3), (zero, zero, zero, slot, zero))
                        for old_LBGSW, new_LBTGW in ((cache.k, k_LBTGW), (cache.v, v_LBTGW)))
    segments_BS = put(cache.segments, reshard(segments_BT, BATCH, None), (zero, slot))
    return x_BTD, KVCache(k_LBGSW, v_LBGSW, segments_BS, slot + batch["tokens"].shape[1])


def _layers(params, tokens_BT, rows: RowContext, execution: Execution, pool_sizes, allowed, per_layer, layer_inputs,
            cache: KVCache | None = None):
    """(final normed activations, what `per_layer` returned, keys and values [L, B, T, G, W] if there is a cache)."""
    c = execution.config
    x_BTD = embed(params["embedding"], tokens_BT, execution.dtype)
    structure, _ = nnx.split(nnx.eval_shape(lambda: Block(c.model, Init(c.model, 0))))

    def layer(x_BTD, inputs):
        layer_params, pools, mask, past, more = inputs
        past = None if past is None or cache is None else (*past, cache.segments)
        x_BTD, route, kv = nnx.merge(structure, layer_params)(x_BTD, rows, pools, mask, execution, past)
        return x_BTD, (per_layer(x_BTD, route, rows, *more), None if past is None else kv)

    policy = REMAT_POLICIES[c.train.remat]
    body = layer if policy is None else jax.checkpoint(layer, policy=policy, prevent_cse=False)
    past = None if cache is None else (cache.k, cache.v)
    pools = None if pool_sizes is None else (pool_sizes, routing.module_mask(c))
    inputs = (params["layers"], pools, allowed_experts(c.model, allowed), past, layer_inputs)
    x_BTD, (outputs, kv) = jax.lax.scan(body, x_BTD, inputs)
    return rms_norm(x_BTD, params["final_norm"], c.model.norm_eps), outputs, kv


def allowed_experts(m: ModelConfig, allowed: Array | np.ndarray | None) -> Array | np.ndarray | None:
    """`allowed` without the experts that layers of a pruned model lack."""
    if not m.experts_per_layer:
        return allowed
    routed_L = jnp.asarray(m.experts_per_layer) - m.num_shared_experts
    present_LR = jnp.arange(m.num_routed_experts) < routed_L[:, None]
    return present_LR if allowed is None else allowed & jnp.expand_dims(present_LR, tuple(range(1, allowed.ndim - 1)))


def row_context(batch: dict[str, Array], execution: Execution, pool_tokens: Array | int | None = None) -> RowContext:
    c, segments_BT = execution.config, batch["segment_ids"]
    causal, next_owns_eos = c.model.attention_scope == "causal", c.router.eos_owner == "next"
    pooled_BT = routing.split_at_eos(segments_BT, batch["tokens"], execution.eos_id) if next_owns_eos else segments_BT
    return RowContext(
        jnp.ones_like(segments_BT) if causal else segments_BT, pooled_BT,
        rotary_angles(batch["positions"], c.model.head_dim, c.model.rope_theta),
        None if pool_tokens is None else routing.first_tokens(pooled_BT, pool_tokens))


@jax.named_scope("embedding")
def embed(embedding: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    table_VD = gather_weight(embedding, dtype, None, None)
    return table_VD.at[tokens].get(out_sharding=ACTIVATIONS)


@jax.named_scope("loss")
def token_losses(params: Params, x_BTD: Float[Array, "B T D"], targets_BT: Int[Array, "B T"],
                 execution: Execution) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(cross entropy of every target in nats, logsumexp of its logits), fp32."""
    return ce.cross_entropy(x_BTD, params["head"], targets_BT, execution.loss_chunk_tokens)


@jax.named_scope("loss")
def loss_sums(params: Params, x_BTD: Float[Array, "B T D"], targets_BT: Int[Array, "B T"], weights_BT: Float[Array, "B T"],
              execution: Execution, of_tokens: bool = False) -> ce.LossSums:
    """Sums over all tokens, of weights * nll and of weights * logsumexp^2, and the two added with the config's weight;
    `of_tokens`: weights * nll of every token too."""
    c = execution.config
    return ce.training_loss(x_BTD, params["head"], targets_BT, weights_BT, c.train.output_z_weight,
                            execution.loss_chunk_tokens, of_tokens)


def logits(params: Params, x_BTD: Float[Array, "B T D"], execution: Execution) -> Float[Array, "B T V"]:
    head_DV = gather_weight(params["head"], execution.dtype, None, "tensor")
    return jnp.einsum("btd,dv->btv", x_BTD, head_DV, preferred_element_type=jnp.float32)


# ---- pieces ---------------------------------------------------------------------------------------------------------


@jax.named_scope("norm")
def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)
