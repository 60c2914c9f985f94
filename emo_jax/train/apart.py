"""A training step taken apart: the loss of every row, and the gradients, which the step itself does not show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emo_jax import model
from emo_jax.config import Config
from emo_jax.sharding import BATCH, reshard
from emo_jax.train.step import Batch, Objective, Totals, over_microbatches, split_rows


class Apart(NamedTuple):
    rows: Float[Array, "B T"]  # nats of every token that has a loss
    gradients: model.Params


def take_apart(config: Config, mesh: jax.sharding.Mesh, eos_id: int = -1) -> Callable[..., Apart]:
    """(params, batch, steps taken so far) -> `Apart`, to be traced. One forward pass more than the gradients need."""
    execution, M = model.Execution.of(config, mesh, eos_id), config.train.microbatches

    def apart(params: Any, batch: Batch, step: Int[Array, ""]) -> Apart:
        objective = Objective(execution, Totals.of(batch), step)
        _, gradients = over_microbatches(objective, params, batch, M)

        def rows(part: Batch) -> Any:
            x_BTD, _ = objective.forward(params, part, None)
            return model.loss_sums(params, x_BTD, part["targets"], part["loss_weights"], execution, True)[3]

        if M == 1:
            return Apart(rows(batch), gradients)
        nats_MbT = jax.lax.map(rows, {name: split_rows(a, M) for name, a in batch.items()})
        nats_bMT = reshard(jnp.moveaxis(nats_MbT, 0, 1), BATCH, None, None)
        return Apart(nats_bMT.reshape(batch["tokens"].shape, out_sharding=jax.typeof(batch["tokens"]).sharding.spec), gradients)

    return apart


def to_compare(apart: Apart) -> dict[str, Any]:
    """What two computations of the same step are compared by: the rows' losses, which each device has of its own rows before
    anything is summed over devices, and the gradients."""
    return apart.gradients | {ROWS: jnp.sum(apart.rows, axis=1)}


ROWS = "loss of its rows"
