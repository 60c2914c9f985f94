"""Watching modules emerge while a model trains: losses with few experts, and how documents and labels use the experts."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from emo_jax import plots
from emo_jax.checkpoints.subset import require_experts
from emo_jax.config import Config
from emo_jax.data.evaluation import MAX_DOCUMENTS, evaluation_rows
from emo_jax.model import Execution, Params
from emo_jax.progress import say
from emo_jax.subsets import calibration as calibration_lib
from emo_jax.subsets.budget import pick
from emo_jax.subsets.use import Use, effective, top_share, use_of_documents
from emo_jax.train.evaluate import Evaluation
from emo_jax.train.tensorboard import Picture

SHARES = {"25%": 0.25, "12.5%": 0.125}
DOCUMENTS = 16  # of each label, whose use of experts is looked at, a row's length of each
ROWS = 128  # that are scored, at most: seven times
SHUFFLES = 4
PANELS = 4  # layers in the picture, at most


class Modularity:
    """An extra evaluation of the training loop (`train.eval_subsets`), on held-out text: half of a label's documents are looked
    at and choose its experts by router probability, the other half is scored. `name` and the call are what the loop asks for;
    None is returned by `make` where no label has two held-out documents."""

    name = "subsets"

    def __init__(self, config: Config, mesh: Mesh, documents: Any, groups: dict[str, list[int]]):
        source, tokenizer, length = documents.evaluated, documents.tokenizer, config.data.sequence_length
        self._config, self._mesh, self._execution = config, mesh, Execution.of(config, mesh, tokenizer.eos_id)
        self._text, scored = calibration_lib.halves(config, source, tokenizer, groups, DOCUMENTS, length)
        fewer = dataclasses.replace(config.train, eval_rows=min(config.train.eval_rows, ROWS))
        rows = evaluation_rows(dataclasses.replace(config, train=fewer), source, tokenizer, scored)
        self._evaluation = Evaluation(config, mesh, rows, tokenizer)
        self._draws = plots.available()
        if not self._draws:
            say("no pictures of the experts' use in TensorBoard: matplotlib is not installed (pip install 'emo-jax[report]')")

    @classmethod
    def make(cls, config: Config, mesh: Mesh, documents: Any) -> Modularity | None:
        """`documents`: the `train.start.Documents` of the run."""
        require_experts(config)
        groups = calibration_lib.by_label(documents.evaluated, documents.held_out[:MAX_DOCUMENTS])
        return cls(config, mesh, documents, groups) if max(map(len, groups.values()), default=0) > 1 else None

    def __call__(self, params: Params) -> dict[str, Any]:
        """nats/token: "loss" of the full model; "loss_at" {"25%", "12.5%"} of the experts, those of the row's label;
        "selective_gap", of a pool of so many routed experts that every document chooses by its own votes, above "loss", and
        "selective_gap_causal", where a token's pool is made of the votes so far and has not seen its future.
        nats between expert and label: "mutual_information", and "label_information" above that of shuffled labels. Of
        documents: "effective_experts" and "top_share". The mean of the layers; "..._layers" has each."""
        use = use_of_documents(params, self._mesh, self._execution, self._text)
        R, router = self._config.model.num_routed_experts, self._config.router
        full = self._loss(params, router.pool_eval or R, pool_tokens=router.pool_eval_tokens or None)

        def gaps(pool_tokens: int | None = None) -> dict[str, float]:
            return {name: self._loss(params, math.ceil(share * R), pool_tokens=pool_tokens) - full
                    for name, share in SHARES.items()}

        by_layer = figures(use, self._config.seed)
        picture = Picture(functools.partial(heatmap, use, self._text.names))
        return {
            "loss": full, "loss_at": {name: self._loss(params, R, self._masks(use, share)) for name, share in SHARES.items()},
            "selective_gap": gaps(), "selective_gap_causal": gaps(self._config.data.sequence_length),
            **{name: float(values.mean()) for name, values in by_layer.items()},
            **{f"{name}_layers": values.tolist() for name, values in by_layer.items()},
            "top_share": {name: _mean_of_documents(use, top_share(use.probabilities, share)).mean().item()
                          for name, share in SHARES.items()},
        } | ({"experts_of_labels": picture} if self._draws else {})

    def _masks(self, use: Use, share: float) -> Bool[np.ndarray, "L n R"]:
        """The experts that each scored row's label prefers, `share` of all, shared ones included."""
        m, names = self._config.model, self._text.names
        keep = max(round(share * m.num_experts), m.top_k) - m.num_shared_experts
        of_label = np.array([[pick(layer, keep) for layer in label] for label in use.of_groups(use.probabilities)])
        return of_label[[names.index(label) for label in self._evaluation.labels]].swapaxes(0, 1)

    def _loss(self, params: Params, pool_size: int, allowed: np.ndarray | None = None, pool_tokens: int | None = None) -> float:
        """Always with a mask and pools, so that one program serves all, and one all causal pools."""
        m = self._config.model
        if allowed is None:
            allowed = np.ones((m.num_layers, m.num_routed_experts), bool)
        loss, tokens = self._evaluation.losses(params, allowed, pool_size=pool_size, pool_tokens=pool_tokens)
        return float(loss.sum() / max(tokens.sum(), 1))


