"""A checkpoint opened for use: config, mesh, parameters and tokenizer together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from emo_jax import compat, model, sharding
from emo_jax.config import Config, MeshConfig, override
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.subsets.subset import model_hash, require_experts
from emo_jax.train.checkpoint import Checkpoint, open_checkpoint
from emo_jax.train.compatibility import require_same_model
from emo_jax.train.evaluate import fit_batch


@dataclass(frozen=True)
class Opened:
    config: Config
    mesh: Mesh
    params: model.Params
    tokenizer: Tokenizer
    checkpoint: Checkpoint | None = None

    @property
    def execution(self) -> model.Execution:
        return model.Execution.of(self.config, self.mesh, self.tokenizer.eos_id)

    def identity(self) -> dict[str, Any]:
        """What a subset file says about the model it was chosen for."""
        if self.checkpoint is None:
            return {"name": self.config.name}
        return {"name": self.config.name, "step": self.checkpoint.step, "hash": checkpoint_hash(self.checkpoint)}


def open_model(path: str, overrides: list[str] = (), step: int | None = None, data_path: str = "") -> Opened:
    """The checkpoint with its parameters on a mesh of all devices (one of fsdp unless `mesh.*` is overridden).

    `data_path` replaces the documents of the run. Raises `InputError` for what cannot be opened, and for dense models.
    """
    found = open_checkpoint(path, step)
    config = fit_config(found.config, overrides, str(found.path), data_path)
    tokenizer = Tokenizer(found.run / "tokenizer.json", config.data.eos_token)
    mesh = sharding.make_mesh(fit_batch(config))
    with compat.set_mesh(mesh):
        params = found.restore_params(mesh, config)
    return Opened(config, mesh, params, tokenizer, found)


def fit_config(saved: Config, overrides: list[str], where: str, data_path: str = "") -> Config:
    """The checkpoint's config for another use: `overrides` may change everything but the model, and the seed, which
    says which documents were held out."""
    require_experts(saved)
    config = dataclasses.replace(saved, mesh=MeshConfig())
    if data_path:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=data_path, format="auto"))
    config = dataclasses.replace(override(config, list(overrides)), seed=saved.seed)
    require_same_model(saved, config, where, anneal=True)
    return config


def checkpoint_hash(checkpoint: Checkpoint) -> str:
    return model_hash(checkpoint.config, checkpoint.meta["checksums"]["params"]["sum"])
