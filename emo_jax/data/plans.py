"""How many rows each block of token files has, where only reading tells: packed documents, or rows that are dropped.

Made once, by all cores, and kept in the cache folder.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from emo_jax.data.documents import hash_text
from emo_jax.files import cache_folder, replacing
from emo_jax.progress import track

_CHUNK = 256  # blocks that a process works on at a time
_ALONE = 2_000  # up to so many blocks are planned without other processes


class RowPlan(NamedTuple):
    counts: np.ndarray  # [blocks] int32: the rows of every block that are kept
    dropped: dict[int, np.ndarray]  # numbers of the rows of a block that are dropped, sorted; most blocks have none


def plan_rows(plan_block: Callable[[int], tuple[int, np.ndarray]], blocks: int, name: str, key: Sequence[object]) -> RowPlan:
    """plan_block: (rows that are kept, numbers of those that are dropped) of a block; picklable. name: of the source. key: all
    that they depend on."""
    path = cache_folder() / "plans" / f"{hash_text(*key)}.npz"
    if not path.is_file():
        chunks = [range(start, min(start + _CHUNK, blocks)) for start in range(0, blocks, _CHUNK)]
        work = _Chunk(plan_block)
        if blocks <= _ALONE:
            made = list(map(work, chunks))
        else:
            with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
                made = list(track(pool.map(work, chunks), f"planning the rows of {name}", f"times {_CHUNK} blocks",
                                  total=len(chunks)))
        counts, where, dropped = (np.concatenate(parts) for parts in zip(*made))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, f".{os.getpid()}.npz") as temporary:  # savez would add the suffix
            np.savez(temporary, counts=counts, where=where, dropped=dropped)
    with np.load(path) as stored:
        where, dropped = stored["where"], stored["dropped"]
        blocks_with, starts = np.unique(where, return_index=True)
        return RowPlan(stored["counts"], dict(zip(blocks_with.tolist(), np.split(dropped, starts[1:]))))


class _Chunk:
    def __init__(self, plan_block: Callable[[int], tuple[int, np.ndarray]]):
        self.plan_block = plan_block

    def __call__(self, blocks: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(counts, block of every dropped row, its number in the block)."""
        found = [self.plan_block(block) for block in blocks]
        where = np.repeat(np.arange(blocks.start, blocks.stop), [len(dropped) for _, dropped in found])
        return (np.array([count for count, _ in found], np.int32), where,
                np.concatenate([dropped for _, dropped in found]).astype(np.int32))
