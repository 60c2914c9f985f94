"""Peak rates of the chips: the only numbers of a roofline that do not come from the compiled program.

FLOP rates and memory sizes: cloud.google.com/tpu/docs/{v5p,v5e,v6e,tpu7x}. Memory bandwidth and link rates: the hardware
tables of jax-ml.github.io/scaling-book, whose link rates are what one-directional transfers reach (90 GB/s a direction on
v5p and v6e, 45 on v5e), and for tpu7x its documentation. A JAX device is a chip; of a tpu7x it is one of two cores, with
half of everything.
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    flops: float  # dense bf16 FLOP/s
    memory: float  # bytes
    bandwidth: float  # of that memory, bytes/s
    link: float  # bytes/s of a ring along one torus axis, both directions together
    axes: int  # torus axes
    clock: float | None  # Hz, of the compiler's cycle estimates; None: not published


CHIPS = {
    "v5p": Chip(459e12, 95.74e9, 2.765e12, 1.8e11, 3, 1.75e9),
    "v5e": Chip(197e12, 16e9, 8.1e11, 0.9e11, 2, 1.5e9),
    "v6e": Chip(918e12, 32e9, 1.6e12, 1.8e11, 2, 1.75e9),
    "tpu7x": Chip(1153.5e12, 96e9, 3.7e12, 1.8e11, 3, None),
}
_DEVICE_KINDS = {"TPU v5": "v5p", "TPU v5p": "v5p", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6 lite": "v6e",
                 "TPU v6e": "v6e", "TPU7x": "tpu7x"}


def chip_name(device_kind: str) -> str | None:
    return _DEVICE_KINDS.get(device_kind)
