"""Devices that are not there, as `jax.experimental.topologies` describes them to the compilers of TPUs and of CUDA."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Any

from emo_jax.chips import CHIPS
from emo_jax.errors import InputError, RunError

# Slices by the names they are rented under: v5p counts cores, two a chip; v5e and v6e count chips.
NAMED = {"v5p-64": "v5p:2x4x4", "v5p-128": "v5p:4x4x4", "v5p-256": "v5p:4x4x8", "v5e-256": "v5e:16x16",
         "v6e-256": "v6e:16x16"}
_LIBTPU = {"v5p": "v5", "v5e": "v5e", "v6e": "v6e", "tpu7x": "tpu7x"}
_AXES = {"v5p": 3, "v5e": 2, "v6e": 2, "tpu7x": 3, "h100": 2, "h200": 2}
# NVIDIA's figures for compute capability 9.0, and for the SXM modules.
_HOPPER = """
platform_name: "CUDA" device_description_str: "{name}" dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  memory_bandwidth: {bandwidth} device_memory_size: {memory} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  core_count: 132 fpus_per_core: 128 threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
}}"""
_GPUS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}


def without_devices() -> None:
    """Sets the environment in which these compilers work on a machine without a TPU or GPU. Before JAX starts."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TF_CPP_MIN_LOG_LEVEL="3",
                      TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="")


def parse(name: str, gpus: bool = False) -> tuple[str, tuple[int, ...]]:
    """"v5p:4x4x4" or a name of `NAMED` -> (chip, chips along each torus axis). With `gpus` also "h100:8" or "h100:4x8" ->
    (GPU, (hosts, GPUs of each))."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", NAMED.get(name, name))
    chip = match.group(1) if match else ""
    sizes = tuple(int(n) for n in match.group(2).split("x")) if match else ()
    if chip in _GPUS and len(sizes) == 1:
        sizes = (1, *sizes)
    if len(sizes) != _AXES.get(chip) or (chip in _GPUS and not gpus):
        raise InputError(f"--topology {name!r} must be a chip and its grid, such as v5p:4x4x4, v5e:16x16, v6e:16x16 or "
                         f"tpu7x:4x4x4, or one of {', '.join(NAMED)}"
                         + "; or the GPUs of a host or of several, such as h100:8 or h200:4x8" * gpus)
    return chip, sizes


def devices(name: str, slices: int = 1) -> list:
    """The devices of so many slices, for meshes to compile for."""
    chip, sizes = parse(name, gpus=True)
    if chip in _GPUS:
        return _gpus(name, chip, sizes, slices)
    if importlib.util.find_spec("libtpu") is None:
        raise RunError("compiling for TPU needs the TPU compiler, but no TPU: pip install 'emo-jax[tpu]'")
    # A torus axis wraps around where it is a multiple of 4 chips (16 on the two-dimensional ones).
    wrap = tuple(n % (4 if len(sizes) == 3 else 16) == 0 for n in sizes)
    options: dict[str, Any] = {"chip_config_name": "megacore"} if chip == "v5p" else {}
    if slices > 1:
        options["num_slices"] = slices
    return _describe(name, "tpu", f"{_LIBTPU[chip]}:{'x'.join(map(str, sizes))}", wrap=(*wrap, *(False,) * (3 - len(wrap))),
                     chips_per_host_bounds=(min(2, sizes[0]), min(2, sizes[1]), 1), **options)


def _gpus(name: str, chip: str, sizes: tuple[int, ...], slices: int) -> list:
    if slices > 1:
        raise InputError(f"--slices {slices} is of TPUs; for GPUs of several hosts: --topology {chip}:HOSTSxGPUS")
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise RunError("compiling for a GPU needs the CUDA compiler, but no GPU: pip install 'emo-jax[cuda]'")
    of = CHIPS[chip.upper()]
    target = _HOPPER.format(name=_GPUS[chip], bandwidth=int(of.bandwidth or 0), memory=int(of.memory or 0))
    return _describe(name, "cuda", chip, target_config=target, topology=f"1x{'x'.join(map(str, sizes))}")


def _describe(given: str, platform: str, name: str, **options: Any) -> list:
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices)
    except Exception as e:
        raise InputError(f"--topology {given}: the compiler does not know it ({str(e).splitlines()[0]})") from None
