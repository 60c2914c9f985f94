"""Which experts a server shall keep of a model that it has whole, by the ids that they have in every other format.

Two files, in the forms that servers have proposed and not yet released: `experts.jsonl`, a line for each layer with all its
routed experts, best first (vllm-ascend's `expert_list_file`, pull request 12525, so far for Qwen3-MoE alone, which keeps
int(n (1 - `expert_prune_ratio`)) of n); and `profile.json`, the pairs [layer, expert] that are not kept (vLLM's
`--riy-expert-profile`, pull request 37824).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from emo_jax.checkpoints.checkpoint import Checkpoint
from emo_jax.checkpoints.subset import Subset, load, require_experts
from emo_jax.config import Config
from emo_jax.convert.formats import Format, Options
from emo_jax.errors import InputError
from emo_jax.files import AnyPath, write_json, write_text


def require(c: Config) -> None:
    require_experts(c)


def write(found: Checkpoint, folder: AnyPath, options: Options) -> dict[str, Any]:
    subset, top_k = load(options.subset, found), found.config.model.routed_top_k
    for layer, kept in enumerate(subset.kept):
        if len(kept) < top_k:
            raise InputError(f"subset {options.subset}: layer {layer} keeps {len(kept)} routed experts; servers choose {top_k} "
                             f"for every token of a model that is whole (subset extract makes a smaller one)")
    counts = {len(kept) for kept in subset.kept}
    if len(counts) > 1:
        raise InputError(f"subset {options.subset} keeps {min(counts)} to {max(counts)} routed experts; a profile keeps "
                         f"as many in every layer")
    ratio = prune_ratio(counts.pop(), subset.num_routed)
    write_text(folder / "experts.jsonl", "".join(
        json.dumps({str(layer): order}) + "\n" for layer, order in enumerate(ranking(subset))))
    write_json(folder / "profile.json", {
        "version": 1, "model": found.config.name, "workload": subset.calibration.get("path", ""),
        "pruned_experts": np.argwhere(~subset.mask()).tolist()})
    return {"architecture": f"expert profile, expert_prune_ratio {ratio:.6g}", "tensors": 0, "expert_prune_ratio": ratio}


def prune_ratio(kept: int, routed: int) -> float:
    """With which int(routed (1 - ratio)) is `kept`, whatever is rounded."""
    return max(0.0, 1 - (kept + 0.5) / routed)


def ranking(subset: Subset) -> list[list[int]]:
    """The routed experts of every layer: what is kept before what is not, each by their scores where the subset has them."""
    scores = np.zeros((len(subset.kept), subset.num_routed)) if subset.scores is None else subset.score_array()
    return [np.lexsort((-row, ~kept)).tolist() for row, kept in zip(scores, subset.mask())]


FORMAT = Format(("float32",), require, write, needs_subset=True)
