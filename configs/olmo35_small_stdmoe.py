"""The standard MoE matched to olmo35_small_emo: the same but for the document pools."""

from emo_jax.config import Config, derive


def config() -> Config:
    return derive("olmo35_small_emo", "olmo35_small_stdmoe", router=dict(document_pool=False))
