"""Ladders of static shapes: a few sizes that every input is padded to, so that XLA compiles few programs."""

import bisect
import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.core.errors import NoEffectWarning, check_number


def ladder(low: int, high: int, *, growth: float = 2.0, multiple: int = 8) -> tuple[int, ...]:
    r"""Sizes from ``low`` to ``high``, each about ``growth`` times the one before.

    .. math:: r_0 = \lceil low \rceil_m, \qquad r_{i+1} = \min(\lceil g\, r_i \rceil_m, \lceil high \rceil_m)

    with :math:`\lceil \cdot \rceil_m` the next multiple of ``multiple``. Padding multiplies a size
    by less than ``growth``, up to the rounding.

    Args:
      low: smallest size that must fit.
      high: largest size that must fit.
      growth: ratio of neighbouring rungs, above 1.
      multiple: every rung is a multiple of it (8 suits vector units).

    Returns:
      Strictly increasing sizes; the last one is at least ``high``.

    Raises:
      ValueError: ``low`` < 1, ``high`` < ``low``, ``growth`` <= 1 or ``multiple`` < 1.

    Example:
      >>> ladder(20, 130)
      (24, 48, 96, 136)
    """
    check_number("low", low, low=1, integer=True)
    check_number("high", high, low=low, integer=True, hint="The ladder climbs from low to high.")
    check_number("growth", growth, low=1, open_low=True)
    check_number("multiple", multiple, low=1, integer=True)
    top = _round_up(high, multiple)
    rungs = [_round_up(low, multiple)]
    while rungs[-1] < top:
        rungs.append(min(_round_up(math.ceil(rungs[-1] * growth), multiple), top))
    return tuple(rungs)


