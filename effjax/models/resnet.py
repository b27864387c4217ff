"""Residual networks whose blocks are arguments, and the CIFAR-10 weights they load."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.core.errors import check_choice
from effjax.core.partition import by_rows
from effjax.core.tree import wide
from effjax.models.convert import Rule, batch_norm_rules, load_weights
from effjax.models.layers import Images, call, check_images, norm_layer
from effjax.models.residual_blocks import BasicBlock, Bottleneck, PreactivationBlock

__all__ = ["ResNet", "pretrained_resnet"]

# (features, strides=, norm=, dtype=, name=) -> a module called as module(x, train).
BlockFactory = Callable[..., nn.Module]

_he = nn.initializers.he_normal()


class ResNet(nn.Module):
    """Residual network over blocks given by the caller; by default in the CIFAR form of He et al. 2016.

    Stem, stages of blocks, global mean, linear classifier. The first block of every stage but the
    first has stride 2.

    Args:
      stages: for each stage its number of blocks, or a tuple of block factories of its own.
      widths: channels of each stage.
      block: factory ``(features, strides=, norm=, dtype=, name=) -> module``, called as
        ``module(x, train)``; ``functools.partial(BasicBlock, shortcut="project")`` is one.
      classes: number of outputs.
      norm: ``"batch"``, ``"group"`` or ``"none"``, handed to the blocks.
      strides: stride of each stage's first block; None means 1, 2, 2, ...
      stem: ``"cifar"`` (3x3 convolution) or ``"imagenet"`` (7x7 stride 2, then 3x3 max-pool stride 2).
      stem_features: channels of the stem; None takes ``widths[0]``.
      preactivation: the norm and the activation of the stem stand before the mean instead, for
        blocks that begin with theirs.
      dtype: compute dtype; parameters and statistics are float32.
      remat: recompute each block in the backward pass.

    Returns:
      When called with ``x`` [batch, height, width, channels]: logits [batch, classes], float32 at
      least; with ``capture=True`` the pair (logits, {"stem", "stage1", ..., "pooled"}).

    Raises:
      ValueError: ``stages``, ``widths`` and ``strides`` of different lengths, unknown ``norm`` or ``stem``.
      TypeError: images of integers.

    Example:
      >>> model = ResNet(stages=(1, 1), widths=(8, 16))
      >>> (logits, out), _ = model.init_with_output(jax.random.key(0), jnp.zeros((2, 32, 32, 3)), capture=True)
      >>> logits.shape, out["stage2"].shape
      ((2, 10), (2, 16, 16, 16))

    Reference: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016
    (arXiv 1512.03385), section 4.2. Option-A padding is split over both sides of the channels, as
    in the widely used PyTorch port whose weights ``pretrained_resnet`` loads.
    """

    stages: tuple[int | tuple[BlockFactory, ...], ...] = (3, 3, 3)
    widths: tuple[int, ...] = (16, 32, 64)
    block: BlockFactory = BasicBlock
    classes: int = 10
    norm: str = "batch"
    strides: tuple[int, ...] | None = None
    stem: str = "cifar"
    stem_features: int | None = None
    preactivation: bool = False
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Images, *, train: bool = False, capture: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        strides = self.strides or (1, *(2,) * (len(self.stages) - 1))
        if not len(self.stages) == len(self.widths) == len(strides):
            raise ValueError(
                f"stages={self.stages} and widths={self.widths} (and strides={self.strides}, unless None) must have "
                "one entry for each stage."
            )
        out = {"stem": self._stem(check_images(x).astype(self.dtype), train)}
        x = out["stem"]
        for index, (stage, width) in enumerate(zip(self.stages, self.widths, strict=True), start=1):
            for position, factory in enumerate((self.block,) * stage if isinstance(stage, int) else stage):
                block = factory(
                    width,
                    strides=strides[index - 1] if position == 0 else 1,
                    norm=self.norm,
                    dtype=self.dtype,
                    name=f"stage{index}_block{position}",
                )
                x = by_rows(call(block, x, train, remat=self.remat))
            out[f"stage{index}"] = x
        if self.preactivation:
            x = self._activated(x, train, "last_norm")
        out["pooled"] = x = x.mean((1, 2))
        logits = wide(nn.Dense(self.classes, dtype=self.dtype, name="head")(x))
        return (logits, out) if capture else logits

    def _stem(self, x: jax.Array, train: bool) -> jax.Array:
        check_choice("stem", self.stem, ("cifar", "imagenet"))
        large = self.stem == "imagenet"
        x = nn.Conv(
            self.stem_features or self.widths[0],
            (7, 7) if large else (3, 3),
            2 if large else 1,
            padding=3 if large else 1,
            use_bias=self.norm == "none",
            kernel_init=_he,
            dtype=self.dtype,
            name="stem_conv",
        )(x)
        if not self.preactivation:
            x = self._activated(x, train, "stem_norm")
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) if large else x

    def _activated(self, x: jax.Array, train: bool, name: str) -> jax.Array:
        return nn.relu(norm_layer(self.norm, x.shape[-1], train=train, dtype=self.dtype, name=name)(x))


# Blocks in each of the three stages; depth = 6n + 2.
SIZES = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
_PROJECTED = functools.partial(BasicBlock, shortcut="project")
_IMAGENET: dict[str, dict[str, Any]] = {
    "resnet18": {"stages": (2, 2, 2, 2), "widths": (64, 128, 256, 512), "block": _PROJECTED},
    "resnet50": {"stages": (3, 4, 6, 3), "widths": (256, 512, 1024, 2048), "block": Bottleneck},
}
# Depth and width.
_WIDE = {"wrn_40_4": (40, 4), "wrn_28_10": (28, 10)}
RESNETS = (*SIZES, *_IMAGENET, *(f"{name}_cifar" for name in _IMAGENET), *_WIDE)


def resnet(name: str, **fields: Any) -> ResNet:
    """A published residual network by name.

    Args:
      name: for images of some 32 pixels ``"resnet20"``, ``"resnet32"``, ``"resnet44"``, ``"resnet56"`` (He et
        al. 2016) and the wide ``"wrn_40_4"``, ``"wrn_28_10"``; for ImageNet ``"resnet18"``, ``"resnet50"``, and with
        ``_cifar`` behind them the same stages after a 3x3 convolution.
      **fields: further fields of ``ResNet``; ``classes`` is 1000 for ImageNet's, else 10.

    Returns:
      The module.

    Raises:
      ValueError: unknown name; the message suggests the nearest.

    Example:
      >>> resnet("resnet32", classes=100).stages
      (5, 5, 5)
    """
    check_choice("name", name, RESNETS)
    if name in SIZES:
        fields = {"stages": (SIZES[name],) * 3, **fields}
        return ResNet(**fields)
    if name in _WIDE:
        return wide_resnet(*_WIDE[name], **fields)
    kind = name.removesuffix("_cifar")
    stem: dict[str, Any] = {"stem": "imagenet", "classes": 1000} if kind == name else {}
    fields = {**_IMAGENET[kind], "stem_features": 64, **stem, **fields}
    return ResNet(**fields)


def wide_resnet(depth: int, width: int, **fields: Any) -> ResNet:
    """The wide ResNet of Zagoruyko & Komodakis 2016, ``WRN-depth-width``.

    Args:
      depth: convolutions, without those of the shortcuts; 6n + 4 with n blocks in each stage.
      width: factor of the channels 16, 32, 64 of the three stages.
      **fields: further fields of ``ResNet``; ``block=functools.partial(PreactivationBlock, dropout=0.3)`` is one.

    Returns:
      The module.

    Raises:
      ValueError: another depth.

    Example:
      >>> wide_resnet(16, 2).widths
      (32, 64, 128)
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth={depth} must be 6n + 4 with n >= 1: 10, 16, 22, 28, 40, ...")
    sizes: dict[str, Any] = {
        "stages": (blocks,) * 3,
        "widths": (16 * width, 32 * width, 64 * width),
        "stem_features": 16,
    }
    fields = {**sizes, "block": PreactivationBlock, "preactivation": True, **fields}
    return ResNet(**fields)


