"""Which expert-parallel shard each routed expert lies on, so that the experts of a token lie together and shards work alike.

Each layer is partitioned by itself, by how often tokens choose two experts together. Then the shards of a layer exchange names,
so that the experts of a document lie on the same shard in all layers: its rows are on one device for the whole step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Integer

from emo_jax.analysis.text import Numbers, Text
from emo_jax.config import Config
from emo_jax.data.documents import Source
from emo_jax.errors import InputError
from emo_jax.subsets.calibration import by_label, document_hash, sample, without

MAX_LOAD = 1.1  # of the busiest shard, over the mean, on the text that chooses
STARTS = 8
_TOKENS = 1 << 16  # at a time
Counts = Int[np.ndarray, "D L N"]


@dataclass(frozen=True)
class Choices:
    """The routed experts of n tokens, without pools."""

    text: Text
    expert_ids: Integer[np.ndarray, "n L k"]

    @property
    def layers(self) -> int:
        return self.expert_ids.shape[1]

    def by_shard(self, shard_of: Int[np.ndarray, "L R"], shards: int) -> tuple[Counts, Counts]:
        """Of every document: how many choices lie on each shard, and how many tokens have any expert there."""
        documents, D = self.text.documents, len(self.text.labels)
        choices, tokens = np.zeros((2, D, self.layers, shards), np.int64)
        for layer in range(self.layers):
            shard = np.sort(shard_of[layer][self.expert_ids[:, layer]], axis=1)  # [n, k]
            first = np.diff(shard, axis=1, prepend=-1) > 0
            place = documents[:, None] * shards + shard
            choices[:, layer] = np.bincount(place.ravel(), minlength=D * shards).reshape(D, shards)
            tokens[:, layer] = np.bincount(place[first], minlength=D * shards).reshape(D, shards)
        return choices, tokens


@dataclass(frozen=True)
class Placement:
    shards: int
    order: Int[np.ndarray, "L R"]  # the expert that comes to each place; shards take equal parts of the table in turn

    @classmethod
    def as_it_is(cls, config: Config, shards: int) -> Placement:
        m = config.model
        return cls(shards, np.tile(np.arange(m.num_routed_experts), (m.num_layers, 1)))

    def shard_of(self, config: Config) -> Int[np.ndarray, "L R"]:
        """The shard of every expert."""
        shard_of_place = np.arange(config.model.num_routed_experts) // (config.model.num_experts // self.shards)
        return np.take_along_axis(np.broadcast_to(shard_of_place, self.order.shape), np.argsort(self.order, axis=1), axis=1)


def capacities(config: Config, shards: int) -> Int[np.ndarray, "N"]:
    """Routed experts on each shard; shared ones, the last rows of the table, take places of the last shard."""
    m = config.model
    if m.num_experts % shards or m.num_experts // shards <= m.num_shared_experts:
        raise InputError(f"--shards {shards} must divide the {m.num_experts} experts of a layer, and leave routed ones on the "
                         f"last shard beside the {m.num_shared_experts} shared")
    found = np.full(shards, m.num_experts // shards)
    found[-1] -= m.num_shared_experts
    return found


def two_parts(source: Source, numbers: Numbers, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(documents to choose by: about that share of those of every label; the others, to measure on, without copies of the
    first). Raises `InputError` where either is empty."""
    groups = by_label(source, numbers)
    chosen = [sample(group, round(len(group) * share), seed) for group in groups.values()]
    choosing = np.sort(np.concatenate([np.zeros(0, int), *chosen]))
    others = np.setdiff1d(np.concatenate([np.zeros(0, int), *groups.values()]).astype(int), choosing)
    measuring = without(source, others, {document_hash(source[int(i)]) for i in choosing})
    if not len(choosing) or not len(measuring):
        raise InputError(f"{source.name}: of {len(choosing) + len(others)} documents {len(choosing)} choose and "
                         f"{len(measuring)} others measure; give more documents, or another --choose-share")
    return choosing, measuring


