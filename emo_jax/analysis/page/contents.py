"""What `emo-jax analyze` left in a folder, as the page reads it."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emo_jax.errors import InputError
from emo_jax.files import reason


class Contents(NamedTuple):
    found: dict[str, Any]  # analysis.json; null where a number is not finite
    arrays: Mapping[str, np.ndarray]  # documents.npz

    def strongest_cluster(self, model: int) -> np.ndarray:
        """int [D]: the cluster that has most tokens of a document; -1 for a document whose text is not here."""
        clusters, starts = self.arrays[f"clusters_{model}"], self.arrays["starts"]
        most = np.full(self.found["data"]["documents"], -1)
        for document, low, high in zip(self.arrays["shown"], starts, starts[1:]):
            if high > low:
                most[document] = np.bincount(clusters[low:high]).argmax()
        return most


def read(folder: Path) -> Contents:
    """Raises `InputError` for a folder that `emo-jax analyze` did not finish."""
    try:
        found = json.loads((folder / "analysis.json").read_text())
        with np.load(folder / "documents.npz") as file:
            arrays = dict(file)
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        raise InputError(f"{folder} is not what emo-jax analyze writes ({reason(e)}); run it again with "
                         f"--out {folder}") from None
    return Contents(_short(found), arrays)


def _short(value: Any) -> Any:
    """Five digits are enough for a reader, and half the bytes."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _short(v) for key, v in value.items()}
    return [_short(v) for v in value] if isinstance(value, list) else value
