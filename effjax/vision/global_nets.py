"""Networks with Global layers in place of the blocks that only widen the view."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.core.errors import check_choice, check_number
from effjax.models.inverted_residual import BlockRow, InvertedResidual, InvertedResidualNet
from effjax.models.residual_blocks import BasicBlock
from effjax.models.resnet import ResNet
from effjax.vision.global_layer import FieldMaps, GlobalLayer
from effjax.vision.pde import PdeConfig

__all__ = ["global_inverted_residual", "mobilenet_global", "resnet_global"]

BlockFactory = Callable[..., nn.Module]

_PROJECTED = functools.partial(BasicBlock, shortcut="project")
_USUAL = PdeConfig()


def resnet_global(
    blocks: int = 1,
    widths: tuple[int, ...] = (16, 32, 64, 64),
    layer: BlockFactory | None = GlobalLayer,
    block: BlockFactory = _PROJECTED,
    **fields: Any,
) -> ResNet:
    """ResNet-Global: a few blocks and one Global layer in each stage but those from the fourth on.

    The default is the paper's CIFAR network. It has four stages and ends at 4 x 4; ResNet-32 has three and ends at
    8 x 8. The paper's WRN-Global has ``widths=(64, 128, 256)`` and Global layers with ``init_fn=BasicBlock``; by its
    counts the wide network of the authors' code has these blocks, and not those of Zagoruyko & Komodakis.

    Args:
      blocks: blocks of each stage.
      widths: channels of each stage.
      layer: factory of what follows the blocks, called as ``block`` is; None for nothing, the same network without.
      block: factory ``(features, strides=, norm=, dtype=, name=) -> module``, called as ``module(x, train)``.
      **fields: of ``ResNet``: ``classes``, ``norm``, ``dtype``, ``remat``, ...

    Returns:
      The module.

    Raises:
      ValueError: no block.

    Example:
      >>> model = resnet_global(layer=functools.partial(GlobalLayer, pde=PdeConfig(K=5)), classes=100)
      >>> len(model.stages)
      4

    Reference: Kag, Saligrama, "Condensing CNNs with Partial Differential Equations", CVPR 2022.
    """
    check_number("blocks", blocks, low=1, integer=True)
    plain = (block,) * blocks
    mixed = plain if layer is None else (*plain, layer)
    stages = tuple(mixed if index < 3 else plain for index in range(len(widths)))
    return ResNet(stages=stages, widths=widths, block=block, **fields)


def global_inverted_residual(
    features: int,
    *,
    hidden: int,
    strides: int = 1,
    kernel: int = 3,
    squeeze: int = 0,
    activation: str = "relu6",
    norm: str = "batch",
    dtype: DTypeLike = jnp.float32,
    name: str | None = None,
    pde: PdeConfig = _USUAL,
    diffusivity: tuple[float, float] | None = (1.0, 1.0),
    dot: bool = False,
) -> GlobalLayer:
    """A Global layer whose first map is that of an inverted residual block; a ``block`` of ``InvertedResidualNet``.

    Args:
      features: output channels.
      hidden: of the block; and so the next five.
      strides: of the block.
      kernel: of the block, and of the maps' convolutions.
      squeeze: of the block.
      activation: of the block, the maps and the layer.
      norm: of all.
      dtype: of all.
      name: of the layer.
      pde: how the equation is solved.
      diffusivity: two numbers; None to compute maps.
      dot: as in ``FieldMaps``.

    Returns:
      The layer.

    Example:
      >>> import jax
      >>> layer = global_inverted_residual(8, hidden=16)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 4, 4, 8)))[0].shape
      (1, 4, 4, 8)
    """
    sizes = {"hidden": hidden, "kernel": kernel, "squeeze": squeeze}
    fields = functools.partial(FieldMaps, kernel=kernel, activation=activation, epsilon=1e-5, dot=dot)
    return GlobalLayer(
        features,
        strides=strides,
        norm=norm,
        dtype=dtype,
        init_fn=functools.partial(InvertedResidual, **sizes, activation=activation),
        velocity=fields,
        diffusivity=fields if diffusivity is None else diffusivity,
        pde=pde,
        activation=activation,
        name=name,
    )


_FIRST = PdeConfig(dt=0.1)
_WIDE = PdeConfig(dt=0.1, dx=2, dy=2)

# Stages of rows: channels, stride, hidden channels, kernel, squeeze-excite, activation; what follows is a Global row's
# own. Squeeze-excite has a quarter of the hidden channels, or, in EfficientNet, of the block's input.
_V2 = (
    (BlockRow(16, 1, 32),),
    *(
        (BlockRow(c, s, hidden), BlockRow(c, 1, 6 * c, activation="relu", block=global_inverted_residual))
        for c, s, hidden in ((24, 2, 96), (32, 2, 144), (64, 2, 192), (96, 1, 384), (160, 2, 576))
    ),
    (BlockRow(320, 1, 960),),
)
_V3 = (
    (BlockRow(16, 1, 16, 3, 0, "relu"),),
    (BlockRow(24, 2, 64, 3, 0, "relu"), BlockRow(24, 1, 72, 3, 0, "relu", global_inverted_residual)),
    (BlockRow(40, 2, 72, 5, 24, "relu"), BlockRow(40, 1, 120, 5, 32, "relu", global_inverted_residual)),
    (BlockRow(80, 2, 240, 3, 0, "hard_swish"), BlockRow(80, 1, 480, 3, 0, "hard_swish", global_inverted_residual)),
    (
        BlockRow(112, 1, 480, 3, 120, "hard_swish"),
        BlockRow(112, 1, 672, 3, 168, "hard_swish", global_inverted_residual),
    ),
    (BlockRow(160, 2, 672, 5, 168, "hard_swish", global_inverted_residual),),
)


def _b0_stage(
    features: int, strides: int, hidden: int, kernel: int, squeeze: int, pde: PdeConfig, diffusivity: float
) -> tuple[BlockRow, BlockRow]:
    block = functools.partial(global_inverted_residual, pde=pde, diffusivity=(diffusivity, diffusivity), dot=True)
    return (
        BlockRow(features, strides, hidden, kernel, squeeze, "silu"),
        BlockRow(features, 1, 6 * features, kernel, features // 4, "silu", block),
    )


_B0 = (
    (BlockRow(16, 1, 32, 3, 8, "silu"),),
    _b0_stage(24, 2, 96, 3, 4, _FIRST, 2.0),
    _b0_stage(40, 2, 144, 5, 6, _WIDE, 2.0),
    _b0_stage(80, 2, 240, 3, 10, _USUAL, 1.0),
    _b0_stage(112, 1, 480, 5, 20, _USUAL, 1.0),
    _b0_stage(192, 2, 672, 5, 28, _USUAL, 1.0),
    (BlockRow(320, 1, 1152, 3, 48, "silu"),),
)
_NETS: dict[str, dict[str, Any]] = {
    "mobilenet_v2": {"stages": _V2},
    "mobilenet_v3_large": {"stages": _V3, "stem": 16, "last": 960, "dense": 1280, "activation": "hard_swish"},
    "efficientnet_b0": {"stages": _B0, "activation": "silu", "dropout": 0.2},
}


def mobilenet_global(name: str, **fields: Any) -> InvertedResidualNet:
    """MobileNetV2-Global, MobileNetV3-Global or EfficientNet-B0-Global: two blocks a stage, the second a Global layer.

    Args:
      name: ``"mobilenet_v2"``, ``"mobilenet_v3_large"`` or ``"efficientnet_b0"``.
      **fields: of ``InvertedResidualNet``: ``classes``, ``stem_strides``, ``dtype``, ...

    Returns:
      The module.

    Raises:
      ValueError: unknown name.

    Example:
      >>> model = mobilenet_global("mobilenet_v2", classes=10, stem_strides=1)
      >>> [len(stage) for stage in model.stages]
      [1, 2, 2, 2, 2, 2, 1]

    Reference: Kag, Saligrama, CVPR 2022. Parameters and multiply-accumulates are those of the released code
    (2.95, 3.87 and 3.82 million), not of the poster (1.6, 3 and 2.4 million).
    """
    return InvertedResidualNet(**{**_NETS[check_choice("name", name, _NETS)], **fields})
