"""Matrix products with operands of one dtype and sums of another."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def dot(x: jax.Array | np.ndarray, kernel: jax.Array | np.ndarray, dtype: DTypeLike | None = None) -> jax.Array:
    """``x @ kernel`` of operands in ``dtype`` (None: their own), accumulated in float32 at least.

    Example:
      >>> x = jnp.full((1, 300), 1.0, jnp.bfloat16)
      >>> float(dot(x, x.T)[0, 0]), dot(x, x.T).dtype.name
      (300.0, 'float32')
    """
    if dtype is not None:
        x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    accumulator = jnp.promote_types(jnp.result_type(x, kernel), jnp.float32)
    return jnp.dot(x, kernel, preferred_element_type=accumulator)
