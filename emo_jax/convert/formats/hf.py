"""The published layout of a model: EmoForCausalLM, or Olmo2NoQKNormPrenormForCausalLM of a dense one, whose code transformers
fetches with trust_remote_code."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from emo_jax.checkpoints.checkpoint import Checkpoint
from emo_jax.config import Config
from emo_jax.convert import folder as folder_lib
from emo_jax.convert.formats import Format, Options
from emo_jax.convert.layouts import entries, require_v1
from emo_jax.errors import InputError
from emo_jax.files import AnyPath

REMOTE_CODE = {  # where stock transformers finds the published code
    "emo": {"AutoConfig": "allenai/Emo_1b14b_1T--configuration_emo.EmoConfig",
            "AutoModelForCausalLM": "allenai/Emo_1b14b_1T--modeling_emo.EmoForCausalLM"},
    "dense": {"AutoConfig": "allenai/Dense_1b_130B--configuration_olmo2_noqknorm_prenorm.Olmo2NoQKNormPrenormConfig",
              "AutoModelForCausalLM":
                  "allenai/Dense_1b_130B--modeling_olmo2_noqknorm_prenorm.Olmo2NoQKNormPrenormForCausalLM"},
}


def require(c: Config) -> None:
    m = c.model
    if not m.num_experts:
        return
    require_v1(c)
    if min(m.experts_per_layer, default=m.top_k) < m.top_k:
        raise InputError(f"the published code chooses model.top_k={m.top_k} experts in every layer; layer "
                         f"{int(np.argmin(m.experts_per_layer))} has {min(m.experts_per_layer)}")


def write(found: Checkpoint, folder: AnyPath, options: Options) -> dict[str, Any]:
    m = found.config.model
    if m.num_shared_experts > 1 and m.num_experts:
        print(f"warning: the published code weights {m.num_shared_experts} shared experts by a softmax over "
              f"their router rows, training gives each the weight 1; --format qwen2_moe is exact", file=sys.stderr)
    layout = "emo" if m.num_experts else "dense"
    keys: dict[str, Any] = {"attention_bias": False, "auto_map": REMOTE_CODE[layout]}
    if m.head_dim * m.num_heads == m.d_model:  # the published code derives it
        keys["head_dim"] = ...
    if layout == "dense":
        keys |= {"architectures": ["Olmo2NoQKNormPrenormForCausalLM"], "model_type": "olmo2_noqknorm_prenorm"}
    else:
        uneven = m.experts_per_layer or None
        keys |= {
            "architectures": ["EmoForCausalLM"], "model_type": "emo", "num_experts": m.num_experts,
            "num_experts_per_layer": list(uneven) if uneven else None, "num_experts_per_tok": m.top_k,
            "num_shared_experts": m.num_shared_experts,
            "num_shared_experts_per_layer": [m.num_shared_experts] * m.num_layers if uneven else None,
            "always_active_experts": None, "always_active_experts_per_layer": None, "dense_intermediate_size": None,
            "dense_mlp_bias": False, "norm_topk_prob": False, "output_router_logits": True, "router_aux_loss_coef": 0.01}
    return folder_lib.write(found, folder, options, list(entries(layout, m)), keys, as_imported=True)


FORMAT = Format(("float32", "bfloat16", "float16"), require, write)
