"""Measures of predictions that may abstain: the risk-coverage curve and the numbers read off it.

Two errors are in use, and every name says which one is meant. Of n predictions let k be accepted and e of these wrong:
the joint error is e / n, the selective risk e / k, the coverage k / n. So joint error = coverage x selective risk.

Predictions of equal confidence are accepted together, so that no number depends on how they happen to be sorted.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import check_choice, check_number, check_shape
from effjax.core.stacked import replicated
from effjax.core.tree import wide

__all__ = [
    "augrc",
    "aurc",
    "coverage_at_joint_error",
    "coverage_at_selective_risk",
    "excess_aurc",
    "joint_error_at_coverage",
    "optimal_aurc",
    "risk_coverage_curve",
    "selective_measures",
    "selective_risk_at_coverage",
]

Confidence = Float[Array | np.ndarray, "n"] | list[float]
Errors = Bool[Array | np.ndarray, "n"] | list[bool]
RULES = ("step", "trapezoid")


class RiskCoverage(NamedTuple):
    """The curve, one entry per prediction in descending order of confidence; excluded predictions come last, as NaN.

    Attributes:
      threshold: the confidence: predictions of at least this much are accepted.
      accepted: int32, their number k.
      errors: int32, how many of these are wrong.
      coverage: k / n.
      selective_risk: errors / k.
      joint_error: errors / n, also called generalised risk.
      last: whether the next prediction has another confidence: the entries to plot, one per distinct threshold.
    """

    threshold: Float[Array, "n"]
    accepted: Int[Array, "n"]
    errors: Int[Array, "n"]
    coverage: Float[Array, "n"]
    selective_risk: Float[Array, "n"]
    joint_error: Float[Array, "n"]
    last: Bool[Array, "n"]


class SelectiveMeasures(NamedTuple):
    """What a threshold does.

    Attributes:
      coverage: share of the predictions that are accepted.
      selective_risk: share of the accepted that are wrong; NaN where none is accepted.
      joint_error: share of all that are accepted and wrong.
    """

    coverage: Float[Array, ""]
    selective_risk: Float[Array, ""]
    joint_error: Float[Array, ""]


def risk_coverage_curve(confidence: Confidence, errors: Errors, *, where: Errors | None = None) -> RiskCoverage:
    r"""Coverage, selective risk and joint error at every threshold.

    .. math::
        k_j = |\{i : c_i \ge c_{(j)}\}|, \quad e_j = |\{i : c_i \ge c_{(j)}, \text{wrong}\}|, \quad
        R_j = e_j / k_j, \quad G_j = e_j / n

    Traceable, of fixed shape; vmap it over models. Sharded arrays give the same numbers: one all-gather and one sort.

    Args:
      confidence: larger is surer; from ``confidence_score``.
      errors: True where the prediction is wrong; from ``prediction_errors``.
      where: True for the predictions that count; None for all. Padding and unknown labels are left out by it.

    Returns:
      A ``RiskCoverage``. One NaN among the confidences that count makes all of its floats NaN.

    Raises:
      ValueError: arrays that are no vectors of one length.
      TypeError: ``errors`` that are not bool.

    Example:
      >>> curve = risk_coverage_curve(jnp.array([0.9, 0.5, 0.7, 0.6]), jnp.array([False, True, True, False]))
      >>> curve.coverage.tolist(), curve.joint_error.tolist()
      ([0.25, 0.5, 0.75, 1.0], [0.0, 0.25, 0.25, 0.5])
    """
    return _curve(*_checked(confidence, errors, where))


def aurc(
    confidence: Confidence, errors: Errors, *, where: Errors | None = None, rule: str = "step"
) -> Float[Array, ""]:
    r"""Area under the curve of selective risk against coverage (Geifman, Uziel, El-Yaniv 2019, arXiv:1805.08206).

    .. math:: \mathrm{AURC} = \frac1n \sum_{j=1}^{n} R_j

    Args:
      confidence: see ``risk_coverage_curve``.
      errors: see ``risk_coverage_curve``.
      where: see ``risk_coverage_curve``.
      rule: ``'step'``, the sum above; ``'trapezoid'`` over the distinct thresholds, from coverage 0, where the risk is
        that of the surest (as fd-shifts computes it).

    Returns:
      The area, in [0, 1]; NaN of no predictions. With ``'step'``, a constant confidence has the error rate.

    Raises:
      ValueError: arrays that are no vectors of one length, or an unknown rule.

    Example:
      >>> float(aurc(jnp.array([0.9, 0.8, 0.7, 0.6]), jnp.array([False, False, False, True])))
      0.0625

    Other programs differ. The released code of the paper divides by k + 1 from the second prediction on, and code that
    sorts without regard to ties gives a number that depends on the order of the data.
    """
    curve = risk_coverage_curve(confidence, errors, where=where)
    return _area(curve, curve.selective_risk, rule, first=None)


def augrc(
    confidence: Confidence, errors: Errors, *, where: Errors | None = None, rule: str = "step"
) -> Float[Array, ""]:
    r"""Area under the curve of joint error against coverage (Traub et al. 2024, arXiv:2407.01032).

    .. math:: \mathrm{AUGRC} = \frac1n \sum_{j=1}^{n} G_j

    Unlike AURC it is not dominated by the few surest predictions.

    Args:
      confidence: see ``risk_coverage_curve``.
      errors: see ``risk_coverage_curve``.
      where: see ``risk_coverage_curve``.
      rule: see ``aurc``; the trapezoids begin at joint error 0.

    Returns:
      The area, in [0, 1]; at best about half the square of the error rate.

    Raises:
      ValueError: arrays that are no vectors of one length, or an unknown rule.

    Example:
      >>> float(augrc(jnp.array([0.9, 0.8, 0.7, 0.6]), jnp.array([False, False, True, True])))
      0.1875
    """
    curve = risk_coverage_curve(confidence, errors, where=where)
    return _area(curve, curve.joint_error, rule, first=0.0)


def optimal_aurc(errors: Errors, *, where: Errors | None = None, limit: bool = False) -> Float[Array, ""]:
    r"""The AURC of a confidence that ranks every error last, at this error rate r.

    .. math::
        \frac1n \sum_{k > n (1 - r)} \frac{k - n (1 - r)}{k}
        \;\to\; r + (1 - r) \log(1 - r) \quad (n \to \infty)

    Args:
      errors: see ``risk_coverage_curve``.
      where: see ``risk_coverage_curve``.
      limit: whether to return the limit of many predictions, in place of the sum.

    Returns:
      The area.

    Raises:
      ValueError: errors that are no vector, or ``where`` of another length.

    Example:
      >>> float(optimal_aurc(jnp.array([True, False, False, False])))
      0.0625
    """
    check_shape("errors", errors, (np.size(errors),))
    _, wrong, counted = _checked(np.zeros(np.shape(errors), np.float32), errors, where)
    return _optimal(wrong, counted, limit)


def excess_aurc(
    confidence: Confidence, errors: Errors, *, where: Errors | None = None, rule: str = "step", limit: bool = False
) -> Float[Array, ""]:
    """E-AURC: ``aurc`` less ``optimal_aurc``, what a better ranking of the same predictions could gain.

    Args:
      confidence: see ``risk_coverage_curve``.
      errors: see ``risk_coverage_curve``.
      where: see ``risk_coverage_curve``.
      rule: see ``aurc``.
      limit: see ``optimal_aurc``; the paper's E-AURC, which may be slightly negative.

    Returns:
      The difference, 0 or more with the defaults.

    Example:
      >>> float(excess_aurc(jnp.array([0.9, 0.8]), jnp.array([False, True])))
      0.0

    Source: Geifman, Uziel, El-Yaniv 2019, arXiv:1805.08206.
    """
    return aurc(confidence, errors, where=where, rule=rule) - optimal_aurc(errors, where=where, limit=limit)


def selective_measures(
    confidence: Confidence, errors: Errors, threshold: Any, *, where: Errors | None = None
) -> SelectiveMeasures:
    """Coverage, selective risk and joint error where predictions of ``confidence >= threshold`` are accepted.

    Args:
      confidence: see ``risk_coverage_curve``; a NaN is never accepted.
      errors: see ``risk_coverage_curve``.
      threshold: a number or a traced scalar; infinity accepts nothing.
      where: see ``risk_coverage_curve``.

    Returns:
      ``SelectiveMeasures``.

    Example:
      >>> found = selective_measures(jnp.array([0.9, 0.7, 0.5]), jnp.array([False, True, True]), 0.6)
      >>> round(float(found.coverage), 3), float(found.selective_risk), round(float(found.joint_error), 3)
      (0.667, 0.5, 0.333)
    """
    return _measures(*_checked(confidence, errors, where), threshold)


def coverage_at_joint_error(
    confidence: Confidence, errors: Errors, target: Any, *, where: Errors | None = None
) -> Float[Array, ""]:
    """The largest coverage at which the joint error is at most ``target``.

    Args:
      confidence: see ``risk_coverage_curve``.
      errors: see ``risk_coverage_curve``.
      target: in [0, 1]; a traced scalar is not checked.
      where: see ``risk_coverage_curve``.

    Returns:
      The coverage, 0 where even the surest are too often wrong. It is read off the data that it is judged on: a bound
      for new data comes from ``effjax.selective``.

    Raises:
      ValueError: a target out of range.

    Example:
      >>> float(coverage_at_joint_error(jnp.array([0.9, 0.8, 0.7, 0.6]), jnp.array([False, True, False, True]), 0.25))
      0.75
    """
    check_number("target", target, low=0, high=1)
    curve = risk_coverage_curve(confidence, errors, where=where)
    return _last_coverage(curve, _size(curve), target)


def coverage_at_selective_risk(
    confidence: Confidence, errors: Errors, target: Any, *, where: Errors | None = None
) -> Float[Array, ""]:
    """The largest coverage at which the selective risk is at most ``target``.

    The risk may rise above the target and fall again as the threshold falls; the last crossing counts.

    Args:
      confidence: see ``risk_coverage_curve``.
      errors: see ``risk_coverage_curve``.
      target: in [0, 1]; a traced scalar is not checked.
      where: see ``risk_coverage_curve``.

    Returns:
      The coverage, see ``coverage_at_joint_error``.

    Raises:
      ValueError: a target out of range.

    Example:
      >>> errors = jnp.array([True, False, False, False])
      >>> float(coverage_at_selective_risk(jnp.array([0.9, 0.8, 0.7, 0.6]), errors, 0.3))
      1.0
    """
    check_number("target", target, low=0, high=1)
    curve = risk_coverage_curve(confidence, errors, where=where)
    return _last_coverage(curve, curve.accepted, target)


def joint_error_at_coverage(
    confidence: Confidence, errors: Errors, target: Any, *, where: Errors | None = None
) -> Float[Array, ""]:
    """The joint error at the highest threshold whose coverage is at least ``target``.

    Args:
      confidence: see ``risk_coverage_curve``.
      errors: see ``risk_coverage_curve``.
      target: in (0, 1]; a traced scalar is not checked.
      where: see ``risk_coverage_curve``.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: a target out of range.

    Example:
      >>> float(joint_error_at_coverage(jnp.array([0.9, 0.8, 0.7, 0.6]), jnp.array([True, False, False, True]), 0.5))
      0.25
    """
    curve = risk_coverage_curve(confidence, errors, where=where)
    return _at_coverage(curve, curve.joint_error, target)


def selective_risk_at_coverage(
    confidence: Confidence, errors: Errors, target: Any, *, where: Errors | None = None
) -> Float[Array, ""]:
    """The selective risk at the highest threshold whose coverage is at least ``target``.

    Args:
      confidence: see ``risk_coverage_curve``.
      errors: see ``risk_coverage_curve``.
      target: in (0, 1]; a traced scalar is not checked.
      where: see ``risk_coverage_curve``.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: a target out of range.

    Example:
      >>> float(selective_risk_at_coverage(jnp.array([0.9, 0.8, 0.7, 0.6]), jnp.array([True, False, False, True]), 0.5))
      0.5
    """
    curve = risk_coverage_curve(confidence, errors, where=where)
    return _at_coverage(curve, curve.selective_risk, target)


def _checked(confidence: Any, errors: Any, where: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    confidence, errors, where = (np.asarray(x) if isinstance(x, list) else x for x in (confidence, errors, where))
    shape = jnp.shape(confidence)
    if len(shape) != 1:
        raise ValueError(f"confidence has shape {shape}; expected [n], one number for each prediction. Use jax.vmap.")
    if not jnp.issubdtype(jnp.result_type(confidence), jnp.floating):
        raise TypeError(f"confidence is {jnp.result_type(confidence)}; floating point numbers are needed.")
    where = np.ones(shape, bool) if where is None else where
    for name, mask in (("errors", errors), ("where", where)):
        check_shape(name, mask, shape, "One for each prediction.")
        if jnp.result_type(mask) != jnp.bool_:
            hint = "True where the prediction is wrong." if name == "errors" else "True for predictions that count."
            raise TypeError(f"{name} is {jnp.result_type(mask)}; bool is needed: {hint}")
    confidence, errors, where = (replicated(jnp.asarray(x)) for x in (wide(confidence), errors, where))
    return confidence, errors, where


@jax.jit
def _curve(confidence: jax.Array, wrong: jax.Array, counted: jax.Array) -> RiskCoverage:
    size, n = confidence.shape[0], counted.sum(dtype=jnp.int32)
    rank = jnp.arange(size, dtype=jnp.int32)
    left_out = rank >= n
    place, threshold, wrong = _descending(confidence, wrong, counted)
    # The last of each group of equal confidence; its counts hold for the whole group.
    differs = jnp.concatenate([place[1:] != place[:-1], jnp.ones(min(size, 1), bool)])
    last = (differs | (rank == n - 1)) & ~left_out
    end = jax.lax.cummin(jnp.where(last, rank, size), reverse=True)
    end = jnp.where(left_out, 0, end)
    totals = jnp.cumsum(wrong & ~left_out, dtype=jnp.int32)  # floats would lose bits beyond 2^24
    accepted = jnp.where(left_out, 0, end + 1)
    found = jnp.where(left_out, 0, totals[end]) if size else totals
    of = jnp.where((counted & jnp.isnan(confidence)).any(), jnp.nan, 1.0) * jnp.where(left_out, jnp.nan, 1.0)
    real = lambda count: count.astype(of.dtype)
    return RiskCoverage(
        threshold=jnp.where(jnp.isnan(of), of, threshold).astype(threshold.dtype),
        accepted=accepted,
        errors=found,
        coverage=real(accepted) / real(n) * of,
        selective_risk=real(found) / real(accepted) * of,
        joint_error=real(found) / real(n) * of,
        last=last,
    )


def _descending(confidence: jax.Array, wrong: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What orders the predictions, their confidences and which are wrong, the surest first and left-out ones last.

    One sort of one number for each, its low bit telling which are wrong: XLA takes six times as long for three columns.
    """
    if confidence.dtype != jnp.float32:  # 64 bits leave no place for another
        _, minus, wrong = jax.lax.sort((~counted, -confidence, wrong), num_keys=2)
        return minus, -minus, wrong
    sign, every = jnp.uint32(1 << 31), jnp.uint32(2**32 - 1)
    bits = jax.lax.bitcast_convert_type(confidence, jnp.uint32)
    bits = jnp.where(bits == sign, jnp.uint32(0), bits)  # of the two zeros one
    # Whole numbers in the order of the floats, the largest float as the least; NaN last.
    place = jnp.where(bits >= sign, bits, bits ^ (sign - 1))
    place = jnp.where(jnp.isnan(confidence), every, place)
    with jax.enable_x64(True):
        packed = place.astype(jnp.uint64) << 1 | wrong.astype(jnp.uint64)
        packed = jax.lax.sort(jnp.where(counted, packed, jnp.uint64(2**64 - 1)))
        place, wrong = (packed >> 1).astype(jnp.uint32), (packed & 1).astype(bool)
    bits = jnp.where(place >= sign, place, place ^ (sign - 1))
    return place, jax.lax.bitcast_convert_type(bits, jnp.float32), wrong


