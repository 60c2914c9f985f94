"""The source and the tokenizer of a config, for the commands `emo-jax data ...`."""

from __future__ import annotations

from emo_jax.config import Config
from emo_jax.data.documents import Source
from emo_jax.data.order import split
from emo_jax.data.sources import open_source
from emo_jax.data.tokenizer import Tokenizer, load_tokenizer
from emo_jax.files import AnyPath, given_path


def open_data(config: Config, folder: str | AnyPath) -> tuple[Source, Tokenizer]:
    """The source and the tokenizer of a config; `folder` holds or receives a tokenizer that has to be trained."""
    source, folder = open_source(config.data), given_path(folder, "--run")
    train_indices, _ = split(source, config.data, config.seed)
    return source, load_tokenizer(config, source, train_indices, folder)
