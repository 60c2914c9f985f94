"""The folder of a model as transformers, vLLM and mlx-lm load it: safetensors, config.json, tokenizer and generation files."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from emo_jax.checkpoints.checkpoint import Checkpoint
from emo_jax.config import Config
from emo_jax.convert.card import model_card
from emo_jax.convert.exporting import DTYPES, arrays
from emo_jax.convert.formats import Options
from emo_jax.convert.importing import HF_FILES, NOTE, ROUTER_ROWS
from emo_jax.convert.layouts import entries
from emo_jax.convert.tensors import Planned, read_json, write_folder
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.files import AnyPath, copy_file, write_json, write_text

# Keys that an imported config.json keeps: they are no part of the model.
UNTOUCHED = ("bos_token_id", "eos_token_id", "pad_token_id", "output_router_logits", "router_aux_loss_coef",
             "use_cache", "num_shared_experts_per_layer")


def write(found: Checkpoint, folder: AnyPath, options: Options, layout: str, keys: dict[str, Any],
          as_imported: bool = False, leave_out: tuple[str, ...] = (), usage: str = "",
          routed_scale: float = 1.0) -> dict[str, Any]:
    """Fills the folder. `keys`: of config.json, what the architecture needs beside the `common_keys`. `as_imported`: keys of
    the imported config.json that we do not know of stay. `leave_out`: keys that it must not have. `usage`: what of `card.USAGE`
    the model card shows; by default the layout's. `routed_scale`: see `layouts.entries`."""
    plan, dtype = list(entries(layout, found.config.model, routed_scale)), DTYPES[options.dtype]
    write_folder(folder, [Planned(e.name, e.shape) for e in plan], (_cast(a, dtype) for a in arrays(plan, found)), dtype,
                 options.shard_bytes)
    tokenizer = _write_tokenizer(found, folder)
    ids = _token_ids(found, tokenizer)
    if not (folder / "generation_config.json").exists():  # the imported one
        write_json(folder / "generation_config.json", {"do_sample": True} | ids, indent=2)
    ours: dict[str, Any] = common_keys(found.config, options.dtype) | keys | ids | {"bos_token_id": None}
    imported = found.run / HF_FILES / "config.json"
    if as_imported and imported.is_file():
        published = read_json(imported)  # it may have more keys than we know of
        ours = published | {key: value for key, value in ours.items() if key not in published or key not in UNTOUCHED}
    write_text(folder / "README.md", model_card(found, options, ours["architectures"][0], usage or layout))
    # The last one: without it, a folder in a bucket is no model.
    write_json(folder / "config.json", {key: ours[key] for key in sorted(ours) if key not in leave_out}, indent=2)
    return {"architecture": ours["architectures"][0], "tensors": len(plan), "tokenizer": tokenizer is not None}


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """What is not 0 stays not 0, as the gate of a shared expert must; only float16 would make it so."""
    cast = np.ascontiguousarray(values.astype(dtype, copy=False))
    if dtype == np.float16:
        cast[(cast == 0) & (values != 0)] = np.finfo(np.float16).smallest_subnormal
    return cast


def common_keys(c: Config, dtype: str) -> dict[str, Any]:
    """Of config.json, what all architectures call alike."""
    m = c.model
    return {
        "attention_dropout": 0.0, "dtype": dtype, "head_dim": m.head_dim, "hidden_act": "silu", "hidden_size": m.d_model,
        "initializer_range": m.init_std, "intermediate_size": m.d_ff, "max_position_embeddings": c.data.sequence_length,
        "num_attention_heads": m.num_heads, "num_hidden_layers": m.num_layers, "num_key_value_heads": m.num_kv_heads,
        "rms_norm_eps": m.norm_eps, "rope_theta": m.rope_theta, "tie_word_embeddings": False,
        "use_cache": True, "vocab_size": m.vocab_size}


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
            "padding_side": "left", "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False, "model_max_length": found.config.data.sequence_length}, indent=2)
    return tokenizer
