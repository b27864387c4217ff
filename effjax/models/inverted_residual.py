"""Inverted residual networks, the family of MobileNet and EfficientNet, over blocks given by the caller."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.core.errors import check_number
from effjax.core.tree import wide
from effjax.models.layers import (
    DepthwiseConv,
    Images,
    Pointwise,
    activation_of,
    call,
    check_images,
    fan_out,
    norm_layer,
    pads,
)

__all__ = ["BlockRow", "InvertedResidual", "InvertedResidualNet"]

# (features, strides=, hidden=, kernel=, squeeze=, activation=, norm=, dtype=, name=) -> a module called as
# module(x, train).
BlockFactory = Callable[..., nn.Module]


class SqueezeExcite(nn.Module):
    """Channels weighted by their means over the image (Hu et al. 2018).

    ``y = x * gate(W2 inner(W1 mean(x) + b1) + b2)``; ``inner`` and ``gate`` are relu and hard sigmoid, as in
    MobileNetV3, or, where ``activation`` is silu, silu and sigmoid, as in EfficientNet.

    Args:
      channels: of the layer in the middle.
      activation: that of the block it stands in.
      dtype: compute dtype; parameters are float32.

    Returns:
      When called with x [batch, height, width, channels]: an array like x.

    Example:
      >>> x = jnp.ones((2, 4, 4, 8))
      >>> SqueezeExcite(2).init_with_output(jax.random.key(0), x)[0].shape
      (2, 4, 4, 8)
    """

    channels: int
    activation: str = "relu"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images) -> jax.Array:
        x = jnp.asarray(x)
        inner, gate = (nn.silu, nn.sigmoid) if self.activation == "silu" else (nn.relu, nn.hard_sigmoid)
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        y = inner(dense(self.channels, kernel_init=fan_out, name="reduce")(x.mean((1, 2))))
        y = gate(dense(x.shape[-1], kernel_init=fan_out, name="expand")(y))
        return x * y[:, None, None, :]


class SeparableBase(nn.Module):
    """Fields and layers that blocks with a depthwise and a 1x1 convolution share."""

    features: int
    strides: int = 1
    hidden: int = 0
    kernel: int = 3
    squeeze: int = 0
    activation: str = "relu6"
    norm: str = "batch"
    padding: str = "symmetric"
    dtype: DTypeLike = jnp.float32

    def act(self, x: jax.Array) -> jax.Array:
        return activation_of(self.activation)(x)

    def normed(self, x: jax.Array, train: bool, name: str) -> jax.Array:
        return norm_layer(self.norm, x.shape[-1], train=train, dtype=self.dtype, name=name)(x)

    def pointwise(self, x: jax.Array, features: int, train: bool, name: str) -> jax.Array:
        """A 1x1 convolution and its norm."""
        y = Pointwise(features, use_bias=self.norm == "none", dtype=self.dtype, name=name)(x)
        return self.normed(y, train, f"{name}_norm")

    def filtered(self, x: Images, train: bool) -> jax.Array:
        """The depthwise convolution, its norm and the activation."""
        y = DepthwiseConv(
            self.kernel,
            strides=self.strides,
            padding=pads(self.padding, self.kernel),
            use_bias=self.norm == "none",
            dtype=self.dtype,
            name="depthwise",
        )(x)
        return self.act(self.normed(y, train, "depthwise_norm"))


class InvertedResidual(SeparableBase):
    """Expand, filter each channel, project back, with a shortcut between the narrow ends (Sandler et al. 2018).

    ``y = project(squeeze(act(norm(depthwise(act(norm(expand(x))))))))``, plus x where the shape stays; no
    activation after ``project``. ``expand`` is left out where x has ``hidden`` channels already.

    Args:
      features: output channels.
      strides: of the depthwise convolution.
      hidden: channels of the depthwise convolution.
      kernel: its size, odd.
      squeeze: channels in the middle of squeeze-excite; 0 for none.
      activation: ``"relu"``, ``"relu6"``, ``"hard_swish"`` or ``"silu"``.
      norm: as for ``norm_layer``; convolutions have biases where it is ``"none"``.
      padding: of the depthwise convolution, ``"symmetric"`` as in PyTorch or ``"same"`` as in TensorFlow; they
        differ where ``strides`` is 2 and the size even.
      skip: whether x is added where the shape stays.
      dtype: compute dtype; parameters and statistics are float32.

    Returns:
      When called as ``block(x, train)`` with x [batch, height, width, channels]: an array
      [batch, ceil(height / strides), ceil(width / strides), features].

    Raises:
      ValueError: an unknown name, or a number that is not positive; ``squeeze`` may be 0.

    Example:
      >>> block = InvertedResidual(features=24, strides=2, hidden=96)
      >>> run = lambda key, x: block.init_with_output(key, x, False)[0]
      >>> jax.eval_shape(run, jax.random.key(0), jnp.zeros((1, 8, 8, 16))).shape
      (1, 4, 4, 24)
    """

    skip: bool = True

    @nn.compact
    def __call__(self, x: Images, train: bool) -> jax.Array:
        for argument in ("features", "strides", "hidden", "kernel"):
            check_number(argument, getattr(self, argument), low=1, integer=True)
        check_number("squeeze", self.squeeze, low=0, integer=True)
        x = y = jnp.asarray(x)
        if self.hidden != x.shape[-1]:
            y = self.act(self.pointwise(y, self.hidden, train, "expand"))
        y = self.filtered(y, train)
        if self.squeeze:
            y = SqueezeExcite(self.squeeze, self.activation, dtype=self.dtype, name="squeeze")(y)
        y = self.pointwise(y, self.features, train, "project")
        return x + y if self.skip and x.shape == y.shape else y


class BlockRow(NamedTuple):
    """One block of an ``InvertedResidualNet``.

    Attributes:
      features: output channels.
      strides: of its depthwise convolution.
      hidden: channels of its depthwise convolution.
      kernel: size of that.
      squeeze: channels in the middle of squeeze-excite; 0 for none.
      activation: as for ``InvertedResidual``.
      block: a factory of its own; None takes the network's.
    """

    features: int
    strides: int = 1
    hidden: int = 0
    kernel: int = 3
    squeeze: int = 0
    activation: str = "relu6"
    block: BlockFactory | None = None


class InvertedResidualNet(nn.Module):
    """Stem, stages of inverted residual blocks, a last 1x1 convolution, global mean, linear classifier.

    MobileNetV1, V2, V3 and EfficientNet are tables of rows; ``mobilenet`` makes them by name.

    Args:
      stages: for each stage the ``BlockRow`` of every block.
      stem: channels of the first 3x3 convolution.
      stem_strides: its stride; 2 for ImageNet, 1 for images of some 32 pixels.
      last: channels of the 1x1 convolution after the stages; 0 for none.
      dense: outputs of a linear layer between the mean and the classifier; 0 for none.
      block: factory ``(features, strides=, hidden=, kernel=, squeeze=, activation=, norm=, dtype=, name=) ->
        module``, called as ``module(x, train)``; a row's own factory goes before it.
      classes: number of outputs.
      activation: after the stem, the last convolution and the dense layer.
      norm: as for ``norm_layer``, handed to the blocks.
      padding: of the stem, as for ``InvertedResidual``; that of the blocks is the factory's.
      dropout: rate before the classifier, in training.
      dtype: compute dtype; parameters and statistics are float32.
      remat: recompute each block in the backward pass.

    Returns:
      When called with ``x`` [batch, height, width, channels]: logits [batch, classes], float32 at
      least; with ``capture=True`` the pair (logits, {"stem", "stage1", ..., "last", "pooled"}).

    Raises:
      ValueError: an unknown name.
      TypeError: images of integers.

    Example:
      >>> rows = ((BlockRow(8, hidden=8),), (BlockRow(16, strides=2, hidden=32), BlockRow(16, hidden=64)))
      >>> model = InvertedResidualNet(rows, stem=8, stem_strides=1, last=32, classes=10)
      >>> run = lambda key, x: model.init_with_output(key, x, capture=True)[0]
      >>> logits, out = jax.eval_shape(run, jax.random.key(0), jnp.zeros((2, 8, 8, 3)))
      >>> logits.shape, out["stage2"].shape
      ((2, 10), (2, 4, 4, 16))

    Reference: Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear
    Bottlenecks", CVPR 2018 (arXiv 1801.04381).
    """

    stages: tuple[tuple[BlockRow, ...], ...]
    stem: int = 32
    stem_strides: int = 2
    last: int = 1280
    dense: int = 0
    block: BlockFactory = InvertedResidual
    classes: int = 1000
    activation: str = "relu6"
    norm: str = "batch"
    padding: str = "symmetric"
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Images, *, train: bool = False, capture: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        act = activation_of(self.activation)
        norm = functools.partial(norm_layer, self.norm, train=train, dtype=self.dtype)
        biased = self.norm == "none"
        x = nn.Conv(
            self.stem,
            (3, 3),
            self.stem_strides,
            padding=pads(self.padding, 3),
            use_bias=biased,
            kernel_init=fan_out,
            dtype=self.dtype,
            name="stem_conv",
        )(check_images(x).astype(self.dtype))
        x = act(norm(self.stem, name="stem_norm")(x))
        out = {"stem": x}
        for index, rows in enumerate(self.stages, start=1):
            for position, row in enumerate(rows):
                sizes = row._asdict()
                factory = sizes.pop("block") or self.block
                block = factory(
                    sizes.pop("features"),
                    **sizes,
                    norm=self.norm,
                    dtype=self.dtype,
                    name=f"stage{index}_block{position}",
                )
                x = call(block, x, train, remat=self.remat)
            out[f"stage{index}"] = x
        if self.last:
            x = Pointwise(self.last, use_bias=biased, dtype=self.dtype, name="last_conv")(x)
            out["last"] = x = act(norm(self.last, name="last_norm")(x))
        out["pooled"] = x = x.mean((1, 2))
        if self.dense:
            x = act(nn.Dense(self.dense, dtype=self.dtype, name="dense")(x))
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        logits = wide(nn.Dense(self.classes, dtype=self.dtype, name="head")(x))
        return (logits, out) if capture else logits
