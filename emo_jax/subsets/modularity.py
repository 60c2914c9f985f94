"""Watching modules emerge while a model trains: the loss with few experts kept, and what experts tell of the labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.sharding import Mesh

from emo_jax.checkpoints.subset import full as everything
from emo_jax.checkpoints.subset import require_experts
from emo_jax.config import Config
from emo_jax.data.evaluation import MAX_DOCUMENTS, evaluation_rows
from emo_jax.loaded import LoadedModel
from emo_jax.model import Params
from emo_jax.subsets import calibration as calibration_lib
from emo_jax.subsets.budget import Budget
from emo_jax.subsets.check import masks_of_labels
from emo_jax.subsets.choose import choose
from emo_jax.train.evaluate import Evaluation

SHARES = (0.25, 0.125)
DOCUMENTS = 16  # so many of each label choose


class Modularity:
    """An extra evaluation of the training loop (`train.eval_subsets`), on held-out text: half of a label's documents
    choose its experts by router probability, the other half is scored with them. `name` and the call are what the loop
    asks for; None is returned by `make` where no label has two held-out documents."""

    name = "subsets"

    def __init__(self, config: Config, mesh: Mesh, documents: Any, groups: dict[str, list[int]]):
        self._config, self._mesh, self._tokenizer = config, mesh, documents.tokenizer
        self._calibration, scored = calibration_lib.halves(config, documents.evaluated, documents.tokenizer, groups, DOCUMENTS)
        rows = evaluation_rows(config, documents.evaluated, documents.tokenizer, scored)
        self._evaluation = Evaluation(config, mesh, rows, documents.tokenizer)
        self._tokens = np.array([about["tokens"] for about in self._calibration.about], float)
        m = config.model
        self._keeps = {share: max(round(share * m.num_experts), m.top_k) for share in SHARES}

    @classmethod
    def make(cls, config: Config, mesh: Mesh, documents: Any) -> Modularity | None:
        """`documents`: the `train.start.Documents` of the run."""
        require_experts(config)
        groups = calibration_lib.by_label(documents.evaluated, documents.held_out[:MAX_DOCUMENTS])
        return cls(config, mesh, documents, groups) if max(map(len, groups.values()), default=0) > 1 else None

    def __call__(self, params: Params) -> dict[str, Any]:
        """{"loss" (of the full model), "loss_at": {"25%": ..}, "mutual_information" (nats, mean of the layers),
        "mutual_information_layers"}."""
        loaded = LoadedModel(self._config, self._mesh, params, self._tokenizer)
        evaluation, names = self._evaluation, self._calibration.names
        budgets = [Budget(keep=k) for k in self._keeps.values()]
        chosen = choose(loaded, self._calibration, "router", budgets)
        probabilities = np.stack([s.score_array() for s in chosen[0]])
        information = mutual_information(probabilities, self._tokens)
        at = {f"{share:.1%}".replace(".0", ""): self._loss(params, masks_of_labels(evaluation, names, subsets))
              for share, subsets in zip(self._keeps, chosen)}
        return {"loss": self._loss(params, everything(self._config).mask()), "loss_at": at,
                "mutual_information": float(information.mean()), "mutual_information_layers": information.tolist()}

    def _loss(self, params: Params, allowed: np.ndarray) -> float:
        loss, tokens = self._evaluation.losses(params, allowed)
        return float(loss.sum() / max(tokens.sum(), 1))


def mutual_information(probabilities: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[L] nats, between the routed expert of a token and the label of its document: 0 where all labels use the experts
    alike. `probabilities` [G, L, R] of the experts in each label, `tokens` [G]."""
    share = (tokens / tokens.sum())[:, None, None]
    p = probabilities / probabilities.sum(axis=2, keepdims=True)
    mean = (share * p).sum(axis=0)
    ratio = np.where(p > 0, p / np.maximum(mean, 1e-30), 1.0)
    return (share * p * np.log(ratio)).sum(axis=(0, 2))
