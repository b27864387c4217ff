"""Residual networks whose blocks are arguments, and the CIFAR-10 weights they load."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.core.errors import check_choice
from effjax.core.tree import wide
from effjax.models.convert import Rule, load_weights
from effjax.models.layers import Images, call, norm_layer

__all__ = ["ResNet", "pretrained_resnet"]

# (features, strides=, norm=, dtype=, name=) -> a module called as module(x, train).
BlockFactory = Callable[..., nn.Module]

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
      >>> y, _ = block.init_with_output(jax.random.key(0), jnp.zeros((1, 8, 8, 16)), False)
      >>> y.shape
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


class ResNet(nn.Module):
    """Residual network in the CIFAR form of He et al. 2016, over blocks given by the caller.

    Stem, stages of blocks, global mean, linear classifier. The first block of every stage but the
    first has stride 2.

    Args:
      stages: for each stage its number of ``block``s, or a tuple of block factories of its own.
      widths: channels of each stage.
      block: factory ``(features, strides=, norm=, dtype=, name=) -> module``, called as
        ``module(x, train)``; ``functools.partial(BasicBlock, shortcut="project")`` is one.
      classes: number of outputs.
      norm: ``"batch"``, ``"group"`` or ``"none"``, handed to the blocks.
      stem: ``"cifar"`` (3x3 convolution) or ``"imagenet"`` (7x7 stride 2, then 3x3 max-pool stride 2).
      dtype: compute dtype; parameters and statistics are float32.
      remat: recompute each block in the backward pass.

    Returns:
      When called with ``x`` [batch, height, width, channels]: logits [batch, classes], float32 at
      least; with ``capture=True`` the pair (logits, {"stem", "stage1", ..., "pooled"}).

    Raises:
      ValueError: ``stages`` and ``widths`` of different lengths, unknown ``norm`` or ``stem``.

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
    stem: str = "cifar"
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Images, *, train: bool = False, capture: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        if len(self.stages) != len(self.widths):
            raise ValueError(f"stages={self.stages} and widths={self.widths} must have one entry for each stage.")
        out = {"stem": self._stem(jnp.asarray(x).astype(self.dtype), train)}
        x = out["stem"]
        for index, (stage, width) in enumerate(zip(self.stages, self.widths, strict=True), start=1):
            for position, factory in enumerate((self.block,) * stage if isinstance(stage, int) else stage):
                block = factory(
                    width,
                    strides=2 if index > 1 and position == 0 else 1,
                    norm=self.norm,
                    dtype=self.dtype,
                    name=f"stage{index}_block{position}",
                )
                x = call(block, x, train, remat=self.remat)
            out[f"stage{index}"] = x
        out["pooled"] = x = x.mean((1, 2))
        logits = wide(nn.Dense(self.classes, dtype=self.dtype, name="head")(x))
        return (logits, out) if capture else logits

    def _stem(self, x: jax.Array, train: bool) -> jax.Array:
        check_choice("stem", self.stem, ("cifar", "imagenet"))
        large = self.stem == "imagenet"
        x = nn.Conv(
            self.widths[0],
            (7, 7) if large else (3, 3),
            2 if large else 1,
            padding=3 if large else 1,
            use_bias=self.norm == "none",
            kernel_init=_he,
            dtype=self.dtype,
            name="stem_conv",
        )(x)
        x = nn.relu(norm_layer(self.norm, self.widths[0], train=train, dtype=self.dtype, name="stem_norm")(x))
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) if large else x


# Blocks in each of the three stages; depth = 6n + 2.
SIZES = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}


def resnet(name: str, **fields: Any) -> ResNet:
    """The CIFAR ResNet of He et al. 2016 by name.

    Args:
      name: ``"resnet20"``, ``"resnet32"``, ``"resnet44"`` or ``"resnet56"``.
      **fields: further fields of ``ResNet``.

    Returns:
      The module.

    Raises:
      ValueError: unknown name; the message suggests the nearest.

    Example:
      >>> resnet("resnet32", classes=100).stages
      (5, 5, 5)
    """
    blocks = SIZES[check_choice("name", name, SIZES)]
    fields = {"stages": (blocks,) * 3, **fields}
    return ResNet(**fields)


def _batch_norm_rules(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.weight", f"params/{target}/scale"),
        Rule(f"{source}.bias", f"params/{target}/bias"),
        Rule(f"{source}.running_mean", f"batch_stats/{target}/mean"),
        Rule(f"{source}.running_var", f"batch_stats/{target}/var"),
        Rule(f"{source}.num_batches_tracked", None),
    )


RESNET_CIFAR10_RULES = (
    Rule("conv1.weight", "params/stem_conv/kernel", "conv"),
    *_batch_norm_rules("bn1", "stem_norm"),
    Rule("layer{stage}.{block}.conv{i}.weight", "params/stage{stage}_block{block}/conv{i}/kernel", "conv"),
    *_batch_norm_rules("layer{stage}.{block}.bn{i}", "stage{stage}_block{block}/norm{i}"),
    Rule("linear.weight", "params/head/kernel", "dense"),
    Rule("linear.bias", "params/head/bias"),
)


def pretrained_resnet(name: str = "resnet20", **fields: Any) -> tuple[ResNet, dict[str, Any]]:
    """A CIFAR-10 ResNet with trained weights.

    Inputs are RGB / 255, minus (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225), NHWC; outputs are
    the ten classes in the official order. ResNet-20 (91.7 % on the test images) travels with the
    package; the deeper ones are looked up in the folder ``EFFJAX_MODELS``.

    Args:
      name: as for ``resnet``.
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
    model = resnet(name, **fields)
    target = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    return model, load_weights(f"resnet_cifar10/{name}", target, RESNET_CIFAR10_RULES)
