"""One open model: the only way in which commands, and people who use the library, get one.

    model = emo_jax.load("runs/tiny")
    model.loss(["some text"])                        # nats/token
    model.router_probabilities(["some text"])[0]     # [tokens, L, R]
    model.generate(["Once"], max_new_tokens=20)

Texts and token ids go in, numpy arrays come out. Shapes as in `emo_jax.model`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from emo_jax import compat, model, sharding
from emo_jax.checkpoints.checkpoint import Checkpoint, open_checkpoint
from emo_jax.checkpoints.compatibility import require_same_model
from emo_jax.checkpoints.subset import Subset, open_subset, require_experts
from emo_jax.compilation import keep_programs
from emo_jax.config import Config, MeshConfig, override
from emo_jax.convert.importing import published_end_ids
from emo_jax.data.evaluation import evaluation_rows, evaluation_set
from emo_jax.data.order import split
from emo_jax.data.sources import Source, open_source
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.errors import InputError
from emo_jax.files import AnyPath
from emo_jax.generation.engine import Generator
from emo_jax.generation.sampling import Sampling
from emo_jax.processes import gather_global
from emo_jax.rounding import round_up
from emo_jax.train.evaluate import Evaluation
from emo_jax.train.step import make_eval_step

BATCH_TOKENS = 16_384  # a batch of texts, padding included
LOGITS = 1 << 27  # values at a time
LENGTH_MULTIPLE = 128  # lengths of rows: few programs are compiled, and every attention kernel takes them
SubsetOrFile = Subset | str | AnyPath


@dataclass(frozen=True)
class LoadedModel:
    config: Config
    mesh: Mesh
    params: model.Params
    tokenizer: Tokenizer
    checkpoint: Checkpoint | None = None  # None: a model in training
    subset: Subset | None = None  # the experts that it uses, unless another subset is asked for; None: all
    own_documents: bool = True  # `config.data` names those of the run, of which only the held-out ones may be scored

    @cached_property
    def execution(self) -> model.Execution:
        return model.Execution.of(self.config, self.mesh, self.tokenizer.eos_id)

    @property
    def saved(self) -> Checkpoint:
        """What it was opened from; a model in training has none."""
        assert self.checkpoint is not None
        return self.checkpoint

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: that of training first, then what an imported model adds, e.g. the end of a turn."""
        more = published_end_ids(self.checkpoint.run) if self.checkpoint else ()
        return tuple(dict.fromkeys([self.tokenizer.eos_id, *more]))

    def identity(self) -> dict[str, Any]:
        """What a subset says about the model that it was chosen for."""
        return self.checkpoint.identity() if self.checkpoint else {"name": self.config.name}

    def allowed(self, subset: SubsetOrFile | None = None) -> Bool[np.ndarray, "L R"] | None:
        """The routed experts that may be used; None: all."""
        chosen = self.subset if subset is None else open_subset(subset, self.checkpoint or self.config)
        return None if chosen is None else chosen.mask()

    # ---- texts and tokens in, numbers out ----

    def logits(self, tokens: Sequence[int] | Sequence[Sequence[int]] | np.ndarray,
               subset: SubsetOrFile | None = None) -> Float[np.ndarray, "*B T V"]:
        """Logits of the next token, after every one of `tokens` [T] or [B, T]; each row is one document. fp32."""
        rows = np.atleast_2d(np.asarray(tokens, np.int32))
        made = list(self._forward([*rows], "logits", subset))
        return np.stack(made) if np.ndim(tokens) == 2 else made[0]

    def router_probabilities(self, texts: Sequence[str],
                             subset: SubsetOrFile | None = None) -> list[Float[np.ndarray, "T L R"]]:
        """What the routers of all layers give every token of each text, its end-of-document token included. Rows sum to 1;
        with a subset they are probabilities among its experts."""
        require_experts(self.config)
        return list(self._forward(self._encode(texts), "scores", subset))

    def loss(self, texts: Sequence[str], subset: SubsetOrFile | None = None) -> Float[np.ndarray, "n"]:
        """nats/token of each text, its end-of-document token included; the first token is given."""
        return np.array([row["loss_sum"] / max(row["loss_tokens"], 1)
                         for row in self._forward(self._encode(texts), "loss", subset)], np.float64)

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 64, *, temperature: float = 0.0, top_p: float = 1.0,
                 seed: int = 0, subset: SubsetOrFile | list[Subset] | None = None, batch_size: int = 16) -> list[str]:
        """What the model writes after each prompt, up to its end; temperature 0 takes the most probable token. `subset`: that
        of all prompts, or a list of one for each."""
        each = subset if isinstance(subset, list) else []
        if isinstance(subset, list) and len(each) != len(prompts):
            raise InputError(f"{len(each)} subsets for {len(prompts)} prompts; give one for all, or one for each")
        masks = [open_subset(one, self.checkpoint or self.config).mask() for one in each]
        ids = [self.tokenizer.encode(p).tolist() or [self.tokenizer.eos_id] for p in self._checked(prompts, "prompts")]
        generator = self.generator(None if isinstance(subset, list) else subset, batch_size)
        made = generator.generate(ids, max_new_tokens, Sampling(temperature, top_p, seed), allowed=masks or None)
        return [self.tokenizer.continuation(i, m) for i, m in zip(ids, made)]

    def generator(self, subset: SubsetOrFile | None = None, batch_size: int = 16) -> Generator:
        """The one that was asked for last is kept, with its compiled programs."""
        allowed = self.allowed(subset)
        key = (None if allowed is None else allowed.tobytes(), batch_size)
        if key not in self._generators:
            self._generators.clear()
            self._generators[key] = Generator(self.config, self.mesh, self.params, self.end_ids, allowed, batch_size)
        return self._generators[key]

    # ---- documents of a source ----

    def documents_to_score(self) -> tuple[Source, np.ndarray]:
        """The source and the numbers of its documents: all of a source that is not the run's, else those that the run is
        evaluated on. Raises `InputError` if that is nothing."""
        if self.own_documents and self.config.data.eval_path:
            return evaluation_set(self.config.data)
        source = open_source(self.config.data)
        if not self.own_documents:
            return source, np.arange(len(source))
        chosen = split(source, self.config.data, self.config.seed)[1]
        if not len(chosen):
            raise InputError(f"the run held out no documents (data.eval_fraction={self.config.data.eval_fraction}); give "
                             f"--data")
        return source, chosen

    def evaluation(self, source: Source, documents: np.ndarray, config: Config | None = None) -> Evaluation:
        config = config or self.config
        return Evaluation(config, self.mesh, evaluation_rows(config, source, self.tokenizer, documents), self.tokenizer)

    # ---- pieces ----

    @cached_property
    def _generators(self) -> dict[tuple, Generator]:
        return {}

    def _checked(self, texts: Sequence[str], what: str = "texts") -> Sequence[str]:
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{what} must be a list of strings, not {type(texts).__name__}")
        return texts

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.tokenizer.encode_document(text) for text in self._checked(texts)]

    def _forward(self, documents: list[np.ndarray], what: str, subset: SubsetOrFile | None) -> Iterator[Any]:
        """What a program of `_program` gives for every document in turn, each in a row of its own."""
        longest = self.config.data.sequence_length
        for i, tokens in enumerate(documents):
            if not 0 < len(tokens) <= longest:
                raise InputError(f"text {i + 1} has {len(tokens):,} tokens; a row holds 1 to {longest:,} "
                                 f"(data.sequence_length)")
        allowed, program = self.allowed(subset), _program(self.execution, self.mesh, what)
        length = min(round_up(max(map(len, documents), default=1), LENGTH_MULTIPLE), longest)
        budget = LOGITS // self.config.model.vocab_size if what == "logits" else BATCH_TOKENS
        shards = sharding.batch_shards(self.mesh)
        count = max(1, min(budget // length, len(documents)) // shards) * shards
        for start in range(0, len(documents), count):
            part = documents[start:start + count]
            with compat.set_mesh(self.mesh):
                rows = {name: sharding.place(x, self.mesh, sharding.TOKENS) for name, x in _rows(part, count, length).items()}
                made = jax.tree.map(gather_global, program(self.params, rows, allowed))
            for i, n in enumerate(map(len, part)):
                yield jax.tree.map(lambda a, i=i, n=n: a[i, :n] if a.ndim > 1 else a[i], made)


def _rows(documents: list[np.ndarray], count: int, length: int) -> dict[str, np.ndarray]:
    """Fields [count, length] of rows that hold one document each, or nothing."""
    rows = {name: np.zeros((count, length), np.int32) for name in ("tokens", "targets", "segment_ids")}
    weights = np.zeros((count, length), np.float32)
    for i, tokens in enumerate(documents):
        n = len(tokens)
        rows["tokens"][i, :n], rows["segment_ids"][i, :n] = tokens, 1
        rows["targets"][i, :n - 1], weights[i, :n - 1] = tokens[1:], 1
    positions = np.tile(np.arange(length, dtype=np.int32), (count, 1))
    return rows | {"positions": positions, "loss_weights": weights}


@functools.cache
def _program(execution: model.Execution, mesh: Mesh, what: str):
    """A jitted (params, rows, allowed) -> a tree of arrays [B, ...] or [B, T, ...]."""
    if what == "loss":
        return make_eval_step(execution.config, mesh, execution.eos_id)

    @jax.jit
    def program(params, rows, allowed):
        x_BTD, scores = model.forward(params, rows, execution, allowed=allowed,
                                      per_layer=lambda x, route, rows: route.scores if what == "scores" else None)
        return jnp.moveaxis(scores, 0, 2) if what == "scores" else model.logits(params, x_BTD, execution)

    return program


# ---- opening --------------------------------------------------------------------------------------------------------


def load(path: str | AnyPath | Checkpoint, overrides: Sequence[str] = (), *, step: int | None = None, data: str = "",
         mesh: MeshConfig | Literal["fsdp", "experts"] = "fsdp", subset: SubsetOrFile | None = None) -> LoadedModel:
    """Opens a checkpoint: a run's folder, its `checkpoints/`, or one step folder; by default the newest step.

    `overrides` such as "data.text_field=body" may change everything but the model and the seed, which says which documents
    were held out. `data`: documents in place of the run's. `subset`: the only experts that the model uses by default.
    `mesh`, over all devices: "fsdp" (parameters sharded), "experts" (whole experts apart and the rest everywhere, so that
    decoding gathers nothing), or any other. Raises `InputError` for what cannot be opened or does not belong together.
    """
    found = path if isinstance(path, Checkpoint) else open_checkpoint(path, step)
    axes = {"fsdp": MeshConfig(), "experts": _expert_mesh(found.config)}.get(mesh, mesh) if isinstance(mesh, str) else mesh
    config = dataclasses.replace(found.config, mesh=axes)
    if data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=data, format="auto"))
    config = dataclasses.replace(override(config, list(overrides)), seed=found.config.seed)
    require_same_model(found.config, config, str(found.path), anneal=True)
    if not (found.run / "tokenizer.json").is_file():
        raise InputError(f"{found.run} has no tokenizer.json; put the one of the model there")
    tokenizer = Tokenizer(found.run / "tokenizer.json", config.data.eos_token)
    chosen = None if subset is None else open_subset(subset, found)
    keep_programs(config.train.compilation_cache)
    device_mesh = sharding.make_mesh(_fit_batch(config))
    with compat.set_mesh(device_mesh):
        params = found.restore_params(device_mesh, config)
    return LoadedModel(config, device_mesh, params, tokenizer, found, chosen, own_documents=not data)


def _expert_mesh(config: Config) -> MeshConfig:
    m, devices = config.model, jax.device_count()
    fits = [n for n in range(1, devices + 1) if devices % n == 0 and m.num_experts % n == 0 and m.d_model % n == 0
            and m.num_shared_experts <= m.num_experts // n]
    return MeshConfig(data=-1, fsdp=1, expert=max(fits) if m.num_experts else 1)


def _fit_batch(config: Config) -> Config:
    """The config with a batch that any mesh of these devices divides, for there is no training step to run."""
    rows = math.lcm(config.train.batch_size, jax.device_count())
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows, microbatches=1))
