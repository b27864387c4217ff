"""Anchor pixels of a feature map: sampling them, interpolating between them, and blending with cheaper features."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from effjax.core.errors import check_choice, check_number, check_shape
from effjax.core.tree import wide

__all__ = ["anchor_mask", "sample_anchors", "spatially_interpolate", "upsample_nearest", "upsample_tent"]

Map = Float[Array | np.ndarray, "batch height width channels"]
Anchors = Float[Array | np.ndarray, "batch rows columns channels"]
Logits = Float[Array | np.ndarray, "features"] | Float[Array | np.ndarray, "batch rows columns 1"]
Pixels = tuple[int, int]

SAMPLINGS = ("lattice", "avg")
INTERPOLATIONS = ("tent", "nearest")


def sample_anchors(x: Map, stride: int, *, mode: str = "lattice", offset: Pixels = (0, 0)) -> Array:
    r"""The map on its anchors, :math:`\{(o_y + s i, o_x + s j)\}`.

    ``lattice`` takes the anchors' own pixels, ``avg`` the mean over the s x s cell that begins at each anchor; a cell
    that the border cuts is the mean of the pixels that there are.

    Args:
      x: map [batch, height, width, channels].
      stride: s, in pixels; 1 makes every pixel an anchor. Static.
      mode: ``"lattice"`` or ``"avg"``.
      offset: pixels above and left of the first anchor, each below s.

    Returns:
      [batch, ceil((height - o_y) / s), ceil((width - o_x) / s), channels], of the dtype of ``x``.

    Raises:
      ValueError: a stride above the height or width, an offset outside [0, s - 1], unknown ``mode``.
      TypeError: a map of integers.

    Example:
      >>> x = np.arange(9, dtype=np.float32).reshape(1, 3, 3, 1)
      >>> np.asarray(sample_anchors(x, 2))[0, ..., 0].tolist()
      [[0.0, 2.0], [6.0, 8.0]]
      >>> np.asarray(sample_anchors(x, 2, mode="avg"))[0, ..., 0].tolist()
      [[2.0, 3.5], [6.5, 8.0]]
    """
    check_choice("mode", mode, SAMPLINGS)
    _check_map("x", x)
    height, width = x.shape[1:3]
    rows, columns = anchor_grid((height, width), stride, offset)
    x = jnp.asarray(x)[:, offset[0] :, offset[1] :]
    if mode == "lattice" or stride == 1:
        return x[:, ::stride, ::stride]
    n, height, width, channels = x.shape
    pad = ((0, 0), (0, rows * stride - height), (0, columns * stride - width), (0, 0))
    cells = jnp.pad(x, pad).reshape(n, rows, stride, columns, stride, channels)
    inside = [
        np.minimum(stride, size - stride * np.arange(count)) for size, count in ((height, rows), (width, columns))
    ]
    pixels = inside[0][None, :, None, None] * inside[1][None, None, :, None]
    return (wide(cells).sum((2, 4)) / pixels.astype(wide(x).dtype)).astype(x.dtype)


def upsample_tent(a: Anchors, stride: int, shape: Pixels, *, offset: Pixels = (0, 0)) -> Array:
    r"""Bilinear interpolation that leaves the anchors as they are.

    A pixel (y, x) between the anchors (i, j) and (i + 1, j + 1), r and q of the way from one to the next, has

    .. math:: U = (1-r)(1-q) A_{i,j} + (1-r) q A_{i,j+1} + r (1-q) A_{i+1,j} + r q A_{i+1,j+1}

    Outside the outermost anchors it copies the nearest. It commutes with 1x1 convolutions and affine maps of the
    channels. ``jax.image.resize`` puts the pixels' centres elsewhere, and is another function.

    Args:
      a: anchors [batch, rows, columns, channels], as many as ``sample_anchors`` takes of such a map.
      stride: pixels from one anchor to the next. Static.
      shape: (height, width) of the map.
      offset: as for ``sample_anchors``.

    Returns:
      [batch, height, width, channels], of the dtype of ``a``.

    Raises:
      ValueError: a map of this shape has another number of anchors; arguments as for ``sample_anchors``.

    Example:
      >>> upsample_tent(jnp.array([0.0, 2.0, 6.0]).reshape(1, 1, 3, 1), 2, (2, 6)).reshape(2, 6)[1].tolist()
      [0.0, 1.0, 2.0, 4.0, 6.0, 6.0]
    """
    return _upsample(a, stride, shape, offset, [step / stride for step in range(stride)])


def upsample_nearest(a: Anchors, stride: int, shape: Pixels, *, offset: Pixels = (0, 0)) -> Array:
    """Every pixel copies its nearest anchor, and of two at the same distance the upper or left one.

    Args:
      a: as for ``upsample_tent``.
      stride: as for ``upsample_tent``.
      shape: as for ``upsample_tent``.
      offset: as for ``sample_anchors``.

    Returns:
      [batch, height, width, channels], of the dtype of ``a``.

    Raises:
      ValueError: as ``upsample_tent``.

    Example:
      >>> upsample_nearest(jnp.array([0.0, 2.0]).reshape(1, 1, 2, 1), 3, (3, 6)).reshape(3, 6)[0].tolist()
      [0.0, 0.0, 2.0, 2.0, 2.0, 2.0]
    """
    return _upsample(a, stride, shape, offset, [float(2 * step > stride) for step in range(stride)])


def anchor_mask(shape: Pixels, stride: int, *, offset: Pixels = (0, 0)) -> Bool[np.ndarray, "height width"]:
    """Which pixels of a map are anchors; a constant of the program.

    Args:
      shape: (height, width) of the map.
      stride: pixels from one anchor to the next.
      offset: as for ``sample_anchors``.

    Returns:
      Bool [height, width].

    Raises:
      ValueError: arguments as for ``sample_anchors``.

    Example:
      >>> anchor_mask((2, 3), 2, offset=(0, 1)).astype(int).tolist()
      [[0, 1, 0], [0, 0, 0]]
    """
    anchor_grid(shape, stride, offset)
    mask = np.zeros(shape, bool)
    mask[offset[0] :: stride, offset[1] :: stride] = True
    return mask


def spatially_interpolate(
    core_fn: Callable[[Array], Array],
    cheap_fn: Callable[[Array], Array] | None,
    x: Map,
    logits: Logits | None = None,
    *,
    stride: int = 2,
    alpha: str = "hard",
    sample: str = "lattice",
    interpolation: str = "tent",
    offset: Pixels = (0, 0),
    residual: bool = True,
) -> Array:
    r"""A residual block whose expensive part runs on the anchors only.

    .. math::
        A &= B(S(X)), \qquad L = C(X) \\
        \alpha &= m + (1 - m)\,\sigma(a) \;\text{(hard)} \quad\text{or}\quad \alpha = \sigma(a) \;\text{(soft)} \\
        Y &= X + \alpha\, U(A) + (1 - \alpha)\, L

    with the sampling S of ``sample_anchors``, the interpolation U of ``upsample_tent`` and the mask m of the anchors.
    In the hard form an anchor has exactly the value of the whole block. The core sees 1 / s^2 of the pixels, so that
    it costs as much less; there is no mask at run time.

    Args:
      core_fn: B, from the anchors [batch, rows, columns, channels] to as many rows and columns. One that halves them
        goes with a ``cheap_fn`` that halves the map.
      cheap_fn: C, at full resolution; its height and width are those of the result. None: :math:`\alpha = 1`, no L.
      x: X [batch, height, width, channels].
      logits: a. One per channel of the result, or a map [batch, height, width, 1] for a gate per pixel. None where
        there is no ``cheap_fn``.
      stride: s, in pixels. Static.
      alpha: ``"hard"`` or ``"soft"``.
      sample: ``"lattice"`` or ``"avg"``, see ``sample_anchors``.
      interpolation: ``"tent"`` or ``"nearest"``.
      offset: as for ``sample_anchors``.
      residual: whether X is added.

    Returns:
      Y, of the dtype of ``x``.

    Raises:
      ValueError: shapes that do not fit; logits without a cheap path or the reverse; unknown words.

    Example:
      >>> x = np.arange(12, dtype=np.float32).reshape(1, 3, 4, 1)
      >>> block = jax.jit(lambda x, logits: spatially_interpolate(lambda a: -a, jnp.zeros_like, x, logits))
      >>> # anchors lose all of it, their neighbours half of what is between them
      >>> np.asarray(block(x, np.zeros(1, np.float32)))[0, ..., 0].tolist()
      [[0.0, 0.5, 0.0, 2.0], [2.0, 2.5, 3.0, 4.0], [0.0, 4.5, 0.0, 6.0]]

    Source: our reconstruction of "Spatially Interpolated Inverted Residual Block" (Kag, Wadhwa, Saligrama, Jain; under
    review in 2023, never published) from one sentence each of a research statement and a thesis abstract: the output
    interpolates between features of a low-resolution sampling and cheaper ones at full resolution, or between
    anchor pixels of high compute and cheaper pixels. Lattice, blend, cheap path and defaults are ours.
    """
    check_choice("alpha", alpha, ("hard", "soft"))
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    if (cheap_fn is None) != (logits is None):
        raise ValueError(
            "cheap_fn and logits go together: give both, or neither for a block without a cheap path (alpha = 1)."
        )
    x = jnp.asarray(x)
    core = core_fn(sample_anchors(x, stride, mode=sample, offset=offset))
    cheap = None if cheap_fn is None else cheap_fn(x)
    _, *shape, _ = (x if cheap is None else cheap).shape
    shape = (shape[0], shape[1])
    if shape != x.shape[1:3] and any(offset):
        raise ValueError(f"offset={tuple(offset)}: a block that changes the map's size has its anchors at (0, 0).")
    upsample = upsample_tent if interpolation == "tent" else upsample_nearest
    y = upsample(core, stride, shape, offset=offset)
    if cheap is not None:
        check_shape("the output of cheap_fn", cheap, y.shape, "As many channels as core_fn's, of the same map.")
        mask = anchor_mask(shape, stride, offset=offset)[None, :, :, None] if alpha == "hard" else None
        y = _blend(y, cheap, logits, mask)
    if not residual:
        return y.astype(x.dtype)
    check_shape("x", x, y.shape, "It is added to the block's output; use residual=False where the shape changes.")
    return x + y.astype(x.dtype)


def _blend(y: Array, cheap: Array, logits: Any, mask: np.ndarray | None) -> Array:
    # In float32: the gradient of a logit is a sum over all pixels of a batch.
    channels, gates = (y.shape[-1],), (*y.shape[:3], 1)
    if jnp.shape(logits) not in (channels, gates):
        raise ValueError(f"logits have shape {jnp.shape(logits)}; expected {channels} or a map {gates}.")
    logits = wide(logits)
    logits = logits[None, None, None, :] if logits.ndim == 1 else logits
    blended = jax.nn.sigmoid(logits) * wide(y) + jax.nn.sigmoid(-logits) * wide(cheap)
    return blended.astype(y.dtype) if mask is None else jnp.where(mask, y, blended.astype(y.dtype))


def anchor_grid(shape: Pixels, stride: int, offset: Pixels = (0, 0)) -> Pixels:
    """How many rows and columns of anchors a map has; the arguments are checked here for all functions."""
    check_number("stride", stride, low=1, integer=True)
    for name, size, first in zip(("height", "width"), shape, offset, strict=True):
        if stride > size:
            raise ValueError(
                f"stride={stride} is larger than the {name} {size} of the map: one anchor would stand for all. Use a "
                f"stride of at most {min(shape)}, or leave this block dense."
            )
        check_number("offset", first, low=0, high=stride - 1, integer=True, hint="It must be below the stride.")
    rows, columns = (-(-(size - first) // stride) for size, first in zip(shape, offset, strict=True))
    return rows, columns


def _check_map(name: str, x: Any) -> None:
    if jnp.ndim(x) != 4:
        hint = f" One map is a batch of one: {name}[None]." if jnp.ndim(x) == 3 else ""
        raise ValueError(f"{name} has shape {jnp.shape(x)}; expected [batch, height, width, channels].{hint}")
    if not jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {x.dtype}; means and blends need a floating one: {name}.astype('float32').")


def _upsample(a: Anchors, stride: int, shape: Pixels, offset: Pixels, weights: list[float]) -> Array:
    _check_map("a", a)
    grid = anchor_grid(shape, stride, offset)
    if a.shape[1:3] != grid:
        raise ValueError(
            f"a holds {a.shape[1]} x {a.shape[2]} anchors; a map of {shape[0]} x {shape[1]} with stride={stride} and "
            f"offset={tuple(offset)} has {grid[0]} x {grid[1]}."
        )
    a = jnp.asarray(a)
    for axis in (2, 1):  # the smaller step first
        a = _interleave(a, axis, shape[axis - 1], offset[axis - 1], weights)
    return a


def _interleave(a: Array, axis: int, size: int, offset: int, weights: list[float]) -> Array:
    """Between every anchor and the next along one axis, ``len(weights)`` pixels: element-wise and of static shape."""
    stride = len(weights)
    if stride == 1:
        return a
    ends = lambda first, last: jax.lax.slice_in_dim(a, first, last, axis=axis)
    count = a.shape[axis]
    if offset:  # an anchor before the first, equal to it
        a = jnp.concatenate([ends(0, 1), a], axis)
        count += 1
    following = jnp.concatenate([ends(1, count), ends(count - 1, count)], axis)
    # The difference form: it keeps constants to the bit, and anchors as they are.
    phases = [a if t == 0 else following if t == 1 else a + (following - a) * t for t in weights]
    shape = (*a.shape[:axis], count * stride, *a.shape[axis + 1 :])
    whole = jnp.stack(phases, axis + 1).reshape(shape)
    first = stride - offset if offset else 0
    return jax.lax.slice_in_dim(whole, first, first + size, axis=axis)
