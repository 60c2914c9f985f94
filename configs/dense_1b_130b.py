"""The dense model of equal active size (1.48B): one SwiGLU of width 8192 a layer. Published with weight decay 0.033."""

from emo_jax.config import Config, derive


def config() -> Config:
    return derive("emo_1b14b_130b", "dense_1b_130b", optimizer=dict(weight_decay=0.033),
                  model=dict(num_experts=0, num_shared_experts=0, top_k=0, d_ff=8192))
