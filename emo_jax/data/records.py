"""What a record must hold to be a document. `ValueError` says what is wrong; the caller adds the file and the record."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from emo_jax.files import AnyPath

_SHARD = re.compile(r"-\d+-of-\d+$")


def text_of(value: Any, field: str) -> str:
    """The text of a field: a string, or bytes of UTF-8."""
    expected = f"expected a string field {field!r} (data.text_field)"
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise ValueError(f"field {field!r} is not UTF-8 text (byte {e.start} is {value[e.start]:#04x}); "
                             f"{expected}") from None
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} is {_kind(value)}; {expected}")
    if not value:
        raise ValueError(f"field {field!r} is empty; {expected} that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {field!r} holds half of a surrogate pair, which is no character") from None
    return value


def tokens_of(value: Any, field: str) -> np.ndarray:
    """[n] integers: the token ids of a field."""
    expected = f"expected a field {field!r} (data.tokens_field) of token ids"
    if not isinstance(value, (list, np.ndarray)):
        raise ValueError(f"field {field!r} is {_kind(value)}; {expected}")
    if not len(value):
        raise ValueError(f"field {field!r} is empty; {expected} that is not empty")
    try:
        tokens = np.asarray(value)
    except ValueError:  # a list of lists of several lengths
        tokens = np.zeros((0, 0))
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"field {field!r} holds other things than integers; {expected}")
    return tokens


def label_of(value: Any, field: str, default: str, names: tuple[str, ...] = ()) -> str:
    """The label in a field: a string or a number, which may stand for one of `names`; `default` where there is none."""
    if value is None:
        return default
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (dict, list, np.ndarray)):
        raise ValueError(f"field {field!r} (data.label_field) is {_kind(value)}; expected a string")
    if names and not isinstance(value, str) and 0 <= int(value) < len(names):
        return names[int(value)]
    return str(value)


def label_of_file(path: AnyPath) -> str:
    """The label of documents that have none: the file's name without its endings and shard number, or the folder's where
    that says nothing."""
    stem = _SHARD.sub("", path.name.split(".")[0])
    whole = path.resolve() if isinstance(path, Path) else path
    return whole.parent.name if stem in ("", "data", "part") or stem.isdigit() else stem


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
