"""Blocks of residual networks: basic, bottleneck, and those that normalise before they convolve."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.core.errors import check_choice
from effjax.models.layers import Images, norm_layer

__all__ = ["BasicBlock", "Bottleneck", "PreactivationBlock"]

_he = nn.initializers.he_normal()


class ResidualBase(nn.Module):
    """Fields and layers that residual blocks share."""

    features: int
    strides: int = 1
    norm: str = "batch"
    dtype: DTypeLike = jnp.float32

    def conv(self, features: int, size: int, strides: int, name: str) -> nn.Conv:
        """A convolution that keeps the map's size but for the strides."""
        return nn.Conv(
            features,
            (size, size),
            strides,
            padding=size // 2,
            use_bias=self.norm == "none",
            kernel_init=_he,
            dtype=self.dtype,
            name=name,
        )

    def normed(self, features: int, train: bool, name: str) -> Callable[..., jax.Array]:
        """The normalisation of that name."""
        return norm_layer(self.norm, features, train=train, dtype=self.dtype, name=name)

    def projected(self, x: Images, train: bool) -> jax.Array:
        """The shortcut where the shape changes: a 1x1 convolution and a norm."""
        x = self.conv(self.features, 1, self.strides, "conv_shortcut")(x)
        return self.normed(self.features, train, "norm_shortcut")(x)


class BasicBlock(ResidualBase):
    """Two 3x3 convolutions and a shortcut (He et al. 2016).

    ``y = relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x))))))``.

    Args:
      features: output channels.
      strides: stride of the first convolution and of the shortcut.
      norm: ``"batch"``, ``"group"`` or ``"none"``.
      shortcut: where the shape changes, ``"pad"`` (option A: every ``strides``-th pixel, channels
        zero-padded on both sides; no parameters) or ``"project"`` (option B: 1x1 convolution + norm).
      skip: False for ``norm2(...)`` alone, without the shortcut and the last relu.
      dtype: compute dtype; parameters and statistics are float32.

    Returns:
      When called as ``block(x, train)`` with x [batch, height, width, channels]: an array
      [batch, ceil(height / strides), ceil(width / strides), features].

    Raises:
      ValueError: unknown ``norm`` or ``shortcut``, or a ``"pad"`` shortcut to fewer channels.

    Example:
      >>> block = BasicBlock(features=32, strides=2)
      >>> run = lambda key, x: block.init_with_output(key, x, False)[0]
      >>> jax.eval_shape(run, jax.random.key(0), jnp.zeros((1, 8, 8, 16))).shape
      (1, 4, 4, 32)
    """

    shortcut: str = "pad"
    skip: bool = True

    @nn.compact
    def __call__(self, x: Images, train: bool) -> jax.Array:
        check_choice("shortcut", self.shortcut, ("pad", "project"))
        y = self.conv(self.features, 3, self.strides, "conv1")(x)
        y = nn.relu(self.normed(self.features, train, "norm1")(y))
        y = self.conv(self.features, 3, 1, "conv2")(y)
        y = self.normed(self.features, train, "norm2")(y)
        if not self.skip:
            return y
        if self.shortcut == "pad":
            x = pad_shortcut(x, self.features, self.strides)
        elif x.shape != y.shape:
            x = self.projected(x, train)
        return nn.relu(x + y)


def pad_shortcut(x: Images, features: int, strides: int) -> jax.Array:
    """Every ``strides``-th pixel, zeros in the new channels on both sides."""
    extra = features - x.shape[-1]
    if extra < 0:
        raise ValueError(
            f"features={features} must be at least the input's {x.shape[-1]} channels with shortcut='pad'. "
            "Use shortcut='project' to narrow."
        )
    return jnp.pad(x[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))


class Bottleneck(ResidualBase):
    """A 3x3 convolution between two 1x1 convolutions, and a shortcut (He et al. 2016).

    ``y = relu(shortcut(x) + norm3(conv3(relu(norm2(conv2(relu(norm1(conv1(x))))))))``.

    Args:
      features: output channels.
      strides: stride of the 3x3 convolution, as in torchvision's networks (the paper's is that of the first), and
        of the shortcut.
      norm: as for ``norm_layer``.
      expansion: ``features`` over the channels of the 3x3 convolution.
      skip: False for ``norm3(...)`` alone, without the shortcut and the last relu.
      dtype: compute dtype; parameters and statistics are float32.

    Returns:
      When called as ``block(x, train)`` with x [batch, height, width, channels]: an array
      [batch, ceil(height / strides), ceil(width / strides), features]. The shortcut is a 1x1 convolution and a
      norm where the shape changes.

    Raises:
      ValueError: unknown ``norm``, or ``features`` that ``expansion`` does not divide.

    Example:
      >>> block = Bottleneck(features=32, strides=2)
      >>> run = lambda key, x: block.init_with_output(key, x, False)[0]
      >>> jax.eval_shape(run, jax.random.key(0), jnp.zeros((1, 8, 8, 16))).shape
      (1, 4, 4, 32)
    """

    expansion: int = 4
    skip: bool = True

    @nn.compact
    def __call__(self, x: Images, train: bool) -> jax.Array:
        inner, rest = divmod(self.features, self.expansion)
        if rest or not inner:
            raise ValueError(f"features={self.features} must be a multiple of expansion={self.expansion}.")
        y = nn.relu(self.normed(inner, train, "norm1")(self.conv(inner, 1, 1, "conv1")(x)))
        y = nn.relu(self.normed(inner, train, "norm2")(self.conv(inner, 3, self.strides, "conv2")(y)))
        y = self.normed(self.features, train, "norm3")(self.conv(self.features, 1, 1, "conv3")(y))
        if not self.skip:
            return y
        return nn.relu(y + (x if x.shape == y.shape else self.projected(x, train)))


class PreactivationBlock(ResidualBase):
    """Two 3x3 convolutions that each follow a norm and an activation, the block of wide ResNets.

    With ``z = relu(norm1(x))``: ``y = shortcut + conv2(relu(norm2(conv1(z))))``; the shortcut is x where the shape
    stays, else a 1x1 convolution of z. Build the ``ResNet`` with ``preactivation=True``.

    Args:
      features: output channels.
      strides: stride of the first convolution and of the shortcut.
      norm: as for ``norm_layer``.
      dropout: rate between the convolutions, in training.
      skip: False for ``conv2(...)`` alone, without the shortcut.
      dtype: compute dtype; parameters and statistics are float32.

    Returns:
      When called as ``block(x, train)`` with x [batch, height, width, channels]: an array
      [batch, ceil(height / strides), ceil(width / strides), features].

    Raises:
      ValueError: unknown ``norm``.

    Example:
      >>> block = PreactivationBlock(features=32, strides=2)
      >>> run = lambda key, x: block.init_with_output(key, x, False)[0]
      >>> jax.eval_shape(run, jax.random.key(0), jnp.zeros((1, 8, 8, 16))).shape
      (1, 4, 4, 32)

    Reference: Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016 (arXiv 1605.07146).
    """

    dropout: float = 0.0
    skip: bool = True

    @nn.compact
    def __call__(self, x: Images, train: bool) -> jax.Array:
        z = nn.relu(self.normed(x.shape[-1], train, "norm1")(x))
        y = self.conv(self.features, 3, self.strides, "conv1")(z)
        y = nn.relu(self.normed(self.features, train, "norm2")(y))
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        y = self.conv(self.features, 3, 1, "conv2")(y)
        if not self.skip:
            return y
        same = self.strides == 1 and x.shape[-1] == self.features
        return y + (x if same else self.conv(self.features, 1, self.strides, "conv_shortcut")(z))
