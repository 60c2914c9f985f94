"""Everything that the study wants to know of one trained model, from text that it was not trained on.

Some documents of every label choose experts and others are scored, whatever the model; labels that the model was trained
on (`trained`) and those that `data.leave_out_labels` kept from it (`left_out`) are kept apart. Numbers over labels are
means of the labels' means.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from emo_jax.analysis import information, use
from emo_jax.analysis.activations import collect
from emo_jax.analysis.clusters import agreement, cluster, features
from emo_jax.analysis.text import Text, make_text
from emo_jax.data.evaluation import MAX_DOCUMENTS, evaluation_rows
from emo_jax.data.order import documents_of_labels
from emo_jax.errors import InputError
from emo_jax.loaded import LoadedModel, load
from emo_jax.progress import say
from emo_jax.rounding import ceil_div
from emo_jax.subsets import calibration as calibration_lib
from emo_jax.subsets import modularity
from emo_jax.subsets.budget import Budget
from emo_jax.subsets.check import full_losses, masks_of_labels
from emo_jax.subsets.choose import choose
from emo_jax.train.evaluate import Evaluation

SHARES = (0.5, 0.25, 0.125)
CHOOSING = (1, 5, 50)  # documents of each label
SCORED = 16  # documents of each label, at most
LOOKED_AT = 1 << 16  # tokens whose activations are taken
POSITIONS = (16, 64, 256)  # where the losses by position in the document are divided
FREQUENT_TOKENS = 200  # the most frequent token ids, whose identity is a class
POOL_TOKENS = 64  # the first of a document, whose votes alone make the third kind of its pools
TOKENS = 512  # What comes after these in a document neither chooses nor is scored.


def measure(path: str, data: str = "", methods: Sequence[str] = ("router",), choosing: Sequence[int] = (50,),
            overrides: Sequence[str] = (), activations: bool = True) -> dict[str, Any]:
    """The measures of the checkpoint `path`, on the documents `data` (default: those it held out and left out).

    Experts are chosen by each of `methods` with the most documents of `choosing`, and by the first one also with the
    other numbers of documents. Without `activations` what the routers tell is left out. Raises `InputError` if no label has two
    documents.
    """
    began = time.monotonic()
    loaded = load(path, list(overrides), data=data)
    text = StudyText(loaded, max(choosing))
    evaluation = text.evaluation(loaded)
    full = full_losses(loaded, evaluation)
    summary = evaluation.summary(*full)["labels"]
    result = {
        "checkpoint": str(loaded.saved.path), "config": loaded.config.name, "seed": loaded.config.seed,
        "tokens": loaded.saved.meta["tokens"], "step": loaded.saved.step, "data": text.source.name,
        "labels": {"trained": text.trained, "left_out": text.left_out},
        "full": text.means({label: part["loss"] for label, part in summary.items()}),
        "positions": {f"{p.start + 1} to {p.stop}": text.evaluation(loaded, p)(loaded.params)["loss"]
                      for p in map(range, (0, *POSITIONS), POSITIONS)},
        "subsets": [],
    }
    settings = [(method, max(choosing)) for method in methods]
    settings += [(methods[0], count) for count in sorted(choosing) if count != max(choosing)]
    for method, count in settings:
        say(f"{path}: experts chosen by {method} from {count} documents of each label")
        result["subsets"] += _subsets(loaded, evaluation, full, text, method, count)
    result["selective_gap"] = _selective_gap(loaded, evaluation, full, text)
    if activations:
        say(f"{path}: activations of the routers")
        result["information"] = _information(loaded, text)
    return result | {"seconds": time.monotonic() - began}


class StudyText:
    """Which documents of which label choose, and which are scored."""

    def __init__(self, loaded: LoadedModel, most: int):
        config = loaded.config
        self.config, self.tokenizer = config, loaded.tokenizer
        self.source, numbers = loaded.documents_to_score()
        if loaded.own_documents and not config.data.eval_path:
            left_out = documents_of_labels(self.source, config.data.left_out)
            numbers = np.concatenate([numbers, calibration_lib.sample(left_out, MAX_DOCUMENTS, config.seed)])
        by_label = {label: documents for label, documents in calibration_lib.by_label(self.source, numbers).items()
                    if len(documents) > 1}
        if not by_label:
            raise InputError(f"{self.source.name}: no label has two documents, one to choose experts by and one to score")
        self.left_out = sorted(set(config.data.left_out) & set(by_label))
        self.trained = sorted(set(by_label) - set(self.left_out))
        self._choosing, self.scored = {}, {}
        for label, documents in by_label.items():
            count = min(most, len(documents) - max(1, len(documents) // 6))
            # The seed is none of the model's: models of other seeds are scored on the same documents.
            self._choosing[label] = calibration_lib.sample(documents, count, 0)
            rest = np.setdiff1d(documents, self._choosing[label])
            self.scored[label] = calibration_lib.sample(rest, SCORED, 0)

    def choosing(self, count: int, label: str = "") -> calibration_lib.Calibration:
        """The first `count` documents of every label, or of one: a smaller number is part of a larger one."""
        if label and label not in self._choosing:
            raise InputError(f"{self.source.name}: no label {label!r} of two documents; there are {', '.join(self._choosing)}")
        groups = {name: calibration_lib.sample(documents, count, 0) for name, documents in self._choosing.items()
                  if label in ("", name)}
        return calibration_lib.from_source(self.config, self.source, self.tokenizer, groups, TOKENS)

    def evaluation(self, loaded: LoadedModel, positions: range | None = None) -> Evaluation:
        """All of the scored documents, for this model or one that was made of it. `positions`: only these tokens of a
        document count, or of its part, where it is cut into rows."""
        c = dataclasses.replace(self.config, model=loaded.config.model)
        rows = ceil_div(SCORED * TOKENS, c.data.sequence_length) * len(self.scored)
        c = dataclasses.replace(c, train=dataclasses.replace(c.train, eval_rows=rows))
        numbers = np.sort(np.concatenate(list(self.scored.values())))
        rows = evaluation_rows(c, self.source, self.tokenizer, numbers, TOKENS)
        if positions is not None:
            rows = [(label, fields | {"loss_weights": fields["loss_weights"] * _within(fields["segment_ids"], positions)})
                    for label, fields in rows]
        return Evaluation(c, loaded.mesh, rows, self.tokenizer)

    def to_look_at(self) -> Text:
        """The scored documents, at most about LOOKED_AT tokens of them."""
        numbers = map(int, np.concatenate([*self.scored.values()]))
        encoded = {i: self.source.encoded(i, self.tokenizer)[:TOKENS] for i in numbers}
        return make_text(self.config, encoded, self.scored, self.source.name).thinned(LOOKED_AT)

    def means(self, by_label: dict[str, float]) -> dict[str, Any]:
        """{"trained", "left_out" (None without such labels), "labels"}"""
        mean = lambda labels: float(np.mean([by_label[label] for label in labels])) if labels else None
        return {"trained": mean(self.trained), "left_out": mean(self.left_out), "labels": by_label}

    def above(self, evaluation: Evaluation, found, full) -> dict[str, Any]:
        """Means of what `found` is above `full`, each (nats, tokens) of every row."""
        rows = {label: evaluation.labels == label for label in sorted([*self.trained, *self.left_out])}
        nats, tokens = found[0] - full[0], found[1]
        return self.means({label: float(nats[of].sum() / max(tokens[of].sum(), 1)) for label, of in rows.items()})


def _within(segments: Int[np.ndarray, "n T"], positions: range) -> Bool[np.ndarray, "n T"]:
    """Whether each token's place in its document, counted from 0, is one of `positions`."""
    places = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    begins = np.diff(segments, axis=1, prepend=0) != 0
    place = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return (place >= positions.start) & (place < positions.stop)


