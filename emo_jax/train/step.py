"""One optimizer step: losses over all microbatches, gradients, AdamW; and one evaluation step.

Every loss is a sum over tokens divided by the tokens of the whole step, so that the gradient does not depend on how the
step is cut into microbatches and shards. With `router.balance_scope=step` the load-balancing loss needs the experts'
counts of all microbatches before the first gradient: a forward pass without gradients collects them (with one
microbatch nothing is added).
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from emo_jax import model, sharding
from emo_jax.compilation import program_config
from emo_jax.config import Config
from emo_jax.data.documents import MAX_LABELS
from emo_jax.kernels import cross_entropy as ce
from emo_jax.kernels.compiler_options import compiler_options
from emo_jax.moe import losses, routing
from emo_jax.sharding import BATCH, reshard, spec
from emo_jax.train import bad_steps
from emo_jax.train.optimizer import learning_rate, make_optimizer

log = logging.getLogger(__name__)

Batch = dict[str, Array]


class TrainState(NamedTuple):
    params: model.Params
    opt_state: Any
    step: Int[Array, ""]  # of the run: those taken and those skipped
    recent: bad_steps.Recent
    reference: model.Params | None = None  # the model that train.divergence_weight compares with; never saved


def init_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """A new state, made in place on the mesh; its values do not depend on the mesh."""
    params = model.init_params(config, mesh)
    with jax.set_mesh(mesh):
        return _init_rest(program_config(config), mesh)(params)


@functools.lru_cache(maxsize=4)
def _init_rest(config: Config, mesh: jax.sharding.Mesh) -> Any:
    """A jitted params -> `TrainState` of them."""
    make = lambda params: TrainState(params, make_optimizer(config).init(params), jnp.zeros((), jnp.int32),
                                     bad_steps.nothing_yet())
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh)), donate_argnums=0)


def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without allocating any of it."""
    params = model.abstract_params(config)
    opt_state = jax.eval_shape(make_optimizer(config).init, params)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    return sharding.abstract(TrainState(params, opt_state, step, jax.eval_shape(bad_steps.nothing_yet)), mesh)


def make_train_step(config: Config, mesh: jax.sharding.Mesh, eos_id: int = -1) -> Any:
    """A jitted `(state, batch) -> (state, metrics)` that donates the state. Metrics are fp32: scalars `loss` (nats a
    token), `total_loss`, the auxiliary losses (unweighted), `grad_norm`, `learning_rate`, `tokens`, `loss_tokens`; arrays [L],
    `grad_norm_by_layer`, `param_norm_by_layer` and what the routers did (see `RouterStats`); and the `verdict` on the step, a
    `bad_steps.Verdict`: if it is skipped, parameters and optimizer stay as they are. A batch that has `labels` [B, T], of each
    token's document, gives `label_nats` and `label_tokens` [MAX_LABELS]: sums over the tokens with a loss."""
    M = config.train.microbatches
    if M > 1 and config.model.num_experts and config.router.balance_scope == "step":
        log.warning("router.balance_scope=step with train.microbatches=%d: every step runs one more forward pass to count "
                    "the experts of all microbatches", M)
    return _train_step(program_config(config), mesh, eos_id)


