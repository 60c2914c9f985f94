"""Run configuration: frozen dataclasses, loading, dotted overrides. Their rules are in `config_rules`.

A run is one Python function, `config() -> Config`, in a file of `configs/`. Defaults are the published recipe of
Emo_1b14b; a field that deviates from it says so.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from emo_jax.config_rules import mesh_shape as mesh_shape
from emo_jax.config_rules import type_hints, validate
from emo_jax.errors import InputError
from emo_jax.files import given_path, shortened

GroupedMatmul = Literal["auto", "fused", "megablox", "mosaic", "batched", "blocked", "reference"]  # see kernels.grouped_matmul
Attention = Literal["auto", "splash", "flash", "blocked", "reference"]  # see kernels.attention


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
    experts_per_layer: tuple[int, ...] = ()  # how many of num_experts each layer of a pruned model has; (): all
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
    module: tuple[str, ...] = ()  # likewise, the experts of each layer, "3 17 40": see subset finetune --inside
    pool_eval: int = 0  # pool size in evaluation; 0: none, as in published inference
    pool_eval_tokens: int = 0  # only so many first tokens vote, for none before them; 0: all vote, for all
    pool_distribution: Literal["uniform", "beta"] = "uniform"
    pool_beta: float = 4.0  # the a of Beta(a, 1); only for pool_distribution=beta
    pool_scope: Literal["layer", "document"] = "layer"
    pool_free: float = 0.0  # share of documents without a pool, drawn anew each step
    pool_grows: bool = False  # the largest size rises from pool_min to pool_max while the schedule goes on
    pool_off_from: float = 1.0  # the part of the learning rate's schedule after which no document has a pool
    eos_owner: Literal["own", "next"] = "own"  # published: next
    load_balance_weight: float = 0.1  # emo_v1 divides it by the number of layers
    router_z_weight: float = 1e-3  # likewise
    balance_scope: Literal["step", "microbatch", "shard"] = "step"  # published: microbatch
    balance_shards: int = 0  # row groups of scope=shard; 0: the number of batch shards of the mesh


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = ""  # file, folder or glob, local or in a bucket; "": the text of the Python installation
    # tokens: what `emo-jax data tokenize` wrote; olmo: flat token files, or a mix file of `label,path` lines.
    format: Literal["auto", "embedded", "jsonl", "text", "tfds", "arrayrecord", "parquet", "arrow", "tokens", "olmo"] = "auto"
    text_field: str = "text"
    tokens_field: str = ""  # of records that hold token ids instead of text
    label_field: str = "source"  # label of a document, for evaluation by label
    leave_out_labels: str = ""  # "a,b": documents of these labels are neither trained on nor held out
    tfds_split: str = "train"  # split of a TFDS dataset (slices such as train[:10%] too), or of a saved Hugging Face one
    mix_root: str = ""  # where the relative paths of a mix file begin; "": the folder of the file
    mix_tokenizer: str = "allenai/dolma2-tokenizer"  # what {TOKENIZER} in the paths of a mix file stands for
    tokenizer: str = ""  # a tokenizer.json; "": train a BPE of model.vocab_size on the documents
    eos_token: str = "<|endoftext|>"
    general_every: int = 0  # every so many-th row is of general documents, which have no pools: see subset finetune
    general_path: str = ""  # the general documents, like `path`
    general_leave_out_labels: str = ""  # "a,b": documents of these labels are not among them
    sequence_length: int = 4096
    packing: Literal["concat_and_split", "first_fit", "best_fit"] = "concat_and_split"  # first_fit of text, best_fit of tokens
    order: Literal["blocks", "olmo"] = "blocks"  # of rows of token files; olmo: exactly the published order
    mixture: str = ""  # "label:weight,..." of token files, weights of tokens; "": all rows alike
    mixture_unit: Literal["tokens", "documents"] = "tokens"
    max_epochs: float = 0.0  # how often a label of a mixture may be read; the others take its place. 0: no limit
    max_documents_per_row: int = 64
    document_end_target: Literal["counted", "masked"] = "counted"  # the first token of the next document
    repetition_filter: bool = True  # rows that repeat a period of 1..13 tokens 32 times carry no loss
    repetitive_rows: Literal["masked", "dropped"] = "masked"  # what repetition_filter does to them
    eval_fraction: float = 0.005  # held out of training, by whole documents
    eval_path: str = ""  # documents to evaluate on (any source): nothing is held out then, whatever eval_fraction says
    max_skipped: float = 0.0  # share of documents that may be skipped as unreadable; beyond it reading stops
    cache_gb: float = 1.0  # GB of memory for what was read from buckets, in each process that reads
    shuffle: bool = True
    workers: int = 2  # of each host: tokenizing processes (0: in the training process), or threads that read token files

    @property
    def held_out_fraction(self) -> float:
        return 0.0 if self.eval_path else self.eval_fraction

    @property
    def left_out(self) -> tuple[str, ...]:
        return tuple(label for label in self.leave_out_labels.split(",") if label)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    learning_rate: float = 4e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 2000
    final_fraction: float = 0.1  # the last step's learning rate / the highest
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on everything but the embedding
    clip_norm: float = 1.0
    # What is trained; the rest stays. module: the experts of router.module (or forced_experts) and their router columns.
    trainable: Literal["all", "experts", "no_router", "module", "module_experts"] = "all"
    start_step: int = -1  # the schedule counts from here; -1: step 0, or the checkpoint's step with train.init_from


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 238_419
    batch_size: int = 1024  # rows of an optimizer step, over all hosts
    batch_ramp: str = ""  # "STEP:ROWS,...": until that step that many rows; then batch_size
    microbatches: int = 1  # gradient accumulation: the rows of a step are split into this many passes
    output_z_weight: float = 1e-5
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on CPU, else bfloat16
    # What the backward pass recomputes, ever more of it; see model.REMAT_POLICIES.
    remat: Literal["none", "light", "projections", "attention", "moe", "full"] = "full"
    log_every: int = 10
    eval_every: int = 250  # 0: only at the end
    eval_rows: int = 256  # rows of held-out text per evaluation, shared out over the labels
    eval_subsets: bool = False  # also: how modular it is: losses with 25 % and 12.5 % of the experts, experts and labels
    init_params_from: str = ""  # checkpoint whose parameters a new run starts with: fresh optimizer, step 0 (fine-tuning)
    init_moments: bool = False  # with it: also the moments of its optimizer
    divergence_weight: float = 0.0  # of the divergence from init_params_from, on general documents, nats/token
    eval_tasks: str = ""  # also: tasks of lm-evaluation-harness, names and YAML files separated by commas
    init_from: str = ""  # checkpoint that an anneal starts from: parameters, optimizer, data position, step
    # Folder of compiled programs for the next start, also in a bucket. "": the user's, ~/.cache/emo_jax/compiled; of a run
    # on TPU or GPU its own, so that all its hosts and the machines after them find them.
    compilation_cache: str = ""
    profile_steps: str = ""  # "FIRST:LAST": what devices and host do in these steps, for XProf, in the folder profile/ of --out
    trackers: str = "tensorboard"  # where numbers go besides metrics.jsonl: any of tensorboard,wandb,trackio; "": nowhere


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 100
    keep_last: int = 2
    keep_every: int = 5000  # 0: none
    keep_best: int = 1  # by evaluation loss
    local: str = ""  # a fast folder for checkpoints between those of the run's folder; all processes must see it. "": none
    local_every: int = 20  # steps
    min_free_gb: float = 0.0  # a run stops, saved, before its disk has less; 0: before two more checkpoints do not fit


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """What a run does when something goes wrong, see launch/README.md."""

    # A step whose loss or gradient norm is not finite is skipped; one that is so many standard deviations above the mean of the
    # last 128 steps, too. 0: not for that, as published for EMO; published for its dense baseline: 6.
    skip_sigma: float = 6.0
    check_replicas_every: int = 100  # steps; parameters that several devices hold must be the same bits. 0: never
    repeat_step_every: int = 0  # steps; the gradients of a step, computed twice, must be the same bits. 0: never
    hang_seconds: float = 300.0  # a step that takes longer, and many times the median, is a hang. 0: none is


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
    grouped_matmul: GroupedMatmul = "auto"
    attention: Attention = "auto"
    loss_chunk_tokens: int = 0  # tokens of one device whose logits exist at a time; 0: 4096, on CPU what caches hold, 512


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run: from the end of the stage before until the step `until` (0: the last one), with overrides that hold for
    the later stages too. One that sets an optimizer field begins a learning-rate schedule, which runs until the next such
    stage, or the end. See `emo_jax.phases`."""

    until: int = 0
    changes: tuple[str, ...] = ()  # such as "data.sequence_length=8192"
    reset_optimizer: bool = False  # begins with fresh moments


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
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    stages: tuple[Stage, ...] = ()  # (): one stage without overrides

    def __post_init__(self):
        validate(self)

    @property
    def uses_pools(self) -> bool:
        return self.model.num_experts > 0 and self.router.document_pool


