"""An MoE model as a Qwen2-MoE: the same additive shared expert, softmax over the routed experts and top-k, in stock
transformers, vLLM and mlx-lm. Its weights are not normalised, or (`emo_v2`) divided by their sum; that they are k times as much
in `emo_v2` is in the down projections of the routed experts."""

from __future__ import annotations

import sys
from typing import Any

from emo_jax.checkpoints.checkpoint import Checkpoint
from emo_jax.config import Config
from emo_jax.convert import folder as folder_lib
from emo_jax.convert.formats import Format, Options
from emo_jax.convert.layouts import require_same_experts
from emo_jax.errors import InputError
from emo_jax.files import AnyPath


def require(c: Config) -> None:
    m = c.model
    if not m.num_experts:
        raise InputError("--format qwen2_moe is for MoE models; model.num_experts=0")
    if m.head_dim * m.num_heads != m.d_model:
        raise InputError(f"--format qwen2_moe needs model.head_dim x model.num_heads = model.d_model, not "
                         f"{m.head_dim} x {m.num_heads} for {m.d_model}")
    require_same_experts(c, "qwen2_moe")


def write(found: Checkpoint, folder: AnyPath, options: Options) -> dict[str, Any]:
    m, v2 = found.config.model, found.config.router.semantics == "emo_v2"
    if v2:
        print("warning: mlx-lm and llama.cpp do not look at norm_topk_prob of a Qwen2-MoE, and compute something else; "
              "transformers and vLLM do, and --format gguf is right for llama.cpp", file=sys.stderr)
    return folder_lib.write(found, folder, options, "qwen2_moe", {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "qkv_bias": True,
        "num_experts": m.num_routed_experts, "num_experts_per_tok": m.routed_top_k, "norm_topk_prob": v2,
        "moe_intermediate_size": m.d_ff, "shared_expert_intermediate_size": max(m.num_shared_experts * m.d_ff, 1),
        "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False, "output_router_logits": False,
        "router_aux_loss_coef": 0.0}, routed_scale=float(m.routed_top_k) if v2 else 1.0)


FORMAT = Format(("float32", "bfloat16", "float16"), require, write)