def _round_up(size: int, multiple: int) -> int:
    return -(-int(size) // multiple) * multiple


def check_ladder(rungs: Sequence[int], longest: int | None = None, *, argument: str = "ladder") -> tuple[int, ...]:
    """Return ``rungs`` as a tuple if they are a ladder that fits the data.

    Args:
      rungs: sizes, at least one, strictly increasing from 1 or more.
      longest: the largest size in the data, if known.
      argument: the caller's argument name, for the messages.

    Returns:
      The rungs as Python integers.

    Raises:
      ValueError: the rungs do not increase, or the last one is below ``longest``.

    Warns:
      NoEffectWarning: rungs that nothing is padded to, as a smaller one already fits ``longest``.

    Example:
      >>> check_ladder([8, 16, 32], 20)
      (8, 16, 32)
    """
    sizes = tuple(int(check_number(f"{argument}[{i}]", size, low=1, integer=True)) for i, size in enumerate(rungs))
    if not sizes or any(low >= high for low, high in itertools.pairwise(sizes)):
        raise ValueError(f"{argument}={sizes} must hold at least one size and increase from rung to rung. Sort it.")
    if longest is not None:
        idle = sizes[sizes.index(smallest_fit(longest, sizes, argument=argument)) + 1 :]
        if idle:
            warnings.warn(
                f"{argument}={sizes}: the longest size in the data is {longest}, so {len(idle)} of the "
                f"{len(sizes)} rungs are never used: {idle}. Drop them.",
                NoEffectWarning,
                stacklevel=2,
            )
    return sizes


def smallest_fit(size: int, rungs: Sequence[int], *, argument: str = "ladder") -> int:
    """The smallest rung that holds ``size``.

    Args:
      size: 0 or more.
      rungs: strictly increasing sizes.
      argument: the caller's name of the ladder, for the message.

    Returns:
      A rung.

    Raises:
      ValueError: ``size`` is above the top rung.

    Example:
      >>> smallest_fit(9, (8, 16, 32))
      16
    """
    check_number("size", size, low=0, integer=True)
    place = bisect.bisect_left(rungs, size)
    if place == len(rungs):
        top = f"the top rung {rungs[-1]}" if len(rungs) else "an empty ladder"
        raise ValueError(f"size={size} exceeds {top} of {argument}={tuple(rungs)}. Add a rung or truncate to fit.")
    return rungs[place]


def pad_to(array: Any, size: int, axis: int = 0, value: Any = 0) -> Any:
    """Pad the end of one axis to ``size``.

    Args:
      array: NumPy (stays NumPy, on the host) or JAX array.
      size: length of the axis afterwards.
      axis: which axis.
      value: what to pad with.

    Returns:
      The array, of the same dtype; the same object if it has the size already.

    Raises:
      ValueError: the axis is longer than ``size``, or does not exist.

    Example:
      >>> pad_to(np.ones((2, 3), np.int32), 4, axis=1)
      array([[1, 1, 1, 0],
             [1, 1, 1, 0]], dtype=int32)
    """
    check_number("size", size, low=0, integer=True)
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(f"axis={axis} does not exist in an array of shape {array.shape}.")
    missing = size - array.shape[axis]
    if missing < 0:
        raise ValueError(
            f"size={size} is below the length {array.shape[axis]} of axis {axis}; padding never cuts. "
            f"Choose size >= {array.shape[axis]} or slice first."
        )
    if missing == 0:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    pad = np.pad if isinstance(array, np.ndarray) else jnp.pad
    return pad(array, widths, constant_values=value)


def fit_ladder(lengths: Iterable[int], count: int, *, multiple: int = 8) -> tuple[int, ...]:
    r"""The ladder of at most ``count`` rungs that pads the given lengths least.

    .. math:: \min_{r_1 < \dots < r_c} \sum_i \min \{ r_j : r_j \ge \ell_i \}

    Exact, by dynamic programming over the distinct rounded lengths :math:`m`: :math:`O(c\,m^2)`.
    ``count`` is the compile budget: one executable a rung.

    Args:
      lengths: sizes in the data, 0 or more.
      count: most rungs allowed.
      multiple: every rung is a multiple of it.

    Returns:
      Strictly increasing rungs; the last one holds the longest length.

    Raises:
      ValueError: no lengths, negative ones, ``count`` or ``multiple`` below 1.

    Warns:
      NoEffectWarning: the data have fewer distinct rounded lengths than ``count``.

    Example:
      >>> fit_ladder([3, 3, 3, 4, 30, 31], 2, multiple=1)
      (4, 31)
    """
    check_number("count", count, low=1, integer=True)
    check_number("multiple", multiple, low=1, integer=True)
    lengths = np.asarray(list(lengths))
    if lengths.size == 0 or lengths.dtype.kind not in "iu" or lengths.min() < 0:
        raise ValueError(f"lengths must be integers of 0 or more, at least one; got {lengths.tolist()[:5]}.")
    rungs, weights = np.unique(np.maximum(-(-lengths // multiple), 1) * multiple, return_counts=True)
    if count > len(rungs):
        warnings.warn(
            f"count={count}, but the lengths fill only {len(rungs)} multiples of {multiple}: a ladder of {len(rungs)} "
            "rungs pads no more.",
            NoEffectWarning,
            stacklevel=2,
        )
    return tuple(int(rungs[i]) for i in _best_partition(rungs, weights, min(count, len(rungs))))


def _best_partition(rungs: np.ndarray, weights: np.ndarray, count: int) -> list[int]:
    """Indices of the last rung of each of ``count`` runs that minimise the padded total."""
    size = len(rungs)
    before = np.concatenate([[0], np.cumsum(weights)])
    # cost[k][i]: least total of the first i rungs' lengths in k runs; cut[k][i]: where the last run starts.
    cost = np.concatenate([[0.0], np.full(size, np.inf)])
    cuts = []
    for _ in range(count):
        new, cut = np.full(size + 1, np.inf), np.zeros(size + 1, int)
        for end in range(1, size + 1):
            totals = cost[:end] + rungs[end - 1] * (before[end] - before[:end])
            cut[end] = np.argmin(totals)
            new[end] = totals[cut[end]]
        cost = new
        cuts.append(cut)
    ends, end = [], size
    for cut in reversed(cuts):
        ends.append(end - 1)
        end = cut[end]
    return ends[::-1]
