"""The spatially interpolated block as a Linen module, and its cheap path at full resolution."""

import dataclasses
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.core.errors import Limits, Natural, check_choice, check_fields, check_number
from effjax.core.tree import wide
from effjax.models.layers import DepthwiseConv, Images, norm_layer
from effjax.vision.anchors import Pixels, anchor_grid, spatially_interpolate

__all__ = ["CheapPath", "SIBlock", "SIConfig", "alternating_offsets"]

_KINDS = re.compile(r"identity|dw3(_pw|_g[1-9]\d*)?")
_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SIConfig:
    """Settings of spatially interpolated blocks.

    Raises:
      ValueError: a number out of range, an unknown word, an offset that is not below the stride.

    Example:
      >>> SIConfig(stride=3, cheap="identity").alpha
      'hard'
    """

    stride: Annotated[int, Limits(low=2, hint="1 makes every pixel an anchor, which saves nothing.")] = 2
    """Pixels from one anchor to the next."""
    sample: Literal["lattice", "avg"] = "lattice"
    """What the core reads: the anchors' pixels, or the means of the cells that begin at them."""
    interpolation: Literal["tent", "nearest"] = "tent"
    """How the core's results are carried to the other pixels."""
    cheap: str | None = "dw3"
    """The path at full resolution, a kind of CheapPath; None for no such path."""
    alpha: Literal["hard", "soft", "gated"] = "hard"
    """Anchors keep the core's results (hard), or all pixels are blended by channel (soft) or by a map (gated)."""
    logit: float = 0.0
    """Initial logit of the blend."""
    offsets: tuple[tuple[Natural, Natural], ...] = ((0, 0),)
    """Pixels above and left of the first anchor, of one block after another, cycled through."""

    def __post_init__(self):
        check_fields(self)
        check_number("logit", self.logit)
        if self.cheap is not None:
            check_kind("cheap", self.cheap)
        if not self.offsets or max(map(max, self.offsets)) >= self.stride:
            raise ValueError(f"offsets={self.offsets} must be one or more pairs below stride={self.stride}.")


def alternating_offsets(stride: int) -> tuple[Pixels, ...]:
    """Offsets of one block after another, such that every pixel is an anchor of one block in ``stride ** 2``.

    Args:
      stride: pixels from one anchor to the next.

    Returns:
      ``stride ** 2`` pairs, for ``SIConfig.offsets``.

    Raises:
      ValueError: a stride below 1.

    Example:
      >>> alternating_offsets(2)
      ((0, 0), (1, 1), (0, 1), (1, 0))
    """
    check_number("stride", stride, low=1, integer=True)
    return tuple((i, (i + shift) % stride) for shift in range(stride) for i in range(stride))


def check_kind(argument: str, kind: str) -> str:
    """Return ``kind`` if it names a cheap path; else raise ``ValueError``."""
    if not _KINDS.fullmatch(kind):
        raise ValueError(
            f"{argument}={kind!r} is not one of 'dw3', 'dw3_pw', 'identity', nor 'dw3_gN' with N groups, such as "
            "'dw3_g4'."
        )
    return kind


class CheapPath(nn.Module):
    """Features at full resolution for a small part of a block's work.

    ``dw3``: 3x3 depthwise convolution and norm. ``dw3_pw``: with a 1x1 convolution between the two. ``dw3_gN``: with a
    1x1 convolution in N groups. ``identity``: the norm alone, which is affine in each channel at inference (a scale
    and a bias where ``norm`` is ``"none"``). Where the number of channels or the size changes, the first and the last
    are ``dw3_pw``.

    Args:
      features: output channels.
      kind: as above.
      strides: of the depthwise convolution.
      norm: as for ``norm_layer``.
      dtype: compute dtype; parameters and statistics are float32.

    Returns:
      When called as ``path(x, train)`` with x [batch, height, width, channels]: an array
      [batch, ceil(height / strides), ceil(width / strides), features].

    Raises:
      ValueError: an unknown ``kind``, or groups that do not divide the channels.

    Example:
      >>> init = lambda key, x: CheapPath(8, "dw3_g4").init_with_output(key, x, False)
      >>> jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 5, 5, 8)))[0].shape
      (1, 5, 5, 8)
    """

    features: int
    kind: str = "dw3"
    strides: int = 1
    norm: str = "batch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images, train: bool) -> jax.Array:
        check_kind("kind", self.kind)
        biased, channels = self.norm == "none", x.shape[-1]
        changes = (channels, 1) != (self.features, self.strides)
        y = jnp.asarray(x, self.dtype)
        if self.kind == "identity" and not changes:
            if biased:
                scale = self.param("scale", nn.initializers.ones, (channels,)).astype(self.dtype)
                bias = self.param("bias", nn.initializers.zeros, (channels,)).astype(self.dtype)
                return y * scale[None, None, None, :] + bias[None, None, None, :]
        else:
            # A bias before a 1x1 convolution would be one too many.
            groups = self._groups(channels) or int(changes)
            y = DepthwiseConv(
                3, self.strides, padding=1, use_bias=biased and not groups, dtype=self.dtype, name="depthwise"
            )(y)
            if groups:
                y = nn.Conv(
                    self.features,
                    (1, 1),
                    feature_group_count=groups,
                    use_bias=biased,
                    kernel_init=_fan_out,
                    dtype=self.dtype,
                    name="pointwise",
                )(y)
        return norm_layer(self.norm, self.features, train=train, dtype=self.dtype, name="norm")(y)

    def _groups(self, channels: int) -> int:
        """Groups of the 1x1 convolution; 0 for none."""
        groups = int(self.kind.removeprefix("dw3_g")) if "_g" in self.kind else int(self.kind == "dw3_pw")
        if groups > 1 and (channels % groups or self.features % groups):
            raise ValueError(
                f"kind={self.kind!r}: {groups} groups do not divide {channels} channels into {self.features}. Use "
                "'dw3_pw', or a number of groups that divides both."
            )
        return groups