@functools.lru_cache(maxsize=4)
def _train_step(config: Config, mesh: jax.sharding.Mesh, eos_id: int) -> Any:
    execution, M = model.Execution.of(config, mesh, eos_id), config.train.microbatches
    optimizer, schedule = make_optimizer(config), learning_rate(config)

    def train_step(state: TrainState, batch: Batch):
        totals, tokens = Totals.of(batch), jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
        objective = Objective(execution, totals, state.step, state.reference)
        (total, sums), grads = over_microbatches(objective, state.params, batch, M)
        metrics, grad_norm = sums.metrics(config, totals), optax.tree.norm(grads)
        with jax.named_scope("optimizer"):
            taken, recent, verdict = bad_steps.judge(state.recent, metrics["loss"], grad_norm, config)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            params, opt_state = bad_steps.taken_or_not(taken, (params, opt_state), (state.params, state.opt_state))
        metrics |= {"total_loss": total, "grad_norm": grad_norm, "learning_rate": schedule(state.step),
                    "tokens": tokens, "loss_tokens": totals.loss_tokens, "verdict": verdict,
                    "grad_norm_by_layer": norm_by_layer(grads), "param_norm_by_layer": norm_by_layer(state.params)}
        if "labels" in batch:
            metrics |= {"label_nats": sums.of_labels, "label_tokens": _by_label(batch["loss_weights"], batch["labels"])}
        return TrainState(params, opt_state, state.step + 1, recent, state.reference), metrics

    options = compiler_options(mesh.devices.flat[0])
    return _with_mesh(jax.jit(train_step, donate_argnums=0, compiler_options=options), mesh)


def make_eval_step(config: Config, mesh: jax.sharding.Mesh, eos_id: int = -1) -> Any:
    """A jitted `(params, batch, allowed=None, pool_size=None, pool_tokens=None) -> sums of every row [B]`: `loss_sum` (nats),
    `loss_tokens`, and `loss_bytes` where the batch has `target_bytes` [B, T]. `allowed` bool [L, R] restricts the routed
    experts; [L, B, 1, R] those of every row. `pool_size`: routed experts in the pool of every document and layer, at least the
    top k, whether or not the model was trained with pools; `pool_tokens`: whose votes, see `model.forward`. `pool_size` None:
    both as in `router.pool_eval` (0: no pools). Another size or number compiles nothing anew."""
    return _eval_step(program_config(config), mesh, eos_id)


@functools.lru_cache(maxsize=4)
def _eval_step(config: Config, mesh: jax.sharding.Mesh, eos_id: int) -> Any:
    execution = model.Execution.of(config, mesh, eos_id)

    def eval_step(params, batch: Batch, allowed=None, pool_size: Int[Array, ""] | None = None,
                  pool_tokens: Int[Array, ""] | int | None = None):
        sizes_LBN = None
        if pool_size is None and config.uses_pools and config.router.pool_eval:
            pool_size, pool_tokens = jnp.int32(config.router.pool_eval), config.router.pool_eval_tokens or None
        if pool_size is not None:
            shape = (config.model.num_layers, batch["tokens"].shape[0], execution.documents_per_row)
            size = jnp.maximum(pool_size, config.model.routed_top_k)
            sizes_LBN = reshard(jnp.full(shape, size, jnp.int32), None, BATCH, None)
        x_BTD, _ = model.forward(params, batch, execution, pool_sizes=sizes_LBN, pool_tokens=pool_tokens, allowed=allowed)
        nll_BT, _ = model.token_losses(params, x_BTD, batch["targets"], execution)
        weights_BT = batch["loss_weights"]
        sums = {"loss_sum": jnp.sum(nll_BT * weights_BT, axis=1), "loss_tokens": jnp.sum(weights_BT, axis=1)}
        if "target_bytes" in batch:
            sums["loss_bytes"] = jnp.sum(batch["target_bytes"] * weights_BT, axis=1)
        return sums

    return _with_mesh(jax.jit(eval_step), mesh)


# ---- the objective of one microbatch --------------------------------------------------------------------------------


class Totals(NamedTuple):
    tokens: Float[Array, ""]  # tokens of the step that are not padding
    loss_tokens: Float[Array, ""]  # sum of the loss weights
    general_tokens: Float[Array, ""] | float = 1.0  # those of general documents

    @classmethod
    def of(cls, batch: Batch) -> Totals:
        return cls(tokens=jnp.maximum(jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32), 1.0),  # all may be padding
                   loss_tokens=jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0),  # all rows may be filtered
                   general_tokens=jnp.maximum(jnp.sum(batch["loss_weights"] * batch["general"]), 1.0)
                   if "general" in batch else 1.0)


