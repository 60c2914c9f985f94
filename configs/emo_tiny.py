"""A tiny EMO that learns on a laptop CPU: 3 layers of width 128, 32 experts of which 4 are active (1 shared).

    emo-jax train emo_tiny --out runs/emo_tiny

On the text of the Python installation (the default) or any `--data.path`; minutes on 2 cores.
"""

from emo_jax.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RouterConfig, TrainConfig


def config() -> Config:
    return Config(
        name="emo_tiny",
        model=ModelConfig(vocab_size=4096, num_layers=3, d_model=128, num_heads=4, num_kv_heads=4, head_dim=32, d_ff=64,
                          num_experts=32, num_shared_experts=1, top_k=4),
        router=RouterConfig(pool_min=4, pool_max=32),
        data=DataConfig(sequence_length=256, max_documents_per_row=32, eval_fraction=0.05, workers=1),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        train=TrainConfig(steps=300, batch_size=16, remat="none", log_every=10, eval_every=150),
        checkpoint=CheckpointConfig(every=100, keep_every=0),
    )
