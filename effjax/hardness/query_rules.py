"""From needs to decisions: thresholds for a coverage, the accuracy of a hybrid at any coverage, and its cost."""

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Num

from effjax.core.errors import NoEffectWarning, check_number, check_shape

__all__ = [
    "HybridCost",
    "HybridScore",
    "QueryThreshold",
    "coverage_interval",
    "hybrid_curve",
    "keep_least",
    "query_threshold",
    "track_coverage",
    "useful_buckets",
]

Needs = Num[Array | np.ndarray, "rows"]
Correct = Bool[Array | np.ndarray, "rows"]


class QueryThreshold(NamedTuple):
    """A threshold and what it does on the rows that it was fitted on.

    Attributes:
      value: rows whose need is above it ask.
      coverage: share of the rows that do not.
      rows: how many rows there were.
      tied: rows whose need equals it; all of them are kept.
    """

    value: float
    coverage: float
    rows: int
    tied: int


def query_threshold(need: Needs, coverage: float, *, known: Correct | None = None) -> QueryThreshold:
    r"""The threshold that keeps a share of the calibration rows; exact, on the host.

    .. math:: t = \mathrm{need}_{(\lceil c n \rceil)}

    in increasing order, so that at least :math:`\lceil c n \rceil` rows have a need of at most t. Rows that tie at t
    are all kept: the queries stay within what was asked for.

    Args:
      need: of rows that neither the models nor the router were fitted on, and that are not reported on. At least
        :math:`1 / \min(c, 1 - c)`.
      coverage: c, the share that the base model should answer, in (0, 1).
      known: rows that count; None for all.

    Returns:
      A ``QueryThreshold``. What it keeps on other rows differs: see ``coverage_interval``.

    Raises:
      ValueError: ``coverage`` outside (0, 1), NaN needs, or too few rows; the message says how many are needed.

    Warns:
      NoEffectWarning: ties keep more rows than was asked for by over 1 / n + 1 %, such as all rows of constant needs.

    Example:
      >>> query_threshold(np.array([0.3, 0.1, 0.4, 0.2]), 0.5)
      QueryThreshold(value=0.2, coverage=0.5, rows=4, tied=1)
    """
    check_number(
        "coverage", coverage, low=0, high=1, open_low=True, open_high=True, hint="All or none needs no router."
    )
    values = np.asarray(need)
    if values.ndim != 1:
        raise ValueError(f"need has shape {values.shape}; one number for each row is needed.")
    if known is not None:
        check_shape("known", known, values.shape, "One for each row.")
        values = values[np.asarray(known)]
    if bad := int(np.isnan(values).sum()):
        raise ValueError(f"need is NaN in {bad} of {len(values)} rows. Repair the model or the router that gave it.")
    # Hair's breadth below, as 0.1 * 30 is above 3.
    least = math.ceil(1 / min(coverage, 1 - coverage) - 1e-9)
    if len(values) < least:
        raise ValueError(
            f"need has {len(values)} rows, too few for coverage={coverage}. Give at least {least} calibration rows."
        )
    place = math.ceil(coverage * len(values) - 1e-9)
    value = np.sort(values)[place - 1]
    kept, tied = float(np.mean(values <= value)), int(np.sum(values == value))
    if kept > coverage + 1 / len(values) + 0.01:
        warnings.warn(
            f"need ties: {tied} of {len(values)} rows have the value {value:.6g}, so the threshold keeps {kept:.1%} "
            f"instead of coverage={coverage:.1%}. Compute needs in float32, or take a rule that tells rows apart.",
            NoEffectWarning,
            stacklevel=2,
        )
    return QueryThreshold(float(value), kept, len(values), tied)


def keep_least(need: Float[Array | np.ndarray, "rows"], coverage: float) -> Bool[Array, "rows"]:
    r"""Exactly :math:`\lceil c n \rceil` rows of least need, of equals the first; traceable.

    Args:
      need: NaN counts as largest.
      coverage: c, in [0, 1].

    Returns:
      True where the base model answers.

    Raises:
      ValueError: ``coverage`` out of [0, 1].

    Example:
      >>> keep_least(jnp.array([0.5, 0.1, 0.5]), 0.5).tolist()
      [True, True, False]
    """
    check_number("coverage", coverage, low=0, high=1)
    rows = need.shape[0]
    count = math.ceil(coverage * rows - 1e-9)
    order = jnp.argsort(need, stable=True)
    # The count is a number, not a shape: every coverage runs one program.
    return jnp.zeros(rows, bool).at[order].set(jnp.arange(rows) < count)


