"""`emo-jax bench moe`: the grouped matmuls of the experts against one dense matmul of equal FLOPs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emo_jax.bench import compute_dtype, interleaved, ratio
from emo_jax.kernels import grouped_matmul as gmm
from emo_jax.rounding import round_up

SMALL = dict(tokens=4096, top_k=3, experts=32, d_model=256, d_ff=256)
PUBLISHED = dict(tokens=16384, top_k=7, experts=127, d_model=2048, d_ff=2048)  # d_ff: gate and up are one matmul


def moe(tokens: int, top_k: int, experts: int, d_model: int, d_ff: int, rounds: int, kernel: str = "auto") -> dict[str, Any]:
    """Forward, and forward with backward, of rows [tokens * top_k, d_model] times [experts, d_model, d_ff] with uneven
    groups, one of them empty."""
    chosen = gmm.choose(kernel, jax.default_backend())
    dtype = compute_dtype()
    sizes, rows = uneven_groups(tokens * top_k, experts, gmm.ROW_ALIGNMENT[chosen.name])
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, d_model), dtype)
    w = jax.random.normal(keys[1], (experts, d_model, d_ff), dtype)
    grouped = lambda x, w: gmm.grouped_matmul(x, w, sizes, chosen)
    dense = lambda x, w: x @ w
    dense_x = x[: tokens * top_k]
    d_grouped = jax.random.normal(keys[2], (rows, d_ff), dtype)
    d_dense = d_grouped[: tokens * top_k]

    def with_backward(f):
        return jax.jit(lambda x, w, d: (*jax.vjp(f, x, w)[1](d), f(x, w)))

    forward, both = jax.jit(grouped), with_backward(grouped)
    dense_forward, dense_both = jax.jit(dense), with_backward(dense)
    times = interleaved({
        "grouped": lambda: forward(x, w), "dense": lambda: dense_forward(dense_x, w[0]),
        "grouped_both": lambda: both(x, w, d_grouped), "dense_both": lambda: dense_both(dense_x, w[0], d_dense),
    }, rounds)
    flops = 2 * tokens * top_k * d_model * d_ff
    return {
        "kernel": str(chosen), "device": jax.devices()[0].device_kind, "tokens": tokens, "top_k": top_k, "experts": experts,
        "d_model": d_model, "d_ff": d_ff, "rounds": rounds,
        "dense_flops_per_second": float(flops / np.median(times["dense"])),
        "forward_over_dense": ratio(times, "grouped", "dense"),
        "forward_backward_over_dense": ratio(times, "grouped_both", "dense_both"),
    }


def uneven_groups(rows: int, experts: int, alignment: int) -> tuple[jax.Array, int]:
    """(group sizes [experts], padded to the alignment, the last one empty; rows of the buffer)"""
    shares = 1.0 + jnp.arange(experts - 1) % 7
    counts = jnp.floor(rows * shares / jnp.sum(shares)).astype(jnp.int32)
    counts = jnp.append(counts.at[0].add(rows - jnp.sum(counts)), 0)
    buffer = round_up(rows + experts * (alignment - 1), alignment)
    return round_up(counts, alignment), buffer


def report(r: dict[str, Any]) -> str:
    return (f"{r['kernel']} on {r['device']}: {r['tokens']:,} tokens x top-{r['top_k']}, {r['experts']} experts of "
            f"{r['d_model']} x {r['d_ff']}, median of {r['rounds']} rounds\n"
            f"dense matmul of equal FLOPs    {r['dense_flops_per_second'] / 1e9:>10,.0f} GFLOP/s\n"
            f"forward over dense             {r['forward_over_dense']:>10.2f}\n"
            f"forward + backward over dense  {r['forward_backward_over_dense']:>10.2f}")
