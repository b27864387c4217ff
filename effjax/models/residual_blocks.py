"""Blocks of residual networks: basic, bottleneck, and those that normalise before they convolve."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.core.errors import check_choice
from effjax.models.layers import Images, norm_layer

__all__ = ["BasicBlock", "Bottleneck", "PreactivationBlock"]

_he = nn.initializers.he_normal()


class BasicBlock(nn.Module):
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

    features: int
    strides: int = 1
    norm: str = "batch"
    shortcut: str = "pad"
    skip: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images, train: bool) -> jax.Array:
        check_choice("shortcut", self.shortcut, ("pad", "project"))
        conv = functools.partial(
            nn.Conv, self.features, use_bias=self.norm == "none", kernel_init=_he, dtype=self.dtype
        )
        norm = functools.partial(norm_layer, self.norm, self.features, train=train, dtype=self.dtype)
        y = conv((3, 3), self.strides, padding=1, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = conv((3, 3), padding=1, name="conv2")(y)
        y = norm(name="norm2")(y)
        if not self.skip:
            return y
        if self.shortcut == "pad":
            x = _pad_shortcut(x, self.features, self.strides)
        elif x.shape != y.shape:
            x = norm(name="norm_shortcut")(conv((1, 1), self.strides, padding=0, name="conv_shortcut")(x))
        return nn.relu(x + y)


def _pad_shortcut(x: Images, features: int, strides: int) -> jax.Array:
    extra = features - x.shape[-1]
    if extra < 0:
        raise ValueError(
            f"features={features} must be at least the input's {x.shape[-1]} channels with shortcut='pad'. "
            "Use shortcut='project' to narrow."
        )
    return jnp.pad(x[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))


class Bottleneck(nn.Module):
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

    features: int
    strides: int = 1
    norm: str = "batch"
    expansion: int = 4
    skip: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images, train: bool) -> jax.Array:
        inner, rest = divmod(self.features, self.expansion)
        if rest or not inner:
            raise ValueError(f"features={self.features} must be a multiple of expansion={self.expansion}.")
        conv = functools.partial(nn.Conv, use_bias=self.norm == "none", kernel_init=_he, dtype=self.dtype)
        norm = functools.partial(norm_layer, self.norm, train=train, dtype=self.dtype)
        y = nn.relu(norm(inner, name="norm1")(conv(inner, (1, 1), name="conv1")(x)))
        y = nn.relu(norm(inner, name="norm2")(conv(inner, (3, 3), self.strides, padding=1, name="conv2")(y)))
        y = norm(self.features, name="norm3")(conv(self.features, (1, 1), name="conv3")(y))
        if not self.skip:
            return y
        if x.shape != y.shape:
            x = conv(self.features, (1, 1), self.strides, padding=0, name="conv_shortcut")(x)
            x = norm(self.features, name="norm_shortcut")(x)
        return nn.relu(x + y)


class PreactivationBlock(nn.Module):
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

    features: int
    strides: int = 1
    norm: str = "batch"
    dropout: float = 0.0
    skip: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images, train: bool) -> jax.Array:
        conv = functools.partial(
            nn.Conv, self.features, use_bias=self.norm == "none", kernel_init=_he, dtype=self.dtype
        )
        norm = functools.partial(norm_layer, self.norm, train=train, dtype=self.dtype)
        z = nn.relu(norm(x.shape[-1], name="norm1")(x))
        y = conv((3, 3), self.strides, padding=1, name="conv1")(z)
        y = nn.relu(norm(self.features, name="norm2")(y))
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        y = conv((3, 3), padding=1, name="conv2")(y)
        if not self.skip:
            return y
        same = self.strides == 1 and x.shape[-1] == self.features
        return y + (x if same else conv((1, 1), self.strides, padding=0, name="conv_shortcut")(z))