class RouterStats(NamedTuple):
    """Sums over the tokens or documents of a microbatch: of one layer, after the scan of all [L]."""

    counts: Float[Array, "*L groups R"]
    load_balancing: Float[Array, "*L"]  # the microbatch's share of the loss; the shares of a step add up to it
    z: Float[Array, "*L"]  # logsumexp^2
    entropy: Float[Array, "*L"]  # entropy of the scores, nats
    pool_size: Float[Array, "*L"]  # routed experts in the pool of a token
    documents: Float[Array, "*L"]
    experts_of_documents: Float[Array, "*L"]  # distinct routed experts that a document used
    buffer_load: Any = None  # experts.BufferLoad with kernels.dispatch=all_to_all


class Sums(NamedTuple):
    loss: Float[Array, ""]
    output_z: Float[Array, ""]
    router: RouterStats | None
    of_labels: Float[Array, "labels"] | None  # the loss, by label
    divergence: Float[Array, ""] | None  # from the reference, of general documents

    def metrics(self, config: Config, totals: Totals) -> dict[str, Array]:
        out = {"loss": self.loss / totals.loss_tokens, "output_z_loss": self.output_z / totals.loss_tokens}
        if self.divergence is not None:
            out["divergence"] = self.divergence / totals.general_tokens
        if self.router is None:
            return out
        r, m = self.router, config.model
        load_LR = jnp.sum(r.counts, axis=1) * (m.num_routed_experts / (m.routed_top_k * totals.tokens))
        return out | {
            "load_balancing_loss": jnp.mean(r.load_balancing),
            "router_z_loss": jnp.mean(r.z) / totals.tokens,
            "dropped_tokens": jnp.zeros(()),  # every dispatch strategy is dropless
            "expert_load_max": jnp.max(load_LR, axis=1),
            "expert_load_min": jnp.min(load_LR, axis=1),
            "router_entropy": r.entropy / totals.tokens,
            "pool_size_mean": r.pool_size / totals.tokens,
            "experts_per_document": r.experts_of_documents / jnp.maximum(r.documents, 1),
        } | ({} if r.buffer_load is None else {
            # Means over the microbatches of the step; a fallback in any layer counts as that layer's share of a step.
            "required_capacity_factor": jnp.max(r.buffer_load.required_capacity_factor) / config.train.microbatches,
            "fallback_steps": jnp.mean(r.buffer_load.fallback) / config.train.microbatches,
        })


