"""Whether a lower validation loss is more than chance, for searches that test hundreds of times on one small set."""

import math
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

from effjax.core.errors import check_number, check_shape

__all__ = ["bootstrap_gain", "halves", "paired_gain"]

Losses = Float[np.ndarray, "rows"]


def paired_gain(before: Losses, after: Losses, weights: Losses | None = None, *, level: float = 0.05) -> bool:
    r"""One-sided paired test of a lower mean loss.

    .. math:: d_i = \ell_i - \ell_i', \quad \bar d = \sum_i w_i d_i, \qquad
        \bar d > z_{1-\alpha} \sqrt{\tfrac{M}{M-1} \sum_i w_i^2 (d_i - \bar d)^2}

    Args:
      before: losses [M].
      after: losses [M].
      weights: [M], summing to 1; None for 1 / M.
      level: alpha of one test. For n tests alpha / n keeps the chance of any false one below alpha.

    Returns:
      Whether the gain is significant; of a single row never.

    Raises:
      ValueError: arrays of different lengths, or a level outside (0, 1).

    Example:
      >>> paired_gain(np.full(100, 1.0), np.linspace(0.8, 1.0, 100)), paired_gain(np.arange(4.0), np.arange(4.0)[::-1])
      (True, False)
    """
    gains, weights = _gains(before, after, weights)
    check_number("level", level, low=0, high=1, open_low=True, open_high=True)
    if len(gains) < 2:
        return False
    mean = weights @ gains
    error = math.sqrt(len(gains) / (len(gains) - 1) * (weights**2 @ (gains - mean) ** 2))
    return bool(mean > NormalDist().inv_cdf(1 - level) * error and mean > 0)


def bootstrap_gain(
    before: Losses,
    after: Losses,
    weights: Losses | None = None,
    *,
    level: float = 0.05,
    samples: int = 2000,
    seed: int = 0,
) -> bool:
    r"""One-sided bootstrap test of a lower mean loss.

    Of ``samples`` draws of M rows with replacement, the share whose mean loss does not fall:
    :math:`(1 + \#\{\bar d^* \le 0\}) / (1 + n) < \alpha`.

    Args:
      before: losses [M].
      after: losses [M].
      weights: [M], summing to 1; None for 1 / M.
      level: alpha of one test.
      samples: n; 1 / (n + 1) must be below the level.
      seed: of the draws.

    Returns:
      Whether the gain is significant.

    Raises:
      ValueError: as ``paired_gain``, or too few samples.

    Example:
      >>> bootstrap_gain(np.full(100, 1.0), np.linspace(0.8, 1.0, 100))
      True
    """
    gains, weights = _gains(before, after, weights)
    check_number("level", level, low=0, high=1, open_low=True, open_high=True)
    low = math.floor(1 / level)
    check_number("samples", samples, low=low, integer=True, hint=f"level={level} needs that many draws.")
    draws = np.random.default_rng(seed)
    rows = len(gains)
    fallen = sum(
        int(((weights * gains)[draws.integers(rows, size=(part, rows))].sum(1) > 0).sum()) for part in _shares(samples)
    )
    return (1 + samples - fallen) / (1 + samples) < level


def _shares(samples: int, most: int = 100) -> list[int]:
    return [min(most, samples - start) for start in range(0, samples, most)]


def halves(rows: int, *, seed: int = 0) -> Float[np.ndarray, "2 rows"]:
    """Weights of the two random halves of a validation set.

    Args:
      rows: at least 2.
      seed: of the split.

    Returns:
      float64 [2, rows]: 1 over the half's size in the half, 0 elsewhere.

    Raises:
      ValueError: fewer rows than 2.

    Example:
      >>> (halves(5) > 0).sum(0).tolist(), halves(5).sum(1).tolist()
      ([1, 1, 1, 1, 1], [1.0, 1.0])
    """
    check_number("rows", rows, low=2, integer=True, hint="Two halves need a row each.")
    order = np.random.default_rng(seed).permutation(rows)
    split = np.zeros((2, rows))
    for half, members in enumerate((order[: rows // 2], order[rows // 2 :])):
        split[half, members] = 1 / len(members)
    return split


def _gains(before: np.ndarray, after: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    before = np.asarray(before, np.float64)
    check_shape("after", after, before.shape, "One loss for each row.")
    weights = np.full(len(before), 1 / max(len(before), 1)) if weights is None else np.asarray(weights, np.float64)
    check_shape("weights", weights, before.shape, "One for each row.")
    return before - np.asarray(after, np.float64), weights
