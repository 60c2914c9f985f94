"""`emo-jax bench step`: tokens a second of the training step, its share of the dense-matmul ideal, and the cost of EMO
routing over standard routing."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emo_jax import model, sharding
from emo_jax.bench import interleaved, matmul, random_segments, ratio
from emo_jax.compilation import keep_programs
from emo_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RouterConfig, TrainConfig
from emo_jax.train.flops import flops_per_token
from emo_jax.train.replicas import hashes
from emo_jax.train.step import Objective, Totals, init_state, make_train_step


def standard() -> Config:
    """The step that figures in the README are about: 4 layers of width 256, 32 experts of hidden 128, top-4 with 1 shared,
    vocabulary 8192, 8 rows of 512 tokens, about 4 documents a row."""
    return Config(
        name="bench",
        model=ModelConfig(vocab_size=8192, num_layers=4, d_model=256, num_heads=8, num_kv_heads=8, head_dim=32, d_ff=128,
                          num_experts=32, num_shared_experts=1, top_k=4),
        router=RouterConfig(pool_min=4, pool_max=32),
        data=DataConfig(sequence_length=512, max_documents_per_row=16),
        optimizer=OptimizerConfig(warmup_steps=10),
        train=TrainConfig(batch_size=8, steps=1000, remat="none"), mesh=MeshConfig(data=1, fsdp=-1))


def step(config: Config | None, rounds: int) -> dict[str, Any]:
    """Times `config` (default: `standard()`) against the same model without document pools and against a dense matmul of
    the machine, on random tokens and documents."""
    emo = config or standard()
    keep_programs(emo.train.compilation_cache)
    plain = dataclasses.replace(emo, router=dataclasses.replace(emo.router, document_pool=False))
    mesh = sharding.make_mesh(emo)
    batch = sharding.global_batch(mesh, random_batch(emo, documents=4))
    dense, dense_flops = matmul()
    timed = {"matmul": dense}
    for name, c in (("emo", emo), ("standard", plain)):
        timed[name] = _train_step(c, mesh, batch)
        timed[f"{name}_gradient"] = _gradient(c, mesh, batch)
    timed["replica_hashes"] = _hashes(emo, mesh)
    times = interleaved(timed, rounds)

    tokens = emo.train.batch_size * emo.data.sequence_length
    matmul_rate = dense_flops / np.median(times["matmul"])
    # Devices of a CPU share the cores that the one matmul takes.
    useful = flops_per_token(emo) * tokens / (1 if jax.default_backend() == "cpu" else jax.device_count())
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    return {
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}", "rounds": rounds, "tokens_per_step": tokens,
        "model_flops_per_token": flops_per_token(emo), "matmul_flops_per_second": float(matmul_rate),
        "tokens_per_second": {"step": tokens / seconds["emo"], "forward_backward": tokens / seconds["emo_gradient"]},
        "share_of_matmul_ideal": float(useful / seconds["emo"] / matmul_rate),
        "emo_over_standard": ratio(times, "emo", "standard"),
        "emo_over_standard_forward_backward": ratio(times, "emo_gradient", "standard_gradient"),
        "replica_hashes": ratio(times, "replica_hashes", "emo") / max(emo.faults.check_replicas_every, 1),
        "seconds": seconds,
    }


def report(r: dict[str, Any]) -> str:
    rates = r["tokens_per_second"]
    return (f"{r['devices']}, {r['tokens_per_step']:,} tokens a step, median of {r['rounds']} rounds\n"
            f"step                     {rates['step']:>12,.0f} tokens/s\n"
            f"forward and backward     {rates['forward_backward']:>12,.0f} tokens/s\n"
            f"share of matmul ideal    {r['share_of_matmul_ideal']:>12.1%}   "
            f"({r['model_flops_per_token'] / 1e6:.1f} MFLOP/token; measured "
            f"{r['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s)\n"
            f"EMO over standard MoE    {r['emo_over_standard']:>12.3f}   (step; forward and backward "
            f"{r['emo_over_standard_forward_backward']:.3f})\n"
            f"hashes of replicas       {r['replica_hashes']:>12.4%}   of a step, at faults.check_replicas_every")


def random_batch(config: Config, documents: int) -> dict[str, np.ndarray]:
    """Random tokens in rows of about `documents` documents."""
    rng = np.random.default_rng(0)
    B, T = config.train.batch_size, config.data.sequence_length
    segments = random_segments(B, T, documents)
    tokens = rng.integers(0, config.model.vocab_size, (B, T + 1), dtype=np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": np.ones((B, T), np.float32),
            "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)), "segment_ids": segments,
            "document_ids": segments + 100 * np.arange(B, dtype=np.int32)[:, None]}


def _train_step(config, mesh, batch):
    train_step, box = make_train_step(config, mesh), [init_state(config, mesh)]

    def call():
        box[0], metrics = train_step(box[0], batch)
        return metrics

    return call


def _hashes(config, mesh):
    """What comparing replicas asks of the devices."""
    hashed, params = jax.jit(hashes), model.init_params(config, mesh)

    def call():
        with jax.set_mesh(mesh):
            return hashed(params)

    return call


def _gradient(config, mesh, batch):
    """Forward and backward alone, as other codebases are often timed."""
    execution, params = model.Execution.of(config, mesh), model.init_params(config, mesh)

    @jax.jit
    def gradient(params, batch):
        tokens = jnp.float32(batch["tokens"].size)
        objective = Objective(execution, Totals(tokens, tokens), jnp.int32(0))
        return jax.grad(lambda p: objective(p, batch, None)[0])(params)

    def call():
        with jax.set_mesh(mesh):
            return gradient(params, batch)

    return call
