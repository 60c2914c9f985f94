"""Pretrain EMO language models in JAX: mixture-of-experts transformers whose experts group into modules by themselves.

As a library: `load` opens a checkpoint (see `LoadedModel`), `choose_subset` finds the experts that texts need, `extract` writes
them as a model of their own. Nothing is imported before it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emo_jax.checkpoints.subset import Subset as Subset
    from emo_jax.loaded import LoadedModel as LoadedModel
    from emo_jax.loaded import load as load
    from emo_jax.subsets.choose import choose_subset as choose_subset
    from emo_jax.surgery.extract import extract as extract

__version__ = "0.1.0"
_HOMES = {"Subset": "checkpoints.subset", "LoadedModel": "loaded", "load": "loaded", "choose_subset": "subsets.choose",
          "extract": "surgery.extract"}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'emo_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"emo_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
