"""Which expert-parallel shard each routed expert lies on, so that the experts of a token lie together and shards work alike.

What is moved between shards depends on the exchange. `kernels.dispatch=all_to_all` sends a row for every choice of a token, so
that with tokens anywhere the share that crosses is 1 - 1/N whatever the placement; it falls if a document's rows lie where most
of its experts are. An exchange that sends a token once to each shard that has any of its experts moves (shards of a token - 1)
rows. Both are measured, on documents that did not choose the placement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from emo_jax.analysis.activations import Activations
from emo_jax.analysis.resampling import Estimate, resamples
from emo_jax.config import Config
from emo_jax.errors import InputError

MAX_LOAD = 1.1  # of the busiest shard, over the mean, on the text that chooses
STARTS = 8


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


def choose_placement(a: Activations, config: Config, shards: int, max_load: float = MAX_LOAD, seed: int = 0) -> Placement:
    """Of every layer by itself, from the choices of `a`."""
    capacity, order = capacities(config, shards), []
    for layer in range(a.layers):
        chosen = np.zeros((len(a.text.tokens), a.experts), np.float32)
        np.put_along_axis(chosen, a.expert_ids[:, layer].astype(int), 1.0, axis=1)
        together = chosen.T @ chosen
        shard = assign(together, capacity, max_load, seed + layer)
        order.append(np.argsort(shard, kind="stable"))
    return Placement(shards, np.stack(order))


def assign(together: Float[np.ndarray, "R R"], capacity: Int[np.ndarray, "N"], max_load: float = MAX_LOAD,
           seed: int = 0) -> Int[np.ndarray, "R"]:
    """The shard of each expert: as many on each as it holds, most pairs of `together` (tokens that chose both; each one's own
    on the diagonal) within a shard, and no shard much above `max_load` times the mean load. By exchanging two experts as long as
    that helps (Kernighan and Lin), from several starts: graph partitioners such as METIS want a compiled library, and 128
    experts are few."""
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


def traffic(a: Activations, placement: Placement, config: Config) -> dict[str, Estimate]:
    """By layer, with resamples over documents: "crossing_home", the share of choices whose expert is not on the shard that has
    most of the document's choices in this layer; "shards", distinct shards of a token; "busiest", the load of the busiest shard
    over the mean."""
    shard_of, N, D = placement.shard_of(config), placement.shards, len(a.text.labels)
    by_shard, distinct = np.zeros((2, D, a.layers, N))
    for layer in range(a.layers):
        shard = shard_of[layer][a.expert_ids[:, layer]]  # [n, k]
        np.add.at(by_shard[:, layer], (a.text.documents[:, None], shard), 1)
        counts = (np.diff(np.sort(shard, axis=1), axis=1) > 0).sum(axis=1) + 1
        np.add.at(distinct[:, layer, 0], a.text.documents, counts)
    lengths, choices = np.diff(a.text.starts), by_shard.sum(axis=2)
    weights = resamples(D)
    mean = lambda x, of: np.tensordot(weights, x, 1) / np.maximum(np.tensordot(weights, of, 1), 1e-30)
    loads = np.tensordot(weights, by_shard, 1)
    return {"crossing_home": Estimate(1 - mean(by_shard.max(axis=2), choices)),
            "shards": Estimate(mean(distinct[:, :, 0], np.broadcast_to(lengths[:, None], choices.shape))),
            "busiest": Estimate(loads.max(axis=2) / loads.mean(axis=2))}


def compare(chosen_by: Activations, measured_on: Activations, config: Config, shards: int,
            max_load: float = MAX_LOAD) -> tuple[Placement, dict[str, Any]]:
    """(the placement, {"before", "after", "saved"} of every measure, means of the layers with intervals)"""
    placement = choose_placement(chosen_by, config, shards, max_load)
    before, after = (traffic(measured_on, p, config) for p in (Placement.as_it_is(config, shards), placement))
    found = {key: {"before": before[key].mean().describe(), "after": after[key].mean().describe(),
                   "saved": (before[key].mean() - after[key].mean()).describe(),
                   "by_layer": after[key].describe()["value"]} for key in before}
    return placement, found
