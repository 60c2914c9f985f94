"""The standard MoE matched to emo_1b14b_1t: the same but for the document pools."""

from emo_jax.config import Config, derive


def config() -> Config:
    return derive("emo_1b14b_1t", "stdmoe_1b14b_1t", router=dict(document_pool=False))
