"""How many experts every layer keeps, and which, given their scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emo_jax.checkpoints.subset import require_enough
from emo_jax.config import Config
from emo_jax.errors import InputError


@dataclass(frozen=True)
class Budget:
    """Exactly one of: experts of every layer, a number for each layer, or a total over all layers that is shared out by
    need. All of them count shared experts.

    The same number for every layer is what all commands mean by --keep. In what is published of EMO every other budget that
    was tried loses: at 32 of 128 experts on ARC-C, 2 points where a global ranking by probability decides (though it keeps
    more of it), 7 with fewer experts in early layers, 14 with fewer in late ones.
    """

    keep: int | None = None
    per_layer: tuple[int, ...] | None = None
    total: int | None = None

    @property
    def needs_scores(self) -> bool:
        return self.total is not None

    def check(self, config: Config) -> None:
        """Raises `InputError` if no subset of this model has the budget."""
        m = config.model
        if sum(x is not None for x in (self.keep, self.per_layer, self.total)) != 1:
            raise InputError("give one of --keep, --keep-per-layer and --keep-total")
        if self.per_layer is not None and len(self.per_layer) != m.num_layers:
            raise InputError(f"--keep-per-layer has {len(self.per_layer)} numbers; {config.name} has {m.num_layers} "
                             f"layers")
        if self.total is not None:
            least = m.num_layers * min(m.top_k, m.num_experts)
            if not least <= self.total <= m.num_layers * m.num_experts:
                raise InputError(f"--keep-total {self.total} must be between {least} (the {m.top_k} experts of a token "
                                 f"in each of {m.num_layers} layers) and {m.num_layers * m.num_experts}")
        else:
            name = "--keep" if self.keep is not None else "--keep-per-layer"
            require_enough(self._fixed(config), config, name)

    def routed(self, config: Config, scores: np.ndarray | None = None) -> np.ndarray:
        """Routed experts of every layer [L]; a total needs the scores [L, R]."""
        if self.total is None:
            return np.array(self._fixed(config))
        assert scores is not None
        m = config.model
        return share_out(scores, self.total - m.num_layers * m.num_shared_experts, m.routed_top_k)

    def _fixed(self, config: Config) -> list[int]:
        m = config.model
        keeps = self.per_layer if self.per_layer is not None else (self.keep or 0,) * m.num_layers
        return [k - m.num_shared_experts for k in keeps]


def pick(scores: np.ndarray, count: int) -> np.ndarray:
    """bool [R]: the `count` experts with the highest scores; of equals the lowest ids."""
    mask = np.zeros(len(scores), bool)
    mask[np.argsort(-scores, kind="stable")[:count]] = True
    return mask


def share_out(scores: np.ndarray, total: int, least: int) -> np.ndarray:
    """[L]: `total` experts over the layers so that the kept share of each layer's score, summed over the layers, is as
    large as it can be; at least `least` in each."""
    shares = -np.sort(-scores / scores.sum(axis=1, keepdims=True), axis=1)
    shares[:, :least] = np.inf
    mask = pick(shares.ravel(), total).reshape(shares.shape)
    return mask.sum(axis=1)
