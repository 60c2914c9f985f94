"""Grouped matmul, attention and loss: one choice per platform, each with a plain reference."""

from __future__ import annotations

from typing import NamedTuple


class Kernel(NamedTuple):
    """A choice. Pallas kernels run interpreted where they are not at home: slow, for tests."""

    name: str
    interpret: bool = False

    def __str__(self) -> str:
        return f"{self.name}_interpret" if self.interpret else self.name
