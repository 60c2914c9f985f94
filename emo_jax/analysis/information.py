"""What the experts tell of the text: of a document's label, of a token's identity, and how few of them a document uses.

Mutual information is in nats, between the routed expert of a token, drawn from the router's probabilities, and a class of
the token. A finite sample shows some even where there is none; what shuffled classes show is subtracted.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from emo_jax.analysis.activations import Activations
from emo_jax.subsets.modularity import mutual_information

FREQUENT_TOKENS = 200  # the most frequent token ids, whose identity is a class
LEAST_PIECE = 64  # tokens of a piece whose experts are counted
SHUFFLES = 4


def label_information(a: Activations, seed: int = 0) -> Float[np.ndarray, "L"]:
    """Expert and label. Labels are shuffled among whole pieces of documents, because a document has some experts of its own
    whatever its label."""
    label_of_piece = np.zeros(a.pieces.max() + 1, int)
    label_of_piece[a.pieces] = a.labels
    return _above_chance(a.probabilities, a.pieces, label_of_piece, seed)


def token_information(a: Activations, seed: int = 0) -> Float[np.ndarray, "L"]:
    """Expert and token identity, among the FREQUENT_TOKENS."""
    use, identity = frequent(a.tokens)
    return _above_chance(a.probabilities[use], np.arange(len(identity)), identity, seed)


def frequent(tokens: Int[np.ndarray, "n"]) -> tuple[np.ndarray, np.ndarray]:
    """(bool [n]: tokens that are among the FREQUENT_TOKENS, their ids)."""
    ids, counts = np.unique(tokens, return_counts=True)
    use = np.isin(tokens, ids[np.argsort(-counts, kind="stable")[:FREQUENT_TOKENS]])
    return use, tokens[use]


def _above_chance(probabilities, unit_of_token, class_of_unit, seed: int) -> np.ndarray:
    """[L], with the classes shuffled among the units for the chance level."""
    draw = np.random.default_rng(seed)
    real = _between(probabilities, class_of_unit[unit_of_token])
    return real - np.mean([_between(probabilities, draw.permutation(class_of_unit)[unit_of_token])
                           for _ in range(SHUFFLES)], axis=0)


def _between(probabilities: Float[np.ndarray, "n L R"], classes: Int[np.ndarray, "n"]) -> np.ndarray:
    order = np.argsort(classes, kind="stable")
    starts = np.flatnonzero(np.diff(classes[order], prepend=classes[order[0]] - 1))
    sums = np.add.reduceat(probabilities[order], starts, axis=0, dtype=np.float64)
    counts = np.diff(np.append(starts, len(classes)))
    return mutual_information(sums, counts.astype(float))


def effective_experts(a: Activations) -> Float[np.ndarray, "L"] | None:
    """exp(entropy) of how a document's choices are spread over the routed experts: the number of equally used experts that
    would be as spread. Mean over pieces of LEAST_PIECE tokens or more; None if there are none."""
    sizes = np.bincount(a.pieces)
    if sizes.max() < LEAST_PIECE:
        return None
    R = a.probabilities.shape[2]
    counts = np.zeros((len(sizes), a.probabilities.shape[1], R))
    for layer in range(counts.shape[1]):
        np.add.at(counts[:, layer], (a.pieces[:, None], a.expert_ids[:, layer]), 1)
    counts = counts[sizes >= LEAST_PIECE]
    used = counts / counts.sum(axis=2, keepdims=True)
    entropy = -np.sum(np.where(used > 0, used * np.log(np.maximum(used, 1e-30)), 0), axis=2)
    return np.exp(entropy).mean(axis=0)