def figures(use: Use, seed: int) -> dict[str, Float[np.ndarray, "L"]]:
    """Of every layer. Labels are shuffled among the documents, as a document has some experts of its own whatever its label."""
    def information(groups):
        return mutual_information(use.of_groups(use.probabilities, groups), use.of_groups(use.tokens, groups))

    draw, real = np.random.default_rng(seed), information(use.groups)
    shuffled = np.mean([information(draw.permutation(use.groups)) for _ in range(SHUFFLES)], axis=0)
    return {"mutual_information": real, "label_information": real - shuffled,
            "effective_experts": _mean_of_documents(use, effective(use.choices))}


def _mean_of_documents(use: Use, values: Float[np.ndarray, "D L"]) -> Float[np.ndarray, "L"]:
    return values[use.long_enough()].mean(axis=0)


def mutual_information(probabilities: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[L] nats, between the routed expert of a token and the label of its document: 0 where all labels use the experts
    alike. `probabilities` [G, L, R] of the experts in each label, `tokens` [G]."""
    share = (tokens / tokens.sum())[:, None, None]
    p = probabilities / probabilities.sum(axis=2, keepdims=True)
    mean = (share * p).sum(axis=0)
    ratio = np.where(p > 0, p / np.maximum(mean, 1e-30), 1.0)
    return (share * p * np.log(ratio)).sum(axis=(0, 2))


def heatmap(use: Use, labels: Sequence[str]) -> bytes:
    """PNG: the share of a label's tokens that choose each expert, in some of the layers from the first to the last. The same
    colours whenever it is drawn."""
    share = use.of_groups(use.choices) / use.of_groups(use.tokens)[:, None, None]
    _, L, R = share.shape
    layers = np.unique(np.linspace(0, L - 1, min(L, PANELS)).round().astype(int))

    def draw(*axes: Any) -> None:
        from matplotlib.colors import PowerNorm

        for axis, layer in zip(axes, layers):
            image = axis.imshow(share[:, layer], "viridis", PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest")
            axis.set_title(f"layer {layer}")
            axis.set_xlabel("expert")
            axis.set_yticks([])
            axis.grid(False)
        axes[0].set_yticks(range(len(labels)), labels, parse_math=False)
        axes[-1].figure.colorbar(image, ax=axes[-1], label="share of the label's tokens")

    return plots.render("png", len(layers), (2 + (1.5 + R / 40) * len(layers), max(2.5, 1.2 + 0.2 * len(labels))), draw)
