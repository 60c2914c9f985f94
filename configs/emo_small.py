"""A small EMO for one GPU: 12 layers of width 768, 64 experts of which 8 are active (1 shared); 0.76B parameters.

    emo-jax train emo_small --out runs/emo_small --data.path=... --data.tokenizer=...

10,000 steps of 131k tokens (1.3B tokens).
"""

from emo_jax.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RouterConfig, TrainConfig


def config() -> Config:
    return Config(
        name="emo_small",
        model=ModelConfig(vocab_size=32_768, num_layers=12, d_model=768, num_heads=12, num_kv_heads=12, head_dim=64,
                          d_ff=384, num_experts=64, num_shared_experts=1, top_k=8),
        router=RouterConfig(pool_min=8, pool_max=64),
        data=DataConfig(sequence_length=2048, max_documents_per_row=64, eval_fraction=0.01, workers=8),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=500),
        train=TrainConfig(steps=10_000, batch_size=64, eval_every=500),
        checkpoint=CheckpointConfig(every=500, keep_every=0),
    )
