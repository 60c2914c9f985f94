"""`emo-jax export`: a checkpoint -> a folder that other programs load. The formats: `emo_jax.convert.formats`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from emo_jax.checkpoints.checkpoint import Checkpoint, open_checkpoint
from emo_jax.checkpoints.description import DamagedCheckpoint
from emo_jax.checkpoints.store import BitSum, ParameterStore, leaf_shapes
from emo_jax.convert import formats
from emo_jax.convert.importing import HF_FILES, NOTE, ROUTER_ROWS
from emo_jax.convert.layouts import Entry
from emo_jax.convert.tensors import read_json
from emo_jax.errors import InputError
from emo_jax.files import folder_path, list_files, make_folder, remove_tree, replacing
from emo_jax.progress import track

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
SHORT = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # other names of dtypes
DEFAULTS = formats.Options()


def export_checkpoint(path: str, out: str, form: str = "hf", step: int | None = None,
                      options: formats.Options = DEFAULTS) -> dict[str, Any]:
    """Writes the folder `out`, whole or not at all. Raises `InputError`."""
    found, target = open_checkpoint(path, step), folder_path(out)
    chosen = formats.get(form)
    chosen.require(found.config)
    if chosen.needs_subset and not options.subset:
        raise InputError(f"--format {form} needs --subset FILE, the experts that are kept")
    if options.subset and not chosen.needs_subset:
        raise InputError(f"--format {form} writes a whole model; make a model of --subset with `emo-jax subset extract` and "
                         f"export that")
    options = options._replace(dtype=_dtype(options.dtype, found, chosen))
    if target.exists() and any(target.iterdir()):
        raise InputError(f"--out {out} is not an empty folder")
    with replacing(target) as partial:
        remove_tree(partial)
        make_folder(partial)
        written = chosen.write(found, partial, options)
    size = sum(file.size for file in list_files(str(target))[1])
    return {"out": str(target), "checkpoint": str(found.path), "format": form, "dtype": options.dtype, "bytes": size} | written


def _dtype(asked: str, found: Checkpoint, chosen: formats.Format) -> str:
    if asked == "auto":
        note = found.run / HF_FILES / NOTE
        asked = read_json(note).get("dtype", "") if note.is_file() else chosen.dtypes[0]
        if not isinstance(asked, str) or asked not in DTYPES:
            raise InputError(f"{note}: dtype={asked!r} is not that of a published tensor; give --dtype")
        return asked if asked in chosen.dtypes else chosen.dtypes[0]
    asked = SHORT.get(asked, asked)
    if asked not in chosen.dtypes:
        raise InputError(f"--dtype {asked}: this format has {', '.join(chosen.dtypes)}")
    return asked


def arrays(plan: list[Entry], found: Checkpoint) -> Iterator[np.ndarray]:
    """The published form of every planned tensor in turn, float32. When all of the checkpoint has been read, its checksum is
    compared. Raises `DamagedCheckpoint`."""
    store, shapes = ParameterStore(found.path / "params"), leaf_shapes(found.config)
    rows = found.run / HF_FILES / ROUTER_ROWS
    dead_rows = np.load(io.BytesIO(rows.read_bytes())) if rows.is_file() else None
    sums = BitSum(shapes)
    for e in track(plan, f"exporting {found.path}", "tensors"):
        values = None
        if e.leaf:
            try:
                values = store.read(e.leaf, e.index)
            except Exception as error:
                leaf = ".".join(e.leaf)
                raise DamagedCheckpoint(f"checkpoint {found.path}: {leaf} cannot be read ({error})") from None
            sums.add(e.leaf, values)
        tensor = e.to_theirs(values)
        if e.dead_rows and dead_rows is not None:
            tensor = np.concatenate([tensor[: -e.dead_rows], dead_rows[e.index[0]]])
        yield tensor
    complete = not found.config.model.experts_per_layer  # else some experts are in no layer and were not read
    if complete and sums.total != found.meta["checksums"]["params"]["sum"]:
        raise DamagedCheckpoint(f"checkpoint {found.path}: params is not what was saved (its checksum differs)")
