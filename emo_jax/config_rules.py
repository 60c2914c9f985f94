"""The rules of a config: the type and the range of every field, what two fields ask of each other, and the mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from emo_jax.errors import InputError

if TYPE_CHECKING:  # `config` checks every `Config` with this module when it is made
    from emo_jax.config import Config

MAX_INT = 2**31 - 1  # steps, tokens of a row and sizes are int32 on the devices
MAX_FLOAT = 3.4e38  # float32
TRACKERS = ("tensorboard", "wandb", "trackio")  # see train.trackers

# What a number must be -> the fields. Every number but model.experts_per_layer and kernels.buffer_factor is in one line.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "at least 1": (lambda x: x >= 1, """
        model.vocab_size model.num_layers model.d_model model.num_heads model.num_kv_heads model.head_dim model.d_ff
        data.max_documents_per_row train.steps train.batch_size train.microbatches train.log_every train.eval_rows
        checkpoint.every checkpoint.keep_last checkpoint.local_every"""),
    "at least 2": (lambda x: x >= 2, "data.sequence_length"),
    "0 or more": (lambda x: x >= 0, """
        model.num_experts model.num_shared_experts model.top_k router.pool_min router.pool_max router.pool_eval
        router.forced_experts router.load_balance_weight router.router_z_weight router.balance_shards data.workers
        optimizer.warmup_steps optimizer.weight_decay train.output_z_weight train.divergence_weight train.eval_every
        checkpoint.keep_every checkpoint.keep_best checkpoint.min_free_gb data.max_epochs data.general_every
        kernels.loss_chunk_tokens faults.skip_sigma faults.check_replicas_every faults.repeat_step_every
        faults.hang_seconds router.pool_eval_tokens"""),
    "more than 0": (lambda x: x > 0, """
        model.rope_theta model.norm_eps model.init_std router.pool_beta optimizer.learning_rate optimizer.eps
        optimizer.clip_norm data.cache_gb"""),
    "at least 1, or 0 for no limit": (lambda x: x == 0 or x >= 1, "kernels.buffer_factor"),
    "at least 1, or -1 for all devices that are left": (
        lambda x: x >= 1 or x == -1, "mesh.data mesh.fsdp mesh.expert mesh.tensor mesh.sequence"),
    "a step, or -1": (lambda x: x >= -1, "optimizer.start_step"),
    "in [0, 1)": (lambda x: 0 <= x < 1, "data.eval_fraction optimizer.beta1 optimizer.beta2"),
    "in [0, 1]": (lambda x: 0 <= x <= 1, """
        optimizer.final_fraction data.max_skipped router.pool_free router.pool_off_from"""),
    "in 0..2^63 - 1": (lambda x: 0 <= x < 2**63, "seed"),
}
type_hints = functools.cache(typing.get_type_hints)  # which compiles every annotation each time

_RANGE_OF = {field: (allowed, holds) for allowed, (holds, fields) in RANGES.items() for field in fields.split()}


def validate(c: Config) -> None:
    """Raises `InputError` naming the fields and their values if `c` breaks a rule."""

    def require(ok: bool, message: str) -> None:
        if not ok:
            raise InputError(f"config {c.name}: {message}")

    _check_fields(c, f"config {c.name}: ")
    m, r, d, t, o = c.model, c.router, c.data, c.train, c.optimizer
    require(m.num_heads % m.num_kv_heads == 0,
            f"model.num_heads={m.num_heads} must be a multiple of model.num_kv_heads={m.num_kv_heads}")
    require(m.head_dim % 2 == 0, f"model.head_dim={m.head_dim} must be even (rotary embedding)")
    if m.num_experts:
        require(m.num_shared_experts < m.num_experts,
                f"model.num_shared_experts={m.num_shared_experts} must be in 0..{m.num_experts - 1} "
                f"(model.num_experts={m.num_experts})")
        require(m.num_shared_experts < m.top_k <= m.num_experts,
                f"model.top_k={m.top_k} must be more than model.num_shared_experts={m.num_shared_experts} and at most "
                f"model.num_experts={m.num_experts}: it counts the active experts, shared ones included")
    if m.experts_per_layer:
        require(len(m.experts_per_layer) == m.num_layers and
                all(m.num_shared_experts < n <= m.num_experts for n in m.experts_per_layer),
                f"model.experts_per_layer={m.experts_per_layer} must be model.num_layers={m.num_layers} numbers in "
                f"{m.num_shared_experts + 1}..{m.num_experts}, the shared experts included")
    if r.module:
        _check_module(c, require)
    require(r.pool_eval > 0 or not r.pool_eval_tokens,
            f"router.pool_eval_tokens={r.pool_eval_tokens} needs router.pool_eval: the size of the pools of evaluation")
    if c.uses_pools:
        least = max(m.routed_top_k - min((len(experts.split()) for experts in r.module), default=0), 0)
        require(least <= r.pool_min <= r.pool_max,
                f"router.pool_min={r.pool_min} must be between the {least} routed experts of a token "
                f"(model.top_k - model.num_shared_experts{' - those of router.module' * bool(r.module)}) and "
                f"router.pool_max={r.pool_max}")
        require(r.pool_eval == 0 or r.pool_eval >= m.routed_top_k,
                f"router.pool_eval={r.pool_eval} must be 0 (no pool) or at least {m.routed_top_k}, "
                f"the routed experts of a token")
        require(r.forced_experts < m.num_routed_experts,
                f"router.forced_experts={r.forced_experts} must be in 0..{m.num_routed_experts - 1}, the routed experts")
    require(d.max_documents_per_row <= d.sequence_length,
            f"data.max_documents_per_row={d.max_documents_per_row} must be in 1..data.sequence_length"
            f"={d.sequence_length}")
    require(o.start_step < t.steps,
            f"optimizer.start_step={o.start_step} must be -1 or a step before train.steps={t.steps}, the final step")
    require(t.batch_size % t.microbatches == 0,
            f"train.microbatches={t.microbatches} must divide train.batch_size={t.batch_size}")
    rows = t.batch_size // t.microbatches
    require(r.balance_shards == 0 or (r.balance_scope == "shard" and rows % r.balance_shards == 0),
            f"router.balance_shards={r.balance_shards} needs router.balance_scope=shard (is {r.balance_scope}) and must "
            f"divide train.batch_size / train.microbatches={rows}")
    require(not (t.init_from and t.init_params_from), "give train.init_from (an anneal: with optimizer and step) or "
            "train.init_params_from (parameters only), not both")
    require(o.trainable == "all" or m.num_experts > 0,
            f"optimizer.trainable={o.trainable!r} needs experts (model.num_experts=0)")
    require(not o.trainable.startswith("module") or bool(r.module or r.forced_experts),
            f"optimizer.trainable={o.trainable!r} needs router.module or forced_experts: the experts that it trains")
    require(d.general_every != 1 and (d.general_every == 0 or t.batch_size % d.general_every == 0),
            f"data.general_every={d.general_every} must be 0 or at least 2, and divide train.batch_size={t.batch_size}")
    require((d.general_every > 0 and t.microbatches == 1) or not t.divergence_weight,
            f"train.divergence_weight={t.divergence_weight} needs data.general_every, as it is of general documents, and "
            f"train.microbatches=1")
    require(not t.init_moments or bool(t.init_params_from), "train.init_moments needs train.init_params_from")
    require(not t.eval_subsets or m.num_experts > 0, "train.eval_subsets needs experts (model.num_experts=0)")
    require(not d.tokens_field or bool(d.tokenizer),
            f"data.tokens_field={d.tokens_field!r} needs data.tokenizer: the one that the token ids were made with")
    if t.profile_steps:
        first, last = step_range(t.profile_steps)
        require(1 <= first <= last, f"train.profile_steps={t.profile_steps!r} must be FIRST:LAST, two steps such as 100:105, "
                "both of which are profiled")
    for name in t.trackers.split(",") if t.trackers else ():
        require(name in TRACKERS, f"train.trackers={t.trackers!r} must be some of {', '.join(TRACKERS)}, separated by commas")
    sizes = dataclasses.asdict(c.mesh)
    require(list(sizes.values()).count(-1) <= 1, f"at most one mesh axis may be -1, got {sizes}")
    if c.stages or t.batch_ramp:
        from emo_jax.phases import phases

        phases(c)  # every part of the run is a config that keeps these rules


def _check_module(c: Config, require: Callable[[bool, str], None]) -> None:
    routed, layers = c.model.num_routed_experts, c.model.num_layers
    experts = [layer.split() for layer in c.router.module]
    right = len(experts) == layers and all(layer and all(e.isdecimal() and int(e) < routed for e in layer) for layer in experts)
    require(c.uses_pools and right,
            f"router.module={c.router.module} must be ids of routed experts, 0..{routed - 1}, such as \"3 17 40\", for each of "
            f"{layers} layers, and needs router.document_pool")


def step_range(text: str) -> tuple[int, int]:
    """(first, last) of "FIRST:LAST", both inclusive; (0, -1), which is none, for anything else."""
    first, _, last = text.partition(":")
    digits = text.isascii() and first.isdecimal() and last.isdecimal() and len(text) <= 21
    return (int(first), int(last)) if digits else (0, -1)


def _check_fields(part: Any, where: str, prefix: str = "") -> None:
    """The type and the range of every field."""
    hints = type_hints(type(part))
    for f in dataclasses.fields(part):
        value, hint, name = getattr(part, f.name), hints[f.name], prefix + f.name
        allowed, in_range = _RANGE_OF.get(name, ("", lambda _: True))

        def require(ok: bool, allowed: str) -> None:
            if not ok:
                raise InputError(f"{where}{name}={value!r} must be {allowed}")

        if dataclasses.is_dataclass(hint):
            require(type(value) is hint, f"a {hint.__name__}")
            _check_fields(value, where, f"{name}.")
        elif typing.get_origin(hint) is Literal:
            require(value in typing.get_args(hint), f"one of {', '.join(map(repr, typing.get_args(hint)))}")
        elif hint is float:
            require(isinstance(value, (int, float)) and type(value) is not bool and abs(value) <= MAX_FLOAT,
                     "a finite float32 number")
            require(in_range(value), allowed)
        elif hint == tuple[int, ...]:
            require(type(value) is tuple and all(type(n) is int for n in value), "a tuple of integers")
        elif hint == tuple[str, ...]:
            require(type(value) is tuple and all(type(s) is str for s in value), "a tuple of strings")
        elif name == "stages":
            require(type(value) is tuple and all(map(dataclasses.is_dataclass, value)), "a tuple of Stage")
            for number, stage in enumerate(value):
                _check_fields(stage, where, f"stages.{number}.")
        else:
            require(type(value) is hint, f"{hint.__name__}, not {type(value).__name__}")
            if hint is int:
                require(in_range(value), allowed)
                require(value <= MAX_INT or name == "seed", f"at most {MAX_INT}")


def mesh_shape(c: Config, num_devices: int, num_slices: int = 1) -> dict[str, int]:
    """The size of every mesh axis on `num_devices` devices, with -1 filled in; `InputError` if it does not fit the
    devices, the batch or the model. The config describes a slice: several of them are so many times `mesh.data`."""
    sizes, num_devices = dataclasses.asdict(c.mesh), num_devices // num_slices
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if num_devices % fixed or (-1 not in sizes.values() and fixed != num_devices):
        raise InputError(f"config {c.name}: mesh {sizes} does not divide the {num_devices} devices"
                         f"{' of a slice' * (num_slices > 1)}; the axis sizes must "
                         f"multiply to {num_devices} (one axis may be -1: all that are left)")
    sizes = {axis: num_devices // fixed if n == -1 else n for axis, n in sizes.items()}
    sizes["data"] *= num_slices
    rows, shards = c.train.batch_size // c.train.microbatches, sizes["data"] * sizes["fsdp"] * sizes["expert"]

    def divides(axis_size: int, value: int, axis: str, what: str) -> None:
        if value % axis_size:
            raise InputError(f"config {c.name}: {axis}={axis_size} must divide {what}={value}")

    divides(shards, rows, "slices x " * (num_slices > 1) + "mesh.data x mesh.fsdp x mesh.expert",
            "train.batch_size / train.microbatches")
    divides(sizes["sequence"], c.data.sequence_length, "mesh.sequence", "data.sequence_length")
    divides(sizes["tensor"], c.model.num_kv_heads, "mesh.tensor", "model.num_kv_heads")
    divides(sizes["tensor"], c.model.d_ff, "mesh.tensor", "model.d_ff")
    divides(sizes["tensor"], c.model.vocab_size, "mesh.tensor", "model.vocab_size")
    divides(sizes["fsdp"] * sizes["expert"], c.model.d_model, "mesh.fsdp x mesh.expert", "model.d_model")
    if c.model.num_experts:
        divides(sizes["expert"], c.model.num_experts, "mesh.expert", "model.num_experts")
        if c.model.num_experts % (sizes["expert"] * sizes["fsdp"]):  # then the hidden width is sharded, not whole experts
            divides(sizes["tensor"] * sizes["fsdp"], c.model.d_ff, "mesh.tensor x mesh.fsdp", "model.d_ff")
        if c.model.num_shared_experts > c.model.num_experts // sizes["expert"]:
            raise InputError(f"config {c.name}: model.num_shared_experts={c.model.num_shared_experts} must fit into one "
                             f"expert shard ({c.model.num_experts} experts / mesh.expert={sizes['expert']})")
    elif sizes["expert"] > 1:
        raise InputError(f"config {c.name}: mesh.expert={sizes['expert']} needs experts (model.num_experts=0)")
    return sizes
