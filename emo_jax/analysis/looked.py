"""What an analysis knows of one model, and what it was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from emo_jax.analysis import clusters as clusters_lib
from emo_jax.analysis.activations import Activations
from emo_jax.analysis.clusters import Clusters
from emo_jax.analysis.resampling import Estimate
from emo_jax.loaded import LoadedModel


@dataclass(frozen=True)
class Options:
    tokens: int = 200_000  # of text, at most
    tokens_per_document: int = 100  # as published
    clusters: int = clusters_lib.CLUSTERS  # at most 255
    features: str = "all"  # or "document", or the number of a layer
    removal_tokens: int = 4_096  # by which the cost of removing experts is measured; 0: not at all
    null_tokens: int = 20_000  # by which routers drawn at random are measured; 0: not at all
    seed: int = 0


@dataclass(frozen=True)
class Looked:
    name: str
    loaded: LoadedModel
    activations: Activations
    clusters: Clusters
    estimates: dict[str, Estimate]