@functools.partial(jax.jit, static_argnames="limit")
def _optimal(wrong: jax.Array, counted: jax.Array, limit: bool) -> jax.Array:
    real = jnp.result_type(float)
    n = counted.sum(dtype=jnp.int32).astype(real)
    right = n - (wrong & counted).sum(dtype=jnp.int32).astype(real)
    if limit:
        share = right / n
        return 1 - share + jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0)
    k = jnp.arange(1, wrong.size + 1).astype(real)
    return jnp.sum(jnp.where(k <= n, jnp.maximum(k - right, 0.0) / k, 0.0)) / n


@jax.jit
def _measures(confidence: jax.Array, wrong: jax.Array, counted: jax.Array, threshold: Any) -> SelectiveMeasures:
    accepted = counted & (confidence >= threshold)
    n, k, e = (x.sum(dtype=jnp.int32).astype(jnp.result_type(float)) for x in (counted, accepted, accepted & wrong))
    return SelectiveMeasures(coverage=k / n, selective_risk=e / k, joint_error=e / n)


@functools.partial(jax.jit, static_argnames=("rule", "first"))
def _area(curve: RiskCoverage, heights: jax.Array, rule: str, first: float | None) -> jax.Array:
    check_choice("rule", rule, RULES)
    counts = curve.accepted > 0
    if rule == "trapezoid" and heights.size:
        # Of every group of equal confidence, the height before it.
        rank = jnp.arange(heights.size, dtype=jnp.int32)
        begins = jnp.concatenate([jnp.ones(1, bool), curve.last[:-1]])
        before = jax.lax.cummax(jnp.where(begins, rank, 0)) - 1
        start = heights[0] if first is None else jnp.full((), first, heights.dtype)
        heights = (heights + jnp.where(before < 0, start, heights[jnp.maximum(before, 0)])) / 2
    return jnp.sum(jnp.where(counts, heights, 0.0)) / counts.sum().astype(heights.dtype)


