"""Image networks made as cheap as another one: narrower, or on smaller images."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.core.macs import count_macs
from effjax.models.inverted_residual import InvertedResidualNet
from effjax.models.resnet import ResNet

STEPS = 64
"""Widths are multiples of one part of this many."""


def forward_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one image [height, width, channels] at inference, by tracing alone."""
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return count_macs(lambda variables, x: model.apply(variables, x), variables, image).least


def narrower(model: nn.Module, shape: tuple[int, ...], macs: int) -> nn.Module:
    """The widest network of fewer channels, in all layers alike, that costs at most so many multiply-accumulates.

    Args:
      model: a ``ResNet`` or an ``InvertedResidualNet``, whose last convolution stays as wide.
      shape: of its images.
      macs: what it may cost.

    Raises:
      ValueError: no width is as cheap.

    Example:
      >>> model = ResNet(stages=(1,), widths=(64,))
      >>> narrower(model, (8, 8, 3), forward_macs(model, (8, 8, 3)) // 4).widths
      (31,)
    """
    width = _largest(lambda part: forward_macs(scaled(model, part / STEPS), shape) <= macs, STEPS)
    if not width:
        raise ValueError(f"model={type(model).__name__} costs more than {macs} multiply-accumulates at every width.")
    return scaled(model, width / STEPS)


def on_smaller_images(model: nn.Module, shape: tuple[int, ...], macs: int) -> nn.Module:
    """The network on images that it reduces first, to the largest height that costs at most so much.

    Args:
      model: of images, whose variables do not depend on their size.
      shape: of its images.
      macs: what it may cost, reducing them included.

    Raises:
      ValueError: no size is as cheap.

    Example:
      >>> model = ResNet(stages=(1,), widths=(8,))
      >>> on_smaller_images(model, (8, 8, 3), forward_macs(model, (8, 8, 3)) // 2).size
      (5, 5)
    """
    height, width, _ = shape
    made = lambda size: Reduced(model, (size, max(1, round(size * width / height))))
    size = _largest(lambda size: forward_macs(made(size), shape) <= macs, height)
    if not size:
        raise ValueError(f"model={type(model).__name__} costs more than {macs} multiply-accumulates at every size.")
    return made(size)


class Reduced(nn.Module):
    """A network on images that are reduced by area-weighted means first.

    Args:
      network: called as ``network(images, train=...)``.
      size: (height, width) to which images are reduced.
    """

    network: nn.Module
    size: tuple[int, int]

    @property
    def dtype(self) -> Any:
        """That of the network."""
        return getattr(self.network, "dtype", jnp.float32)

    @property
    def remat(self) -> bool:
        """That of the network."""
        return getattr(self.network, "remat", False)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        return self.network(jax.image.resize(x, (x.shape[0], *self.size, x.shape[3]), "linear"), train=train)


def scaled(model: nn.Module, factor: float) -> nn.Module:
    """The same network with all channels times a factor, rounded; that of the classifier's input stays where it is set.

    Example:
      >>> scaled(ResNet(widths=(16, 32, 64)), 0.5).widths
      (8, 16, 32)
    """
    times = lambda channels: max(1, round(factor * channels)) if channels else 0
    if isinstance(model, ResNet):
        return model.clone(widths=tuple(map(times, model.widths)))
    if not isinstance(model, InvertedResidualNet):
        raise ValueError(f"model={type(model).__name__} has no widths to scale; give a ResNet or a MobileNet.")
    row = lambda row: row._replace(
        features=times(row.features), hidden=times(row.hidden), squeeze=times(row.squeeze) if row.squeeze else 0
    )
    stages = tuple(tuple(map(row, rows)) for rows in model.stages)
    return dataclasses.replace(model, stages=stages, stem=times(model.stem))


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, where all below one that fits do; 0 if none does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
