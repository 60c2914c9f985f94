"""The standard MoE matched to emo_1b14b_130b: the same but for the document pools."""

from emo_jax.config import Config, derive


def config() -> Config:
    return derive("emo_1b14b_130b", "stdmoe_1b14b_130b", router=dict(document_pool=False))
