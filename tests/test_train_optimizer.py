"""The optimizer against the published recipe: schedule values, decay mask, clipping, and AdamW by hand."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emo_jax.config import Config, OptimizerConfig, TrainConfig
from emo_jax.errors import InputError
from emo_jax.train import optimizer

SCHEDULES = json.loads((Path(__file__).parent / "fixtures" / "lr_schedule.json").read_text())["schedules"]


def config(steps=100, **optimizer_fields):
    return Config(name="test", train=TrainConfig(steps=steps), optimizer=OptimizerConfig(**optimizer_fields))


@pytest.mark.parametrize("golden", SCHEDULES, ids=lambda g: str(g["max_steps"]))
def test_cosine_equals_the_published_values(golden):
    schedule = optimizer.learning_rate(config(
        steps=golden["max_steps"], learning_rate=golden["peak_lr"], warmup_steps=golden["warmup_steps"],
        final_fraction=golden["alpha_f"]))
    ours = schedule(np.array(golden["steps"]) - 1)  # published steps count from 1
    np.testing.assert_allclose(ours, golden["lr"], rtol=3e-6)


def test_anneal_falls_linearly_from_the_checkpoint_to_zero():
    start, steps = 238_419, 11_920
    schedule = optimizer.learning_rate(config(
        steps=start + steps, learning_rate=4e-4, schedule="linear", final_fraction=0.0, warmup_steps=0,
        start_step=start))
    np.testing.assert_allclose(schedule(start), 4e-4 * (1 - 1 / steps), rtol=1e-6)
    np.testing.assert_allclose(schedule(start + steps // 2 - 1), 2e-4, rtol=1e-6)
    assert float(schedule(start + steps - 1)) == 0


def test_linear_and_constant_after_warmup():
    fields = dict(learning_rate=1.0, warmup_steps=10, final_fraction=0.5)
    linear = optimizer.learning_rate(config(steps=110, schedule="linear", **fields))
    np.testing.assert_allclose(linear(np.array([0, 9, 59, 109, 500])), [0.1, 1.0, 0.75, 0.5, 0.5], rtol=1e-6)
    constant = optimizer.learning_rate(config(steps=110, schedule="constant", **fields))
    np.testing.assert_allclose(constant(np.array([0, 9, 59, 109])), [0.1, 1, 1, 1], rtol=1e-6)


def test_start_step_beyond_the_end_is_refused():
    with pytest.raises(InputError, match="optimizer.start_step=100.*train.steps=100"):
        config(steps=100, start_step=100)


def test_adamw_by_hand():
    """Two clipped steps, written out in float64; the embedding does not decay, norms and routers do."""
    c = config(schedule="constant", warmup_steps=0, learning_rate=0.1, weight_decay=0.1)
    tx = optimizer.make_optimizer(c)
    rng = np.random.default_rng(0)
    params = {"embedding": rng.normal(size=4), "layers": {"mlp_norm": rng.normal(size=3)}, "head": rng.normal(size=2)}
    leaves = {"embedding": params["embedding"], "mlp_norm": params["layers"]["mlp_norm"], "head": params["head"]}
    tree = lambda flat: {"embedding": jnp.float32(flat["embedding"]), "head": jnp.float32(flat["head"]),
                         "layers": {"mlp_norm": jnp.float32(flat["mlp_norm"])}}
    state, current = tx.init(tree(leaves)), tree(leaves)
    mean, var = dict.fromkeys(leaves, 0.0), dict.fromkeys(leaves, 0.0)
    for step, size in ((1, 5.0), (2, 0.01)):  # the first gradient is clipped, the second is not
        grads = {k: rng.normal(size=v.shape) * size for k, v in leaves.items()}
        updates, state = tx.update(tree(grads), state, current)
        current = {k: ({"mlp_norm": current[k]["mlp_norm"] + u["mlp_norm"]} if k == "layers" else current[k] + u)
                   for k, u in updates.items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g * min(1.0, 1.0 / (norm + 1e-6))
            mean[k], var[k] = 0.9 * mean[k] + 0.1 * g, 0.95 * var[k] + 0.05 * g * g
            adam = mean[k] / (1 - 0.9**step) / (np.sqrt(var[k] / (1 - 0.95**step)) + 1e-8)
            leaves[k] = leaves[k] - 0.1 * (adam + (0.0 if k == "embedding" else 0.1) * leaves[k])
    for k, expected in leaves.items():
        ours = current["layers"]["mlp_norm"] if k == "mlp_norm" else current[k]
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("trainable, trained", [
    ("all", ["embedding", "gate", "q", "router"]), ("experts", ["gate"]), ("no_router", ["embedding", "gate", "q"])])
def test_what_is_not_trained_stays_and_no_checkpoint_changes_its_form(trainable, trained):
    params = {"embedding": jnp.ones(2), "layers": {"q": jnp.ones(3), "moe": {"gate": jnp.ones(4), "router": jnp.ones(5)}}}
    tx = optimizer.make_optimizer(config(warmup_steps=0, learning_rate=0.1, trainable=trainable))
    state = tx.init(params)
    updates, _ = tx.update(jax.tree.map(lambda p: 3 * p, params), state, params)
    changed = [path[-1].key for path, u in jax.tree_util.tree_leaves_with_path(updates) if u.all()]
    assert sorted(changed) == trained
    assert all(u.all() or not u.any() for u in jax.tree.leaves(updates))  # weight decay moves nothing either
    adamw = (optax.ScaleByAdamState, optax.MaskedState, optax.ScaleByScheduleState)
    fine_tuned = trainable != "all"
    assert [type(s) for s in state] == [optax.EmptyState] * (1 + fine_tuned) + [tuple] + [optax.EmptyState] * fine_tuned
    assert tuple(map(type, state[1 + fine_tuned])) == adamw
