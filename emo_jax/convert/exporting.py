"""`emo-jax export`: a checkpoint -> a folder that transformers and vLLM load.

Formats: `hf`, the published layout of the model (EmoForCausalLM, whose code transformers fetches with
trust_remote_code; dense: Olmo2NoQKNormPrenormForCausalLM), and the same function in architectures that stock
transformers and vLLM have: `qwen2_moe` for MoE models, `llama` for dense ones. `deepseek` is another name for
`qwen2_moe`: transformers has no DeepSeek-MoE (the first version, without latent attention), and Qwen2-MoE is the same
additive shared expert, softmax over the routed experts and top-k without normalisation.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from emo_jax.checkpoints.checkpoint import Checkpoint, open_checkpoint
from emo_jax.checkpoints.description import DamagedCheckpoint
from emo_jax.checkpoints.store import BitSum, ParameterStore, leaf_shapes
from emo_jax.config import Config
from emo_jax.convert import description
from emo_jax.convert.importing import HF_FILES, NOTE, ROUTER_ROWS
from emo_jax.convert.layouts import Entry, entries
from emo_jax.convert.tensors import SHARD_BYTES, Planned, read_json, write_folder
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, copy_file, folder_path, list_files, make_folder, remove_tree, replacing, write_json
from emo_jax.progress import track

FORMATS = ("hf", "qwen2_moe", "deepseek", "llama")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def export_checkpoint(path: str, out: str, form: str = "hf", dtype: str = "auto", step: int | None = None,
                      shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Writes the folder `out`; tensors go through memory one at a time. `dtype` auto: that of the checkpoint it was
    imported from, else float32. Raises `InputError`."""
    found, target = open_checkpoint(path, step), folder_path(out)
    config = found.config
    layout = {"hf": "emo" if config.model.num_experts else "dense", "deepseek": "qwen2_moe"}.get(form, form)
    description.require_exportable(layout, config)
    hf_files = found.run / HF_FILES
    if dtype == "auto":
        found_dtype = read_json(hf_files / NOTE).get("dtype") if (hf_files / NOTE).is_file() else "float32"
        if not isinstance(found_dtype, str) or found_dtype not in DTYPES:
            raise InputError(f"{hf_files / NOTE}: dtype={found_dtype!r} is not that of a published tensor; give --dtype")
        dtype = found_dtype
    if target.exists() and any(target.iterdir()):
        raise InputError(f"--out {out} is not an empty folder")
    if layout == "emo" and config.model.num_shared_experts > 1:
        print(f"warning: the published code weights {config.model.num_shared_experts} shared experts by a softmax over "
              f"their router rows, training gives each the weight 1; --format qwen2_moe is exact", file=sys.stderr)

    plan = list(entries(layout, config.model))
    planned = [Planned(e.name, e.shape) for e in plan]
    with replacing(target) as partial:
        remove_tree(partial)
        make_folder(partial)
        write_folder(partial, planned, _arrays(plan, found, DTYPES[dtype]), DTYPES[dtype], shard_bytes)
        tokenizer = _write_tokenizer(found, partial)
        ids = _token_ids(found, tokenizer)
        if not (partial / "generation_config.json").exists():  # the imported one
            write_json(partial / "generation_config.json", {"do_sample": True} | ids, indent=2)
        # The last one: without it, a folder in a bucket is no model.
        write_json(partial / "config.json", _config_json(layout, config, dtype, ids, hf_files), indent=2)
    size = sum(file.size for file in list_files(str(target))[1])
    return {"out": str(target), "checkpoint": str(found.path), "format": form, "architecture": layout, "dtype": dtype,
            "tensors": len(plan), "bytes": size, "tokenizer": tokenizer is not None}


def _arrays(plan: list[Entry], found: Checkpoint, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The array of every planned tensor in turn. When all of the checkpoint has been read, its checksum is compared."""
    store, shapes = ParameterStore(found.path / "params"), leaf_shapes(found.config)
    rows = found.run / HF_FILES / ROUTER_ROWS
    dead_rows = np.load(io.BytesIO(rows.read_bytes())) if rows.is_file() else None
    sums = BitSum(shapes)
    for e in track(plan, f"exporting {found.path}", "tensors"):
        values = None
        if e.leaf:
            try:
                values = store.read(e.leaf, e.index)
            except Exception as error:
                leaf = ".".join(e.leaf)
                raise DamagedCheckpoint(f"checkpoint {found.path}: {leaf} cannot be read ({error})") from None
            sums.add(e.leaf, values)
        tensor = e.to_theirs(values)
        if e.dead_rows and dead_rows is not None:
            tensor = np.concatenate([tensor[: -e.dead_rows], dead_rows[e.index[0]]])
        yield np.ascontiguousarray(tensor.astype(dtype, copy=False))
    complete = not found.config.model.experts_per_layer  # else some experts are in no layer and were not read
    if complete and sums.total != found.meta["checksums"]["params"]["sum"]:
        raise DamagedCheckpoint(f"checkpoint {found.path}: params is not what was saved (its checksum differs)")


# ---- the other files ------------------------------------------------------------------------------------------------


def _config_json(layout: str, config: Config, dtype: str, ids: dict[str, Any], hf_files: AnyPath) -> dict[str, Any]:
    ours = description.written_keys(layout, config, dtype) | ids | {"bos_token_id": None}
    if layout in description.REMOTE_CODE and (hf_files / "config.json").is_file():
        published = read_json(hf_files / "config.json")  # it may have more keys than we know of
        ours = published | {key: value for key, value in ours.items() if key not in published or key not in UNTOUCHED}
    return dict(sorted(ours.items()))


# Keys that an imported config.json keeps: they are no part of the model.
UNTOUCHED = ("auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "output_router_logits", "router_aux_loss_coef",
             "use_cache", "num_shared_experts_per_layer")


def _token_ids(found: Checkpoint, tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        hf_files = found.run / HF_FILES / "config.json"
        published = read_json(hf_files) if hf_files.is_file() else {}
        return {key: published.get(key) for key in ("eos_token_id", "pad_token_id")}
    pad = tokenizer.token_id("<|pad|>")
    return {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id if pad is None else pad}


def _write_tokenizer(found: Checkpoint, target: AnyPath) -> Tokenizer | None:
    source, hf_files = found.run / "tokenizer.json", found.run / HF_FILES
    if hf_files.is_dir():
        for file in hf_files.iterdir():
            if file.name not in (NOTE, ROUTER_ROWS, "config.json"):
                copy_file(file, target / file.name)
    if not source.is_file():
        print(f"warning: {found.run} has no tokenizer.json; the export has none either", file=sys.stderr)
        return None
    copy_file(source, target / "tokenizer.json")
    tokenizer = Tokenizer(source, found.config.data.eos_token)
    if not (target / "tokenizer_config.json").exists():
        pad = "<|pad|>" if tokenizer.token_id("<|pad|>") is not None else tokenizer.eos_token
        write_json(target / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.eos_token, "pad_token": pad,
            "clean_up_tokenization_spaces": False, "model_max_length": found.config.data.sequence_length}, indent=2)
    return tokenizer
