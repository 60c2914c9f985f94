"""Whole parts and multiples, of integers and of arrays of them."""

from __future__ import annotations

from typing import Any


def ceil_div(n: Any, d: int) -> Any:
    """n / d, rounded up."""
    return -(-n // d)


def round_up(n: Any, multiple: int) -> Any:
    """The next multiple at or above n."""
    return ceil_div(n, multiple) * multiple


def equal_parts(n: int, least: int) -> int:
    """The smallest number of equal parts of n that is `least` or more."""
    return next(parts for parts in range(max(least, 1), n + 1) if n % parts == 0)
