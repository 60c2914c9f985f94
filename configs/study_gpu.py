"""The study of emergent modules on one GPU: emo_small on 655 million tokens a model. Its variants:
emo_jax/study/variants.py.

    bash launch/study.sh --gpu --data.path=LABELLED.jsonl --data.tokenizer=tokenizer.json
"""

from emo_jax.config import Config, derive


def config() -> Config:
    return derive("emo_small", "study_gpu", train=dict(steps=5000, eval_every=0),
                  checkpoint=dict(every=500, keep_last=1, keep_best=0))
