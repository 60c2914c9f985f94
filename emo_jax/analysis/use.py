"""How few experts a document uses, and how well those of a stretch of text can be held in a cache."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from emo_jax.analysis.activations import Activations
from emo_jax.analysis.resampling import Measure
from emo_jax.analysis.text import weighted
from emo_jax.subsets import use as subsets_use
from emo_jax.subsets.use import LEAST_TOKENS, effective

SEGMENT = 16  # tokens
CACHE = 2  # a cache holds so many times the experts that a token uses


def effective_experts(a: Activations) -> Measure:
    """exp(entropy) of how a document's choices are spread over the routed experts: the number of equally used experts that
    would be as spread; mean of the documents of `LEAST_TOKENS` or more (of all, if there are none), [B, L]."""
    return _mean_of_documents(effective(a.choices), long_enough(a))


def long_enough(a: Activations) -> np.ndarray:
    lengths = np.diff(a.text.starts)
    return lengths >= min(LEAST_TOKENS, lengths.max())


def top_share(a: Activations, share: float) -> Measure:
    """The part of a document's router probability that its own strongest experts have, `share` of all, [B, L]. With routers
    that prefer nothing it is `share`."""
    return _mean_of_documents(subsets_use.top_share(a.probability_sums, share), long_enough(a))


def _mean_of_documents(values: np.ndarray, use: np.ndarray) -> Measure:
    return lambda weights: weighted(values[use], np.maximum(weights[:, use], 1e-12))


# ---- local routing consistency (Liang et al., "Not All Models Suit Expert Offloading", arXiv 2505.16056) -------------


def segment_routing(a: Activations) -> Measure:
    """Segment routing best performance (SRP): the best F1 score of a router that must choose the same experts for all
    `SEGMENT` tokens of a segment, against the real choices, [B, L]. The best such router takes an expert where it is chosen by
    at least a certain number of the segment's tokens, the same for all experts; the number is tried out."""
    hist = _frequencies(a)  # [D, L, 1 + SEGMENT]: (segment, expert) pairs by the number of tokens that chose the expert
    f = np.arange(SEGMENT + 1)

    def measure(weights: np.ndarray) -> np.ndarray:
        counts = np.tensordot(weights, hist, 1)  # [B, L, 1 + m]
        from_top = lambda x: np.cumsum(x[..., ::-1], axis=-1)[..., ::-1]
        hit, missed = from_top(counts * f), (counts * f).sum(axis=-1, keepdims=True)
        wrong = from_top(counts * (SEGMENT - f))
        return (2 * hit / np.maximum(hit + wrong + missed, 1e-30))[..., 1:].max(axis=-1)

    return measure


def segment_cache(a: Activations) -> Measure:
    """Segment cache best hit rate (SCH): the share of a segment's choices that a cache of `CACHE` k experts answers if it holds
    the segment's most frequent ones, [B, L]."""
    hits, segments = np.zeros((2, len(a.text.labels), a.layers))
    for layer, document, counts in _segments(a):
        top = np.sort(counts, axis=1)[:, ::-1][:, :CACHE * a.expert_ids.shape[2]].sum(axis=1)
        np.add.at(hits[:, layer], document, top / counts.sum(axis=1))
        np.add.at(segments[:, layer], document, 1)
    return lambda weights: (weights @ hits) / np.maximum(weights @ segments, 1e-30)


def _frequencies(a: Activations) -> np.ndarray:
    hist = np.zeros((len(a.text.labels), a.layers, SEGMENT + 1))
    for layer, document, counts in _segments(a):
        np.add.at(hist[:, layer], (np.repeat(document, a.experts), counts.reshape(-1).astype(int)), 1)
    return hist


def _segments(a: Activations):
    """(layer, document [S], choices of each expert [S, R]) of the whole segments of all documents, layer by layer."""
    lengths = np.diff(a.text.starts)
    offset = np.arange(len(a.text.tokens)) - np.repeat(a.text.starts[:-1], lengths)
    whole = offset < np.repeat(lengths // SEGMENT * SEGMENT, lengths)
    document = a.text.documents[whole][::SEGMENT]
    segment = np.repeat(np.arange(len(document)), SEGMENT)
    for layer in range(a.layers):
        counts = np.zeros((len(document), a.experts), np.float32)
        np.add.at(counts, (segment[:, None], a.expert_ids[:, layer][whole]), 1)
        yield layer, document, counts


# ---- losses ---------------------------------------------------------------------------------------------------------


def mean_loss(a: Activations) -> Measure:
    """nats/token of the full model, [B]."""
    return _ratio(a.text.sums(a.nats), _predicted(a))


def gap(a: Activations, pooled: Float[np.ndarray, "n"]) -> Measure:
    """The selective gap: the loss with pools above the full model's, nats/token, [B]."""
    return _ratio(a.text.sums(pooled) - a.text.sums(a.nats), _predicted(a))


def pool_size(experts: int, share: float, top_k: int) -> int:
    """`share` of the routed experts, at least those that a token needs."""
    return max(math.ceil(share * experts), top_k)


def _predicted(a: Activations) -> np.ndarray:
    return np.diff(a.text.starts) - 1.0  # the last token of a document predicts nothing of it


def _ratio(nats: np.ndarray, tokens: np.ndarray) -> Measure:
    return lambda weights: (weights @ nats) / (weights @ tokens)
