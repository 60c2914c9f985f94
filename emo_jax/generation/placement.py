"""Where parameters and rows lie for inference, and the sizes that rows are rounded up to."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emo_jax import sharding
from emo_jax.model import Params
from emo_jax.rounding import ceil_div

FP32 = ("attention_norm", "mlp_norm", "final_norm", "router")


def for_inference(params: Params, dtype: Any) -> Params:
    """Matrices in the compute dtype, whole on every device but for heads, hidden widths and expert tables, which stay
    sharded; norms and routers stay fp32."""

    def prepare(path, leaf):
        names = [k.key for k in path]
        where = leaf.sharding.spec
        if names[-2:-1] != ["moe"] or names[-1] == "router":
            where = P(*("tensor" if axes == "tensor" else None for axes in where))
        leaf = leaf if names[-1] in FP32 else leaf.astype(dtype)
        return jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, where))

    return jax.tree_util.tree_map_with_path(prepare, params)


def power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


def bucket(n: int, least: int = 32) -> int:
    """The next of 32, 48, 64, 96, 128, ...: at most a third of a row is padding."""
    size = power_of_two(n, least)
    return size * 3 // 4 if size > least and n <= size * 3 // 4 else size


def round_rows(n: int, mesh: Mesh) -> int:
    """Rows for n of them: a power of two on every shard of the batch."""
    shards = sharding.batch_shards(mesh)
    return shards * power_of_two(ceil_div(n, shards))
