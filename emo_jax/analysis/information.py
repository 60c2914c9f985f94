"""What experts and clusters tell of the text: mutual information with a document's label and with a token's identity, in nats.

A finite sample shows some information even where there is none; what the same text shows with its classes shuffled is
subtracted. Experts are drawn from the router's probabilities.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from emo_jax.analysis.activations import Activations
from emo_jax.analysis.resampling import Measure
from emo_jax.subsets.modularity import mutual_information

SHUFFLES = 4
TOKEN_RESAMPLES = 20  # of what has to be summed token by token anew
TOKENS = 100_000  # that the information about token identity is estimated by


def label_information(a: Activations, seed: int = 0) -> Measure:
    """Expert and label, [B, L]. Labels are shuffled among documents, because a document has some experts of its own whatever
    its label."""
    lengths, sums = np.diff(a.text.starts), a.probability_sums

    def of(weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        members, made = np.eye(len(a.text.names))[labels], []  # [D, G]
        for w in weights:
            counts = (w * lengths) @ members
            made.append(mutual_information(np.tensordot((members[:, counts > 0] * w[:, None]).T, sums, 1), counts[counts > 0]))
        return np.stack(made)

    return _above_shuffled(of, a.text.labels, seed)


def cluster_label_information(clusters: Int[np.ndarray, "n"], a: Activations, seed: int = 0) -> Measure:
    """Cluster of a token and label of its document, [B]."""
    counts = cluster_counts(clusters, a)

    def of(weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        members = np.eye(len(a.text.names))[labels]
        return np.array([_of_table((members * w[:, None]).T @ counts) for w in weights])

    return _above_shuffled(of, a.text.labels, seed)


def cluster_counts(clusters: Int[np.ndarray, "n"], a: Activations) -> Float[np.ndarray, "D C"]:
    """Tokens of every document in every cluster."""
    counts = np.zeros((len(a.text.labels), int(clusters.max()) + 1))
    np.add.at(counts, (a.text.documents, clusters), 1)
    return counts


def cluster_token_information(clusters: Int[np.ndarray, "n"], a: Activations, seed: int = 0) -> Measure:
    """Cluster and identity of a token (all ids), [B]."""
    C = int(clusters.max()) + 1

    def of(weights: np.ndarray, identities: np.ndarray) -> np.ndarray:
        cells = identities.astype(np.int64) * C + clusters
        return np.array([_of_table(np.bincount(cells, w[a.text.documents], (identities.max() + 1) * C).reshape(-1, C))
                         for w in weights])

    return _above_shuffled(of, np.unique(a.text.tokens, return_inverse=True)[1], seed)


def token_information(a: Activations, seed: int = 0, frequent: int = 0) -> Measure:
    """Expert and identity of a token, of all ids or only of the `frequent` ones, [B, L], from about `TOKENS` tokens and the
    first `TOKEN_RESAMPLES` resamples."""
    from scipy.sparse import csr_matrix

    few = a.thinned(TOKENS) if len(a.text.tokens) > TOKENS else a
    use = frequent_tokens(few.text.tokens, frequent) if frequent else np.ones(len(few.text.tokens), bool)
    n, documents, of_document = use.sum(), np.isin(a.text.numbers, few.text.numbers), few.text.documents[use]

    def of(weights: np.ndarray, identities: np.ndarray) -> np.ndarray:
        by_identity, size = [], int(identities.max()) + 1
        for w in weights[:TOKEN_RESAMPLES]:
            of_token = w[documents][of_document]
            summing = csr_matrix((of_token.astype(np.float32), (identities, np.arange(n))), (size, n))
            by_identity.append((summing, np.bincount(identities, of_token, size)))
        made = []
        for layer in range(a.layers):  # one at a time: sums of all layers by identity would be gigabytes
            p = few.probabilities[use, layer].astype(np.float32)
            made.append([mutual_information((summing @ p)[counts > 0][:, None], counts[counts > 0])[0]
                         for summing, counts in by_identity])
        return np.transpose(made)

    return _above_shuffled(of, np.unique(few.text.tokens[use], return_inverse=True)[1], seed)


def frequent_tokens(tokens: Int[np.ndarray, "n"], count: int) -> Bool[np.ndarray, "n"]:
    """Which tokens are among the `count` most frequent ids."""
    ids, counts = np.unique(tokens, return_counts=True)
    return np.isin(tokens, ids[np.argsort(-counts, kind="stable")[:count]])


def _above_shuffled(of, classes: np.ndarray, seed: int) -> Measure:
    def measure(weights: np.ndarray) -> np.ndarray:
        draw = np.random.default_rng(seed)
        real, shuffled = of(weights, classes), of(weights, draw.permutation(classes))
        more = [of(weights[:1], draw.permutation(classes)) for _ in range(SHUFFLES - 1)]
        shuffled[:1] = np.mean([shuffled[:1], *more], axis=0)  # the value itself has the mean of all
        return real - shuffled

    return measure


def _of_table(counts: Float[np.ndarray, "X Y"]) -> float:
    """Of the row and the column of a draw."""
    p = counts / counts.sum()
    expected = p.sum(axis=1, keepdims=True) * p.sum(axis=0, keepdims=True)
    return float(np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / np.maximum(expected, 1e-300)), 0.0)))
