"""Run configuration: frozen dataclasses, loading, dotted overrides, and every rule that spans fields.

A run is one Python function, `config() -> Config`, in a file of `configs/`. Defaults are the published recipe of
Emo_1b14b; a field that deviates from it says so.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from emo_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    vocab_size: int = 100_352
    num_layers: int = 16
    d_model: int = 2048
    num_heads: int = 16
    num_kv_heads: int = 16
    head_dim: int = 128
    d_ff: int = 1024  # hidden width of one expert; of the whole MLP when num_experts is 0
    num_experts: int = 128  # routed + shared; 0: a dense MLP
    num_shared_experts: int = 1  # always active, weight 1; the last rows of the expert table
    experts_per_layer: tuple[int, ...] = ()  # of a pruned model: how many of num_experts each layer has; (): all
    top_k: int = 8  # active experts of a token, shared ones included
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02  # truncated normal, cut at 3 standard deviations
    attention_scope: Literal["document", "causal"] = "document"  # published standard MoE and dense: causal

    @property
    def num_routed_experts(self) -> int:
        return self.num_experts - self.num_shared_experts

    @property
    def routed_top_k(self) -> int:
        return self.top_k - self.num_shared_experts


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    document_pool: bool = True  # False: the standard MoE
    semantics: Literal["emo_v1", "emo_v2"] = "emo_v1"
    pool_min: int = 8  # routed experts, inclusive
    pool_max: int = 128  # inclusive; a pool >= the number of routed experts is no constraint
    forced_experts: int = 0  # the last routed experts, in every pool on top of its size (experts added to a trained model)
    pool_eval: int = 0  # pool size in evaluation; 0: none, as in published inference
    pool_distribution: Literal["uniform", "beta"] = "uniform"
    pool_beta: float = 4.0  # the a of Beta(a, 1); only for pool_distribution=beta
    pool_scope: Literal["layer", "document"] = "layer"
    eos_owner: Literal["own", "next"] = "own"  # published: next
    load_balance_weight: float = 0.1  # emo_v1 divides it by the number of layers
    router_z_weight: float = 1e-3  # likewise
    balance_scope: Literal["step", "microbatch", "shard"] = "step"  # published: microbatch
    balance_shards: int = 0  # row groups of scope=shard; 0: the number of batch shards of the mesh


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = ""  # file, folder, glob or TFDS directory; "": the text of the Python installation
    format: Literal["auto", "embedded", "jsonl", "text", "tfds"] = "auto"
    text_field: str = "text"
    label_field: str = "source"  # label of a document, for evaluation by label
    leave_out_labels: str = ""  # "a,b": documents of these labels are neither trained on nor held out
    tfds_split: str = "train"  # split of a TFDS dataset; slices such as train[:10%] are allowed
    tokenizer: str = ""  # a tokenizer.json; "": train a BPE of model.vocab_size on the documents
    eos_token: str = "<|endoftext|>"
    sequence_length: int = 4096
    packing: Literal["concat_and_split", "first_fit"] = "concat_and_split"
    max_documents_per_row: int = 64
    document_end_target: Literal["counted", "masked"] = "counted"  # the first token of the next document
    repetition_filter: bool = True  # rows that repeat a period of 1..13 tokens 32 times carry no loss
    eval_fraction: float = 0.005  # of the documents, by document
    shuffle: bool = True
    workers: int = 2  # tokenizing processes of each host; 0: in the training process

    @property
    def left_out(self) -> tuple[str, ...]:
        return tuple(label for label in self.leave_out_labels.split(",") if label)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    learning_rate: float = 4e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 2000
    final_fraction: float = 0.1  # of the learning rate, at the last step
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on everything but the embedding
    clip_norm: float = 1.0
    trainable: Literal["all", "experts", "no_router"] = "all"  # what is trained; the rest stays (fine-tuning)
    start_step: int = -1  # the schedule counts from here; -1: step 0, or the checkpoint's step with train.init_from


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 238_419
    batch_size: int = 1024  # rows of an optimizer step, over all hosts
    microbatches: int = 1  # gradient accumulation: the rows of a step are split into this many passes
    output_z_weight: float = 1e-5
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on CPU, else bfloat16
    # What the backward pass recomputes, ever more of it; see model.REMAT_POLICIES.
    remat: Literal["none", "light", "projections", "attention", "moe", "full"] = "full"
    log_every: int = 10
    eval_every: int = 250  # 0: only at the end
    eval_rows: int = 256  # rows of held-out text per evaluation, shared out over the labels
    eval_subsets: bool = False  # also: loss with 25 % and 12.5 % of the experts, mutual information of experts and labels
    init_params_from: str = ""  # checkpoint whose parameters a new run starts with: fresh optimizer, step 0 (fine-tuning)
    eval_tasks: str = ""  # also: tasks of lm-evaluation-harness, names and YAML files separated by commas
    init_from: str = ""  # checkpoint that an anneal starts from: parameters, optimizer, data position, step


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 100
    keep_last: int = 2
    keep_every: int = 5000  # 0: none
    keep_best: int = 1  # by evaluation loss


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; at most one may be -1 (all that are left)."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    tensor: int = 1
    sequence: int = 1


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    # See moe.experts; local with mesh.expert > 1: two axes to shard the experts over.
    dispatch: Literal["auto", "dense", "local", "ring", "all_to_all"] = "auto"
    buffer_factor: float = 2.0  # all_to_all: receive buffer / balanced load; a layer that needs more takes ring. 0: no limit
    grouped_matmul: str = "auto"  # see kernels.grouped_matmul.KERNELS
    attention: str = "auto"  # see kernels.attention.KERNELS
    loss_chunk_tokens: int = 4096  # tokens of one device whose logits exist at the same time


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)

    def __post_init__(self):
        validate(self)

    @property
    def uses_pools(self) -> bool:
        return self.model.num_experts > 0 and self.router.document_pool


# ---- rules ----------------------------------------------------------------------------------------------------------


def validate(c: Config) -> None:
    """Raises `InputError` naming the fields and their values if `c` breaks a rule."""

    def require(ok: bool, message: str) -> None:
        if not ok:
            raise InputError(f"config {c.name}: {message}")

    for part in (c, *(getattr(c, f.name) for f in dataclasses.fields(c))):
        if dataclasses.is_dataclass(part):
            _check_types(c.name, part)

    m, r, d, t, o = c.model, c.router, c.data, c.train, c.optimizer
    for name in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff"):
        require(getattr(m, name) > 0, f"model.{name}={getattr(m, name)} must be positive")
    require(m.num_heads % m.num_kv_heads == 0,
            f"model.num_heads={m.num_heads} must be a multiple of model.num_kv_heads={m.num_kv_heads}")
    require(m.head_dim % 2 == 0, f"model.head_dim={m.head_dim} must be even (rotary embedding)")
    if m.num_experts:
        require(0 <= m.num_shared_experts < m.num_experts,
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
    if c.uses_pools:
        require(m.routed_top_k <= r.pool_min <= r.pool_max,
                f"router.pool_min={r.pool_min} must be between the {m.routed_top_k} routed experts of a token "
                f"(model.top_k - model.num_shared_experts) and router.pool_max={r.pool_max}")
        require(r.pool_eval == 0 or r.pool_eval >= m.routed_top_k,
                f"router.pool_eval={r.pool_eval} must be 0 (no pool) or at least {m.routed_top_k}, "
                f"the routed experts of a token")
        require(0 <= r.forced_experts < m.num_routed_experts,
                f"router.forced_experts={r.forced_experts} must be in 0..{m.num_routed_experts - 1}, the routed experts")
        require(r.pool_beta > 0, f"router.pool_beta={r.pool_beta} must be positive")
    require(r.load_balance_weight >= 0 and r.router_z_weight >= 0 and t.output_z_weight >= 0,
            "router.load_balance_weight, router.router_z_weight and train.output_z_weight must not be negative")
    rows = t.batch_size // t.microbatches if t.microbatches > 0 else 0
    require(r.balance_shards == 0 or (r.balance_scope == "shard" and rows % r.balance_shards == 0),
            f"router.balance_shards={r.balance_shards} needs router.balance_scope=shard (is {r.balance_scope}) and must "
            f"divide train.batch_size / train.microbatches={rows}")

    require(d.sequence_length >= 2, f"data.sequence_length={d.sequence_length} must be at least 2")
    require(1 <= d.max_documents_per_row <= d.sequence_length,
            f"data.max_documents_per_row={d.max_documents_per_row} must be in 1..data.sequence_length"
            f"={d.sequence_length}")
    require(0 <= d.eval_fraction < 1, f"data.eval_fraction={d.eval_fraction} must be in [0, 1)")
    require(d.workers >= 0, f"data.workers={d.workers} must not be negative")

    require(o.learning_rate > 0, f"optimizer.learning_rate={o.learning_rate} must be positive")
    require(0 <= o.final_fraction <= 1, f"optimizer.final_fraction={o.final_fraction} must be in [0, 1]")
    require(o.warmup_steps >= 0, f"optimizer.warmup_steps={o.warmup_steps} must not be negative")
    require(o.clip_norm > 0, f"optimizer.clip_norm={o.clip_norm} must be positive")
    require(-1 <= o.start_step < t.steps, f"optimizer.start_step={o.start_step} must be -1 or a step before "
            f"train.steps={t.steps}, the final step")
    require(t.steps > 0 and t.batch_size > 0 and t.log_every > 0,
            f"train.steps={t.steps}, train.batch_size={t.batch_size} and train.log_every={t.log_every} must be positive")
    require(t.microbatches > 0 and t.batch_size % t.microbatches == 0,
            f"train.microbatches={t.microbatches} must divide train.batch_size={t.batch_size}")
    require(t.eval_rows > 0 and t.eval_every >= 0,
            f"train.eval_rows={t.eval_rows} must be positive and train.eval_every={t.eval_every} not negative")
    require(not (t.init_from and t.init_params_from), "give train.init_from (an anneal: with optimizer and step) or "
            "train.init_params_from (parameters only), not both")
    require(o.trainable == "all" or m.num_experts > 0,
            f"optimizer.trainable={o.trainable!r} needs experts (model.num_experts=0)")
    require(not t.eval_subsets or m.num_experts > 0, "train.eval_subsets needs experts (model.num_experts=0)")
    require(c.checkpoint.every > 0 and c.checkpoint.keep_last > 0,
            f"checkpoint.every={c.checkpoint.every} and checkpoint.keep_last={c.checkpoint.keep_last} must be positive")
    require(c.checkpoint.keep_every >= 0 and c.checkpoint.keep_best >= 0,
            "checkpoint.keep_every and checkpoint.keep_best must not be negative")

    require(c.kernels.buffer_factor == 0 or c.kernels.buffer_factor >= 1,
            f"kernels.buffer_factor={c.kernels.buffer_factor} must be at least 1, or 0 for no limit")
    require(c.kernels.loss_chunk_tokens > 0, f"kernels.loss_chunk_tokens={c.kernels.loss_chunk_tokens} must be positive")

    sizes = dataclasses.asdict(c.mesh)
    require(all(n > 0 or n == -1 for n in sizes.values()), f"mesh axes must be positive or -1, got {sizes}")
    require(list(sizes.values()).count(-1) <= 1, f"at most one mesh axis may be -1, got {sizes}")


def mesh_shape(c: Config, num_devices: int) -> dict[str, int]:
    """The size of every mesh axis on `num_devices` devices, with -1 filled in; `InputError` if it does not fit the
    devices, the batch or the model."""
    sizes = dataclasses.asdict(c.mesh)
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if num_devices % fixed or (-1 not in sizes.values() and fixed != num_devices):
        raise InputError(f"config {c.name}: mesh {sizes} does not divide the {num_devices} devices; the axis sizes must "
                         f"multiply to {num_devices} (one axis may be -1: all that are left)")
    sizes = {axis: num_devices // fixed if n == -1 else n for axis, n in sizes.items()}
    rows, shards = c.train.batch_size // c.train.microbatches, sizes["data"] * sizes["fsdp"] * sizes["expert"]

    def divides(axis_size: int, value: int, axis: str, what: str) -> None:
        if value % axis_size:
            raise InputError(f"config {c.name}: {axis}={axis_size} must divide {what}={value}")

    divides(shards, rows, "mesh.data x mesh.fsdp x mesh.expert", "train.batch_size / train.microbatches")
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


def _check_types(name: str, part: Any) -> None:
    hints = typing.get_type_hints(type(part))
    for f in dataclasses.fields(part):
        value, hint = getattr(part, f.name), hints[f.name]
        where = f"config {name}: {_PREFIX.get(type(part), '')}{f.name}={value!r}"
        if typing.get_origin(hint) is Literal:
            if value not in typing.get_args(hint):
                raise InputError(f"{where} must be one of {', '.join(map(repr, typing.get_args(hint)))}")
        elif hint is float and not (isinstance(value, (int, float)) and not isinstance(value, bool)
                                    and math.isfinite(value)):
            raise InputError(f"{where} must be a finite number")
        elif hint in (int, bool, str) and type(value) is not hint:
            raise InputError(f"{where} must be {hint.__name__}, not {type(value).__name__}")
        elif hint == tuple[int, ...] and not (type(value) is tuple and all(type(n) is int for n in value)):
            raise InputError(f"{where} must be a tuple of integers")


_PREFIX = {t: n + "." for n, t in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(t)}


# ---- loading, overriding, printing ----------------------------------------------------------------------------------


def config_names() -> list[str]:
    return sorted(p.stem for folder in _config_folders() for p in folder.glob("*.py") if not p.stem.startswith("_"))


def load_config(name_or_path: str, overrides: list[str] = ()) -> Config:
    """The config of a file of `configs/` (by name) or of any Python file with `config() -> Config`, after dotted
    overrides such as `--train.steps=100`. Raises `InputError`."""
    path = Path(name_or_path)
    if path.suffix != ".py":
        found = [folder / f"{name_or_path}.py" for folder in _config_folders()]
        path = next((p for p in found if p.is_file()), path)
    if not path.is_file():
        raise InputError(f"no config {name_or_path!r}; {_did_you_mean(name_or_path, config_names())}")
    return override(_load_module(path).config(), overrides)


def override(config: Config, overrides: list[str]) -> Config:
    """`config` with `--a.b=value` or `a.b=value` applied in order."""
    tree = to_dict(config)
    keys = {key: None for key in flatten(tree)}
    for item in overrides:
        key, equals, text = item.removeprefix("--").partition("=")
        if not equals or key not in keys:
            what = "is not of the form --a.b=value" if not equals else f"unknown config key {key!r}"
            raise InputError(f"override {item!r}: {what}; {_did_you_mean(key, list(keys))}")
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node[parent]
        node[leaf] = _parse(key, text, type(node[leaf]))
    return from_dict(tree)


def derive(base: str, name: str, **changes: Any) -> Config:
    """The config `base` of `configs/` under a new name, with `section=dict(field=value)` changes."""
    config = load_config(base)
    sections = {k: dataclasses.replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
    return dataclasses.replace(config, name=name, **sections)


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(tree: dict[str, Any]) -> Config:
    """The inverse of `to_dict`; unknown keys raise `InputError`, missing ones take their default (so that a config
    saved by an older version loads)."""

    def build(cls, node, prefix):
        hints = typing.get_type_hints(cls)
        unknown = set(node) - set(hints)
        if unknown:
            key = sorted(unknown)[0]
            raise InputError(f"unknown config key {prefix + key!r}; {_did_you_mean(key, list(hints))}")
        return cls(**{k: build(hints[k], v, f"{prefix}{k}.") if dataclasses.is_dataclass(hints[k])
                      else tuple(v) if isinstance(v, list) else v for k, v in node.items()})

    return build(Config, tree, "")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    out = {}
    for key, value in tree.items():
        out.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out


def difference(config: Config, base: Config | None = None) -> dict[str, tuple[Any, Any]]:
    """{"a.b": (value in base, value in config)} for every field that differs; base: the published defaults."""
    old, new = flatten(to_dict(base or Config(name=config.name))), flatten(to_dict(config))
    return {key: (old[key], new[key]) for key in new if old[key] != new[key]}


def dumps(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def _config_folders() -> list[Path]:
    here = Path(__file__).resolve().parent
    return [p for p in (here.parent / "configs", here / "configs") if p.is_dir()]


def _load_module(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"emo_jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as e:
        raise InputError(f"{path} cannot be loaded: {type(e).__name__}: {e}") from e
    if not callable(getattr(module, "config", None)):
        raise InputError(f"{path}: a config file defines a function config() -> Config")
    return module


def _parse(key: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is tuple:
            return tuple(int(n) for n in text.split(",") if n)
        return kind(text)
    except (KeyError, ValueError):
        allowed = {bool: "true or false", int: "an integer", float: "a number", tuple: "integers such as 8,16,8"}[kind]
        raise InputError(f"{key}={text!r} must be {allowed}") from None


def _did_you_mean(given: str, known: list[str]) -> str:
    close = difflib.get_close_matches(given, known, n=3, cutoff=0.5)
    if not close:  # the right field in the wrong section
        close = [k for k in known if k.rpartition(".")[2] == given.rpartition(".")[2]][:3]
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
