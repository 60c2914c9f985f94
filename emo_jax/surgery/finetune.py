"""Fine-tuning a subset: the extracted model becomes an ordinary run with a fresh optimizer.

The step is that of pretraining, so experts are balanced over the whole batch of all devices and microbatches
(`router.balance_scope`), not within a device's batch. What is trained is `optimizer.trainable`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from emo_jax.checkpoints.checkpoint import FOLDER, Checkpoint, open_checkpoint, steps
from emo_jax.checkpoints.subset import Subset, require_of
from emo_jax.config import Config, MeshConfig, override
from emo_jax.files import AnyPath, make_folder
from emo_jax.surgery.extract import extract
from emo_jax.train import loop
from emo_jax.train.holder import hold

START = "start"  # the extracted model, in the folder of the run


def finetune_config(small: Config, start: AnyPath, data: str, overrides: Sequence[str]) -> Config:
    """Published settings for fine-tuning on a task, before `overrides`: 5e-5, linear to 0 after 10 % warmup, no weight
    decay, batches of 32 rows."""
    config = dataclasses.replace(
        small, mesh=MeshConfig(),
        optimizer=dataclasses.replace(small.optimizer, learning_rate=5e-5, schedule="linear", final_fraction=0.0,
                                      weight_decay=0.0, warmup_steps=0, start_step=-1),
        train=dataclasses.replace(small.train, steps=100, batch_size=32, microbatches=1, init_from="",
                                  init_params_from=str(start)))
    if data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=data, format="auto",
                                                                      eval_path=""))
    config = override(config, list(overrides))
    if not any("optimizer.warmup_steps" in item for item in overrides):
        config = override(config, [f"optimizer.warmup_steps={max(config.train.steps // 10, 1)}"])
    return config


def finetune(found: Checkpoint, subset: Subset, out: str | AnyPath, data: str = "", overrides: Sequence[str] = (),
             evaluations: Iterable = ()) -> dict[str, Any]:
    """Extracts into `out`/start and trains into `out`, going on from what is there; returns what `loop.train` does."""
    with hold(folder := make_folder(out)) as holder:
        require_of(subset, found)
        start = folder / START
        if not steps(start / FOLDER):
            extract(found, subset, start)
        small = open_checkpoint(start)
        subset.save(folder / "subset.json")
        tokenizer = folder / "tokenizer.json"
        if not tokenizer.exists() and (start / "tokenizer.json").exists():
            tokenizer.write_bytes((start / "tokenizer.json").read_bytes())
        return loop.train_held(finetune_config(small.config, start, data, overrides), folder, evaluations, holder)
