"""Devices of a TPU slice that is not there, as `jax.experimental.topologies` describes them to the TPU compiler."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Any

from emo_jax.errors import InputError, RunError

# Slices by the names they are rented under: v5p counts cores, two a chip; v5e and v6e count chips.
NAMED = {"v5p-64": "v5p:2x4x4", "v5p-128": "v5p:4x4x4", "v5p-256": "v5p:4x4x8", "v5e-256": "v5e:16x16",
         "v6e-256": "v6e:16x16"}
_LIBTPU = {"v5p": "v5", "v5e": "v5e", "v6e": "v6e", "tpu7x": "tpu7x"}
_AXES = {"v5p": 3, "v5e": 2, "v6e": 2, "tpu7x": 3}


def without_tpu() -> None:
    """Sets the environment in which libtpu compiles on a machine without one. Before JAX starts."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TF_CPP_MIN_LOG_LEVEL="3",
                      TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="")


def parse(name: str) -> tuple[str, tuple[int, ...]]:
    """"v5p:4x4x4" or a name of `NAMED` -> (chip, chips along each torus axis)."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", NAMED.get(name, name))
    chip = match and match.group(1)
    sizes = tuple(int(n) for n in match.group(2).split("x")) if match else ()
    if chip not in _LIBTPU or len(sizes) != _AXES[chip]:
        raise InputError(f"--topology {name!r} must be a chip and its grid, such as v5p:4x4x4, v5e:16x16, v6e:16x16 or "
                         f"tpu7x:4x4x4, or one of {', '.join(NAMED)}")
    return chip, sizes


def devices(name: str, slices: int = 1) -> list:
    """The devices of so many slices, for meshes to compile for."""
    chip, sizes = parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise RunError("compiling for TPU needs the TPU compiler, but no TPU: pip install 'emo-jax[tpu]'")
    from jax.experimental import topologies

    # A torus axis wraps around where it is a multiple of 4 chips (16 on the two-dimensional ones).
    wrap = tuple(n % (4 if len(sizes) == 3 else 16) == 0 for n in sizes)
    options: dict[str, Any] = {"chip_config_name": "megacore"} if chip == "v5p" else {}
    bounds = (min(2, sizes[0]), min(2, sizes[1]), 1)
    if slices > 1:
        options["num_slices"] = slices
    try:
        slice_ = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{_LIBTPU[chip]}:{'x'.join(map(str, sizes))}", chips_per_host_bounds=bounds,
            wrap=(*wrap, *(False,) * (3 - len(wrap))), **options)
    except Exception as e:
        raise InputError(f"--topology {name}: the TPU compiler does not know it ({str(e).splitlines()[0]})") from None
    return list(slice_.devices)