class SIBlock(nn.Module):
    r"""A residual block whose core runs on the anchors only: ``spatially_interpolate`` as a module.

    :math:`Y = f(X + \alpha U(B(S(X))) + (1 - \alpha) L(X))`. Any modules serve as the core B and the cheap path L, if
    they are called as ``module(x, train)``.

    Args:
      core: B, a block without its shortcut, such as ``InvertedResidual(..., skip=False)``.
      cheap: L, such as ``CheapPath(features)``; None: :math:`\alpha = 1`, no L.
      stride: pixels from one anchor to the next; 1 makes every pixel an anchor.
      alpha: ``"hard"``, ``"soft"`` or ``"gated"``. In the first two the logits are one parameter per channel, in the
        last a map, :math:`w \cdot X + b` of every pixel, and alpha its sigmoid, on anchors too.
      sample: ``"lattice"`` or ``"avg"``, see ``sample_anchors``.
      interpolation: ``"tent"`` or ``"nearest"``.
      offset: pixels above and left of the first anchor.
      residual: whether X is added.
      activation: f, after the sum; None for none, as in linear bottlenecks.
      logit: initial logit of alpha.

    Returns:
      When called as ``block(x, train)`` with x [batch, height, width, channels]: an array of the height and width that
      ``cheap`` gives, or those of x.

    Raises:
      ValueError: as ``spatially_interpolate``.

    Example:
      >>> from effjax.models.inverted_residual import InvertedResidual
      >>> block = SIBlock(InvertedResidual(8, hidden=48, skip=False), CheapPath(8))
      >>> init = lambda key, x: block.init_with_output(key, x, False)
      >>> y, variables = jax.eval_shape(init, jax.random.key(0), jnp.ones((2, 7, 9, 8)))
      >>> y.shape, sorted(variables["params"])
      ((2, 7, 9, 8), ['alpha', 'cheap', 'core'])

    A reconstruction, see ``spatially_interpolate``.
    """

    core: nn.Module
    cheap: nn.Module | None = None
    stride: int = 2
    alpha: str = "hard"
    sample: str = "lattice"
    interpolation: str = "tent"
    offset: Pixels = (0, 0)
    residual: bool = True
    activation: Callable[[jax.Array], jax.Array] | None = None
    logit: float = 0.0

    @nn.compact
    def __call__(self, x: Images, train: bool = False) -> jax.Array:
        check_choice("alpha", self.alpha, ("hard", "soft", "gated"))
        x = jnp.asarray(x)
        _, height, width, _ = x.shape
        anchor_grid((height, width), self.stride, self.offset)  # before the paths meet the map
        cheap = None if self.cheap is None else self.cheap(x, train)
        y = spatially_interpolate(
            lambda anchors: self.core(anchors, train),
            None if cheap is None else lambda x: cheap,
            x,
            None if cheap is None else self._logits(x, cheap.shape),
            stride=self.stride,
            alpha="hard" if self.alpha == "hard" else "soft",
            sample=self.sample,
            interpolation=self.interpolation,
            offset=self.offset,
            residual=self.residual,
        )
        return y if self.activation is None else self.activation(y)

    def _logits(self, x: jax.Array, shape: tuple[int, ...]) -> Any:
        initial = nn.initializers.constant(self.logit)
        if self.alpha != "gated":
            return self.param("alpha", initial, (shape[-1],))
        if x.shape[1:3] != shape[1:3]:
            raise ValueError(f"alpha='gated' gates the pixels of the {x.shape[1:3]} map, not {shape[1:3]}. Use 'soft'.")
        # float32, as the sum over channels and the sigmoid are.
        gate = nn.Dense(1, kernel_init=nn.initializers.zeros, bias_init=initial, dtype=wide(x).dtype, name="gate")
        return gate(wide(x))
