"""A checkpoint opened for inference."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from emo_jax import compat, model, sharding
from emo_jax.config import Config, MeshConfig, override
from emo_jax.convert.importing import KEPT
from emo_jax.convert.tensors import read_json
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.errors import InputError
from emo_jax.subsets import subset as subset_lib
from emo_jax.train.checkpoint import Checkpoint, open_checkpoint
from emo_jax.train.compatibility import require_same_model
from emo_jax.train.evaluate import fit_batch


@dataclass(frozen=True)
class Opened:
    checkpoint: Checkpoint
    config: Config
    mesh: Mesh
    params: model.Params
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]  # any of them ends a text; the first is the one of training
    allowed: np.ndarray | None  # bool [L, R], the experts of the subset


def open_for_inference(path: str, subset: str = "", step: int | None = None, overrides: list[str] = ()) -> Opened:
    """Raises `InputError` for what cannot be opened, a run without tokenizer, or a subset of another model."""
    found = open_checkpoint(path, step)
    mesh = _mesh_of(found.config, jax.device_count())
    config = override(dataclasses.replace(found.config, mesh=mesh), list(overrides))
    require_same_model(found.config, config, str(found.path), anneal=True)
    allowed = subset_lib.load(subset, config).mask() if subset else None
    if not (found.run / "tokenizer.json").is_file():
        raise InputError(f"{found.run} has no tokenizer.json; put the one of the model there")
    tokenizer = Tokenizer(found.run / "tokenizer.json", config.data.eos_token)
    mesh = sharding.make_mesh(fit_batch(config))
    with compat.set_mesh(mesh):
        params = found.restore_params(mesh, config)
    return Opened(found, config, mesh, params, tokenizer, _eos_ids(found, tokenizer), allowed)


def _mesh_of(config: Config, devices: int) -> MeshConfig:
    """Whole experts on every device, as many as possible apart, so that nothing is gathered; the rest by rows."""
    m = config.model
    fits = [n for n in range(1, devices + 1) if devices % n == 0 and m.num_experts % n == 0 and m.d_model % n == 0
            and m.num_shared_experts <= m.num_experts // n]
    return MeshConfig(data=-1, fsdp=1, expert=max(fits) if m.num_experts else 1)


def _eos_ids(found: Checkpoint, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The end-of-document token, and what an imported generation config adds, e.g. the end of a chat turn."""
    path = found.run / KEPT / "generation_config.json"
    more = read_json(path).get("eos_token_id") if path.is_file() else None
    more = more if isinstance(more, list) else [] if more is None else [more]
    return tuple(dict.fromkeys([tokenizer.eos_id, *more]))
