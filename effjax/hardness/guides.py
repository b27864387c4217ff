"""Guide networks of DiSK: small nets on the teacher's features that say where the student is helped."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.errors import check_choice

__all__ = ["FeatureGuide", "MapGuide"]

Norm = Literal["layer", "batch", "none"]


class FeatureGuide(nn.Module):
    """A guide on feature vectors, such as the input of the teacher's last layer: Dense, norm, ReLU, ..., Dense 1.

    With widths 64 and 128 and batch norms it is the release's ``b23``, with widths K, 64, K that of its ImageNet
    program. Layer norms by default, as batch norms need the statistics of the whole batch on a mesh.

    Args:
      widths: of the hidden layers.
      norm: ``"layer"``, ``"batch"`` or ``"none"``.
      dtype: of the matrix products' operands.

    Returns:
      When called with features ``[rows, ...]``, whose further axes are flattened: the guide's logits ``[rows]``,
      before the sigmoid.

    Example:
      >>> guide = FeatureGuide()
      >>> variables = guide.init(jax.random.key(0), jnp.ones((2, 5)))
      >>> guide.apply(variables, jnp.ones((2, 5))).shape
      (2,)
    """

    widths: Sequence[int] = (64, 128)
    norm: Norm = "layer"
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> Float[Array, "rows"]:
        x = features.reshape(features.shape[0], -1)
        for width in self.widths:
            x = nn.relu(_norm(self.norm, train)(_dense(width, self.dtype)(x)))
        return _dense(1, self.dtype)(x)[:, 0]


class MapGuide(nn.Module):
    """A guide on feature maps, such as the input of the teacher's last stage: the release's ``b24``.

    1x1, 3x3 and 1x1 convolutions with norms and SiLU, the mean over positions, Dense ``features``, then Dense
    ``classes``, norm, ReLU and Dense 1. Of several maps (the teacher's and the student's, without a gradient, as in
    ``b26``) each has convolutions of its own.

    Args:
      features: width after the convolutions, of each map; the release takes the width of the network's features.
      classes: width of the hidden layer.
      channels: of the convolutions.
      norm: ``"batch"``, as released, ``"layer"`` or ``"none"``.
      dtype: of the products' operands.

    Returns:
      When called with one or more maps ``[rows, height, width, channels]``: the guide's logits ``[rows]``.

    Example:
      >>> guide = MapGuide(features=8, classes=10, channels=4)
      >>> variables = guide.init(jax.random.key(0), jnp.ones((2, 4, 4, 3)))
      >>> guide.apply(variables, jnp.ones((2, 4, 4, 3))).shape
      (2,)
    """

    features: int
    classes: int
    channels: int = 256
    norm: Norm = "batch"
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, *maps: jax.Array, train: bool = False) -> Float[Array, "rows"]:
        norm = functools.partial(_norm, self.norm, train)
        parts = []
        for x in maps:
            for size in (1, 3, 1):
                x = nn.Conv(self.channels, (size, size), use_bias=False, dtype=self.dtype)(x)
                x = nn.silu(norm()(x))
            parts.append(nn.Dense(self.features, dtype=self.dtype)(x.mean((1, 2))))
        x = jnp.concatenate(parts, axis=1)
        x = nn.relu(norm()(_dense(self.classes, self.dtype)(x)))
        return _dense(1, self.dtype)(x)[:, 0]


def _dense(width: int, dtype: Any) -> nn.Dense:
    """As the release starts it."""
    return nn.Dense(
        width, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), bias_init=nn.initializers.constant(0.01)
    )


def _norm(kind: str, train: bool) -> Callable[[jax.Array], jax.Array]:
    check_choice("norm", kind, ("layer", "batch", "none"))
    if kind == "none":
        return lambda x: x
    if kind == "layer":
        return nn.LayerNorm()
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)
