"""New checkpoints from parts of others, on disk: one (layer, expert) in memory at a time, no device.

A *part* is (leaf, index): of expert tables one expert of one layer, of other layer parameters one layer, else all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from emo_jax import buckets
from emo_jax import config as config_lib
from emo_jax.checkpoints import description
from emo_jax.checkpoints.checkpoint import Checkpoint, finish_step, require_new, unfinished_step
from emo_jax.checkpoints.store import BitSum, Leaf, ParameterStore, leaf_shapes
from emo_jax.config import Config
from emo_jax.errors import InputError, RunError
from emo_jax.files import AnyPath, copy_file, remove_tree, write_text
from emo_jax.progress import track

TABLES = (("layers", "moe", "gate"), ("layers", "moe", "up"), ("layers", "moe", "down"))
ROUTER = ("layers", "moe", "router")
BATCH_BYTES = 256 << 20  # parts that are committed together

Values = Callable[[Leaf, tuple[int, ...]], np.ndarray]


def store_of(found: Checkpoint) -> ParameterStore:
    return ParameterStore(found.path / "params")


def parts_of(shapes: dict[Leaf, tuple[int, ...]]) -> Iterator[tuple[Leaf, tuple[int, ...]]]:
    for leaf, shape in shapes.items():
        split = 2 if leaf in TABLES else 1 if leaf[0] == "layers" else 0
        yield from ((leaf, index) for index in np.ndindex(*shape[:split]))


def write_checkpoint(out: str | AnyPath, config: Config, values: Values, origin: Checkpoint, made: dict[str, Any]) -> AnyPath:
    """A checkpoint of step 0 that holds parameters only, with the tokenizer of `origin`; returns its step folder.

    `values` gives every part in its new shape. `made` says in `meta` what was done with `origin`.
    """
    target = require_new(out)
    unfinished = unfinished_step(target, "writing")
    remove_tree(unfinished)
    shapes = leaf_shapes(config)
    store, sums = ParameterStore(unfinished / "params"), BitSum(shapes)
    try:
        store.create(shapes)
        batch, size = [], 0
        for leaf, index in track(list(parts_of(shapes)), f"writing {target}", "parts"):
            part = np.ascontiguousarray(values(leaf, index), np.float32)
            if part.shape != shapes[leaf][len(index):]:
                raise RunError(f"{'.'.join(leaf)}{list(index)} has shape {part.shape}, not {shapes[leaf][len(index):]}")
            sums.add(leaf, part)
            batch.append((leaf, index, part))
            size += part.nbytes
            if size >= BATCH_BYTES:
                store.write(batch)
                batch, size = [], 0
        store.write(batch)
        description.write(unfinished, description.describe(
            config, 0, origin.meta["tokens"], origin.meta["source"], sums.checksums(), made=made | {"of": origin.identity()}))
        tokenizer = origin.run / "tokenizer.json"
        if tokenizer.is_file():
            copy_file(tokenizer, target / "tokenizer.json")
        write_text(target / "config.json", config_lib.dumps(config))
        return finish_step(unfinished)
    except (InputError, RunError):
        raise
    except (OSError, *buckets.errors(target)) as e:
        raise RunError(f"writing {target} failed: {e}") from e
