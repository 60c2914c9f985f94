"""Steps that are not taken: the rule, inside the jitted step, and the numbers of the last steps that it needs.

The rule is the published `SkipStepOptimizer`'s: a step is skipped when its loss or its gradient norm is more than
`faults.skip_sigma` standard deviations above the mean of the last WINDOW steps, as soon as half of them are there. Other than
published, a value that is not finite is always skipped and does not enter the window, where it would be the mean from then on.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from emo_jax.config import Config

WINDOW = 128  # steps
# Uniform guesses over a vocabulary of V have a loss of ln(V). A model gets above that, but not by half, unless it has diverged:
# it is then sure of the wrong tokens.
DIVERGED = 1.5


class Recent(NamedTuple):
    """The last WINDOW steps with finite numbers, as rings: entry `count` % WINDOW is the oldest, and written next."""

    loss: Float[Array, "window"]
    grad_norm: Float[Array, "window"]
    count: Int[Array, ""]  # of values that have entered
    skipped: Int[Array, ""]  # the last so many steps, in a row
    diverged: Int[Array, ""]  # the last so many steps, in a row, had a loss above DIVERGED ln(V), and above the window's oldest


class Verdict(NamedTuple):
    """On one step; all of them numbers, which leave the devices as one array."""

    skipped: Any
    skipped_in_a_row: Any  # with this one
    diverged_in_a_row: Any
    loss_mean: Any  # of the window before the step; 0 where it is empty
    loss_std: Any
    grad_norm_mean: Any
    grad_norm_std: Any


def nothing_yet() -> Recent:
    zero = jnp.zeros((), jnp.int32)
    return Recent(jnp.zeros(WINDOW), jnp.zeros(WINDOW), zero, zero, zero)


def judge(recent: Recent, loss: Float[Array, ""], grad_norm: Float[Array, ""],
          config: Config) -> tuple[Bool[Array, ""], Recent, Float[Array, "numbers"]]:
    """(whether the step is taken, the steps with this one, its `Verdict`)."""
    kept = jnp.minimum(recent.count, WINDOW)
    entry = jnp.arange(WINDOW)

    def statistics(values):
        """Mean and standard deviation, as of a sample."""
        mean = jnp.sum(jnp.where(entry < kept, values, 0)) / jnp.maximum(kept, 1)
        return mean, jnp.sqrt(jnp.sum(jnp.where(entry < kept, (values - mean) ** 2, 0)) / jnp.maximum(kept - 1, 1))

    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    spikes, numbers = jnp.bool_(False), []
    for value, values in ((loss, recent.loss), (grad_norm, recent.grad_norm)):
        mean, std = statistics(values)
        spikes |= value - mean > config.faults.skip_sigma * std
        numbers += [mean, std]
    taken = finite
    if config.faults.skip_sigma:
        taken &= ~spikes | (recent.count + 1 < WINDOW // 2)  # published: half of the window, with this step

    oldest = jnp.sum(jnp.where(entry == jnp.where(recent.count > WINDOW, recent.count % WINDOW, 0), recent.loss, 0))
    worse = (loss > DIVERGED * math.log(config.model.vocab_size)) & (loss > oldest) & (recent.count > 0)
    enters = finite & (loss > 0)  # where no token has a loss, there is nothing to compare with

    def entered(values, value):
        return jnp.where(enters & (entry == recent.count % WINDOW), value, values)

    after = Recent(entered(recent.loss, loss), entered(recent.grad_norm, grad_norm), recent.count + enters,
                   jnp.where(taken, 0, recent.skipped + 1), jnp.where(worse, recent.diverged + 1, 0))
    verdict = Verdict(~taken, after.skipped, after.diverged, *numbers)
    return taken, after, jnp.stack([jnp.asarray(x, jnp.float32) for x in verdict])


def taken_or_not(taken: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Parameters and optimizer state after the step: `new`, or bit for bit `old`, in the same pass over them. What the schedule
    counts are the steps of the run, and goes on."""
    counter = lambda part: isinstance(part, optax.ScaleByScheduleState)
    return jax.tree.map(
        lambda a, b: a if counter(a) else jnp.where(taken, a, b), new, old, is_leaf=counter)


# ---- in checkpoints -------------------------------------------------------------------------------------------------


def to_json(recent: Recent) -> dict[str, Any]:
    """Exact: a float32 survives JSON."""
    values = jax.device_get(recent)
    kept = min(int(values.count), WINDOW)
    rings = {name: getattr(values, name)[:kept].tolist() for name in ("loss", "grad_norm")}
    return rings | {name: int(getattr(values, name)) for name in ("count", "skipped", "diverged")}


def from_json(saved: dict[str, Any] | None, shardings: Recent) -> Recent:
    """None: of a checkpoint that has none. shardings: a tree of arrays or `jax.ShapeDtypeStruct`s that have them."""
    values = jax.tree.map(np.array, jax.device_get(nothing_yet()))
    if saved:
        for name in ("loss", "grad_norm"):
            getattr(values, name)[:len(saved[name])] = saved[name]
        values = values._replace(**{name: np.int32(saved[name]) for name in ("count", "skipped", "diverged")})
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), values, shardings)
