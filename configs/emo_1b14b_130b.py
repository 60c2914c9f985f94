"""EMO 1B/14B, 130B tokens (30,995 steps of 4.19M).

    emo-jax train emo_1b14b_130b --out runs/emo_1b14b_130b --data.path=... --data.tokenizer=...

Expected (published): cross entropy 3.36 at step 1000, 2.79 at step 5000, 2.45 at the end.
"""

from emo_jax.config import Config, derive


def config() -> Config:
    return derive("emo_1b14b_1t", "emo_1b14b_130b", train=dict(steps=30_995, eval_every=250),
                  checkpoint=dict(keep_every=5000))
