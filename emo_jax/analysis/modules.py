"""Modules one by one: what a cluster, or the experts of a subset, are for, and what the model is without them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from emo_jax.analysis import clusters as clusters_lib
from emo_jax.analysis.activations import Activations, losses
from emo_jax.analysis.looked import Looked, Options
from emo_jax.analysis.words import Words, name
from emo_jax.checkpoints.subset import Subset
from emo_jax.progress import track

EXPERTS_SHOWN = 5  # of a layer
SUBSET_TOKENS = 0.05  # those of all tokens that give a subset's experts the most probability are its tokens


def of_clusters(one: Looked, words: Words, options: Options) -> list[dict[str, Any]]:
    """A cluster's experts, in each layer as many as a token uses: those that its tokens prefer most, against all text."""
    a, of_token, taken = one.activations, one.clusters.of_token, Counter()
    members = [of_token == c for c in range(int(of_token.max()) + 1)]
    mean = _mean_probabilities(a, np.ones(len(of_token), bool))
    shares = np.stack([_mean_probabilities(a, where) for where in members])  # [C, L, R]
    strongest = np.argsort(-(shares - mean), axis=2, kind="stable")[..., :a.expert_ids.shape[2]]
    masks = np.zeros(shares.shape, bool)
    np.put_along_axis(masks, strongest, True, axis=2)
    removal = _Removal(one, options)
    overlap = np.einsum("clr,dlr->cd", masks.astype(float), masks) / masks[0].sum()
    return [{"id": c} | _describe(a, words, where, shares[c], mean, taken, options) | {
        "removal": removal.of(masks[c]), "overlap": overlap[c].tolist()}
        for c, where in enumerate(track(members, f"{one.name}: clusters, and what removing their experts costs", "clusters"))]


def of_subset(one: Looked, words: Words, options: Options, title: str, subset: Subset) -> dict[str, Any]:
    """The experts of a subset; its tokens are those that prefer them most."""
    a, mask = one.activations, subset.mask()
    inside = np.concatenate([(a.probabilities[low:low + clusters_lib.CHUNK].astype(np.float32) * mask).sum(axis=(1, 2))
                             for low in range(0, len(a.text.tokens), clusters_lib.CHUNK)])
    where = inside >= np.quantile(inside, 1 - SUBSET_TOKENS)
    mean = _mean_probabilities(a, np.ones(len(where), bool))
    described = _describe(a, words, where, _mean_probabilities(a, where), mean, Counter(), options)
    clusters = one.clusters.of_token
    return described | {"name": title, "share": subset.share, "removal": _Removal(one, options).of(mask),
                        "tokens_of_clusters": np.bincount(clusters[where], minlength=int(clusters.max()) + 1).tolist()}


def experts_of(module: dict[str, Any], one: dict[str, Any]) -> Subset:
    """The experts of a module as a subset, e.g. for `emo-jax subset disable`. `one`: the model that it belongs to."""
    kept = tuple(tuple(layer) for layer in module["removal"]["experts"])
    return Subset(kept, one["experts"], one["shared"], "cluster", {}, None, one["identity"])


def _describe(a: Activations, words: Words, where: Bool[np.ndarray, "n"], shares: Float[np.ndarray, "L R"],
              mean: Float[np.ndarray, "L R"], taken: Counter, options: Options) -> dict[str, Any]:
    names, labels = a.text.names, a.text.labels[a.text.documents]
    by_label = np.bincount(labels[where], minlength=len(names)) / where.sum()
    order = [g for g in np.argsort(-by_label, kind="stable") if by_label[g] > 0]
    enriched = words.enriched(where)
    shown = np.argsort(-shares, axis=1, kind="stable")[:, :EXPERTS_SHOWN]
    return {
        "name": name(enriched, names[order[0]], taken), "tokens": int(where.sum()),
        "documents": len(np.unique(a.text.documents[where])), "labels": {names[g]: float(by_label[g]) for g in order},
        "experts": [[[int(e), float(shares[layer, e]), float(shares[layer, e] / max(mean[layer, e], 1e-9))] for e in row]
                    for layer, row in enumerate(shown)],
        "words": enriched, "contexts": words.contexts(where, options.seed),
    }


def _mean_probabilities(a: Activations, where: np.ndarray) -> np.ndarray:
    """[L, R]: the routers' probabilities of some tokens."""
    numbers = np.flatnonzero(where)
    sums = np.zeros((a.layers, a.experts))
    for low in range(0, len(numbers), clusters_lib.CHUNK):
        sums += a.probabilities[numbers[low:low + clusters_lib.CHUNK]].sum(axis=0, dtype=np.float32)
    return sums / len(numbers)


class _Removal:
    """What a model's loss is without some experts."""

    def __init__(self, one: Looked, options: Options):
        self.loaded, self.tokens = one.loaded, options.removal_tokens
        if self.tokens:
            self.text = one.activations.text.thinned(self.tokens)
            self.counted, self.members = np.diff(self.text.starts) - 1.0, np.eye(len(self.text.names))[self.text.labels]
            self.full = self._by_document(np.ones((one.activations.layers, one.activations.experts), bool))

    def of(self, removed: Bool[np.ndarray, "L R"]) -> dict[str, Any] | None:
        """{"experts" [L][ids], "loss": the rise of the loss of every label, and of "all", nats/token}; None where it was not
        asked for, or too few experts would be left."""
        if not self.tokens or (~removed).sum(axis=1).min() < self.loaded.config.model.routed_top_k:
            return None
        rise = self._by_document(~removed) - self.full
        by_label, tokens = rise @ self.members, self.counted @ self.members
        return {"experts": [np.flatnonzero(row).tolist() for row in removed],
                "loss": {"all": float(rise.sum() / self.counted.sum())} | {
                    label: float(by_label[g] / tokens[g]) for g, label in enumerate(self.text.names) if tokens[g]}}

    def _by_document(self, allowed: np.ndarray) -> np.ndarray:
        return self.text.sums(losses(self.loaded, self.text, allowed=allowed))
