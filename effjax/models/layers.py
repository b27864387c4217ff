"""What the image backbones share: the choice of normalisation and recomputed sub-modules."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.errors import check_choice

Images = Float[Array | np.ndarray, "batch height width channels"]


def norm_layer(kind: str, channels: int, *, train: bool, dtype: DTypeLike, name: str) -> Callable[..., jax.Array]:
    """The normalisation named ``kind``, made inside the calling module's compact method.

    Args:
      kind: ``"batch"`` (Ioffe & Szegedy 2015; running averages in evaluation), ``"group"`` (Wu & He
        2018; the largest of 1, 2, 4, 8 groups that divides the channels) or ``"none"``.
      channels: channels of the input.
      train: use the batch's statistics and update the running ones.
      dtype: compute dtype; statistics are float32.
      name: the module's name.

    Returns:
      A function of one array.

    Raises:
      ValueError: unknown ``kind``.
    """
    check_choice("norm", kind, ("batch", "group", "none"))
    if kind == "batch":
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name)
    if kind == "group":
        return nn.GroupNorm(num_groups=math.gcd(channels, 8), epsilon=1e-5, dtype=dtype, name=name)
    return lambda x: x


def call(module: nn.Module, x: jax.Array, train: bool, *, remat: bool = False) -> jax.Array:
    """``module(x, train)``; with ``remat`` its activations are recomputed in the backward pass."""
    run = lambda module, x: module(x, train)
    return (nn.remat(run) if remat else run)(module, x)
