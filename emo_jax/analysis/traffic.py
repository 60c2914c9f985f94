"""What a placement of experts moves between expert-parallel shards, and how evenly shards work.

What is moved depends on the exchange and on where the rows of a document lie. `kernels.dispatch=all_to_all` sends a row for
every choice of a token whose expert lies on another shard; an exchange that sends a token once to each shard that has any of
its experts sends fewer (none is built here). Each is counted with documents *dealt* to the shards whatever they hold, as data
loading does, and *at home*: every document of a batch on a shard that has many of its experts, as many documents on each. The
latter knows the document's choices beforehand: it bounds what a loader could reach that guesses them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

from emo_jax.analysis.placement import MAX_LOAD, Choices, Placement, choose_placement
from emo_jax.analysis.resampling import Estimate, resamples
from emo_jax.config import Config

BATCH = 64  # documents


def traffic(a: Choices, placement: Placement, config: Config) -> dict[str, Estimate]:
    """By layer, with resamples over documents: "shards", distinct shards of a token; "crossing", the share of choices whose
    expert is not on the document's shard; "copies", rows of a token for other shards, if each gets one at most; both also
    "_at_home"; "busiest", the load of the busiest shard over the mean, and "busiest_of_batch", its mean over batches."""
    choices, tokens = a.by_shard(placement.shard_of(config), placement.shards)
    D, lengths = len(choices), np.diff(a.text.starts)
    weights, draw = resamples(D), np.random.default_rng(0)

    def ratio(x: np.ndarray, of: np.ndarray) -> Estimate:
        return Estimate(np.tensordot(weights, x, 1) / np.maximum(np.tensordot(weights, of, 1), 1e-30))

    totals, lengths = choices.sum(axis=2), np.broadcast_to(lengths[:, None], (D, a.layers))
    order = draw.permutation(D)
    dealt = np.empty(D, int)
    dealt[order] = np.arange(D) % placement.shards
    found = {"shards": ratio(tokens.sum(axis=2), lengths)}
    for name, shard in (("", dealt), ("_at_home", homes(choices.sum(axis=1), order))):
        away = lambda x, shard=shard: x.sum(axis=2) - x[np.arange(D), :, shard]
        found |= {f"crossing{name}": ratio(away(choices), totals), f"copies{name}": ratio(away(tokens), lengths)}
    loads = np.tensordot(weights, choices, 1)
    in_batches = [_busiest_of_batch(choices[draw.permutation(np.repeat(np.arange(D), w.astype(int)))]) for w in weights]
    return found | {"busiest": Estimate(_busiest(loads)), "busiest_of_batch": Estimate(np.stack(in_batches))}


def homes(choices: Int[np.ndarray, "D N"], order: Int[np.ndarray, "D"]) -> Int[np.ndarray, "D"]:
    """The shard of every document's rows: of each batch, documents in that order, the assignment with the most choices at home,
    as many documents on each shard."""
    from scipy.optimize import linear_sum_assignment

    shards, found = choices.shape[1], np.empty(len(choices), int)
    for start in range(0, len(order), BATCH):
        batch = order[start:start + BATCH]
        places = np.tile(np.arange(shards), -(-len(batch) // shards))
        rows, columns = linear_sum_assignment(choices[batch][:, places], maximize=True)
        found[batch[rows]] = places[columns]
    return found


def _busiest(loads: np.ndarray) -> np.ndarray:
    return loads.max(axis=-1) / np.maximum(loads.mean(axis=-1), 1e-30)


def _busiest_of_batch(choices: np.ndarray) -> np.ndarray:
    """[L], the mean over whole batches of documents in turn; of fewer documents than a batch, those."""
    size = min(BATCH, len(choices))
    whole = choices[:len(choices) // size * size]
    return _busiest(whole.reshape(-1, size, *choices.shape[1:]).sum(axis=1)).mean(axis=0)


def compare(chosen_by: Choices, measured_on: Choices, config: Config, shards: int,
            max_load: float = MAX_LOAD) -> tuple[Placement, dict[str, Any]]:
    """(the placement, {"before", "after", "saved"} of every measure, means of the layers with intervals)"""
    placement = choose_placement(chosen_by, config, shards, max_load)
    before, after = (traffic(measured_on, p, config) for p in (Placement.as_it_is(config, shards), placement))
    found = {key: {"before": before[key].mean().describe(), "after": after[key].mean().describe(),
                   "saved": (before[key].mean() - after[key].mean()).describe(),
                   "by_layer": after[key].describe()["value"]} for key in before}
    return placement, found