WIDE_RESNET_RULES = (
    Rule("conv1.weight", "params/stem_conv/kernel", "conv"),
    Rule(
        "block{stage}.layer.{block}.convShortcut.weight",
        "params/stage{stage}_block{block}/conv_shortcut/kernel",
        "conv",
    ),
    Rule("block{stage}.layer.{block}.conv{i}.weight", "params/stage{stage}_block{block}/conv{i}/kernel", "conv"),
    *batch_norm_rules("block{stage}.layer.{block}.bn{i}", "stage{stage}_block{block}/norm{i}"),
    *batch_norm_rules("bn1", "last_norm"),
    Rule("fc.weight", "params/head/kernel", "dense"),
    Rule("fc.bias", "params/head/bias"),
)
"""The names of the widely used PyTorch port of wide ResNets (``block1.layer.0.bn1``)."""

RESNET_IMAGENET_RULES = (
    Rule("conv1.weight", "params/stem_conv/kernel", "conv"),
    *batch_norm_rules("bn1", "stem_norm"),
    Rule("layer{stage}.{block}.conv{i}.weight", "params/stage{stage}_block{block}/conv{i}/kernel", "conv"),
    *batch_norm_rules("layer{stage}.{block}.bn{i}", "stage{stage}_block{block}/norm{i}"),
    Rule("layer{stage}.{block}.downsample.0.weight", "params/stage{stage}_block{block}/conv_shortcut/kernel", "conv"),
    *batch_norm_rules("layer{stage}.{block}.downsample.1", "stage{stage}_block{block}/norm_shortcut"),
    Rule("fc.weight", "params/head/kernel", "dense"),
    Rule("fc.bias", "params/head/bias"),
)
"""The names of torchvision and timm for ResNet-18 and ResNet-50."""

