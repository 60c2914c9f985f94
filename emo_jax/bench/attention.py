"""`emo-jax bench attention`: the attention kernel against the plain form, and against the time that a dense matmul takes for
the FLOPs of the query-key pairs that a causal mask within documents leaves."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emo_jax.bench import compute_dtype, interleaved, matmul, random_segments, ratio
from emo_jax.kernels import Kernel
from emo_jax.kernels import attention as kernels
from emo_jax.sharding import BATCH, single_device_mesh

SMALL = dict(rows=2, length=1024, heads=4, head_dim=64)
PUBLISHED = dict(rows=4, length=4096, heads=16, head_dim=128)


def attention(rows: int, length: int, heads: int, head_dim: int, documents: int, rounds: int,
              kernel: str = "auto") -> dict[str, Any]:
    """Forward, and forward with backward, of rows of about `documents` documents."""
    chosen, mesh = kernels.choose(kernel, jax.default_backend(), head_dim), single_device_mesh()
    segments = random_segments(rows, length, documents)
    pairs = (segments[:, :, None] == segments[:, None, :]) & np.tri(length, dtype=bool)
    place = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, P(BATCH, *axes)))
    whole, parts = place(segments, None), place(segments, "sequence")
    arrays = jax.random.normal(jax.random.key(0), (4, rows, length, heads, head_dim), compute_dtype())
    arrays = [place(a, axis, "tensor", None) for a, axis in zip(arrays, ("sequence", None, None, "sequence"))]

    def timed(kernel):
        attend = lambda q, k, v: kernels.attention(q, k, v, parts, whole, kernel)
        forward = jax.jit(attend)
        both = jax.jit(lambda q, k, v, d: (attend(q, k, v), jax.vjp(attend, q, k, v)[1](d)))

        def call(function, *args):
            with jax.set_mesh(mesh):
                return function(*args)

        return lambda: call(forward, *arrays[:3]), lambda: call(both, *arrays)

    dense, dense_flops = matmul()
    functions = {"matmul": dense}
    functions["kernel"], functions["kernel_both"] = timed(chosen)
    functions["plain"], functions["plain_both"] = timed(Kernel("reference"))
    times = interleaved(functions, rounds)
    flops = 4 * heads * head_dim * int(pairs.sum())  # two matmuls; the backward pass has five with the recomputed one
    over_floor = lambda name, factor: ratio(times, name, "matmul") / (factor * flops / dense_flops)
    return {
        "kernel": str(chosen), "device": jax.devices()[0].device_kind, "rows": rows, "length": length, "heads": heads,
        "head_dim": head_dim, "documents": documents, "rounds": rounds,
        "matmul_flops_per_second": float(dense_flops / np.median(times["matmul"])),
        "forward_over_plain": ratio(times, "kernel", "plain"),
        "forward_backward_over_plain": ratio(times, "kernel_both", "plain_both"),
        "forward_over_floor": over_floor("kernel", 1),
        "forward_backward_over_floor": over_floor("kernel_both", 3.5),
        "seconds": {name: float(np.median(values)) for name, values in times.items()},
    }


def report(r: dict[str, Any]) -> str:
    return (f"{r['kernel']} on {r['device']}: {r['rows']} rows of {r['length']:,} tokens in about {r['documents']} documents,"
            f" {r['heads']} heads of {r['head_dim']}, median of {r['rounds']} rounds\n"
            "                     over the plain form   over the FLOP floor"
            f" ({r['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s)\n"
            f"forward              {r['forward_over_plain']:>19.2f}   {r['forward_over_floor']:>19.2f}\n"
            f"forward + backward   {r['forward_backward_over_plain']:>19.2f}   {r['forward_backward_over_floor']:>19.2f}")
