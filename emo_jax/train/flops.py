"""Useful FLOPs of a token: over the peak rate of the devices (see `chips`), the share of it that training reaches (MFU)."""

from __future__ import annotations

from emo_jax.config import Config


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
