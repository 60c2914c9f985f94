"""A standard MoE of 32 experts (3.9B parameters), for comparison at equal memory with a subset of 32."""

from emo_jax.config import Config, derive


def config() -> Config:
    return derive("emo_1b14b_130b", "stdmoe_1b4b_130b", router=dict(document_pool=False),
                  model=dict(num_experts=32))
