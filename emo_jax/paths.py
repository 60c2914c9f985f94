"""Paths as a person gives them."""

from __future__ import annotations

from pathlib import Path

from emo_jax.errors import InputError


def given_path(given: str | Path, field: str) -> Path:
    """`given` with ~ put in; there may be nothing there. Raises `InputError`, naming `field`, for what cannot be looked at:
    too long a name, a NUL character, the home of nobody, a folder without permission."""
    try:
        path = Path(given).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as e:
        raise InputError(f"{field}={shortened(str(given))!r} cannot be looked up: "
                         f"{getattr(e, 'strerror', None) or e}") from None
    return path


def shortened(text: str, limit: int = 200) -> str:
    """`text`, its middle left out where it is long."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}...({len(text):,} characters)...{text[-half:]}"
