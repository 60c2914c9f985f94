"""A dense model as a Llama, which stock transformers, vLLM and llama.cpp's converter know."""

from __future__ import annotations

from typing import Any

from emo_jax.checkpoints.checkpoint import Checkpoint
from emo_jax.config import Config
from emo_jax.convert import folder as folder_lib
from emo_jax.convert.formats import Format, Options
from emo_jax.errors import InputError
from emo_jax.files import AnyPath


def require(c: Config) -> None:
    if c.model.num_experts:
        raise InputError(f"--format llama is for dense models; model.num_experts={c.model.num_experts}")


def write(found: Checkpoint, folder: AnyPath, options: Options) -> dict[str, Any]:
    return folder_lib.write(found, folder, options, "llama", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False})


FORMAT = Format(("float32", "bfloat16", "float16"), require, write)