def _subsets(loaded: LoadedModel, evaluation: Evaluation, full, text: StudyText, method: str,
             count: int) -> list[dict[str, Any]]:
    """The loss above the full model's with a subset for every label, by kept share."""
    m, calibration = loaded.config.model, text.choosing(count)
    keeps = [max(round(share * m.num_experts), m.num_shared_experts + 1) for share in SHARES]
    rows = []
    for share, keep, subsets in zip(SHARES, keeps, choose(loaded, calibration, method, [Budget(keep=k) for k in keeps])):
        masks = masks_of_labels(evaluation, calibration.names, subsets)
        losses = evaluation.losses(loaded.params, masks, f"scoring {keep} experts")
        rows.append({"method": method, "documents": count, "share": share, "keep": keep}
                    | text.above(evaluation, losses, full))
    return rows


def _selective_gap(loaded: LoadedModel, evaluation: Evaluation, full, text: StudyText) -> dict[str, dict[str, Any]]:
    """{which votes: {share: means}}: the loss above the full model's with a pool of so many routed experts for each document,
    by the votes of all its tokens (a pool that has seen the future of each), of those so far, and of the first ones."""
    voters = {"document": None, "causal": loaded.config.data.sequence_length, f"first {POOL_TOKENS} tokens": POOL_TOKENS}
    R = loaded.config.model.num_routed_experts
    losses = lambda votes, share: evaluation.losses(
        loaded.params, None, f"scoring pools of {share:.1%}, {votes}", math.ceil(share * R), voters[votes])
    return {votes: {name: text.above(evaluation, losses(votes, share), full) for name, share in modularity.SHARES.items()}
            for votes in voters}


def _information(loaded: LoadedModel, text: StudyText) -> dict[str, Any]:
    """Means over the layers, and the layers. `effective_experts` is None where no document is long enough."""
    a = collect(loaded, text.to_look_at())
    whole = np.ones((1, len(a.text.labels)))  # every document once
    enough = np.diff(a.text.starts).max() >= use.LEAST_TOKENS
    by_layer = {"expert_label": information.label_information(a)(whole)[0],
                "expert_token": information.token_information(a, frequent=FREQUENT_TOKENS)(whole)[0],
                "effective_experts": use.effective_experts(a)(whole)[0] if enough else None}
    clusters = agreement(a, cluster(features(a)).of_token, FREQUENT_TOKENS)
    return ({name: None if values is None else float(values.mean()) for name, values in by_layer.items()}
            | {"cluster_label": clusters["label"], "cluster_token": clusters["token"], "tokens": len(a.text.tokens),
               "layers": {name: None if values is None else values.tolist() for name, values in by_layer.items()}})
