"""Multi-layer perceptron."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.tree import wide
from effjax.models.layers import call

__all__ = ["MLP"]


class _Layer(nn.Module):
    features: int
    activation: Callable[[jax.Array], jax.Array]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x, train):
        return self.activation(nn.Dense(self.features, kernel_init=nn.initializers.he_normal(), dtype=self.dtype)(x))


class MLP(nn.Module):
    """Fully connected classifier over the flattened input.

    ``h_0 = vec(x)``, ``h_i = activation(W_i h_{i-1} + b_i)``, ``logits = W h_n + b``.

    Args:
      features: widths of the hidden layers; empty makes it a linear classifier.
      classes: number of outputs.
      activation: elementwise function.
      dtype: compute dtype; parameters are float32.
      remat: recompute each hidden layer in the backward pass.

    Returns:
      When called with ``x`` of shape [batch, ...]: logits [batch, classes], float32 at least; with
      ``capture=True`` the pair (logits, {"layer0": [batch, features[0]], ...}).

    Example:
      >>> model = MLP(features=(32,), classes=10)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
      >>> model.apply(variables, jnp.zeros((5, 8, 8, 1))).shape
      (5, 10)
    """

    features: tuple[int, ...] = (256, 128)
    classes: int = 10
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array | np.ndarray, "batch ..."], *, train: bool = False, capture: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        x = jnp.asarray(x).reshape(x.shape[0], -1).astype(self.dtype)
        out = {}
        for index, features in enumerate(self.features):
            layer = _Layer(features, self.activation, self.dtype, name=f"layer{index}")
            out[f"layer{index}"] = x = call(layer, x, train, remat=self.remat)
        logits = wide(nn.Dense(self.classes, dtype=self.dtype, name="head")(x))
        return (logits, out) if capture else logits
