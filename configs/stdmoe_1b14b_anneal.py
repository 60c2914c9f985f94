"""The 50B-token anneal of stdmoe_1b14b_1t.

    emo-jax train stdmoe_1b14b_anneal --out runs/stdmoe_1b14b_anneal --train.init_from=runs/stdmoe_1b14b_1t \\
        --data.path=... --data.tokenizer=...

Parameters, optimizer, data position and step come from the checkpoint; the rate falls linearly from 4e-4 to 0 over
11,920 steps (50B tokens), to step 250,339.
"""

from emo_jax.config import Config, derive


def config() -> Config:
    return derive("stdmoe_1b14b_1t", "stdmoe_1b14b_anneal",
                  optimizer=dict(learning_rate=4e-4, schedule="linear", warmup_steps=0, final_fraction=0.0),
                  train=dict(steps=250_339, init_from="runs/stdmoe_1b14b_1t"))
