"""The study of emergent modules on a laptop CPU: emo_tiny on two million tokens. Its variants:
emo_jax/study/variants.py.

    bash launch/study.sh --data.path=LABELLED.jsonl
"""

from emo_jax.config import Config, derive


def config() -> Config:
    return derive("emo_tiny", "study_cpu", model=dict(vocab_size=2048), data=dict(workers=0),
                  train=dict(steps=500, eval_every=0, log_every=50), checkpoint=dict(every=250, keep_last=1, keep_best=0))
