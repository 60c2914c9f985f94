"""The standard MoE matched to emo_small: the same but for the document pools."""

from emo_jax.config import Config, derive


def config() -> Config:
    return derive("emo_small", "stdmoe_small", router=dict(document_pool=False))
