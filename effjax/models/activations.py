"""Activations by the names of Hugging Face's configs."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp


def exact_gelu(x: jax.Array) -> jax.Array:
    """``x Phi(x)`` of the error function; for 32 bits and more as ``1 + erf``, which costs less than its complement.

    Args:
      x: of any shape.

    Returns:
      An array like ``x``.

    Example:
      >>> [f"{y:.4f}" for y in exact_gelu(jnp.array([-1.0, 0.0, 1.0]))]
      ['-0.1587', '0.0000', '0.8413']
    """
    if x.dtype not in (jnp.float32, jnp.float64):  # 1 + erf would round what is below their resolution
        return nn.gelu(x, approximate=False)
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": exact_gelu,
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": jnp.tanh,
}
