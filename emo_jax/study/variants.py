"""The models of the study: each variant is a few fields on top of a base config that is EMO, and what is measured of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from emo_jax.config import Config
from emo_jax.errors import InputError


class Variant(NamedTuple):
    sentence: str
    fields: tuple[str, ...] = ()  # Overrides; {quarter} is a quarter of the experts.
    methods: tuple[str, ...] = ("router",)  # Experts are chosen by these, by the first with each of `documents`.
    documents: tuple[int, ...] = (50,)  # So many documents of each label choose.
    baseline: str = "stdmoe"  # The standard MoE with the same weights of the losses.


_ALL: dict[str, Any] = {"methods": ("router", "layerwise", "easy_ep", "reap", "man", "msan", "gated_ean", "random"),
                        "documents": (1, 5, 50)}
_NO_POOLS = ("--router.document_pool=false",)
_V2 = ("--router.semantics=emo_v2", "--router.load_balance_weight=0.01", "--router.router_z_weight=1e-5")

VARIANTS = {
    "emo": Variant("EMO as the base config has it.", **_ALL),
    "stdmoe": Variant("Its matched standard MoE: no document pools.", _NO_POOLS, **_ALL),
    "local_balance": Variant("Experts are balanced within each eighth of the rows instead of over all of them.",
                             ("--router.balance_scope=shard", "--router.balance_shards=8")),
    "fixed_pool": Variant("Every pool has a quarter of the experts.",
                          ("--router.pool_min={quarter}", "--router.pool_max={quarter}")),
    "beta_pool": Variant("Pool sizes are drawn from Beta(4, 1): mostly large pools.", ("--router.pool_distribution=beta",)),
    "free_pool": Variant("Three documents in ten have no pool.", ("--router.pool_free=0.3",)),
    "late_off": Variant("No pools in the last fifth of training.", ("--router.pool_off_from=0.8",)),
    "later_off": Variant("No pools in the last tenth.", ("--router.pool_off_from=0.9",)),
    "growing_pool": Variant("The largest pool grows from the smallest one to all experts.", ("--router.pool_grows=true",)),
    "emo_v2": Variant("The later upstream router, with its weights of the auxiliary losses.", _V2, baseline="stdmoe_v2"),
    "stdmoe_v2": Variant("The standard MoE with the weights of emo_v2.", _NO_POOLS + _V2, baseline="stdmoe_v2"),
    "beta_pool_v2": Variant("emo_v2 with sizes from Beta(4, 1).", ("--router.pool_distribution=beta", *_V2),
                            baseline="stdmoe_v2"),
    "free_pool_v2": Variant("emo_v2 with three documents in ten without a pool.", ("--router.pool_free=0.3", *_V2),
                            baseline="stdmoe_v2"),
    "half_free_v2": Variant("emo_v2 with every second document without a pool.", ("--router.pool_free=0.5", *_V2),
                            baseline="stdmoe_v2"),
    "late_off_v2": Variant("emo_v2 without pools in the last fifth of training.", ("--router.pool_off_from=0.8", *_V2),
                           baseline="stdmoe_v2"),
}
MAIN = ("emo", "stdmoe")  # trained with all seeds
ABLATIONS = ("local_balance", "fixed_pool", "beta_pool", "emo_v2", "stdmoe_v2")


def fields(name: str, base: Config) -> list[str]:
    """The overrides that make the variant of `base`."""
    if name not in VARIANTS:
        raise InputError(f"--variants: unknown variant {name!r}; known: {', '.join(VARIANTS)}")
    return [field.format(quarter=base.model.num_experts // 4) for field in VARIANTS[name].fields]

