"""Which size is shown when: sizes drawn for each step, fixed shares of a batch, batches of as many tokens."""

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from effjax.core.errors import check_number

__all__ = [
    "join_groups",
    "level_batch",
    "level_groups",
    "level_tokens",
    "progressive_level",
    "sample_level",
]

Level = TypeVar("Level", bound=Hashable)


def sample_level(levels: Sequence[Level], step: int, *, seed: int, weights: Sequence[float] | None = None) -> Level:
    """The level of a step, drawn on the host: a function of (seed, step), so the same on every host and on resume.

    Args:
      levels: sizes or other levels. Each is a program of its own: four to six are enough.
      step: from 0.
      seed: 0 or more, the same on all hosts. Hosts that draw different sizes wait for each other forever.
      weights: probabilities up to a factor; None draws uniformly, as the paper does. A larger one for the full size
        keeps it from being under-trained.

    Returns:
      One of ``levels``.

    Raises:
      ValueError: no level, weights that are negative, all zero, or of another number, numbers out of range.

    Example:
      >>> [sample_level((12, 20, 28), step, seed=0) for step in range(6)]
      [20, 28, 12, 28, 28, 20]

    Source: Nagarajan, Raghunathan 2023, arXiv:2312.12385 (ECML PKDD 2024).
    """
    check_number("step", step, low=0, integer=True)
    check_number("seed", seed, low=0, integer=True)
    shares = level_weights(levels, weights)
    at = np.searchsorted(np.cumsum(shares), np.random.default_rng((seed, step)).random(), side="right")
    return levels[min(int(at), len(levels) - 1)]


def progressive_level(
    levels: Sequence[Level],
    step: int,
    steps: int,
    *,
    delay: float = 0.5,
    last: float = 0.2,
) -> Level:
    r"""Progressive resizing: the smallest level first, then one after the other, and the largest at the end.

    .. math:: i = \left\lfloor (k - 1) \, \frac{t / T - d}{1 - d - f} \right\rfloor \in [0, k - 1]

    Args:
      levels: k levels in increasing order.
      step: t, from 0.
      steps: T, steps of the whole training.
      delay: d, the share of the training that the smallest level takes.
      last: f, the share at the end that the largest takes.

    Returns:
      One of ``levels``.

    Raises:
      ValueError: no level, or numbers out of range.

    Example:
      >>> [progressive_level((16, 24, 32), step, 10) for step in range(10)]
      [16, 16, 16, 16, 16, 16, 16, 24, 32, 32]

    After the method "Progressive Image Resizing" of MosaicML's Composer, with its defaults, on a ladder of sizes in
    place of one that grows by 4 pixels: as many programs as levels.
    """
    level_weights(levels, None)
    check_number("steps", steps, low=1, integer=True)
    check_number("step", step, low=0, high=steps, integer=True)
    check_number("delay", delay, low=0, high=1)
    check_number("last", last, low=0, high=1 - delay, hint="delay and last share the training.")
    done = step / steps
    if done >= 1 - last - 1e-9:
        return levels[-1]
    place = (len(levels) - 1) * (done - delay) / max(1 - delay - last, 1e-9)
    return levels[min(max(int(place + 1e-9), 0), len(levels) - 1)]


def level_weights(levels: Sequence[Any], weights: Sequence[float] | None, argument: str = "weights") -> np.ndarray:
    """Probabilities of the levels, checked.

    Example:
      >>> level_weights((12, 28), (1, 3)).tolist()
      [0.25, 0.75]
    """
    if not len(levels):
        raise ValueError("levels=() must hold at least one level.")
    shares = np.ones(len(levels)) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (len(levels),) or not np.isfinite(shares).all() or (shares < 0).any() or not shares.sum():
        raise ValueError(f"{argument}={weights} must hold a number from 0 on for each of the {len(levels)} levels.")
    return shares / shares.sum()