def coverage_interval(kept: int, rows: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """The Clopper-Pearson interval of a coverage that was realised on a test set.

    Args:
      kept: rows that the base model answered.
      rows: all rows.
      confidence: of both sides together, in (0, 1).

    Returns:
      Least and largest coverage that agree with what was seen.

    Raises:
      ValueError: ``kept`` above ``rows``, or ``confidence`` out of (0, 1).

    Example:
      >>> [round(edge, 3) for edge in coverage_interval(70, 100)]
      [0.6, 0.788]
    """
    from scipy.special import betaincinv

    check_number("rows", rows, low=1, integer=True)
    check_number("kept", kept, low=0, high=rows, integer=True)
    check_number("confidence", confidence, low=0, high=1, open_low=True, open_high=True)
    side = (1 - confidence) / 2
    low = 0.0 if kept == 0 else float(betaincinv(kept, rows - kept + 1, side))
    high = 1.0 if kept == rows else float(betaincinv(kept + 1, rows - kept, 1 - side))
    return low, high


class HybridScore(NamedTuple):
    r"""How good a hybrid is: counts as shares of the rows that count.

    .. math:: \mathrm{accuracy} = c \cdot \mathrm{accuracy}(b \mid \mathrm{kept})
        + (1 - c) \cdot \mathrm{accuracy}(g \mid \mathrm{sent})

    Attributes:
      coverage: c, the share that the base model answers.
      accuracy: of the hybrid.
      base_accuracy: of the base model on what it keeps; NaN where that is nothing.
      expert_accuracy: of the expert on what it is sent; NaN where that is nothing.
    """

    coverage: Any
    accuracy: Any
    base_accuracy: Any
    expert_accuracy: Any


def hybrid_score(keep: Correct, base_correct: Correct, expert_correct: Correct, known: Correct) -> HybridScore:
    """How good a hybrid is that keeps some rows. Traceable.

    Args:
      keep: rows that the base model answers.
      base_correct: where it is right.
      expert_correct: where the expert is right.
      known: rows that count.

    Returns:
      Float32 scalars.

    Example:
      >>> yes, no = jnp.array([True, True]), jnp.array([True, False])
      >>> float(hybrid_score(no, no, yes, yes).accuracy)
      1.0
    """
    rows = jnp.shape(keep)
    for name, value in (("base_correct", base_correct), ("expert_correct", expert_correct), ("known", known)):
        check_shape(name, value, rows, "One for each row.")
    keep, sent = jnp.asarray(keep) & known, ~jnp.asarray(keep) & known
    kept_right, sent_right = jnp.sum(keep & base_correct), jnp.sum(sent & expert_correct)
    # 0 / 0 is NaN: there is no accuracy of nothing.
    share = lambda part, whole: part.astype(jnp.float32) / whole.astype(jnp.float32)
    kept, total = jnp.sum(keep), jnp.sum(known)
    return HybridScore(
        share(kept, total),
        share(kept_right + sent_right, total),
        share(kept_right, kept),
        share(sent_right, jnp.sum(sent)),
    )


def hybrid_curve(
    need: Float[Array | np.ndarray, "rows"],
    base_correct: Correct,
    expert_correct: Correct,
    coverages: Sequence[float],
    *,
    known: Correct | None = None,
) -> HybridScore:
    r"""The hybrid at several coverages, each exactly :math:`\lceil c n \rceil` rows.

    To compare rules; a threshold for service is fitted on other rows, by ``query_threshold``.

    Args:
      need: of any rule or router. NaN counts as largest.
      base_correct: where the base model is right.
      expert_correct: where the expert is right.
      coverages: shares that the base model answers, in [0, 1].
      known: rows that count; None for all. The others must not be among the rows: filter them first where ``need`` is
        compared over them.

    Returns:
      A ``HybridScore`` of arrays, one number for each coverage.

    Example:
      >>> right = jnp.array([True, False, True, False])
      >>> hybrid_curve(jnp.array([0.0, 1.0, 0.2, 0.9]), right, ~right, (1.0, 0.5, 0.0)).accuracy.tolist()
      [0.5, 1.0, 0.5]
    """
    if known is not None:
        chosen = np.flatnonzero(np.asarray(known))
        need, base_correct, expert_correct = (np.asarray(a)[chosen] for a in (need, base_correct, expert_correct))
    return _curve(need, base_correct, expert_correct, tuple(map(float, coverages)))


@functools.partial(jax.jit, static_argnums=3)
def _curve(need: Any, base_correct: Any, expert_correct: Any, coverages: tuple[float, ...]) -> HybridScore:
    everybody = jnp.ones(need.shape[0], bool)
    scores = [hybrid_score(keep_least(need, c), base_correct, expert_correct, everybody) for c in coverages]
    return HybridScore(*(jnp.stack(column) for column in zip(*scores, strict=True)))


def track_coverage(
    threshold: ArrayLike, request: Bool[Array | np.ndarray, "rows"], coverage: float, *, rate: float = 0.05
) -> jax.Array:
    r"""A threshold that keeps to its budget of queries under shift; traceable, one step for each batch.

    .. math:: t \leftarrow t + \eta \big( \overline{r} - (1 - c) \big)

    Args:
      threshold: t, in the units of the need.
      request: rows that asked with it.
      coverage: c, in (0, 1).
      rate: eta.

    Returns:
      The next threshold. It keeps the budget, not the accuracy.

    Raises:
      ValueError: ``coverage`` out of (0, 1), or a rate that is not above 0.

    Example:
      >>> track_coverage(0.0, jnp.array([True, True]), 0.5).item()
      0.02500000037252903
    """
    check_number("coverage", coverage, low=0, high=1, open_low=True, open_high=True)
    check_number("rate", rate, low=0, open_low=True)
    asked = jnp.sum(request, dtype=jnp.float32) / max(request.size, 1)
    # Without rows there is nothing to learn from.
    return jnp.asarray(threshold, jnp.float32) + rate * (asked - (1 - coverage)) * float(bool(request.size))


class HybridCost(NamedTuple):
    r"""What an answer costs on average, in any unit: multiply-adds, milliseconds, joules, money.

    .. math:: \overline{C}(c) = C_b + C_r + (1 - c)(C_m + C_g)

    Attributes:
      base: C_b of the base model.
      expert: C_g.
      router: C_r of the router, which every input pays.
      transfer: C_m of sending an input to the expert.

    Example:
      >>> cost = HybridCost(base=48.0, expert=215.0)
      >>> cost.average(0.9), cost.break_even()
      (69.5, 0.22325581395348837)
    """

    base: float
    expert: float
    router: float = 0.0
    transfer: float = 0.0

    def average(self, coverage: Any) -> Any:
        """The mean cost of an input at a coverage, or at an array of them, in [0, 1]."""
        held = np.asarray(coverage)
        if not ((held >= 0) & (held <= 1)).all():
            raise ValueError(f"coverage={coverage!r} must lie in [0, 1].")
        return self.base + self.router + (1 - coverage) * (self.transfer + self.expert)

    def coverage(self, budget: float) -> float:
        """The least coverage whose mean cost is within a budget.

        Raises:
          ValueError: the base model and the router alone cost more.
        """
        least = self.base + self.router
        if budget < least:
            raise ValueError(f"budget={budget!r} is below the {least:g} that base and router cost at coverage 1.")
        return max(0.0, 1 - (budget - least) / (self.transfer + self.expert))

    def break_even(self) -> float:
        """The coverage above which the hybrid is cheaper than the expert for all; above 1 it never is."""
        return (self.base + self.router) / (self.transfer + self.expert)


def useful_buckets(seconds: dict[int, float], *, saving: float = 0.05) -> tuple[int, ...]:
    """Buckets that save time: accelerators take as long for few rows as for somewhat more.

    Args:
      seconds: what the expert takes for each size; of ``effjax.core.timing.time_interleaved``, say.
      saving: a size stays if it saves at least this share against the next larger one that stays.

    Returns:
      Increasing sizes; the largest always stays.

    Raises:
      ValueError: no size at all, or ``saving`` out of [0, 1).

    Example:
      >>> useful_buckets({8: 1.0, 16: 1.0, 32: 1.02, 64: 1.9})
      (32, 64)
    """
    check_number("saving", saving, low=0, high=1, open_high=True)
    if not seconds:
        raise ValueError("seconds={} is empty: give the time of at least one size.")
    sizes = sorted(seconds, reverse=True)
    kept = sizes[:1]
    for size in sizes[1:]:
        if seconds[size] <= (1 - saving) * seconds[kept[-1]]:
            kept.append(size)
    return tuple(reversed(kept))
