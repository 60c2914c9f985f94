"""XLA options of the training step, by platform.

On chips with SparseCores these run the collectives, beside the compute: without them every weight gather and gradient
reduction of a pod is synchronous, and every reduce-scatter over several torus axes becomes a whole all-reduce.
"""

from __future__ import annotations

from typing import Any

_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
_SPARSE_CORE = {
    f"{_OFFLOAD}all_gather": "true", f"{_OFFLOAD}2d_all_gather": "true", f"{_OFFLOAD}3d_all_gather": "true",
    f"{_OFFLOAD}reduce_scatter": "true", f"{_OFFLOAD}nd_reduce_scatter": "true", f"{_OFFLOAD}all_reduce": "true",
    f"{_OFFLOAD}ragged_all_to_all": "true",
    "xla_tpu_enable_sparse_core_reduce_scatter_v2": "true",
    # The TensorCore's own way of overlapping, which excludes the SparseCore's.
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "false",
    "xla_tpu_use_tc_device_shape_on_sc": "true", "xla_sc_disable_megacore_partitioning": "true",
    "xla_enable_async_all_gather": "true",
}
_TENSOR_CORE = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_tpu_enable_async_ragged_all_to_all": "true", "xla_enable_async_all_gather": "true",
}


def compiler_options(device: Any) -> dict[str, str] | None:
    """For a step that runs on devices like `device`."""
    if device.platform != "tpu":
        return None
    return (_SPARSE_CORE if has_sparse_cores(device) else _TENSOR_CORE) | {"xla_tpu_scoped_vmem_limit_kib": "65536"}


def has_sparse_cores(device: Any) -> bool:
    return device.platform == "tpu" and device.device_kind not in ("TPU v5 lite", "TPU v5e")
