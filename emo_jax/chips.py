"""Peak rates of the chips: for MFU while training, and the only numbers of `emo-jax compile`'s roofline that do not come
from the compiled program.

TPU FLOP rates: cloud.google.com/tpu/docs/{v4,v5p,v5e,v6e,tpu7x}. Memory sizes: what the TPU compiler lets a
program have. Memory bandwidth and link rates: the
hardware tables of jax-ml.github.io/scaling-book, whose link rates are what one-directional transfers reach (90 GB/s a
direction on v5p and v6e, 45 on v5e), and for tpu7x its documentation. Network: the same pages of cloud.google.com (50 Gbit/s a
chip of v5p; of a pod of 256 chips 6.4 Tbit/s for v5e, 25.6 for v6e). GPUs: NVIDIA's product pages (SXM, dense
bf16). A JAX device is a chip; of a tpu7x it is one of two cores, with half of everything.
"""

from __future__ import annotations

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    flops: float  # dense bf16 FLOP/s
    memory: float | None = None  # bytes; None, here and below: the chip has no roofline
    bandwidth: float | None = None  # bytes/s of that memory
    link: float | None = None  # bytes/s of a ring along one torus axis, both directions together
    clock: float | None = None  # Hz, of the compiler's cycle estimates; None: not published
    network: float | None = None  # bytes/s of the data center's network between slices
    devices: int = 1  # JAX devices of a chip


CHIPS = {
    "v5p": Chip(459e12, 95.74 * GIB, 2.765e12, 1.8e11, 1.75e9, 6.25e9),
    "v5e": Chip(197e12, 15.75 * GIB, 8.1e11, 0.9e11, 1.5e9, 3.125e9),
    "v6e": Chip(918e12, 31.25 * GIB, 1.6e12, 1.8e11, 1.75e9, 12.5e9),
    "tpu7x": Chip(1153.5e12, 94.75 * GIB, 3.7e12, 1.8e11, devices=2),
    "v4": Chip(275e12),
    "B200": Chip(2250e12), "A100": Chip(312e12),
    "H200": Chip(989e12, 141e9, 4.8e12), "H100": Chip(989e12, 80e9, 3.35e12),
}
WITHOUT_SPARSE_CORES = ("v5e",)  # of the TPUs with links: nothing runs collectives beside the computation
# The first one found in `device_kind` counts, so longer names come first.
_DEVICE_KINDS = {"TPU7x": "tpu7x", "TPU v6": "v6e", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v4": "v4",
                 "B200": "B200", "H200": "H200", "H100": "H100", "A100": "A100"}


def chip_name(device_kind: str) -> str | None:
    """The chip of `CHIPS` that a `jax.Device.device_kind` names, if any."""
    return next((chip for kind, chip in _DEVICE_KINDS.items() if kind.lower() in device_kind.lower()), None)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one JAX device of this kind, where known."""
    name = chip_name(device_kind)
    return CHIPS[name].flops if name else None