def choose_placement(a: Choices, config: Config, shards: int, max_load: float = MAX_LOAD, seed: int = 0) -> Placement:
    """By the choices of `a`."""
    capacity, m = capacities(config, shards), config.model
    shard_of = np.stack([assign(together(a.expert_ids[:, layer], m.num_routed_experts), capacity, max_load, seed + layer)
                         for layer in range(a.layers)])
    names = align(a.by_shard(shard_of, shards)[0], capacity)
    return Placement(shards, np.argsort(np.take_along_axis(names, shard_of, axis=1), axis=1, kind="stable"))


def together(expert_ids: Integer[np.ndarray, "n k"], experts: int) -> Float[np.ndarray, "R R"]:
    """Tokens that chose both experts; each one's own on the diagonal."""
    found = np.zeros((experts, experts))
    for start in range(0, len(expert_ids), _TOKENS):
        part = expert_ids[start:start + _TOKENS].astype(int)
        chosen = np.zeros((len(part), experts), np.float32)
        np.put_along_axis(chosen, part, 1.0, axis=1)
        found += chosen.T @ chosen
    return found


def assign(together: Float[np.ndarray, "R R"], capacity: Int[np.ndarray, "N"], max_load: float = MAX_LOAD,
           seed: int = 0) -> Int[np.ndarray, "R"]:
    """The shard of each expert: as many on each as it holds, most pairs of `together` within a shard, and no shard much above
    `max_load` times the mean load. By exchanging two experts as long as that helps (Kernighan and Lin), from several starts:
    graph partitioners such as METIS want a compiled library, and 128 experts are few."""
    load, pairs = np.diag(together).astype(float), (together - np.diag(np.diag(together))).astype(float)
    unit, mean, best = pairs.sum() / 2, load.sum() / len(capacity), None
    draw = np.random.default_rng(seed)
    for _ in range(STARTS):
        shard = draw.permutation(np.repeat(np.arange(len(capacity)), capacity))
        value = _exchange(shard, pairs / max(unit, 1e-30), load / max(mean, 1e-30), max_load, len(capacity))
        if best is None or value > best[0]:
            best = value, shard
    assert best is not None
    return best[1]


def _exchange(shard: np.ndarray, pairs: np.ndarray, load: np.ndarray, max_load: float, shards: int) -> float:
    """Exchanges experts in `shard` in place; returns what was reached."""
    each = np.arange(len(shard))
    for _ in range(20 * len(shard)):
        member = np.eye(shards)[shard]
        near, loads = pairs @ member, load @ member  # [R, N], [N]
        own = near[each, shard]
        gain = near[:, shard] - own[:, None]
        gain = gain + gain.T - 2 * pairs
        moved = load[None, :] - load[:, None]  # what a's shard gains if a leaves for b
        here, there = loads[shard][:, None] + moved, loads[shard][None, :] - moved
        over = lambda x: np.maximum(x - max_load, 0)
        relief = over(loads[shard])[:, None] + over(loads[shard])[None, :] - over(here) - over(there)
        score = np.where(shard[:, None] != shard[None, :], gain + relief, -np.inf)
        a, b = np.unravel_index(np.argmax(score), score.shape)
        if score[a, b] <= 1e-9:
            break
        shard[a], shard[b] = shard[b], shard[a]
    member = np.eye(shards)[shard]
    return float((pairs * (member @ member.T)).sum() / 2 - np.maximum(load @ member - max_load, 0).sum())


def align(choices: Counts, capacity: Int[np.ndarray, "N"]) -> Int[np.ndarray, "L N"]:
    """The name that each layer's shards get, so that documents find their experts on the same one in all layers: each layer in
    turn is matched to the sum of the others until none changes. Names go only to a shard of the same size."""
    from scipy.optimize import linear_sum_assignment

    _, layers, shards = choices.shape
    names = np.tile(np.arange(shards), (layers, 1))
    named, same_size = choices.astype(float), capacity[:, None] == capacity[None, :]
    for _ in range(20):
        before = names.copy()
        for layer in range(layers):
            gain = choices[:, layer].T @ (named.sum(axis=1) - named[:, layer])  # [shard, name]
            names[layer] = linear_sum_assignment(np.where(same_size, gain, -1e30), maximize=True)[1]
            named[:, layer, names[layer]] = choices[:, layer]
        if np.array_equal(names, before):
            break
    return names
