"""Public training runs, and what the cost model says of their shapes: how far real steps are from bounds.

A bound of a compiled program is not a speed. `RUNS` are measured MFUs of models whose shape a config can express; measured /
predicted is the factor between the two, `derating`. Their batches and meshes are not all known: the prediction is that of the
best plan with mesh.fsdp alone for `TOKENS_A_DEVICE`. Published figures count FLOPs in different ways, so a factor is good to a
tenth or two.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from emo_jax import chips
from emo_jax.aot import topology as topologies
from emo_jax.config import Config, DataConfig, ModelConfig, RouterConfig, TrainConfig
from emo_jax.plan.calibration import ROWS, calibration, cost_of
from emo_jax.plan.search import search

TOKENS_A_DEVICE = 16_384
FINE = "fine-grained MoE"
_TIERS = "github.com/AI-Hypercomputer/maxtext docs/reference/models/tiering.md"
_IRONWOOD = "github.com/AI-Hypercomputer/tpu-recipes training/ironwood/README.md"
# Fine-grained MoEs on chips without a roofline in `chips.CHIPS`: 67B-A2B on v4 16.5 to 21.9 % (marin-community/marin issue
# 6044), 256 and more experts on GB200 19.4 to 26.3 % (marin issue 7201, pull request 8549); and one program whose experts grow
# from 8 to 56 at equal FLOPs: 50.4 to 28 % (AI-Hypercomputer/maxtext issue 1256).
FINE_GRAINED_MFU = (0.20, 0.27)


class Run(NamedTuple):
    name: str
    topology: str
    mfu: float  # measured, bf16
    source: str
    model: ModelConfig
    length: int = 4096

    @property
    def kind(self) -> str:
        return kind(self.model)


def _shape(layers: int, width: int, heads: int, groups: int, hidden: int, vocabulary: int, experts: int = 0, k: int = 0):
    return ModelConfig(num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=groups, head_dim=128, d_ff=hidden,
                       vocab_size=vocabulary, num_experts=experts, num_shared_experts=0, top_k=k)


_MIXTRAL_7B = _shape(32, 4096, 32, 8, 14336, 32_000, 8, 2)
RUNS = (
    Run("Llama 2 70B", "v5p:8x8x8", 0.654, _TIERS, _shape(80, 8192, 64, 8, 28672, 32_000)),
    Run("Llama 3.1 8B", "v6e-256", 0.4546, _TIERS, _shape(32, 4096, 32, 8, 14336, 128_256), 8192),
    Run("Mixtral 8x7B", "v5p:4x4x8", 0.5256, _TIERS, _MIXTRAL_7B),
    Run("Mixtral 8x7B", "v6e-256", 0.3523, _TIERS, _MIXTRAL_7B),
    Run("Qwen3 235B-A22B", "tpu7x:4x8x8", 0.273, _IRONWOOD, _shape(94, 4096, 64, 4, 1536, 151_936, 128, 8)),
)


def kind(model: ModelConfig) -> str:
    return "dense" if not model.num_experts else "coarse MoE" if model.num_experts <= 16 else FINE


class Comparison(NamedTuple):
    run: Run
    bound: float  # predicted MFU

    @property
    def factor(self) -> float:
        return self.run.mfu / self.bound


@functools.cache
def comparisons() -> tuple[Comparison, ...]:
    found = []
    for run in RUNS:
        name, grid = topologies.parse(run.topology)
        rows = math.prod(grid) * chips.CHIPS[name].devices * TOKENS_A_DEVICE // run.length
        config = Config(name=run.name, model=run.model, router=RouterConfig(document_pool=False),
                        data=DataConfig(sequence_length=run.length), train=TrainConfig(batch_size=rows))
        best = search(config, run.topology, given=("mesh.data=1", "mesh.expert=1", "mesh.tensor=1")).best[0]
        found.append(Comparison(run, best.cost.mfu(calibration().coefficients)))
    return tuple(found)


@functools.cache
def derating(model: ModelConfig) -> tuple[float, float]:
    """What to multiply a predicted MFU with to expect a measured one, from and to: as far as runs of this kind came. For
    fine-grained MoEs it begins with the slowest published ones over the best bound of `calibration.ROWS`."""
    factors = [c.factor for c in comparisons() if c.run.kind == kind(model)]
    if kind(model) == FINE:
        costs = [cost_of(row) for row in ROWS]
        best = max(c.model_flops / c.place.chip.flops / row.seconds for row, c in zip(ROWS, costs))
        factors.append(FINE_GRAINED_MFU[0] / best)
    return min(factors), max(factors)
