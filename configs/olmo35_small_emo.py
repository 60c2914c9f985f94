"""EMO with the router geometry of Olmo 3.5 small: 512 routed experts of which 16 are active, 1 shared, pools of 16 to 512.

    emo-jax train olmo35_small_emo --out runs/olmo35 --data.path=TOKENIZED --data.tokenizer=dolma2/tokenizer.json

179,000 steps of 16.8M tokens (3.0T), the first stop of the public run (allenai/OLMo-core, docs/SMALL_HERO_20260907.md: 12.50B
parameters, 0.79B active). 13.2B parameters here, 0.69B active: layers, width, heads, experts, batch, length, schedule and loss
weights are the public ones, but this package's blocks are not Olmo 3.5's. Its own: 14 of the 16 layers attend linearly (KDA);
the first MLP is dense; experts work in a latent of width 512 with a hidden width of 1024 (here width 1024, hidden width 512: as
many parameters); the shared expert's hidden width is 1024; other norms, gates and a scaled embedding.

513 rows of the expert table divide over an expert axis of 3, 9, 19 or 27 alone: take `mesh.fsdp`.
"""

from emo_jax.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RouterConfig, TrainConfig


def config() -> Config:
    return Config(
        name="olmo35_small_emo",
        model=ModelConfig(num_layers=16, d_model=1024, num_heads=8, num_kv_heads=4, head_dim=128, d_ff=512,
                          num_experts=513, num_shared_experts=1, top_k=17, attention_scope="causal"),
        router=RouterConfig(semantics="emo_v2", pool_min=16, pool_max=512, pool_eval=512, eos_owner="next",
                            load_balance_weight=0.01, router_z_weight=1e-5),
        # Not known: how many documents a row may hold (here the default), and its share of held-out text.
        data=DataConfig(sequence_length=8192),
        # Not known: the decay that ends the run, which is to go on to 14T tokens (834,466 steps); the trunk is constant.
        optimizer=OptimizerConfig(learning_rate=1.1e-3, schedule="constant"),
        train=TrainConfig(steps=179_000, batch_size=2048, eval_every=1000),
        checkpoint=CheckpointConfig(every=100, keep_every=20_000),
    )
