"""Fine-tuning the experts of a subset, alone or inside the whole model.

Alone, the extracted model becomes an ordinary run. Inside, the run is one of the whole model: the pool of every document of
the task holds the subset (`router.module`), and so many of the other experts as are drawn for the document, from none to all.
So the subset learns its part among all the others, and what it gains, the whole model gains. A quarter of the rows are of
general documents, on which the model may not diverge from the one it was; what the defaults rest on is in `study/README.md`.
The step is that of pretraining, so experts are balanced over the whole batch of all devices and microbatches
(`router.balance_scope`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from emo_jax.checkpoints.checkpoint import FOLDER, Checkpoint, open_checkpoint, steps
from emo_jax.checkpoints.subset import Subset, require_of
from emo_jax.config import Config, MeshConfig, override
from emo_jax.data.order import labels_but
from emo_jax.data.sources import open_source
from emo_jax.files import AnyPath, copy_file, make_folder
from emo_jax.surgery.extract import extract
from emo_jax.train import loop
from emo_jax.train.holder import hold

START = "start"  # the extracted model, in the folder of the run
GENERAL_EVERY, DIVERGENCE_WEIGHT = 4, 2.0  # inside


def finetune_config(found: Config, start: AnyPath, data: str, label: str, overrides: Sequence[str], general: bool) -> Config:
    """Published settings for fine-tuning on a task, before `overrides`: 5e-5, linear to 0 after 10 % warmup, no weight
    decay, batches of 32 rows. `general`: with general documents, those of `found`, and the penalty on the divergence."""
    config = dataclasses.replace(
        found, mesh=MeshConfig(), stages=(),
        optimizer=dataclasses.replace(found.optimizer, learning_rate=5e-5, schedule="linear", final_fraction=0.0,
                                      weight_decay=0.0, warmup_steps=0, start_step=-1),
        train=dataclasses.replace(found.train, steps=100, batch_size=32, batch_ramp="", microbatches=1, init_from="",
                                  init_params_from=str(start)))
    if data or label:
        d = found.data
        config = dataclasses.replace(config, data=dataclasses.replace(
            d, path=data or d.path, format="auto", eval_path="", leave_out_labels="", mixture="", order="blocks"))
        if general:
            config = dataclasses.replace(
                config, train=dataclasses.replace(config.train, divergence_weight=DIVERGENCE_WEIGHT),
                data=dataclasses.replace(config.data, general_every=GENERAL_EVERY, general_path=d.path,
                                         general_leave_out_labels=d.leave_out_labels))
    config = override(config, list(overrides))
    if label:
        others = labels_but(open_source(config.data), label)
        config = override(config, [f"data.leave_out_labels={','.join(others)}"])
    if not any("optimizer.warmup_steps" in item for item in overrides):
        config = override(config, [f"optimizer.warmup_steps={max(config.train.steps // 10, 1)}"])
    return config


def inside_config(whole: Config, subset: Subset) -> Config:
    """The whole model with the subset in every pool."""
    m, sizes = whole.model, [len(ids) for ids in subset.kept]
    router = dataclasses.replace(
        whole.router, document_pool=True, module=tuple(" ".join(map(str, ids)) for ids in subset.kept),
        pool_min=max(m.routed_top_k - min(sizes), 0), pool_max=m.num_routed_experts - max(sizes),
        pool_distribution="uniform", pool_free=0.0, pool_grows=False, pool_off_from=1.0)
    return dataclasses.replace(whole, name=f"{whole.name}-module", router=router)


def finetune(found: Checkpoint, subset: Subset | None, out: str | AnyPath, data: str = "", overrides: Sequence[str] = (),
             evaluations: Iterable = (), *, alone: bool = False, label: str = "") -> dict[str, Any]:
    """Trains into `out`, going on from what is there; returns what `loop.train` does. `alone`: the model that is extracted into
    `out`/start, else the whole one; without a subset, all of that. `label`: only documents of that label."""
    with hold(folder := make_folder(out)) as holder:
        start, base = found.path, found.config
        if subset is not None:
            require_of(subset, found).save(folder / "subset.json")
        if subset is not None and alone:
            start = folder / START
            if not steps(start / FOLDER):
                extract(found, subset, start)
            base = open_checkpoint(start).config
        elif subset is not None:
            base = inside_config(base, subset)
        tokenizer, given = folder / "tokenizer.json", found.run / "tokenizer.json"
        if not tokenizer.exists() and given.exists():
            copy_file(given, tokenizer)
        return loop.train_held(finetune_config(base, start, data, label, overrides, not alone), folder, evaluations, holder)
