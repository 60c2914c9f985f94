"""Reading the kept experts alone, straight from the whole checkpoint.

Expert tables are stored in one chunk per layer and expert: what is not kept is neither read nor held in memory.
"""

from __future__ import annotations

import jax
import numpy as np

from emo_jax import sharding
from emo_jax.checkpoints.checkpoint import Checkpoint
from emo_jax.checkpoints.description import DamagedCheckpoint
from emo_jax.checkpoints.rewrite import ROUTER, TABLES, store_of
from emo_jax.checkpoints.store import Leaf, ParameterStore, leaf_shapes
from emo_jax.checkpoints.subset import Subset, require_of
from emo_jax.config import Config
from emo_jax.model import Params
from emo_jax.surgery.extract import router_columns, row_of, subset_config


def load_subset(found: Checkpoint, subset: Subset, mesh: jax.sharding.Mesh | None = None) -> tuple[Config, Params]:
    """(config, parameters) of the smaller model, on `mesh` or on one device; equal to extracting and restoring it.

    A process reads the experts of its own devices only. Raises `InputError` if the subset is of another model.
    """
    require_of(subset, found)
    config = subset_config(found.config, subset)
    mesh = mesh or sharding.single_device_mesh()
    store, shapes = store_of(found), leaf_shapes(config)
    tree: Params = {}
    for leaf, shape in shapes.items():
        placed = jax.sharding.NamedSharding(mesh, sharding.parameter_spec(leaf))
        node = tree
        for name in leaf[:-1]:
            node = node.setdefault(name, {})
        node[leaf[-1]] = _leaf(store, leaf, shape, placed, subset, found)
    return config, tree


def _leaf(store: ParameterStore, leaf: Leaf, shape, placed, subset: Subset, found: Checkpoint) -> jax.Array:
    try:
        if leaf in TABLES:
            first, values = _experts(store, leaf, shape, placed, subset)
        else:
            first, values = 0, store.read(leaf, ())
    except ValueError as e:
        raise DamagedCheckpoint(f"checkpoint {found.path}: params.{'.'.join(leaf)} cannot be read ({e})") from None
    if leaf == ROUTER:
        values = np.stack([router_columns(router, subset, layer) for layer, router in enumerate(values)])
    if leaf not in TABLES:
        return jax.make_array_from_callback(shape, placed, lambda index: values[index])

    def part(index):
        rows = range(*index[1].indices(shape[1]))
        return values[index[0], rows.start - first:rows.stop - first, *index[2:]]

    return jax.make_array_from_callback(shape, placed, part)


def _experts(store: ParameterStore, leaf: Leaf, shape, placed, subset: Subset) -> tuple[int, np.ndarray]:
    """(first row, values [L, rows, ., .]) of the rows of the smaller table that this process's devices hold."""
    rows = [range(*index[1].indices(shape[1])) for index in placed.addressable_devices_indices_map(shape).values()]
    first, last = min(r.start for r in rows), max(r.stop for r in rows)
    values = np.zeros((shape[0], last - first, *shape[2:]), np.float32)
    wanted = [(layer, row, source) for layer in range(shape[0]) for row in range(first, last)
              if (source := row_of(subset, layer, row)) is not None]
    parts = store.read_many(leaf, [(layer, source) for layer, _, source in wanted])
    for (layer, row, _), part in zip(wanted, parts):
        values[layer, row - first] = part
    return first, values
