"""The published layout of a model: EmoForCausalLM, or Olmo2NoQKNormPrenormForCausalLM of a dense one, which transformers runs
with trust_remote_code: with our own code (`convert/remote_code`, in the folder) or the published one, which it fetches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from emo_jax.checkpoints.checkpoint import Checkpoint
from emo_jax.config import Config
from emo_jax.convert import folder as folder_lib
from emo_jax.convert.formats import Format, Options
from emo_jax.convert.importing import HF_FILES
from emo_jax.convert.layouts import require_v1
from emo_jax.convert.tensors import read_json
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, copy_file
from emo_jax.moe.routing import SEMANTICS
from emo_jax.progress import say

OWN_CODE = {
    "emo": {"AutoConfig": "configuration_emo.EmoConfig", "AutoModelForCausalLM": "modeling_emo.EmoForCausalLM"},
    "dense": {"AutoConfig": "configuration_emo.Olmo2NoQKNormPrenormConfig",
              "AutoModelForCausalLM": "modeling_emo.Olmo2NoQKNormPrenormForCausalLM"},
}
PUBLISHED_CODE = {  # where transformers finds it
    "emo": {"AutoConfig": "allenai/Emo_1b14b_1T--configuration_emo.EmoConfig",
            "AutoModelForCausalLM": "allenai/Emo_1b14b_1T--modeling_emo.EmoForCausalLM"},
    "dense": {"AutoConfig": "allenai/Dense_1b_130B--configuration_olmo2_noqknorm_prenorm.Olmo2NoQKNormPrenormConfig",
              "AutoModelForCausalLM":
                  "allenai/Dense_1b_130B--modeling_olmo2_noqknorm_prenorm.Olmo2NoQKNormPrenormForCausalLM"},
}
FILES = Path(__file__).parent.parent / "remote_code"
CODES = ("own", "published")


def write(found: Checkpoint, folder: AnyPath, options: Options) -> dict[str, Any]:
    m, own = found.config.model, options.code == "own"
    if options.code not in CODES:
        raise InputError(f"--code {options.code!r} must be one of {', '.join(CODES)}")
    if not own:
        require_published(found.config)
    layout = "emo" if m.num_experts else "dense"
    keys: dict[str, Any] = {"attention_bias": False, "auto_map": OWN_CODE[layout] if own else _published_code(found, layout)}
    if layout == "dense":
        keys |= {"architectures": ["Olmo2NoQKNormPrenormForCausalLM"], "model_type": "olmo2_noqknorm_prenorm"}
    else:
        keys |= {"architectures": ["EmoForCausalLM"], "model_type": "emo", **_expert_keys(found.config, own)}
    derived = m.head_dim * m.num_heads == m.d_model  # by the published code, which has no key for it
    # transformers 5 warns of the name rope_scaling; imported models have None there.
    leave_out = [*(["head_dim"] if derived else []), *(["rope_scaling"] if own else [])]
    for file in sorted(FILES.glob("*.py")) if own else ():
        copy_file(file, folder / file.name)
    return folder_lib.write(found, folder, options, layout, keys, as_imported=True,
                            leave_out=tuple(leave_out), usage=f"hf-{options.code}")


def _expert_keys(c: Config, own: bool) -> dict[str, Any]:
    m, uneven, rules = c.model, list(c.model.experts_per_layer) or None, SEMANTICS[c.router.semantics]
    keys: dict[str, Any] = {
        "num_experts": m.num_experts, "num_experts_per_layer": uneven, "num_experts_per_tok": m.top_k,
        "num_shared_experts": m.num_shared_experts,
        "num_shared_experts_per_layer": [m.num_shared_experts] * m.num_layers if uneven else None,
        "always_active_experts": None, "always_active_experts_per_layer": None, "dense_intermediate_size": None,
        "dense_mlp_bias": False, "norm_topk_prob": rules.normalize is not None, "output_router_logits": not own,
        "router_aux_loss_coef": 0.01}
    return keys | ({"routed_scaling_factor": float(m.routed_top_k)} if rules.restore_scale else {})


def _published_code(found: Checkpoint, layout: str) -> dict[str, str]:
    """That of the imported config.json where it names a repository: one without names files beside it, which are not here."""
    imported = found.run / HF_FILES / "config.json"
    named = read_json(imported).get("auto_map") if imported.is_file() else None
    elsewhere = isinstance(named, dict) and all("--" in str(value) for value in named.values())
    return named if named and elsewhere else PUBLISHED_CODE[layout]


def require_published(c: Config) -> None:
    """`InputError` where the published code computes another function."""
    m = c.model
    if not m.num_experts:
        return
    require_v1(c)
    if min(m.experts_per_layer, default=m.top_k) < m.top_k:
        raise InputError(f"the published code chooses model.top_k={m.top_k} experts in every layer; layer "
                         f"{int(np.argmin(m.experts_per_layer))} has {min(m.experts_per_layer)}; --code own allows it")
    if m.num_shared_experts > 1:
        say(f"warning: the published code weights {m.num_shared_experts} shared experts by a softmax over their router rows, "
            f"training gives each the weight 1; --code own is exact")


def require(c: Config) -> None:
    """Our own code runs every model; what the published code cannot, `require_published` refuses."""


FORMAT = Format(("float32", "bfloat16", "float16"), require, write)
