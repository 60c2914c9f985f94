"""Which changes of a config a checkpoint survives, and the message when it does not."""

from __future__ import annotations

from typing import Any

from emo_jax.config import Config, flatten, to_dict
from emo_jax.errors import InputError
from emo_jax.phases import phases

# Fields of `data` that may change from one start of a run to the next; with `seed`, everything else there fixes which tokens a
# run sees, and `model` and `router` fix what the parameters mean.
FREE_DATA_FIELDS = tuple(f"data.{name}" for name in (
    "path", "general_path", "format", "tokenizer", "workers", "text_field", "tokens_field", "eval_path", "max_skipped",
    "cache_gb", "mix_root"))
# Fields that change what is made of the documents, not which of them are next.
ROW_FIELDS = tuple(f"data.{name}" for name in (
    "sequence_length", "packing", "max_documents_per_row", "document_end_target", "repetition_filter", "repetitive_rows"))


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


def require_same_optimizer(saved: Config, given: Config, where: str) -> None:
    """Raises `InputError` if the state of the optimizer has another form."""
    old, new = saved.optimizer.trainable, given.optimizer.trainable
    if (old == "all") != (new == "all"):
        raise InputError(f"{where} holds another form of optimizer state: optimizer.trainable: {old!r} in the checkpoint, "
                         f"{new!r} given. Give the value of the checkpoint, or another --out with train.init_params_from.")


def require_same_data(saved: Config, given: Config, step: int, where: str) -> None:
    """Raises `InputError` if `given`, a run's config, has read other documents until `step`, or in another order, than `saved`.
    Stages that begin later, and the batch size, are free."""
    old, new = ([phase for phase in phases(c) if phase.starts_stage and phase.first_step < max(step, 1)]
                for c in (saved, given))
    wrong = _differences(saved, given, ("seed",))
    if (begun := [p.first_step for p in old]) != (begins := [p.first_step for p in new]):
        wrong.append(f"stages that begin before step {step}: at {begun} in the checkpoint, at {begins} given")
    else:
        for a, b in zip(old, new):
            found = _differences(a.config, b.config, ("data.",), FREE_DATA_FIELDS)
            wrong += [f"stage {a.stage}: {line}" for line in found] if len(old) > 1 else found
    if wrong:
        raise InputError(f"{where} stands in another stream of rows than config {given.name} describes:\n  "
                         + "\n  ".join(wrong) + "\nGive the values of the checkpoint (a change from here on is a stage), or "
                         "another --out (with train.init_from to keep the parameters).")


def same_documents(saved: Config, given: Config) -> bool:
    """Whether two configs without stages, of the same source, read its documents in the same order."""
    return not _differences(saved, given, ("data.", "seed"), FREE_DATA_FIELDS + ROW_FIELDS)


def same_rows(saved: Config, given: Config) -> bool:
    """Whether they also make the same rows of them."""
    return not _differences(saved, given, ROW_FIELDS)


def same_source(saved: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether two fingerprints are of the same documents and tokenizer. Those of older checkpoints have fewer parts; contents
    are compared where they are of one kind, such as of files that were moved from a bucket to a disk are not."""
    common = saved.keys() & given.keys()
    if "content" in common and _kind(saved["content"]) != _kind(given["content"]):
        common -= {"content"}
    return {"documents", "tokenizer"} <= common and all(saved[name] == given[name] for name in common)


def _kind(content: Any) -> str:
    return str(content).partition(":")[0]