def level_groups(batch: PyTree, shares: Sequence[int]) -> list[Any]:
    """Split a batch into groups of fixed shares, one for each level: the paper's mixture of sizes within every step.

    Of every ``sum(shares)`` neighbouring rows the first ``shares[0]`` are the first group's, and so on. So a batch that
    is sharded over devices is split on each of them, no row moves, and every step costs the same. Shuffle the batch, as
    any loader does, so that an example meets another level in another epoch.

    Args:
      batch: an array or a tree of arrays, the batch axis leading.
      shares: integers, the rows of each group; their sum divides the batch. (1, 1, 2): half for the last level.

    Returns:
      A tree for each group, with ``rows * share / sum(shares)`` rows.

    Raises:
      ValueError: a batch that the shares do not divide, shares below 1.

    Example:
      >>> [part.tolist() for part in level_groups(jnp.arange(8), (1, 3))]
      [[0, 4], [1, 2, 3, 5, 6, 7]]

    Source: Nagarajan, Raghunathan 2023, arXiv:2312.12385 (ECML PKDD 2024).
    """
    period = _period(shares)
    rows = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(rows) != 1 or rows == {()}:
        raise ValueError(f"batch has leading axes {sorted(rows)}; its arrays must have one batch axis in common.")
    (count,) = rows.pop()
    if count % period:
        raise ValueError(
            f"batch of {count} rows does not divide by the sum of shares={tuple(shares)}. Use a multiple of {period}."
        )
    ends = list(itertools.accumulate(shares))

    def cut(leaf: Any, start: int, end: int) -> jax.Array:
        rest, times = jnp.shape(leaf)[1:], count // period
        return jnp.asarray(leaf).reshape(times, period, *rest)[:, start:end].reshape(times * (end - start), *rest)

    return [
        jax.tree.map(lambda leaf, start=start, end=end: cut(leaf, start, end), batch)
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def join_groups(parts: Sequence[PyTree], shares: Sequence[int]) -> Any:
    """The inverse of ``level_groups``: what was computed for the groups, in the batch's order.

    Args:
      parts: a tree for each group, of one form and dtypes.
      shares: as for ``level_groups``.

    Returns:
      One such tree with the rows of all.

    Raises:
      ValueError: another number of groups, or of rows in them.

    Example:
      >>> join_groups(level_groups(jnp.arange(8), (1, 3)), (1, 3)).tolist()
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    period = _period(shares)
    if len(parts) != len(shares):
        raise ValueError(f"parts hold {len(parts)} groups for shares={tuple(shares)}: give one for each.")

    def join(*leaves: Any) -> jax.Array:
        rows = [jnp.shape(leaf)[0] for leaf in leaves]
        times = rows[0] // shares[0]
        if rows != [share * times for share in shares]:
            raise ValueError(f"parts have {rows} rows, which are not as shares={tuple(shares)}.")
        rest = jnp.shape(leaves[0])[1:]
        pieces = [jnp.reshape(leaf, (times, share, *rest)) for leaf, share in zip(leaves, shares, strict=True)]
        return jnp.concatenate(pieces, axis=1).reshape(times * period, *rest)

    return jax.tree.map(join, *parts)


def _period(shares: Sequence[int]) -> int:
    if not len(shares):
        raise ValueError("shares=() must hold one integer for each level.")
    for i, share in enumerate(shares):
        check_number(f"shares[{i}]", share, low=1, integer=True, hint="Leave out a level that gets no rows.")
    return int(sum(shares))


def level_tokens(size: int | Sequence[int], patch: int, *, prefix: int = 1) -> int:
    """Tokens of an image in a vision transformer.

    Args:
      size: both sides in pixels, or (height, width).
      patch: side of a patch in pixels; divides both.
      prefix: special tokens, ``model.prefix`` of a ``ViT``.

    Returns:
      Their number, special ones included.

    Raises:
      ValueError: a number below 1, or a side that is no multiple of the patch.

    Example:
      >>> level_tokens(384, 16), level_tokens(224, 16)
      (577, 197)
    """
    check_number("patch", patch, low=1, integer=True)
    check_number("prefix", prefix, low=0, integer=True)
    height, width = (size, size) if isinstance(size, int | np.integer) else size
    for side in (height, width):
        check_number("size", side, low=1, integer=True)
        if side % patch:
            raise ValueError(f"size={size} is no multiple of patch={patch}; {max(1, round(side / patch)) * patch} is.")
    return prefix + (height // patch) * (width // patch)


def level_batch(tokens: int, budget: int, *, multiple: int = 8) -> int:
    r"""The batch size of a level under a constant budget of tokens, so that small levels fill the device too.

    .. math:: B = m \left\lfloor \frac{\mathrm{budget}}{m \cdot \mathrm{tokens}} \right\rfloor

    Scale the learning rate by :math:`\sqrt{B / B_0}` with ``effjax.optim.scale_by_batch_size``.

    Args:
      tokens: of one example, ``level_tokens``.
      budget: tokens of one step.
      multiple: m, the batch is a multiple of it: 8 times the number of devices.

    Returns:
      B, ``multiple`` at least.

    Raises:
      ValueError: a budget that is too small for ``multiple`` examples, numbers out of range.

    Example:
      >>> [level_batch(level_tokens(size, 16), 577 * 64) for size in (224, 384)]
      [184, 64]
    """
    check_number("tokens", tokens, low=1, integer=True)
    check_number("multiple", multiple, low=1, integer=True)
    least = tokens * multiple
    check_number("budget", budget, low=least, integer=True, hint=f"{multiple} examples of {tokens} tokens are {least}.")
    return budget // least * multiple
