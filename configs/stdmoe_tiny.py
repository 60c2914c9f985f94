"""The standard MoE matched to emo_tiny: the same but for the document pools."""

from emo_jax.config import Config, derive


def config() -> Config:
    return derive("emo_tiny", "stdmoe_tiny", router=dict(document_pool=False))
