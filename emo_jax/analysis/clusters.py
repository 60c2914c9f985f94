"""Clusters of tokens by what the routers do with them.

As published (EMO paper, section 5; `scripts/clustering` of the code): the routers' probabilities of all layers, centred;
principal components of 95 % of the variance; unit length; k-means with 32 clusters, refined with centres of unit length.
Components and centres are found on `FIT_TOKENS` tokens, spread evenly, and all tokens are then assigned to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from emo_jax.analysis.activations import Activations
from emo_jax.analysis.information import cluster_counts, frequent_tokens
from emo_jax.errors import InputError

CLUSTERS = 32
VARIANCE = 0.95
FIT_TOKENS = 50_000
QUALITY_TOKENS = 5_000  # for the silhouette, which compares all pairs
REFINEMENTS = 20
CHUNK = 1 << 14  # tokens that are transformed at a time


class Clusters(NamedTuple):
    of_token: Int[np.ndarray, "n"]
    centres: Float[np.ndarray, "C P"]  # of unit length, in principal components
    reduce: Callable[[np.ndarray], np.ndarray]  # features [m, F] -> unit vectors in principal components [m, P]
    quality: dict[str, float]  # silhouette, davies_bouldin


def features(a: Activations, layers: str = "all") -> Float[np.ndarray, "n F"]:
    """What tokens are clustered by: probabilities of "all" layers, or of the layer of this number."""
    if layers == "all":
        return a.probabilities.reshape(len(a.text.tokens), -1)
    if not layers.isdigit() or int(layers) >= a.layers:
        raise InputError(f"features of layer {layers}: expected all, document, or a layer of 0..{a.layers - 1}")
    return a.probabilities[:, int(layers)]


def document_features(a: Activations) -> Float[np.ndarray, "D F"]:
    """Mean probabilities of a document's tokens."""
    means = a.probability_sums / np.diff(a.text.starts)[:, None, None]
    return means.reshape(len(means), -1)


def cluster_tokens(a: Activations, what: str = "all", clusters: int = CLUSTERS, seed: int = 0) -> Clusters:
    """By the probabilities of "all" layers or of the layer of a number; or, with "document", tokens of whole documents by their
    mean probabilities."""
    if what != "document":
        return cluster(features(a, what), clusters, seed)
    found = cluster(document_features(a), clusters, seed)
    return found._replace(of_token=found.of_token[a.text.documents])


def cluster(x: Float[np.ndarray, "n F"], clusters: int = CLUSTERS, seed: int = 0) -> Clusters:
    """Clusters of the rows of `x`. Needs scikit-learn (`pip install 'emo-jax[report]'`)."""
    kmeans = require_sklearn()[1]
    few = x[_spread(len(x), FIT_TOKENS)].astype(np.float32)
    unit = reducer(few, seed)
    points = unit(few)
    count = min(clusters, len(np.unique(points, axis=0)))
    fitted = kmeans(count, n_init=10, max_iter=500, batch_size=4096, random_state=seed).fit(points)
    centres = _refine(points, fitted.cluster_centers_)
    of_token = np.concatenate([np.argmax(unit(x[i:i + CHUNK].astype(np.float32)) @ centres.T, axis=1)
                               for i in range(0, len(x), CHUNK)])
    used = np.unique(of_token)  # by size, the largest is 0
    used = used[np.argsort(-np.bincount(of_token)[used], kind="stable")]
    number = np.zeros(len(centres), int)
    number[used] = np.arange(len(used))
    return Clusters(number[of_token], centres[used], unit, _quality(points, np.argmax(points @ centres[used].T, axis=1)))


def reducer(few: Float[np.ndarray, "m F"], seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    pca = require_sklearn()[0](VARIANCE, svd_solver="covariance_eigh" if len(few) >= few.shape[1] else "full",
                               random_state=seed).fit(few)
    return functools.partial(_unit, pca)


def _unit(pca: Any, x: np.ndarray) -> np.ndarray:
    return _normalised(pca.transform(x.astype(np.float32)))


def source_entropy(a: Activations, of_token: Int[np.ndarray, "n"]) -> float:
    """Entropy of the labels of a cluster's tokens, nats, mean over the tokens: 0 where every cluster is of one label."""
    counts = np.eye(len(a.text.names))[a.text.labels].T @ cluster_counts(of_token, a)  # [G, C]
    share = counts / np.maximum(counts.sum(axis=0), 1)
    entropy = -np.sum(np.where(share > 0, share * np.log(np.maximum(share, 1e-30)), 0.0), axis=0)
    return float((entropy * counts.sum(axis=0)).sum() / counts.sum())


def agreement(a: Activations, of_token: Int[np.ndarray, "n"], frequent: int) -> dict[str, float]:
    """Adjusted mutual information (0: chance, 1: the same partition) of the clusters with the labels of the documents, and
    with the identity of the most frequent tokens."""
    from sklearn.metrics import adjusted_mutual_info_score

    use = frequent_tokens(a.text.tokens, frequent)
    return {"label": float(adjusted_mutual_info_score(a.text.labels[a.text.documents], of_token)),
            "token": float(adjusted_mutual_info_score(a.text.tokens[use], of_token[use]))}


def require_sklearn() -> tuple[Any, Any]:
    """(PCA, MiniBatchKMeans)"""
    try:
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.decomposition import PCA
    except ImportError:
        raise InputError("clusters need scikit-learn: pip install 'emo-jax[report]'") from None
    return PCA, MiniBatchKMeans


def _normalised(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _refine(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Spherical k-means from the centres of k-means: nearest by cosine, and centres that are means of unit length."""
    centres, before = _normalised(centres), None
    for _ in range(REFINEMENTS):
        nearest = np.argmax(points @ centres.T, axis=1)
        if before is not None and np.array_equal(nearest, before):
            break
        before = nearest
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, points)
        centres = np.where(np.bincount(nearest, minlength=len(centres))[:, None] > 0, _normalised(sums), centres)
    return centres


def _quality(points: np.ndarray, of_point: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import davies_bouldin_score, silhouette_score

    few = _spread(len(points), QUALITY_TOKENS)
    if len(np.unique(of_point[few])) < 2:
        return {}
    return {"silhouette": float(silhouette_score(points[few], of_point[few], metric="cosine")),
            "davies_bouldin": float(davies_bouldin_score(points, of_point))}


def _spread(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))
