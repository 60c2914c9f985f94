"""Programs that are compiled once: kept between processes, and within one for all configs that they are the same for."""

from __future__ import annotations

import dataclasses

import jax

from emo_jax import machine
from emo_jax.config import CheckpointConfig, Config, DataConfig, FaultsConfig
from emo_jax.files import AnyPath, cache_folder, given_path


def keep_programs(folder: str | AnyPath = "") -> None:
    """Keeps what is compiled from now on in `folder` (may be in a bucket; "": `cache_folder() / "compiled"`). A folder that JAX
    was given before (JAX_COMPILATION_CACHE_DIR) stays."""
    if jax.config.jax_compilation_cache_dir:  # ty: ignore[missing-attribute]
        return
    place = given_path(folder, "train.compilation_cache") if folder else cache_folder() / "compiled"
    if jax.default_backend() == "cpu":  # XLA compiles for the processor it runs on, and folders are shared and moved
        place = place / machine.code_key()
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a first answer is many small programs
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def program_config(config: Config) -> Config:
    """`config` with the defaults of what no program of a step depends on: documents, checkpoints, intervals. What is traced for
    it is what would be traced for `config`, so that runs in one process share it."""
    t, o = config.train, config.optimizer
    timeless = o.schedule == "constant" and not config.router.pool_grows and config.router.pool_off_from == 1
    steps = max(o.start_step, 0) + 1 if timeless else t.steps
    train = dataclasses.replace(t, steps=steps, log_every=1, eval_every=0, eval_rows=1, eval_subsets=False,
                                eval_tasks="", init_params_from="", init_moments=False, init_from="", batch_ramp="",
                                compilation_cache="", profile_steps="", trackers="")
    data = DataConfig(sequence_length=config.data.sequence_length, max_documents_per_row=config.data.max_documents_per_row,
                      general_every=config.data.general_every)
    faults = FaultsConfig(skip_sigma=config.faults.skip_sigma)
    return dataclasses.replace(config, name="program", data=data, train=train, checkpoint=CheckpointConfig(), faults=faults,
                               stages=())
