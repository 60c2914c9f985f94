"""emo_1b14b_1t with document pools off for the last 5 % of training, so that the full model ends as it is used.

    emo-jax train emo_1b14b_pools_off --out runs/emo_1b14b_pools_off --data.path=... --data.tokenizer=...

The Olmo 3.5 runs train so: pools in pretraining, none in mid-training and after. The learning rate goes on by its schedule.
"""

from emo_jax.config import Config, Stage, derive

OFF_FROM = 226_498  # of 238,419 steps


def config() -> Config:
    return derive("emo_1b14b_1t", "emo_1b14b_pools_off",
                  stages=(Stage(until=OFF_FROM), Stage(changes=("router.document_pool=false",))))