RESNET_CIFAR10_RULES = (
    Rule("conv1.weight", "params/stem_conv/kernel", "conv"),
    *batch_norm_rules("bn1", "stem_norm"),
    Rule("layer{stage}.{block}.conv{i}.weight", "params/stage{stage}_block{block}/conv{i}/kernel", "conv"),
    *batch_norm_rules("layer{stage}.{block}.bn{i}", "stage{stage}_block{block}/norm{i}"),
    Rule("linear.weight", "params/head/kernel", "dense"),
    Rule("linear.bias", "params/head/bias"),
)


def pretrained_resnet(name: str = "resnet20", **fields: Any) -> tuple[ResNet, dict[str, Any]]:
    """A CIFAR-10 ResNet with trained weights.

    Inputs are RGB / 255, minus (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225), NHWC; outputs are
    the ten classes in the official order. ResNet-20 (91.7 % on the test images) travels with the
    package; the deeper ones are looked up in the folder ``EFFJAX_MODELS``.

    Args:
      name: ``"resnet20"``, ``"resnet32"``, ``"resnet44"`` or ``"resnet56"``.
      **fields: further fields of ``ResNet`` that leave its variables as they are: ``dtype``, ``remat``.

    Returns:
      The module, and its variables ``{"params", "batch_stats"}`` in float32.

    Raises:
      ValueError: unknown name, or ``fields`` that change the variables.
      FileNotFoundError: the weights are not on this machine.

    Example:
      >>> model, variables = pretrained_resnet("resnet20")
      >>> model.apply(variables, jnp.zeros((1, 32, 32, 3))).shape
      (1, 10)

    Source: Y. Idelbayev, "Proper ResNet Implementation for CIFAR10/CIFAR100 in PyTorch" (BSD-2-Clause);
    kernels are stored in float16.
    """
    model = resnet(check_choice("name", name, SIZES), **fields)
    target = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    return model, load_weights(f"resnet_cifar10/{name}", target, RESNET_CIFAR10_RULES)
