"""The parameters of a checkpoint on disk, read and written in parts: no device, no mesh, no whole array in memory.

They are Zarr arrays in one OCDBT database, as Orbax lays them out: expert tables in one chunk per layer and expert,
other layer parameters in one per layer, the embedding and the head in pieces.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from emo_jax import buckets, model
from emo_jax.config import Config
from emo_jax.files import AnyPath

Leaf = tuple[str, ...]
PIECE_BYTES = 64 * 2**20  # what is not split by layers is written in such pieces


def leaf_shapes(config: Config) -> dict[Leaf, tuple[int, ...]]:
    """Every parameter array of a model by its place in the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(model.abstract_params(config))
    return {tuple(k.key for k in path): leaf.shape for path, leaf in leaves}


class ParameterStore:
    """The folder of a `params` item."""

    def __init__(self, folder: AnyPath):
        self.folder = folder
        self._base = buckets.kvstore(f"{folder}/") if buckets.is_url(folder) else f"file://{folder}/"
        self._arrays: dict[Leaf, ts.TensorStore] = {}
        # Keeps the index of the database, so that it is read once, and no more than this of anything else.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 64 << 20}})

    def create(self, shapes: dict[Leaf, tuple[int, ...]]) -> None:
        """Declares fp32 arrays; what is already there stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leaf, shape in shapes.items():
            split = {3: 1, 4: 2 if "moe" in leaf else 1}.get(len(shape), 1 if leaf[0] == "layers" else 0)
            chunks = [1] * split + list(shape[split:])
            if not split:
                chunks[0] = max(1, min(shape[0], PIECE_BYTES // (4 * int(np.prod(shape[1:])))))
            self._arrays[leaf] = ts.open(
                self._spec(leaf) | {"metadata": {
                    "shape": list(shape), "chunks": chunks, "dtype": "<f4", "fill_value": None, "order": "C",
                    "compressor": {"id": "zstd", "level": 1}, "filters": None, "dimension_separator": "."}},
                create=True, open=True, context=self._context).result()
        self._write_metadata(shapes)

    def write(self, parts: Iterable[tuple[Leaf, tuple, np.ndarray]]) -> None:
        """Writes (array, index, values) parts and commits them together; large ones piece by piece, for memory."""
        transaction = ts.Transaction()
        for leaf, index, values in parts:
            if index or values.nbytes <= PIECE_BYTES:
                self._array(leaf).with_transaction(transaction)[index].write(values).result()
                continue
            rows: Any = self._array(leaf).chunk_layout.write_chunk.shape[0]  # ty: ignore[not-subscriptable]  zarr has it
            for start in range(0, len(values), rows):
                piece = values[start : start + rows]
                self._array(leaf)[start : start + len(piece)].write(piece).result()
        transaction.commit_async().result()

    def read(self, leaf: Leaf, index: tuple) -> np.ndarray:
        return self._array(leaf)[index].read().result()

    def read_many(self, leaf: Leaf, indices: Iterable[tuple], at_once: int = 64) -> Iterator[np.ndarray]:
        """The parts in order, with so many reads under way."""
        array, under_way = self._array(leaf), collections.deque()
        for index in indices:
            under_way.append(array[index].read())
            if len(under_way) == at_once:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

    def _array(self, leaf: Leaf) -> ts.TensorStore:
        if leaf not in self._arrays:
            self._arrays[leaf] = ts.open(self._spec(leaf), open=True, context=self._context).result()
        return self._arrays[leaf]

    def _spec(self, leaf: Leaf) -> dict[str, Any]:
        return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": self._base,
                                              "path": ".".join(leaf) + "/"}}

    def _write_metadata(self, shapes: dict[Leaf, tuple[int, ...]]) -> None:
        """What Orbax reads to learn the tree."""
        tree = {str(leaf): {
            "key_metadata": [{"key": key, "key_type": 2} for key in leaf],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)},
        } for leaf, shape in shapes.items()}
        (self.folder / "_METADATA").write_text(json.dumps({
            "tree_metadata": tree, "use_ocdbt": True, "use_zarr3": False, "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None}))


class BitSum:
    """The checksum of `emo_jax.checkpoints.checkpoint.checksums`, from parts of the leaves in any order."""

    def __init__(self, leaves: Iterable[Leaf], total: int = 0, finite: bool = True):
        self._weight = {leaf: 2 * i + 1 for i, leaf in enumerate(sorted(leaves))}
        self.total, self.finite = total, finite

    def checksums(self) -> dict[str, dict[str, Any]]:
        """As `meta` holds them, for a checkpoint of parameters only."""
        return {"params": {"sum": self.total, "finite": self.finite}}

    def add(self, leaf: Leaf, part: np.ndarray) -> None:
        step = max(1, PIECE_BYTES * len(part) // max(part.nbytes, 1))
        for start in range(0, len(part), step):
            piece = np.ascontiguousarray(part[start : start + step])
            bits = int(piece.view(np.uint32).sum(dtype=np.uint64)) * self._weight[leaf]
            self.total = (self.total + bits) % 2**32
            self.finite = self.finite and bool(np.isfinite(piece).all())