class Objective(NamedTuple):
    execution: model.Execution
    totals: Totals
    step: Int[Array, ""]
    reference: model.Params | None = None

    def counts(self, params: model.Params, batch: Batch) -> Float[Array, "L groups R"]:
        """The experts' counts of one microbatch, without losses."""
        return self.forward(params, batch, None)[1].counts

    def __call__(self, params, batch: Batch, step_counts: Float[Array, "L R"] | None):
        """(the microbatch's part of the step's total loss, `Sums`). `step_counts`: the experts' counts of all microbatches,
        None where this is the only one, or where they are not balanced together."""
        c, totals = self.execution.config, self.totals
        x_BTD, stats = self.forward(params, batch, step_counts)
        objective, loss, output_z, nats_BT = model.loss_sums(
            params, x_BTD, batch["targets"], batch["loss_weights"], self.execution, "labels" in batch)
        total = objective / totals.loss_tokens
        if stats is not None:
            scale = 1 / c.model.num_layers if routing.SEMANTICS[c.router.semantics].aux_per_layer else 1.0
            total += scale * c.router.load_balance_weight * jnp.sum(stats.load_balancing)
            total += scale * c.router.router_z_weight * jnp.sum(stats.z) / totals.tokens
        divergence = None
        if self.reference is not None:
            general = {name: every_nth_row(a, c.data.general_every) for name, a in batch.items()}
            before_BTD, _ = model.forward(self.reference, general, self.execution)
            before = jax.lax.stop_gradient((before_BTD, self.reference["head"]))
            divergence = ce.divergence(*before, every_nth_row(x_BTD, c.data.general_every), params["head"],
                                       general["loss_weights"], self.execution.loss_chunk_tokens)
            total += c.train.divergence_weight * divergence / totals.general_tokens
        of_labels = None if nats_BT is None else _by_label(nats_BT, batch["labels"])
        return total, Sums(loss, output_z, stats, of_labels, divergence)

    def forward(self, params, batch: Batch, step_counts):
        """(x_BTD after the last layer, `RouterStats`)."""
        c, sizes_LBN = self.execution.config, None
        if c.uses_pools:
            documents_BN = segment_document_ids(batch, self.execution)
            start = max(c.optimizer.start_step, 0)
            progress = (self.step - start) / (c.train.steps - start)
            sizes_LBN = routing.draw_pool_sizes(c.router, c.seed, self.step, c.model.num_layers, documents_BN, progress)
            if "general" in batch:  # their pools hold everything
                general_BN = segment_values(batch, self.execution, batch["general"]) > 0
                sizes_LBN = jnp.where(general_BN, routing.NO_POOL, sizes_LBN)
        return model.forward(
            params, batch, self.execution, pool_sizes=sizes_LBN, layer_inputs=() if step_counts is None else (step_counts,),
            per_layer=self._router_stats if c.model.num_experts else lambda x, route, rows: None)

    def _router_stats(self, x_BTD, route: routing.Routing, rows: model.RowContext, step_counts_R=None) -> RouterStats:
        segments_BT, R = rows.router_segments, self.execution.config.model.num_routed_experts
        mask_BT = segments_BT > 0
        frozen = jax.tree.map(jax.lax.stop_gradient, route)
        counts_gR = losses.expert_counts(frozen.expert_ids, mask_BT, R, self.execution.balance_groups)
        counts_gR = checkpoint_name(counts_gR, "expert_counts")
        scores_BTR = frozen.scores
        entropy_BT = -jnp.sum(jnp.where(scores_BTR > 0, scores_BTR * jnp.log(scores_BTR), 0.0), axis=-1)
        documents_BTN = routing.one_hot_documents(segments_BT, self.execution.documents_per_row)
        chosen_BRT = routing.is_chosen(frozen.expert_ids, R).astype(jnp.float32)
        used_BNR = jnp.einsum("btn,brt->bnr", documents_BTN, chosen_BRT, out_sharding=P(BATCH, None, None)) > 0.5
        return RouterStats(
            counts=counts_gR,
            load_balancing=self._load_balancing(route.scores, counts_gR, step_counts_R, mask_BT),
            z=losses.router_z_loss(route.logsumexp, mask_BT, 1.0),
            entropy=jnp.sum(jnp.where(mask_BT, entropy_BT, 0.0)),
            pool_size=jnp.sum(jnp.where(mask_BT, jnp.sum(frozen.pool, axis=-1), 0), dtype=jnp.float32),
            documents=jnp.sum(jnp.any(documents_BTN > 0, axis=1), dtype=jnp.float32),
            experts_of_documents=jnp.sum(used_BNR, dtype=jnp.float32),
            buffer_load=frozen.buffer_load,
        )

    def _load_balancing(self, scores_BTR, counts_gR, step_counts_R, mask_BT) -> Float[Array, ""]:
        c, tokens = self.execution.config, self.totals.tokens
        if c.router.balance_scope == "step":
            counts_R = counts_gR[0] if step_counts_R is None else step_counts_R
            return losses.load_balancing_loss(scores_BTR, counts_R, mask_BT, c.model.routed_top_k, tokens, tokens)
        tokens_g = losses.group_rows(jnp.sum(mask_BT, axis=1, dtype=jnp.float32), self.execution.balance_groups)
        share = jnp.sum(tokens_g) / tokens  # 1 / microbatches for full rows
        tokens_g1 = jnp.maximum(tokens_g, 1.0)[:, None]
        return share * jnp.mean(losses.load_balancing_loss(scores_BTR, counts_gR, mask_BT, c.model.routed_top_k,
                                                           tokens_g1, tokens_g1))


