"""Checkpoints in the published layout, for tests of `emo_jax.convert` and what builds on it."""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from emo_jax import model, sharding
from emo_jax.checkpoints import checkpoint
from emo_jax.checkpoints.writer import CheckpointWriter
from emo_jax.config import CheckpointConfig
from emo_jax.train.step import init_state

FIXTURES = Path(__file__).parent / "fixtures"


def golden(name: str):
    """(folder of a tiny published checkpoint, its inputs and outputs)."""
    folder = FIXTURES / f"hf_tiny_{name}"
    return folder, dict(np.load(folder / "io.npz"))


def copy(name: str, target: Path, tensors=lambda w: w, **keys) -> Path:
    """A published fixture with other tensors or config keys."""
    folder, _ = golden(name)
    target.mkdir(parents=True)
    weights = tensors(load_file(folder / "model.safetensors"))
    save_file({k: np.ascontiguousarray(v) for k, v in weights.items()}, target / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | keys
    (target / "config.json").write_text(json.dumps(config))
    return target


def save_new(config, out: Path, seed_scale: float = 10.0):
    """A checkpoint of new parameters (scaled up, so that every part matters); (run folder, parameters)."""
    mesh = sharding.single_device_mesh()
    state = init_state(config, mesh)
    state = state._replace(params=jax.tree.map(lambda a: a * seed_scale if a.ndim > 2 else a, state.params))
    writer = CheckpointWriter(out, CheckpointConfig())
    writer.save(0, {"params": state.params, "opt_state": state.opt_state}, config, tokens=0, source={}, position=None)
    writer.close()
    return out, jax.tree.map(np.asarray, state.params)


def open_params(path: Path):
    """(config, mesh, parameters) of a checkpoint on one device."""
    found, mesh = checkpoint.open_checkpoint(path), sharding.single_device_mesh()
    with jax.set_mesh(mesh):
        return found.config, mesh, found.restore_params(mesh)


def rows_of(mesh, tokens, segments=None):
    """A batch for `model.forward`, every row one document unless `segments` say otherwise."""
    B, T = tokens.shape
    return sharding.global_batch(mesh, {
        "tokens": tokens, "segment_ids": np.ones_like(tokens) if segments is None else segments,
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1))})


def forward_pass(config, mesh, allowed=None, everything=False):
    """A jitted (params, batch) -> logits, or (logits, final activations, (inputs of the next layers, routing))."""
    execution = model.Execution.of(config, mesh)

    def forward(params, batch):
        x, layers = model.forward(params, batch, execution, allowed=allowed,
                                  per_layer=lambda x, route, rows: (x, route))
        logits = model.logits(params, x, execution)
        return (logits, x, layers) if everything else logits

    return jax.jit(forward)


def outputs(config, mesh, params, tokens, segments=None, allowed=None):
    """All that `forward_pass` gives, as numpy arrays."""
    with jax.set_mesh(mesh):
        forward = forward_pass(config, mesh, allowed, everything=True)
        return jax.tree.map(np.asarray, forward(params, rows_of(mesh, tokens, segments)))