@jax.jit
def _size(curve: RiskCoverage) -> jax.Array:
    return (curve.accepted > 0).sum(dtype=jnp.int32)


def _at_most(errors: jax.Array, of: jax.Array, target: Any) -> jax.Array:
    """``errors / of <= target``, where rounding does not decide whether 4 of 400 is one in a hundred."""
    real = jnp.result_type(float)
    most = jnp.asarray(target, real) * of.astype(real)
    return errors.astype(real) <= most * (1 + 4 * jnp.finfo(real).eps)


@jax.jit
def _last_coverage(curve: RiskCoverage, of: jax.Array, target: Any) -> jax.Array:
    fits = _at_most(curve.errors, of, target)
    poison = jnp.sum(jnp.where(curve.accepted > 0, curve.coverage, 0.0)) * 0  # NaN confidences stay visible
    none = jnp.where(_size(curve) > 0, 0.0, jnp.nan)
    return jnp.max(jnp.where(fits & (curve.accepted > 0), curve.coverage, 0.0), initial=0.0) + poison + none


def _at_coverage(curve: RiskCoverage, heights: jax.Array, target: Any) -> jax.Array:
    check_number("target", target, low=0, high=1, open_low=True)
    return _height_at(curve, heights, target)


@jax.jit
def _height_at(curve: RiskCoverage, heights: jax.Array, target: Any) -> jax.Array:
    slack = 1 - 4 * jnp.finfo(curve.coverage.dtype).eps
    real = curve.coverage.dtype
    reached = curve.accepted.astype(real) >= jnp.asarray(target, real) * _size(curve).astype(real) * slack
    first = jnp.argmax(reached & (curve.accepted > 0)) if heights.size else 0
    return heights[first] if heights.size else jnp.full((), jnp.nan, heights.dtype)
