"""Rotary position embedding in fp32: dimension i of the first half of a head turns with dimension i of the second.

Two forms with the same numbers. On TPU the halves, which lie in the same vector registers, change places in a matmul with a
permutation, which is exact. Letters are those of `emo_jax.model`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Rotary = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]  # cos and sin; half: W / 2


def rotary_angles(positions: Int[Array, "B T"], head_dim: int, theta: float) -> Rotary:
    """Of every position."""
    frequencies_W2 = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles_BTW2 = positions[..., None].astype(jnp.float32) * frequencies_W2
    return jnp.cos(angles_BTW2), jnp.sin(angles_BTW2)


def rotate(x: Float[Array, "B T H W"], rotary: Rotary, by_matmul: bool = False) -> Float[Array, "B T H W"]:
    """x, every head turned by the angles of its position."""
    if by_matmul:
        return _by_matmul(x, rotary)
    cos_BT1W2, sin_BT1W2 = (a[:, :, None, :] for a in rotary)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = first * cos_BT1W2 - second * sin_BT1W2, second * cos_BT1W2 + first * sin_BT1W2
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


@jax.custom_vjp
def _by_matmul(x, rotary):
    cos_BT1W, sin_BT1W = (jnp.concatenate([a, a], axis=-1)[:, :, None, :] for a in rotary)
    half = np.eye(x.shape[-1] // 2)
    swap_WW = np.block([[0 * half, half], [-half, 0 * half]])  # (first, second) -> (-second, first)
    swapped = jnp.einsum("bthw,wv->bthv", x, jnp.asarray(swap_WW, x.dtype), precision=jax.lax.Precision.HIGHEST)
    return (x.astype(jnp.float32) * cos_BT1W + swapped.astype(jnp.float32) * sin_BT1W).astype(x.dtype)


# The adjoint turns back: the matmul's own adjoint would round its part of the gradient a second time.
_by_matmul.defvjp(lambda x, rotary: (_by_matmul(x, rotary), rotary),
                  lambda rotary, d: (_by_matmul(d, (rotary[0], -rotary[1])), None))