# ---- loading, overriding, printing ----------------------------------------------------------------------------------


def config_names() -> list[str]:
    return sorted(p.stem for folder in _config_folders() for p in folder.glob("*.py") if not p.stem.startswith("_"))


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """The config of a file of `configs/` (by name) or of any Python file with `config() -> Config`, after dotted
    overrides such as `--train.steps=100`. Raises `InputError`."""
    path = given_path(name_or_path, "CONFIG")
    if path.suffix != ".py":
        found = [given_path(folder / f"{name_or_path}.py", "CONFIG") for folder in _config_folders()]
        path = next((p for p in found if p.is_file()), path)
    if not isinstance(path, Path) or not path.is_file():
        raise InputError(f"no config {name_or_path!r}; {_did_you_mean(name_or_path, config_names())}")
    return override(_run_file(path), overrides)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `--a.b=value` or `a.b=value` applied in order."""
    tree = to_dict(config)
    keys = dict.fromkeys(flatten(tree))
    for item in overrides:
        key, equals, text = item.removeprefix("--").partition("=")
        if not equals or key not in keys:
            what = "is not of the form --a.b=value" if not equals else f"unknown config key {key!r}"
            raise InputError(f"override {item!r}: {what}; {_did_you_mean(key, list(keys))}")
        node, section = tree, Config
        *parents, leaf = key.split(".")
        for parent in parents:
            if isinstance(node, (list, tuple)):
                node, section = node[int(parent)], Stage
            else:
                node, section = node[parent], type_hints(section)[parent]
        node[leaf] = _parse(key, text, type_hints(section)[leaf])
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

    def build(cls: type, node: Any, prefix: str) -> Any:
        if not isinstance(node, dict):
            raise InputError(f"config {prefix.rstrip('.')}: {shortened(repr(node))} must be an object of fields")
        hints = type_hints(cls)
        unknown = set(node) - set(hints)
        if unknown:
            key = sorted(unknown)[0]
            raise InputError(f"unknown config key {prefix + key!r}; {_did_you_mean(key, list(hints))}")
        if cls is Config and "name" not in node:
            raise InputError("config: the field 'name' is missing")
        return cls(**{k: value(hints[k], v, f"{prefix}{k}.") for k, v in node.items()})

    def value(hint: Any, given: Any, prefix: str) -> Any:
        if dataclasses.is_dataclass(hint):
            return build(hint, given, prefix)
        if hint == tuple[Stage, ...] and isinstance(given, (list, tuple)):
            return tuple(build(Stage, stage, f"{prefix}{number}.") for number, stage in enumerate(given))
        return tuple(given) if isinstance(given, list) else given

    return build(Config, tree, "")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": ({"d": 2},)} -> {"a.b": 1, "c.0.d": 2}"""
    out = {}
    for key, value in tree.items():
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, dict) for v in value):
            value = {str(number): v for number, v in enumerate(value)}
        out.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out


