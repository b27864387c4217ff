"""Depthwise convolution that is fast on CPUs too."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from effjax.core.errors import check_choice, check_number
from effjax.core.tree import wide

Pads = tuple[tuple[int, int], tuple[int, int]]


def depthwise_conv(
    x: Float[Array | np.ndarray, "batch height width channels"],
    kernel: Float[Array | np.ndarray, "rows columns 1 channels"],
    *,
    strides: int = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    impl: str = "auto",
) -> Float[Array, "batch out_height out_width channels"]:
    r"""Convolution of every channel with a filter of its own.

    :math:`y_{n,i,j,c} = \sum_{a,b} k_{a,b,c}\, x_{n, si+a-p, sj+b-p, c}`

    XLA's grouped convolution on CPUs is 20 to 400 times slower than its multiply-accumulates take.
    There, ``"shift"`` adds one shifted product per tap; its gradient is two such sums, so it has
    reverse-mode derivatives of first order only (``"conv"`` has all).

    Args:
      x: images.
      kernel: filters, in the layout of ``flax.linen.Conv(feature_group_count=channels)``.
      strides: of both axes.
      padding: ``"SAME"``, ``"VALID"``, zeros on each side, or ((top, bottom), (left, right)).
      impl: ``"shift"``, ``"conv"`` (``lax.conv_general_dilated``) or ``"auto"``: ``"shift"`` on CPUs.

    Returns:
      The output in the dtype of ``x``; sums are in float32 at least.

    Raises:
      ValueError: channels or dtypes of ``x`` and ``kernel`` differ, or an argument is not legal.

    Example:
      >>> depthwise_conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2)), strides=2)[0, :, :, 0]
      Array([[9., 6.],
             [6., 4.]], dtype=float32)
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    check_choice("impl", impl, ("auto", "shift", "conv"))
    strides = int(check_number("strides", strides, integer=True, low=1))
    if x.shape[-1] != kernel.shape[-1] or x.dtype != kernel.dtype:
        raise ValueError(
            f"x with {x.shape[-1]} channels of {x.dtype} and kernel with {kernel.shape[-1]} of {kernel.dtype} "
            "must agree. Give one filter per channel, in the dtype of x."
        )
    pads = _pads(padding, x.shape[1:3], kernel.shape[:2], strides)
    if impl == "shift" or (impl == "auto" and jax.default_backend() == "cpu"):
        return _shift(x, kernel, strides, pads)
    return lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _pads(padding: str | int | Sequence[tuple[int, int]], sizes: Sequence[int], taps: Sequence[int], s: int) -> Pads:
    if isinstance(padding, str):
        check_choice("padding", padding, ("SAME", "VALID"))
        rows, columns = lax.padtype_to_pads(sizes, taps, (s, s), padding)
    elif isinstance(padding, int):
        rows = columns = (padding, padding)
    else:
        rows, columns = padding
    pads = (int(rows[0]), int(rows[1])), (int(columns[0]), int(columns[1]))
    if min(min(pads)) < 0:
        raise ValueError(f"padding={padding!r} must not be negative. Slice x to crop it.")
    for size, tap, pad in zip(sizes, taps, pads, strict=True):
        if size + sum(pad) < tap:
            raise ValueError(f"kernel with {tap} taps is larger than the {size} + {sum(pad)} padded pixels of x.")
    return pads


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shift(x: jax.Array, kernel: jax.Array, strides: int, pads: Pads) -> jax.Array:
    # Otherwise XLA computes what made x, normalisation and activation, anew for every tap.
    padded = lax.optimization_barrier(jnp.pad(x, ((0, 0), *pads, (0, 0))))
    return _named(_sum_of_shifts, "products", kernel)(padded, kernel, strides)


def _shift_fwd(x, kernel, strides, pads):
    return _shift(x, kernel, strides, pads), (x, kernel)


def _shift_bwd(strides, pads, saved, g):
    x, kernel = saved
    g = lax.optimization_barrier(g)
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    dx = _transposed(g, kernel, strides, pads, x.shape[1:3])
    return dx, _named(_kernel_gradient, "kernel", kernel)(padded, g, kernel, strides)


