"""Models for the tests of subsets: the published tiny checkpoint, and one of random numbers."""

from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from emo_jax import model as model_lib
from emo_jax import sharding
from emo_jax.config import Config, DataConfig, MeshConfig, ModelConfig, RouterConfig, TrainConfig
from emo_jax.data.tokenizer import Tokenizer
from emo_jax.loaded import LoadedModel

FIXTURES = Path(__file__).parent / "fixtures"


class NoTokenizer(Tokenizer):
    def __init__(self):
        self.eos_id = -1


def tiny_config(**model) -> Config:
    shape = dict(vocab_size=512, num_layers=3, d_model=64, num_heads=4, num_kv_heads=4, head_dim=16, d_ff=32,
                 num_experts=16, num_shared_experts=1, top_k=4)
    return Config(name="tiny", model=ModelConfig(**shape | model), router=RouterConfig(pool_min=3, pool_max=15),
                  data=DataConfig(sequence_length=32, max_documents_per_row=8),
                  train=TrainConfig(steps=10, batch_size=4, remat="none"), mesh=MeshConfig(data=1, fsdp=1))


def published() -> LoadedModel:
    """The tiny checkpoint that the golden selections were made with."""
    config = tiny_config()
    w, m = load_file(FIXTURES / "hf_tiny_emo" / "model.safetensors"), config.model

    def layer(i):
        p = f"model.layers.{i}."
        heads = {n: w[f"{p}self_attn.{n}_proj.weight"].T.reshape(64, 4, 16) for n in "qkv"}
        experts = {ours: np.stack([w[f"{p}mlp.experts.{e}.{ours}_proj.weight"].T for e in range(m.num_experts)])
                   for ours in ("gate", "up", "down")}
        return {"attention_norm": w[p + "pre_attention_layernorm.weight"],
                "mlp_norm": w[p + "pre_feedforward_layernorm.weight"],
                "attention": heads | {"o": w[p + "self_attn.o_proj.weight"].T.reshape(4, 16, 64)},
                "moe": experts | {"router": w[p + "mlp.gate.weight"][:m.num_routed_experts].T}}

    params = {"embedding": w["model.embed_tokens.weight"], "final_norm": w["model.norm.weight"],
              "layers": jax.tree.map(lambda *a: np.stack(a), *map(layer, range(m.num_layers))),
              "head": w["lm_head.weight"].T}
    return opened(config, jax.devices()[:1], params)


def opened(config: Config, devices=None, params=None) -> LoadedModel:
    """`params` (or new ones) on a mesh of these devices (one by default)."""
    mesh = sharding.make_mesh(config, devices or jax.devices()[:1])
    params = model_lib.init_params(config, mesh) if params is None else params
    placed = jax.tree.map(jax.device_put, params, sharding.parameter_shardings(params, mesh))
    return LoadedModel(config, mesh, placed, NoTokenizer())
