"""MobileNetV1, V2, V3 and EfficientNet-B0 by name: tables of rows for ``InvertedResidualNet``."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax

from effjax.core.errors import check_choice, check_number
from effjax.models.inverted_residual import BlockRow, InvertedResidual, InvertedResidualNet, SeparableBase
from effjax.models.layers import Images

__all__ = ["DepthwiseSeparable"]


class DepthwiseSeparable(SeparableBase):
    """A depthwise and a 1x1 convolution, each with norm and activation: the block of MobileNetV1.

    ``y = act(norm(project(act(norm(depthwise(x))))))``. Fields and result are those of ``InvertedResidual``, so
    that either can stand in a network; ``hidden`` are the channels of x, and there is no shortcut.

    Args:
      features: output channels.
      strides: of the depthwise convolution.
      hidden: channels of x.
      kernel: size of the depthwise convolution, odd.
      squeeze: must be 0.
      activation: as for ``InvertedResidual``.
      norm: as for ``norm_layer``; convolutions have biases where it is ``"none"``.
      padding: as for ``InvertedResidual``.
      dtype: compute dtype; parameters and statistics are float32.

    Returns:
      When called as ``block(x, train)``: an array [batch, ceil(height / strides), ceil(width / strides), features].

    Raises:
      ValueError: ``hidden`` or ``squeeze`` of another block, or an unknown name.

    Example:
      >>> block = DepthwiseSeparable(features=32, strides=2, hidden=16)
      >>> run = lambda key, x: block.init_with_output(key, x, False)[0]
      >>> jax.eval_shape(run, jax.random.key(0), jax.numpy.zeros((1, 8, 8, 16))).shape
      (1, 4, 4, 32)

    Reference: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
    Applications", 2017 (arXiv 1704.04861).
    """

    @nn.compact
    def __call__(self, x: Images, train: bool) -> jax.Array:
        if self.hidden != x.shape[-1] or self.squeeze:
            raise ValueError(
                f"hidden={self.hidden}, squeeze={self.squeeze}: DepthwiseSeparable neither expands its input's "
                f"{x.shape[-1]} channels nor squeezes. Use hidden={x.shape[-1]} and squeeze=0, or InvertedResidual."
            )
        return self.act(self.pointwise(self.filtered(x, train), self.features, train, "project"))


def round_channels(channels: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``channels``, or the next one where more than a tenth would be lost.

    Example:
      >>> round_channels(0.35 * 32), round_channels(0.75 * 24)
      (16, 24)
    """
    near = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return near + divisor if near < 0.9 * channels else near


class _Stage(NamedTuple):
    """Blocks of one resolution; of several ``hidden`` there is one for each block."""

    features: int
    strides: int
    hidden: tuple[float, ...]  # of expansions (times the block's input) or of channels
    kernel: int = 3
    squeeze: bool = False
    activation: str = ""


def _expanded(expansion: int, features: int, blocks: int, strides: int, kernel: int = 3, squeeze: bool = False):
    return _Stage(features, strides, (expansion,) * blocks, kernel, squeeze)


_V1 = (
    _expanded(1, 64, 1, 1),
    _expanded(1, 128, 2, 2),
    _expanded(1, 256, 2, 2),
    _expanded(1, 512, 6, 2),
    _expanded(1, 1024, 2, 2),
)
_V2 = (
    _expanded(1, 16, 1, 1),
    _expanded(6, 24, 2, 2),
    _expanded(6, 32, 3, 2),
    _expanded(6, 64, 4, 2),
    _expanded(6, 96, 3, 1),
    _expanded(6, 160, 3, 2),
    _expanded(6, 320, 1, 1),
)
# MobileNetV3 gives channels in place of expansions; its first stages have relu.
_V3_LARGE = (
    _Stage(16, 1, (16,), 3, False, "relu"),
    _Stage(24, 2, (64, 72), 3, False, "relu"),
    _Stage(40, 2, (72, 120, 120), 5, True, "relu"),
    _Stage(80, 2, (240, 200, 184, 184)),
    _Stage(112, 1, (480, 672), 3, True),
    _Stage(160, 2, (672, 960, 960), 5, True),
)
_V3_SMALL = (
    _Stage(16, 2, (16,), 3, True, "relu"),
    _Stage(24, 2, (72, 88), 3, False, "relu"),
    _Stage(40, 2, (96, 240, 240), 5, True),
    _Stage(48, 1, (120, 144), 5, True),
    _Stage(96, 2, (288, 576, 576), 5, True),
)
_B0 = (
    _expanded(1, 16, 1, 1, 3, True),
    _expanded(6, 24, 2, 2, 3, True),
    _expanded(6, 40, 2, 2, 5, True),
    _expanded(6, 80, 3, 2, 3, True),
    _expanded(6, 112, 3, 1, 5, True),
    _expanded(6, 192, 4, 2, 5, True),
    _expanded(6, 320, 1, 1, 3, True),
)