def difference(config: Config, base: Config | None = None) -> dict[str, tuple[Any, Any]]:
    """{"a.b": (value in base, value in config)} for every field that differs; base: the published defaults."""
    old, new = flatten(to_dict(base or Config(name=config.name))), flatten(to_dict(config))
    return {key: (old.get(key), new[key]) for key in new if old.get(key) != new[key]}


def dumps(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def _config_folders() -> list[Path]:
    here = Path(__file__).resolve().parent
    return [p for p in (here.parent / "configs", here / "configs") if p.is_dir()]


def _run_file(path: Path) -> Config:
    """What `config()` of a Python file returns."""
    wanted = "expected a Python file (.py) with a function config() -> Config without arguments"
    spec = importlib.util.spec_from_file_location(f"emo_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"config {path}: not a Python file; {wanted}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "config", None)):
            raise InputError(f"config {path}: has no function config(); {wanted}")
        config = module.config()
    except InputError:
        raise
    except (Exception, SystemExit) as e:
        raise InputError(f"config {path} cannot be loaded: {type(e).__name__}: {e}; {wanted}") from e
    if not isinstance(config, Config):
        raise InputError(f"config {path}: config() returned {shortened(repr(config))}; {wanted}")
    return config


def _parse(key: str, text: str, kind: Any) -> Any:
    integers, words = tuple[int, ...], tuple[str, ...]
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind == integers:
            return tuple(int(n) for n in text.split(",") if n)
        if kind == words:
            return tuple(word for word in text.split(";") if word)
        return kind(text) if kind in (int, float) else text
    except (KeyError, ValueError):
        allowed = {bool: "true or false", int: "an integer", float: "a number", integers: "integers such as 8,16,8"}[kind]
        raise InputError(f"{key}={text!r} must be {allowed}") from None


def _did_you_mean(given: str, known: list[str]) -> str:
    elsewhere = [k for k in known if k.rpartition(".")[2] == given.rpartition(".")[2]][:3]  # the right field, its section not
    close = elsewhere or difflib.get_close_matches(given, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
