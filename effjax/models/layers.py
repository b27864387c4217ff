"""What the image backbones share: depthwise convolutions, the choice of normalisation, recomputed sub-modules."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.depthwise import depthwise_conv
from effjax.core.errors import check_choice, check_number

Images = Float[Array | np.ndarray, "batch height width channels"]


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "hard_swish": nn.hard_swish,
    "silu": nn.silu,
}
fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
EPSILONS = {"batch": 1e-5, "batch-1e-3": 1e-3}
"""Of the batch norms, by name."""
_NORMS = (*EPSILONS, "group", "none")


class DepthwiseConv(nn.Module):
    """A convolution of every channel with a filter of its own, by ``effjax.core.depthwise.depthwise_conv``.

    Its parameters are those of ``nn.Conv(channels, (k, k), feature_group_count=channels)``.

    Args:
      kernel_size: ``k``.
      strides: in both directions.
      padding: ``"SAME"``, ``"VALID"``, a number for all sides, or a pair of numbers for each direction.
      use_bias: add one number to every channel.
      dtype: compute dtype; parameters are float32.
      impl: as for ``depthwise_conv``.

    Returns:
      When called with x [batch, height, width, channels]: an array with as many channels.

    Raises:
      ValueError: a number that is not positive, or an unknown ``impl``.

    Example:
      >>> x = jnp.ones((1, 8, 8, 4))
      >>> y, variables = DepthwiseConv(3, strides=2).init_with_output(jax.random.key(0), x)
      >>> y.shape, variables["params"]["kernel"].shape
      ((1, 4, 4, 4), (3, 3, 1, 4))
    """

    kernel_size: int
    strides: int = 1
    padding: str | int | Sequence[tuple[int, int]] = "SAME"
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    impl: str = "auto"

    @nn.compact
    def __call__(self, x: Images) -> jax.Array:
        x = jnp.asarray(x)
        size = check_number("kernel_size", self.kernel_size, low=1, integer=True)
        channels = x.shape[-1]
        # The fan of a depthwise kernel is k * k: its input axis has length 1.
        kernel = self.param("kernel", nn.initializers.he_normal(), (size, size, 1, channels))
        x = jnp.asarray(x, self.dtype)
        y = depthwise_conv(x, kernel.astype(self.dtype), strides=self.strides, padding=self.padding, impl=self.impl)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (channels,)).astype(self.dtype)
            y = y + bias[None, None, None, :]
        return y


class Pointwise(nn.Module):
    """A 1x1 convolution, computed as a matrix product: on a CPU that is up to twice as fast.

    Its parameters are those of ``nn.Conv(features, (1, 1))``, drawn with the variance ``2 / features``.

    Args:
      features: output channels.
      use_bias: add one number to every channel.
      dtype: compute dtype; parameters are float32.

    Returns:
      When called with x [..., channels]: an array [..., features].

    Example:
      >>> y, variables = Pointwise(6).init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 4)))
      >>> y.shape, variables["params"]["kernel"].shape
      ((1, 8, 8, 6), (1, 1, 4, 6))
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*positions channels"]) -> jax.Array:
        kernel = self.param("kernel", fan_out, (1, 1, x.shape[-1], self.features))
        # As a matrix, or the gradient of the kernel begins with a transposed copy of the output's.
        y = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel[0, 0].astype(self.dtype)
        y = y.reshape(*x.shape[:-1], self.features)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
            y = y + jnp.expand_dims(bias, tuple(range(x.ndim - 1)))
        return y


def activation_of(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation named ``"relu"``, ``"relu6"``, ``"hard_swish"`` or ``"silu"``."""
    return ACTIVATIONS[check_choice("activation", name, ACTIVATIONS)]


def pads(padding: str, kernel: int) -> str | int:
    """What a convolution takes as ``padding``: half the kernel on every side, or TensorFlow's.

    Args:
      padding: ``"symmetric"``, or ``"same"``, which for stride 2 on an even size adds nothing before and one after.
      kernel: its size.

    Raises:
      ValueError: an unknown name, or an even kernel with ``"symmetric"``.
    """
    check_choice("padding", padding, ("symmetric", "same"))
    if padding == "same":
        return "SAME"
    if kernel % 2 == 0:
        raise ValueError(f"kernel={kernel} has no middle: give an odd one, or padding='same'.")
    return kernel // 2


def check_images(x: Any) -> jax.Array:
    """``x`` as an array, if it is a batch of floating images.

    Raises:
      TypeError: integers, which a network would take for values of 0 to 255 or 65,535.
      ValueError: not [batch, height, width, channels], or no pixels.

    Example:
      >>> check_images(np.zeros((8, 8, 3)))
      Traceback (most recent call last):
      ValueError: x has shape (8, 8, 3); expected [batch, height, width, channels]. One is a batch of one: x[None].
    """
    shape = np.shape(x)
    if len(shape) != 4 or 0 in shape[1:]:
        hint = " One is a batch of one: x[None]." if len(shape) == 3 else ""
        raise ValueError(f"x has shape {shape}; expected [batch, height, width, channels].{hint}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        whole = {"uint8": " / 255", "uint16": " / 65535"}.get(str(x.dtype), "")
        raise TypeError(
            f"x has dtype {x.dtype}; the network takes floating ones, scaled as it was trained: "
            f"x.astype('float32'){whole}, then the mean and the deviation. An image task does that."
        )
    return jnp.asarray(x)


def norm_layer(kind: str, channels: int, *, train: bool, dtype: DTypeLike, name: str) -> Callable[..., jax.Array]:
    """The normalisation named ``kind``, made inside the calling module's compact method.

    Args:
      kind: ``"batch"`` (Ioffe & Szegedy 2015; running averages in evaluation), ``"batch-1e-3"`` (with an
        epsilon of 1e-3 instead of 1e-5, as MobileNetV3 has it), ``"group"`` (Wu & He 2018; the largest
        of 1, 2, 4, 8 groups that divides the channels) or ``"none"``.
      channels: channels of the input.
      train: use the batch's statistics and update the running ones.
      dtype: compute dtype; statistics are float32.
      name: the module's name.

    Returns:
      A function of one array.

    Raises:
      ValueError: unknown ``kind``.
    """
    check_choice("norm", kind, _NORMS)
    if kind in EPSILONS:
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=EPSILONS[kind], dtype=dtype, name=name)
    if kind == "group":
        return nn.GroupNorm(num_groups=math.gcd(channels, 8), epsilon=1e-5, dtype=dtype, name=name)
    return lambda x: x


def call(module: nn.Module, x: jax.Array, train: bool, *, remat: bool = False) -> jax.Array:
    """``module(x, train)``; with ``remat`` its activations are recomputed in the backward pass."""
    run = lambda module, x: module(x, train)
    return (nn.remat(run) if remat else run)(module, x)
