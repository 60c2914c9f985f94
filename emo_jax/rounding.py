"""Whole parts and multiples, of integers and of arrays of them."""

from __future__ import annotations


def ceil_div(n, d: int):
    """n / d, rounded up."""
    return -(-n // d)


def round_up(n, multiple: int):
    """The next multiple at or above n."""
    return ceil_div(n, multiple) * multiple
