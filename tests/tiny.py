"""A tiny model and random rows for tests."""

import dataclasses

import numpy as np

from emo_jax.config import Config, DataConfig, KernelConfig, MeshConfig, ModelConfig, OptimizerConfig, RouterConfig, TrainConfig


def config(**sections) -> Config:
    """2 layers of width 32, 16 experts of which 4 are active; `section=dict(field=value)` changes it."""
    base = dict(
        name="tiny",
        model=ModelConfig(vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=16,
                          num_experts=16, num_shared_experts=1, top_k=4),
        router=RouterConfig(pool_min=4, pool_max=16),
        data=DataConfig(sequence_length=32, max_documents_per_row=8),
        # With this eps an update follows its gradient, where AdamW's usual one makes a sign of rounding errors.
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant", eps=1e-2),
        train=TrainConfig(steps=10, batch_size=8, remat="none"), kernels=KernelConfig(),
        mesh=MeshConfig(data=1, fsdp=-1))
    for name, change in sections.items():
        base[name] = dataclasses.replace(base[name], **change) if isinstance(change, dict) else change
    return Config(**base)


def batch(config: Config, seed: int = 0, padding: int = 5) -> dict[str, np.ndarray]:
    """Random rows of up to 5 documents; the first row ends in `padding` padding tokens."""
    rng = np.random.default_rng(seed)
    B, T, V = config.train.batch_size, config.data.sequence_length, config.model.vocab_size
    segments = np.sort(rng.integers(0, 5, (B, T)), axis=1)
    segments = np.cumsum(np.diff(segments, axis=1, prepend=segments[:, :1]) > 0, axis=1) + 1
    weights = np.ones((B, T), np.float32)
    if padding:
        segments[0, -padding:], weights[0, -padding:] = 0, 0
    ids = np.where(segments > 0, 100 * np.arange(B)[:, None] + segments, 0)
    rows = {"tokens": rng.integers(0, V, (B, T)), "targets": rng.integers(0, V, (B, T)), "segment_ids": segments,
            "document_ids": ids, "positions": np.tile(np.arange(T), (B, 1))}
    return {name: a.astype(np.int32) for name, a in rows.items()} | {"loss_weights": weights}
