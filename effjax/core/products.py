"""Matrix products with operands of one dtype and sums of another, and what is added to them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from effjax.core.tree import wide, wide_dtype


def dot(x: jax.Array | np.ndarray, kernel: jax.Array | np.ndarray, dtype: DTypeLike | None = None) -> jax.Array:
    """``x @ kernel`` of operands in ``dtype`` (None: their own), accumulated in float32 at least.

    Example:
      >>> x = jnp.full((1, 300), 1.0, jnp.bfloat16)
      >>> float(dot(x, x.T)[0, 0]), dot(x, x.T).dtype.name
      (300.0, 'float32')
    """
    if dtype is not None:
        x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    return jnp.dot(x, kernel, preferred_element_type=wide_dtype(jnp.result_type(x, kernel)))


def aligned(x: jax.Array | np.ndarray, like: jax.Array) -> jax.Array:
    """``x`` with axes of length one in front, as many as ``like`` has more."""
    return jnp.expand_dims(x, tuple(range(like.ndim - x.ndim)))


def add_bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """``x + bias``, the bias along the last axis and in float32 at least; None adds nothing."""
    return x if bias is None else x + aligned(wide(bias), x)