def norm_by_layer(params: model.Params) -> Float[Array, "L"]:
    """Of everything that a layer has."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x), axis=range(1, x.ndim)) for x in jax.tree.leaves(params["layers"])))


def segment_document_ids(batch: Batch, execution: model.Execution) -> Int[Array, "B N"]:
    """The id, in the data source, of each document that the router sees in a row."""
    return segment_values(batch, execution, batch["document_ids"])


def segment_values(batch: Batch, execution: model.Execution, values_BT: Int[Array, "B T"]) -> Int[Array, "B N"]:
    """The value of each document that the router sees in a row: that of its last token (with `eos_owner=next` the first one
    belongs to the document before)."""
    segments_BT = model.row_context(batch, execution).router_segments
    position_T1 = jnp.arange(segments_BT.shape[1])[:, None]
    member_BTN = segments_BT[..., None] == jnp.arange(1, execution.documents_per_row + 1)
    last_B1N = jnp.max(jnp.where(member_BTN, position_T1, -1), axis=1, keepdims=True)
    return jnp.sum(jnp.where(position_T1 == last_B1N, values_BT[..., None], 0), axis=1)


def _by_label(x: Float[Array, "B T"], labels: Int[Array, "B T"]) -> Float[Array, "labels"]:
    """The sum of `x` over the tokens of each label. Masked, as a scatter is slow on TPUs and a matmul rounds there."""
    return jnp.sum(jnp.where(labels[..., None] == jnp.arange(MAX_LABELS), x[..., None], 0.0), axis=(0, 1))


# ---- microbatches ---------------------------------------------------------------------------------------------------


def over_microbatches(objective: Objective, params, batch: Batch, M: int):
    """((total loss, Sums), gradients) of the whole step."""
    value_and_grad = jax.value_and_grad(objective, has_aux=True)
    if M == 1:
        return value_and_grad(params, batch, None)
    parts = {name: split_rows(a, M) for name, a in batch.items()}
    step_counts = None
    c = objective.execution.config
    if c.model.num_experts and c.router.balance_scope == "step":
        counts = jax.lax.map(lambda part: objective.counts(params, part), parts)
        step_counts = jnp.sum(counts, axis=(0, 2))

    def add(carry, part):
        return jax.tree.map(jnp.add, carry, value_and_grad(params, part, step_counts)), None

    first = jax.eval_shape(value_and_grad, params, {name: a[0] for name, a in parts.items()}, step_counts)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding), first)
    return jax.lax.scan(add, zeros, parts)[0]


def every_nth_row(a: Shaped[Array, "B T *any"], n: int) -> Shaped[Array, "b T *any"]:
    """Rows 0, n, 2n, ...; a device's rows stay on it. Those of general documents, for n=data.general_every."""
    rest = [None] * (a.ndim - 2)
    groups = jnp.reshape(a, (a.shape[0] // n, n, *a.shape[1:]), out_sharding=spec(BATCH, None, "sequence", *rest))
    return groups[:, 0]


def split_rows(a: Shaped[Array, "B T"], M: int) -> Shaped[Array, "{M} b T"]:
    """Microbatch m holds rows m, M + m, ...: a device's rows stay on it."""
    parts = jnp.moveaxis(a.reshape(a.shape[0] // M, M, a.shape[1]), 1, 0)
    return reshard(parts, None, BATCH, "sequence")


def _with_mesh(jitted, mesh):
    """`jitted` under `mesh`, with `lower` for ahead-of-time compilation."""

    def call(*args, **kwargs):
        with jax.set_mesh(mesh):
            return jitted(*args, **kwargs)

    def lower(*args, **kwargs):
        with jax.set_mesh(mesh):
            return jitted.lower(*args, **kwargs)

    call.lower = lower  # ty: ignore[missing-attribute]
    return call
