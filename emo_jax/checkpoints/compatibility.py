"""Which changes of a config a checkpoint survives, and the message when it does not."""

from __future__ import annotations

from typing import Any

from emo_jax.config import Config, flatten, to_dict
from emo_jax.errors import InputError

# Fields below these may change from one start of a run to the next; everything else under `data`, `seed` and
# `train.batch_size` fixes which tokens step k sees, and `model` and `router` fix what the parameters mean.
FREE_DATA_FIELDS = tuple(f"data.{name}" for name in (
    "path", "format", "tokenizer", "workers", "text_field", "tokens_field", "eval_path", "max_skipped", "cache_gb", "mix_root"))


def _differences(saved: Config, given: Config, prefixes: tuple[str, ...], free: tuple[str, ...] = ()) -> list[str]:
    old, new = _fields(saved), _fields(given)
    return [f"{key}: {old[key]!r} in the checkpoint, {new[key]!r} given"
            for key in new if key.startswith(prefixes) and key not in free and old[key] != new[key]]


def _fields(config: Config) -> dict[str, Any]:
    fields = flatten(to_dict(config))
    del fields["data.eval_fraction"]
    return fields | {"data.eval_fraction (0 with data.eval_path)": config.data.held_out_fraction}


def require_same_model(saved: Config, given: Config, where: str, anneal: bool = False) -> None:
    """Raises `InputError` naming every field that makes `saved` another model than `given`.

    An anneal may change how documents meet the parameters (routing and attention), not the parameters' shapes.
    """
    prefixes = ("model.",) if anneal else ("model.", "router.")
    wrong = _differences(saved, given, prefixes, free=("model.attention_scope",) if anneal else ())
    if wrong:
        raise InputError(f"{where} holds another model than config {given.name}:\n  " + "\n  ".join(wrong)
                         + "\nGive another --out, or the values of the checkpoint.")


def require_same_data(saved: Config, given: Config, where: str) -> None:
    """Raises `InputError` if the run would not see the documents in the order it started with."""
    wrong = _differences(saved, given, ("data.", "seed", "train.batch_size"), free=FREE_DATA_FIELDS)
    if wrong:
        raise InputError(f"{where} stands in another stream of rows than config {given.name} describes:\n  "
                         + "\n  ".join(wrong) + "\nGive the values of the checkpoint, or another --out (with "
                         "train.init_from to keep the parameters).")


def same_stream(saved: Config, given: Config) -> bool:
    return not _differences(saved, given, ("data.", "seed", "train.batch_size"), free=FREE_DATA_FIELDS)
