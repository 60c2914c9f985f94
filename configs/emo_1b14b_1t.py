"""EMO 1B/14B, 1T tokens: 128 experts, 8 active of which 1 shared, document pools of 8 to 128 routed experts.

    emo-jax train emo_1b14b_1t --out runs/emo_1b14b_1t --data.path=TOKENIZED_OR_TEXT --data.tokenizer=dolma2/tokenizer.json

13.57B parameters, 1.49B active; 238,419 steps of 4.19M tokens. Expected (published, 130B run): cross entropy 3.36 at step
1000, 2.79 at step 5000. Fill the batch with `--train.microbatches` where 1024 rows do not fit.
"""

from emo_jax.config import CheckpointConfig, Config, TrainConfig


def config() -> Config:
    return Config(name="emo_1b14b_1t", train=TrainConfig(steps=238_419, eval_every=2500),
                  checkpoint=CheckpointConfig(every=100, keep_every=20_000))
