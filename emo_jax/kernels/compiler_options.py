"""XLA options of the training step, by platform, with a reason each: the one place where they are set. `emo-jax config` shows
them. CPU and GPU take none: nothing measured there was worth one."""

from __future__ import annotations

from typing import Any, NamedTuple


class Option(NamedTuple):
    name: str
    value: str
    reason: str


_OFFLOAD, _FUSE = "xla_tpu_enable_sparse_core_collective_offload_", "xla_tpu_enable_async_collective_fusion"
_BESIDE = "runs on the SparseCores, beside the compute, instead of while nothing else does"
_ALL_TPU = (
    Option("xla_enable_async_all_gather", "true", "weights are gathered while the layer before computes"),
    Option("xla_tpu_scoped_vmem_limit_kib", "65536", "blocks of the grouped matmul and of attention take over 16 MiB"),
)
_SPARSE_CORE = (
    *(Option(_OFFLOAD + kind, "true", _BESIDE) for kind in (
        "all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "all_reduce", "ragged_all_to_all")),
    Option(f"{_OFFLOAD}nd_reduce_scatter", "true",
           "over several torus axes too, where XLA else makes a whole all-reduce of it: twice the bytes"),
    Option("xla_tpu_enable_sparse_core_reduce_scatter_v2", "true", "reduce-scatters of all shapes"),
    *(Option(f"{_FUSE}_fuse_{kind}", "false", "the TensorCore's own way of overlapping, which excludes the SparseCore's")
      for kind in ("all_gather", "reduce_scatter", "all_reduce")),
    Option("xla_tpu_use_tc_device_shape_on_sc", "true", "SparseCores take arrays in the TensorCore's layout, without a copy"),
    Option("xla_sc_disable_megacore_partitioning", "true", "of both TensorCores of a chip at once"),
)
_TENSOR_CORE = (
    Option(_FUSE, "true", "without SparseCores a collective moves on in steps inside of fusions"),
    Option(f"{_FUSE}_fuse_all_gather", "true", "all-gathers too"),
    Option(f"{_FUSE}_multiple_steps", "true", "over several fusions"),
    Option("xla_tpu_overlap_compute_collective_tc", "true", "compute beside collectives"),
    Option("xla_tpu_enable_async_ragged_all_to_all", "true", "rows travel to their experts while others are multiplied"),
)
PLATFORMS = {
    "tpu with SparseCores (v5p, v6e, tpu7x)": (*_ALL_TPU, *_SPARSE_CORE),
    "tpu without SparseCores (v5e)": (*_ALL_TPU, *_TENSOR_CORE),
}


def compiler_options(device: Any) -> dict[str, str] | None:
    """For a step that runs on devices like `device`."""
    if device.platform != "tpu":
        return None
    options = (*_ALL_TPU, *(_SPARSE_CORE if has_sparse_cores(device) else _TENSOR_CORE))
    return {option.name: option.value for option in options}


def has_sparse_cores(device: Any) -> bool:
    return device.platform == "tpu" and device.device_kind not in ("TPU v5 lite", "TPU v5e")
