"""AdamW and its learning-rate schedules, as published.

Weight decay covers everything (norms and routers too) but the embedding. The published trainer counts a step before
it takes it, so the first step of a warmup of W steps runs at 1/W of the peak, and the last step at the final rate.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emo_jax.config import Config
from emo_jax.moe.routing import module_mask


def learning_rate(config: Config) -> optax.Schedule:
    """The rate as a function of the number of steps already taken (0 for the first step).

    Steps are counted from `optimizer.start_step`: warmup, then `cosine` or `linear` down to `final_fraction` of the
    peak at `train.steps`, or `constant`. An anneal is `linear` from the start step, without warmup.
    """
    o = config.optimizer
    start = max(o.start_step, 0)
    decay_steps = max(config.train.steps - start - o.warmup_steps, 1)

    def decayed(step, shape):
        """`shape` falls from 1 to 0 as its argument, the share of the decay that is over, goes from 0 to 1."""
        share = jnp.clip((step - o.warmup_steps) / decay_steps, 0, 1)
        return o.final_fraction + (1 - o.final_fraction) * shape(share)

    fraction = {
        "cosine": lambda step: decayed(step, lambda share: 0.5 * (1 + jnp.cos(jnp.pi * share))),
        "linear": lambda step: decayed(step, lambda share: 1 - share),
        "constant": jnp.ones_like,
    }[o.schedule]

    def schedule(steps_taken):
        step = jnp.asarray(steps_taken, jnp.float32) + 1 - start
        return o.learning_rate * jnp.where(step < o.warmup_steps, step / max(o.warmup_steps, 1), fraction(step))

    return schedule


def decay_mask(params: dict) -> dict[str, bool]:
    """Which top-level parameters decay, as a prefix of the parameter tree."""
    return {name: name != "embedding" for name in params}


def trained_mask(params: Any, config: Config) -> Any:
    """Which parameters `optimizer.trainable` trains: a tree of bools, and of masks where it is some experts of each layer."""
    trainable, module_LR = config.optimizer.trainable, module_mask(config)

    def trained(path, leaf) -> bool | np.ndarray:
        names = [k.key for k in path]
        router = names[-1] == "router"
        if trainable.startswith("module"):
            if "moe" not in names or (router and trainable == "module_experts"):
                return False
            assert module_LR is not None
            if router:
                return module_LR[:, None]
            return np.pad(module_LR, ((0, 0), (0, config.model.num_shared_experts)))[..., None, None]
        return trainable == "all" or (not router and (trainable == "no_router" or "moe" in names))

    return jax.tree_util.tree_map_with_path(trained, params)


def keep_untrained(config: Config) -> optax.GradientTransformation:
    """Zeroes what must not change. Not `optax.masked`: its state has another tree than that of checkpoints so far."""
    return optax.stateless(lambda updates, params: jax.tree.map(
        lambda u, trained: u if trained is True else jnp.where(trained, u, 0), updates, trained_mask(updates, config)))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales all gradients by min(1, max_norm / (norm + 1e-6)): the 1e-6 is the published one, absent in optax."""

    def scaled(updates, params):
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale, updates)

    return optax.stateless(scaled)


def reset_moments(opt_state: Any) -> Any:
    """The state as of a new optimizer, but for the steps that the schedule counts."""
    adam = lambda part: isinstance(part, optax.ScaleByAdamState)
    return jax.tree.map(lambda part: jax.tree.map(jnp.zeros_like, part) if adam(part) else part, opt_state, is_leaf=adam)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    o = config.optimizer
    steps = (
        clip_by_global_norm(o.clip_norm),
        optax.adamw(learning_rate(config), b1=o.beta1, b2=o.beta2, eps=o.eps, weight_decay=o.weight_decay,
                    mask=decay_mask),
    )
    if o.trainable == "all":
        return optax.chain(*steps)
    return optax.chain(keep_untrained(config), *steps, keep_untrained(config))  # gradients, and weight decay
