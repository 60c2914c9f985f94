"""What `emo-jax export` can write: one file a format, whose name is the format's and which defines FORMAT."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from emo_jax.checkpoints.checkpoint import Checkpoint
from emo_jax.config import Config
from emo_jax.errors import InputError
from emo_jax.files import AnyPath

ALIASES = {"deepseek": "qwen2_moe"}  # transformers has no DeepSeek-MoE of the first kind, and Qwen2-MoE is the same function
NAMES = tuple(sorted(module.name.replace("_profile", "-profile") for module in pkgutil.iter_modules(__path__)))


class Options(NamedTuple):
    """What a person may choose beside the format; most formats look at some of it."""

    dtype: str = "auto"  # one of the format's; auto: that of the checkpoint it was imported from, else the format's first
    shard_bytes: int = 5 * 10**9  # of one safetensors file
    subset: str = ""  # file, of a format that needs one
    code: str = "own"  # of the published layout, whose modeling code: own (in the folder) or published (on the hub)
    license: str = ""  # the hub's name of it, e.g. apache-2.0; "": the card states none
    repo: str = ""  # ORGANISATION/NAME on the hub, as the card names the model; "": the folder itself


class Format(NamedTuple):
    """`require(config)` raises `InputError` where the format cannot express the model. `write(found, folder, options)` fills
    the empty folder, tensors going through memory one at a time, and returns what a person is told: at least `architecture`
    and `tensors`."""

    dtypes: tuple[str, ...]
    require: Callable[[Config], None]
    write: Callable[[Checkpoint, AnyPath, Options], dict[str, Any]]
    needs_subset: bool = False


def get(name: str) -> Format:
    name = ALIASES.get(name, name)
    if name not in NAMES:
        raise InputError(f"--format {name!r} must be one of {', '.join(NAMES)}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").FORMAT