_shift.defvjp(_shift_fwd, _shift_bwd)


def _sum_of_shifts(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    rows, columns = ((size - tap) // strides + 1 for size, tap in zip(x.shape[1:3], kernel.shape[:2], strict=True))
    total = jnp.zeros((), wide(x).dtype)
    for i, j in np.ndindex(kernel.shape[:2]):
        total += wide(_window(x, i, j, rows, columns, strides)) * wide(kernel[i, j])[None, None]
    return total.astype(x.dtype)


def _window(x: jax.Array, i: int, j: int, rows: int, columns: int, strides: int) -> jax.Array:
    """What tap (i, j) meets at each output."""
    last = (x.shape[0], i + (rows - 1) * strides + 1, j + (columns - 1) * strides + 1, x.shape[3])
    return lax.slice(x, (0, i, j, 0), last, (1, strides, strides, 1))


def _transposed(g: jax.Array, kernel: jax.Array, strides: int, pads: Pads, sizes: Sequence[int]) -> jax.Array:
    """Gradient in the input: pixels of one remainder modulo ``strides`` see one sub-lattice of taps."""
    counts = tuple(-(-size // strides) for size in sizes)
    phases = []
    for remainders in np.ndindex(strides, strides):
        # Input pixel ``strides * q + remainder`` is tap ``strides * m + first`` of output ``q + shift - m``.
        places = [divmod(r + low, strides) for r, (low, _) in zip(remainders, pads, strict=True)]
        taps = kernel[tuple(slice(first, None, strides) for _, first in places)][::-1, ::-1]
        if not taps.size:  # More strides than taps: no output reads these pixels.
            phases.append(jnp.zeros((g.shape[0], *counts, g.shape[3]), g.dtype))
            continue
        lows = [tap - 1 - shift for tap, (shift, _) in zip(taps.shape[:2], places, strict=True)]
        around = [
            (low, count + tap - 1 - size - low, 0)
            for low, count, tap, size in zip(lows, counts, taps.shape[:2], g.shape[1:3], strict=True)
        ]
        moved = lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *around, (0, 0, 0)))
        phases.append(_named(_sum_of_shifts, "products", taps)(moved, taps, 1))
    if strides == 1:
        return phases[0]
    (high, across), (batch, *_, channels) = counts, g.shape
    lattice = jnp.stack(phases).reshape(strides, strides, batch, high, across, channels).transpose(2, 3, 0, 4, 1, 5)
    return lattice.reshape(batch, high * strides, across * strides, channels)[:, : sizes[0], : sizes[1]]


def _kernel_gradient(x: jax.Array, g: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    """Sums over images and pixels, a row of outputs at a time: XLA's own reduction to the last axis is scalar."""
    (batch, rows, columns, channels), taps = g.shape, kernel.shape[:2]

    def row(totals, h):
        band = lax.dynamic_slice_in_dim(x, h * strides, taps[0], axis=1)
        gradient = wide(lax.dynamic_slice_in_dim(g, h, 1, axis=1))
        windows = (_window(band, i, j, 1, columns, strides) for i, j in np.ndindex(taps))
        return [total + wide(window) * gradient for total, window in zip(totals, windows, strict=True)], None

    zeros = jnp.zeros((batch, 1, columns, channels), wide(g).dtype)
    totals, _ = lax.scan(row, [zeros] * (taps[0] * taps[1]), jnp.arange(rows))
    return jnp.stack(totals).sum((1, 2, 3)).reshape(kernel.shape).astype(kernel.dtype)


def _named(function, kind: str, kernel: jax.Array):
    """The function as a jitted one whose name says to ``core.macs`` what it costs: element-wise work counts nothing."""
    return _jitted(function, f"depthwise_{kind}_{kernel.shape[0] * kernel.shape[1]}")


@functools.cache
def _jitted(function, name: str):
    named = lambda *args: function(*args)
    named.__name__ = named.__qualname__ = name
    strides = 3 if function is _kernel_gradient else 2
    return jax.jit(named, static_argnums=strides)
