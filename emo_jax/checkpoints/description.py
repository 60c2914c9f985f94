"""The description of a checkpoint: its items `meta` (config, conventions, tokens, versions, checksums) and `data` (where
the run stands in its data)."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any, NamedTuple

import emo_jax
from emo_jax import config as config_lib
from emo_jax.checkpoints.orbax import read_json
from emo_jax.config import Config
from emo_jax.errors import InputError
from emo_jax.files import AnyPath
from emo_jax.phases import trained_config

VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
Checksums = dict[str, dict[str, Any]]  # {item: {"sum", "finite"}}


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be read or is not what was written."""


class Description(NamedTuple):
    meta: dict[str, Any]
    data: dict[str, Any]


def describe(config: Config, step: int, tokens: int, source: dict[str, Any], checksums: Checksums,
             position: dict[str, Any] | None = None, **more: Any) -> Description:
    """`source` identifies the documents, see `emo_jax.train.start.fingerprint`; `position`: where the run stands in its data,
    see `emo_jax.train.batches` (None: at the first document); `more` goes into `meta`, such as the evaluation loss, or what a
    checkpoint was made of."""
    versions = {"emo_jax": emo_jax.__version__} | {name: importlib.metadata.version(name) for name in VERSIONED}
    meta = {"config": config_lib.to_dict(config), "conventions": conventions(trained_config(config, step)), "tokens": tokens,
            "source": source, "versions": versions, "step": step, "checksums": checksums}
    return Description(meta | more, position or {"rows": None})


def conventions(config: Config) -> dict[str, Any]:
    """How the parameters were trained to read documents, for whoever loads them."""
    r, d = config.router, config.data
    return {
        "document_pool": config.uses_pools, "semantics": r.semantics, "eos_owner": r.eos_owner,
        "pool_scope": r.pool_scope, "pool_distribution": r.pool_distribution,
        "attention_scope": config.model.attention_scope, "packing": d.packing, "eos_token": d.eos_token,
        "document_end_target": d.document_end_target, "max_documents_per_row": d.max_documents_per_row,
    }


def write(folder: AnyPath, description: Description) -> None:
    """As Orbax's `JsonSave` does, for checkpoints that are written tensor by tensor."""
    for item, value in description._asdict().items():
        (folder / item).mkdir(exist_ok=True)
        (folder / item / "metadata").write_text(json.dumps(value))


def read(folder: AnyPath, item: str) -> dict[str, Any]:
    try:
        return dict(read_json(folder / item))
    except Exception as e:
        raise DamagedCheckpoint(f"checkpoint {folder}: {item} cannot be read ({type(e).__name__}: {e})") from None