class _Design(NamedTuple):
    stages: tuple[_Stage, ...]
    activation: str
    stem: int = 32
    last: int = 1280
    dense: int = 0
    channels: bool = False  # whether the stages' ``hidden`` are channels
    squeeze: str = ""  # a quarter of the "hidden" or of the "input" channels
    last_shrinks: bool = False  # whether a width below 1 narrows the last layer
    block: Any = InvertedResidual
    norm: str = "batch"


_DESIGNS = {
    "mobilenet_v1": _Design(_V1, "relu6", last=0, block=DepthwiseSeparable),
    "mobilenet_v2": _Design(_V2, "relu6"),
    "mobilenet_v3_large": _Design(_V3_LARGE, "hard_swish", 16, 960, 1280, True, "hidden", True, norm="batch-1e-3"),
    "mobilenet_v3_small": _Design(_V3_SMALL, "hard_swish", 16, 576, 1024, True, "hidden", True, norm="batch-1e-3"),
    "efficientnet_b0": _Design(_B0, "silu", squeeze="input", last_shrinks=True),
}
MOBILENETS = (*_DESIGNS, *(f"{name}_cifar" for name in _DESIGNS))


def mobilenet(
    name: str, *, width: float = 1.0, strides: tuple[int, ...] | None = None, **fields: Any
) -> InvertedResidualNet:
    """A MobileNet or EfficientNet by name.

    Args:
      name: ``"mobilenet_v1"``, ``"mobilenet_v2"``, ``"mobilenet_v3_large"``, ``"mobilenet_v3_small"`` or
        ``"efficientnet_b0"``; with ``_cifar`` behind it, for images of some 32 pixels: the stem and the first
        stage that halves the resolution keep it.
      width: factor of all channels, which are rounded to multiples of 8 as torchvision and timm round them.
      strides: of each stage's first block; None takes the table's.
      **fields: further fields of ``InvertedResidualNet``; ``classes`` is 1000, for ``_cifar`` 10.

    Returns:
      The module.

    Raises:
      ValueError: an unknown name, a width that is not positive, strides of another number of stages.

    Example:
      >>> model = mobilenet("mobilenet_v2_cifar", width=0.5)
      >>> [rows[0].strides for rows in model.stages], model.stem_strides
      ([1, 1, 2, 2, 1, 2, 1], 1)

    References: Howard et al. 2017 (arXiv 1704.04861); Sandler et al. 2018 (1801.04381); Howard et al.,
    "Searching for MobileNetV3", 2019 (1905.02244); Tan & Le, "EfficientNet", 2019 (1905.11946). The MobileNetV3s
    have batch norms with an epsilon of 1e-3, as torchvision's; timm's have 1e-5: ``norm="batch"``.
    """
    check_choice("name", name, MOBILENETS)
    check_number("width", width, low=0, open_low=True)
    design = _DESIGNS[name.removesuffix("_cifar")]
    small = name.endswith("_cifar")
    own = _strides(design, small) if strides is None else tuple(strides)
    if len(own) != len(design.stages):
        raise ValueError(f"strides={strides}: {name} has {len(design.stages)} stages. Give one number for each.")
    scaled = lambda channels: round_channels(channels * width)
    last = design.last and (scaled(design.last) if design.last_shrinks or width > 1 else design.last)
    stages = _rows(design, width, own)
    if design.channels:  # six times what the last stage gives
        last = 6 * stages[-1][-1].features
    sizes: dict[str, Any] = {
        "stages": stages,
        "stem": scaled(design.stem),
        "stem_strides": 1 if small else 2,
        "last": last,
        "dense": design.dense and scaled(design.dense),
        "block": design.block,
        "classes": 10 if small else 1000,
        "activation": design.activation,
        "norm": design.norm,
    }
    sizes |= fields
    return InvertedResidualNet(**sizes)


def _strides(design: _Design, small: bool) -> tuple[int, ...]:
    strides = [stage.strides for stage in design.stages]
    if small:
        strides[strides.index(2)] = 1
    return tuple(strides)


def _rows(design: _Design, width: float, strides: tuple[int, ...]) -> tuple[tuple[BlockRow, ...], ...]:
    inputs, stages = round_channels(design.stem * width), []
    for stage, stride in zip(design.stages, strides, strict=True):
        rows = []
        features = round_channels(stage.features * width)
        for position, given in enumerate(stage.hidden):
            hidden = round_channels(given * width) if design.channels else round(given * inputs)
            quarter = round_channels(hidden // 4) if design.squeeze == "hidden" else max(1, inputs // 4)
            rows.append(
                BlockRow(
                    features,
                    strides=stride if position == 0 else 1,
                    hidden=hidden,
                    kernel=stage.kernel,
                    squeeze=quarter if stage.squeeze else 0,
                    activation=stage.activation or design.activation,
                )
            )
            inputs = features
        stages.append(tuple(rows))
    return tuple(stages)
