"""The dense model of emo_tiny's active size: one SwiGLU of width 4 x 64 a layer."""

from emo_jax.config import Config, derive


def config() -> Config:
    return derive("emo_tiny", "dense_tiny",
                  model=dict(num_experts=0, num_shared_experts=0, top_k=0, d_ff=256))
