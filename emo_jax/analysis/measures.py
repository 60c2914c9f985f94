"""How modular a model is, in numbers: the table of `emo-jax analyze`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from emo_jax.analysis import clusters as clusters_lib
from emo_jax.analysis import coverage, information, use
from emo_jax.analysis.activations import Activations
from emo_jax.analysis.clusters import Clusters
from emo_jax.analysis.resampling import Estimate, resamples


class Row(NamedTuple):
    key: str
    title: str
    unit: str
    better: str  # for modules: "higher", "lower", or "" where it depends
    help: str


POOLS = {"gap_quarter": 0.25, "gap_eighth": 0.125}  # of the routed experts
MEASURES = (
    Row("loss", "Loss with all experts", "nats/token", "lower",
        "Cross entropy of the next token in the text that was looked at."),
    Row("gap_quarter", "Selective gap at 25 %", "nats/token", "lower",
        "How much the loss rises when each document may only use the quarter of the experts that it asks for most."),
    Row("gap_eighth", "Selective gap at 12.5 %", "nats/token", "lower", "The same with an eighth of the experts."),
    Row("label_information", "What experts tell of the label", "nats", "higher",
        "Mutual information of a token's expert with the label of its document, above shuffled labels; 0 is nothing."),
    Row("cluster_label", "What clusters tell of the label", "nats", "higher",
        "The same for the cluster of a token, by all layers together."),
    Row("token_information", "What experts tell of the token itself", "nats", "",
        "Mutual information of a token's expert with its identity, above shuffled tokens: experts of words, not topics."),
    Row("cluster_token", "What clusters tell of the token itself", "nats", "lower",
        "The same for the cluster of a token."),
    Row("effective_experts", "Effective experts a document", "experts", "lower",
        "The number of equally used experts that would be as spread as those of a document."),
    Row("top_quarter", "Routing mass in a document's top 25 %", "share", "higher",
        "The part of the router's probability that goes to the quarter of the experts that a document prefers; 0.25: none."),
    Row("top_eighth", "Routing mass in a document's top 12.5 %", "share", "higher", "The same for an eighth of the experts."),
    Row("pool_overlap", "Pools alike within a label", "share", "higher",
        "How much more of their strongest experts two documents of one label share than two of different labels."),
    Row("segment_routing", f"Segment routing ({use.SEGMENT} tokens)", "F1", "higher",
        "How well one choice of experts for a whole segment can stand for the choices of its tokens (SRP, arXiv 2505.16056)."),
    Row("segment_cache", f"Segment cache hits ({use.SEGMENT} tokens, {use.CACHE}k experts)", "share", "higher",
        "The share of a segment's choices that a cache of its most frequent experts answers (SCH, arXiv 2505.16056)."),
    Row("silhouette", "Silhouette of the clusters", "-1 to 1", "higher",
        "How far clusters are apart against how wide they are."),
    Row("davies_bouldin", "Davies-Bouldin index of the clusters", "", "lower", "How wide clusters are against how far apart."),
    Row("source_entropy", "Entropy of labels in a cluster", "nats", "lower", "0 where each cluster is of one label."),
)


def measure(a: Activations, clusters: Clusters, pooled: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """Every measure with its resamples over documents, by layer where it has layers. `pooled`: the nats of every token with
    the pools of `POOLS`."""
    weights, found = resamples(len(a.text.labels)), clusters.of_token
    drawn = {
        "loss": use.mean_loss(a),
        **{key: use.gap(a, nats) for key, nats in pooled.items()},
        "label_information": information.label_information(a),
        "cluster_label": information.cluster_label_information(found, a),
        "token_information": information.token_information(a),
        "cluster_token": information.cluster_token_information(found, a),
        "effective_experts": use.effective_experts(a),
        "top_quarter": use.top_share(a, 0.25),
        "top_eighth": use.top_share(a, 0.125),
        "pool_overlap": coverage.pool_overlap(a),
        "segment_routing": use.segment_routing(a),
        "segment_cache": use.segment_cache(a),
    }
    single = clusters.quality | {"source_entropy": clusters_lib.source_entropy(a, found)}
    return {key: Estimate(of(weights)) for key, of in drawn.items()} | {
        key: Estimate(np.array([value])) for key, value in single.items()}


def baselines(a: Activations) -> dict[str, float]:
    """What a router shows that prefers nothing, where that is known without running one."""
    entropy = np.bincount(a.text.labels[a.text.documents]) / len(a.text.tokens)
    return {"gap_quarter": 0.0, "gap_eighth": 0.0, "label_information": 0.0, "cluster_label": 0.0, "token_information": 0.0,
            "cluster_token": 0.0, "effective_experts": float(a.experts), "top_quarter": 0.25, "top_eighth": 0.125,
            "pool_overlap": 0.0, "source_entropy": float(-np.sum(entropy[entropy > 0] * np.log(entropy[entropy > 0])))}
