"""Useful FLOPs of a token and the peak rate of a device: together the share of the peak that training reaches (MFU)."""

from __future__ import annotations

from emo_jax.config import Config

# Dense bf16 FLOP/s of one JAX device, from the vendors' product pages; the first name found in `device_kind` counts.
PEAK_FLOPS = {
    "TPU7x": 1153e12,  # one of two cores of a chip
    "TPU v6 lite": 918e12, "TPU v6e": 918e12,
    "TPU v5 lite": 197e12, "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v4": 275e12,
    "B200": 2250e12,
    "H200": 989e12, "H100": 989e12,
    "A100": 312e12,
}


def peak_flops(device_kind: str) -> float | None:
    return next((rate for name, rate in PEAK_FLOPS.items() if name.lower() in device_kind.lower()), None)


def active_matmul_params(config: Config) -> int:
    """Parameters that multiply a token: projections, router, active experts (shared ones included) and the head."""
    m = config.model
    attention = m.d_model * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads)
    experts = m.top_k if m.num_experts else 1
    router = m.d_model * m.num_routed_experts if m.num_experts else 0
    return m.num_layers * (attention + router + experts * 3 * m.d_model * m.d_ff) + m.d_model * m.vocab_size


def flops_per_token(config: Config) -> float:
    """Forward and backward, without recomputation; attention as causal over whole rows, as the field counts it."""
    m = config.model
    attention = 6 * m.num_layers * m.num_heads * m.head_dim * config.data.sequence_length
    return 6 * active_matmul_params(config) + attention
