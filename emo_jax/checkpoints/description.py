"""The description of a checkpoint: its items `meta` (config, conventions, tokens, versions, checksums) and `data` (where
the run stands in its data), sealed together and checked whenever they are read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import emo_jax
from emo_jax import buckets
from emo_jax import config as config_lib
from emo_jax.config import Config
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, reason, shortened
from emo_jax.phases import trained_config

VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
FILE = "metadata"  # in the folder of an item, as Orbax's `JsonSave` writes it
SEAL = "seal"  # of `meta`: the SHA-256 of everything else in both items
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
    return sealed(Description(meta | more, position or {"rows": None}))


def conventions(config: Config) -> dict[str, Any]:
    """How the parameters were trained to read documents, for whoever loads them."""
    r, d = config.router, config.data
    return {
        "document_pool": config.uses_pools, "semantics": r.semantics, "eos_owner": r.eos_owner,
        "pool_scope": r.pool_scope, "pool_distribution": r.pool_distribution,
        "attention_scope": config.model.attention_scope, "packing": d.packing, "eos_token": d.eos_token,
        "document_end_target": d.document_end_target, "max_documents_per_row": d.max_documents_per_row,
    }


def sealed(description: Description) -> Description:
    """With the seal of what it holds now, as JSON holds it."""
    meta, data = json.loads(json.dumps(description))
    meta.pop(SEAL, None)
    return Description(meta | {SEAL: _seal(meta, data)}, data)


def _seal(meta: dict[str, Any], data: dict[str, Any]) -> str:
    content = [{key: value for key, value in meta.items() if key != SEAL}, data]
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write(folder: AnyPath, description: Description) -> None:
    """As Orbax's `JsonSave` does, for checkpoints that are written tensor by tensor."""
    for item, value in description._asdict().items():
        (folder / item).mkdir(exist_ok=True)
        (folder / item / FILE).write_text(json.dumps(value))


# ---- reading ---------------------------------------------------------------------------------------------------------


def _is_count(x: Any) -> bool:
    return type(x) is int and 0 <= x < 2**63


def _are_counts(x: Any) -> bool:
    return type(x) is list and all(map(_is_count, x))


def _are_checksums(x: Any) -> bool:
    return type(x) is dict and "params" in x and all(
        type(item) is dict and _is_count(item.get("sum")) and type(item.get("finite")) is bool for item in x.values())


# The fields that are relied on: whether one must be there, what it must be, and the test of that.
_FIELDS: dict[str, dict[str, tuple[bool, str, Callable[[Any], bool]]]] = {
    "meta": {
        "step": (True, "an integer, 0 or more", _is_count),
        "tokens": (True, "an integer, 0 or more", _is_count),
        "config": (True, "an object", lambda x: type(x) is dict),
        "source": (True, "an object", lambda x: type(x) is dict),
        "checksums": (True, "the sum and finite of params and perhaps of opt_state", _are_checksums),
        "conventions": (False, "an object", lambda x: type(x) is dict),
        "versions": (False, "an object", lambda x: type(x) is dict),
        "held_out_loss": (False, "null or a number", lambda x: x is None or type(x) in (int, float)),
    },
    "data": {
        "rows": (False, "null or the counts of every stream",
                 lambda x: x is None or (type(x) is list and all(_are_counts(state) and len(state) > 1 for state in x))),
        "next": (False, "an integer, 0 or more", _is_count),
        "stages": (False, "a count for every stage", lambda x: _are_counts(x) and len(x) > 0),
    },
}


def read(folder: AnyPath) -> Description:
    """The description of a step folder. Raises `DamagedCheckpoint`, naming item and field, unless it is what was written for
    the step that the folder is named after. Checkpoints of before there were seals have none."""
    found = Description(_read_object(folder, "meta"), _read_object(folder, "data"))
    for item, fields in _FIELDS.items():
        values = getattr(found, item)
        for field, (needed, allowed, holds) in fields.items():
            if needed and field not in values:
                raise DamagedCheckpoint(f"checkpoint {folder}: {item} lacks {field!r}")
            if field in values and not holds(values[field]):
                raise DamagedCheckpoint(f"checkpoint {folder}: {item} is damaged: {field}="
                                        f"{shortened(json.dumps(values[field]))} must be {allowed}")
    if not found.data.keys() & {"rows", "stages"}:
        raise DamagedCheckpoint(f"checkpoint {folder}: data lacks 'rows' or 'stages'")
    if found.meta.get(SEAL, _seal(*found)) != _seal(*found):
        raise DamagedCheckpoint(f"checkpoint {folder}: meta and data are not what was saved (their seal differs)")
    if folder.name != str(found.meta["step"]):
        raise DamagedCheckpoint(f"checkpoint {folder}: it is the one of step {found.meta['step']}, in a folder of another name")
    return found


def _read_object(folder: AnyPath, item: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / item / FILE).read_text())
    except (OSError, ValueError, RecursionError, *buckets.errors(folder)) as e:
        raise DamagedCheckpoint(f"checkpoint {folder}: {item} cannot be read ({reason(e)})") from None
    if type(value) is not dict:
        raise DamagedCheckpoint(f"checkpoint {folder}: {item} is damaged: a JSON {type(value).__name__}; expected an object")
    return value
