"""Clusters of tokens by what the routers of all layers do with them, and whether these are topics or words.

As published: centred probabilities of all layers, principal components of 95 % of the variance, unit length, k-means with
32 clusters (EMO paper, section 5).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from emo_jax.analysis.activations import Activations
from emo_jax.analysis.information import frequent
from emo_jax.errors import InputError

CLUSTERS = 32
VARIANCE = 0.95


def cluster(a: Activations, clusters: int = CLUSTERS, seed: int = 0) -> Int[np.ndarray, "n"]:
    """The cluster of every token. Needs scikit-learn (`pip install 'emo-jax[report]'`)."""
    try:
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.decomposition import PCA
    except ImportError:
        raise InputError("clusters need scikit-learn: pip install 'emo-jax[report]'") from None
    x = PCA(VARIANCE, svd_solver="full", random_state=seed).fit_transform(a.probabilities.reshape(len(a.tokens), -1))
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    means = MiniBatchKMeans(min(clusters, len(x)), n_init=10, max_iter=500, batch_size=4096, random_state=seed)
    return means.fit_predict(x)


def agreement(a: Activations, clusters: Int[np.ndarray, "n"]) -> dict[str, float]:
    """Adjusted mutual information (0: chance, 1: the same partition) of the clusters with the labels of the documents, and
    with the identity of the most frequent tokens."""
    from sklearn.metrics import adjusted_mutual_info_score

    use, identity = frequent(a.tokens)
    return {"label": float(adjusted_mutual_info_score(a.labels, clusters)),
            "token": float(adjusted_mutual_info_score(identity, clusters[use]))}
