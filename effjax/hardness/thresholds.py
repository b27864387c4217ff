"""Thresholds of a confidence from held-out predictions, with and without a guarantee.

All of them accept a prediction where ``confidence >= threshold``. They run on the host, in float64, as they need
quantiles of the Beta distribution. The held-out predictions must be exchangeable with those to come, and must have had
no part in training or in the choice of the network.

Of n predictions let k be accepted and e of these wrong. The joint error is P(accepted and wrong), estimated by e / n,
the selective risk P(wrong | accepted), estimated by e / k.
"""

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer
from scipy import special

from effjax.core.errors import NoEffectWarning, check_choice, check_number, check_shape

__all__ = [
    "Threshold",
    "binomial_p_value",
    "binomial_upper_bound",
    "calibration_examples",
    "conformal_threshold",
    "ltt_threshold",
    "search_threshold",
    "sgr_threshold",
]

Confidence = Float[Array | np.ndarray, "n"]
Errors = Bool[Array | np.ndarray, "n"]
MEASURES = ("selective_risk", "joint_error")


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A threshold and what is known of it.

    Attributes:
      value: accept where ``confidence >= value``; infinity never accepts.
      method: ``'ltt'``, ``'sgr'``, ``'conformal'`` or ``'search'``.
      measure: what ``target`` limits: ``'selective_risk'``, ``'joint_error'``, or ``'coverage'`` from below.
      target: the limit asked for.
      delta: most probability, over the draw of the held-out predictions, that the limit is exceeded on new data; None
        where the method does not limit it.
      bound: what the measure is below with probability 1 - delta; None where nothing is promised.
      examples: n.
      accepted: k at this threshold.
      errors: e at this threshold.
    """

    value: float
    method: str
    measure: str
    target: float
    delta: float | None
    bound: float | None
    examples: int
    accepted: int
    errors: int

    @property
    def coverage(self) -> float:
        """Share of the held-out predictions that are accepted."""
        return self.accepted / self.examples

    def __str__(self) -> str:
        """What is promised, in a sentence."""
        what = self.measure.replace("_", " ")
        found = f"{self.accepted} of {self.examples} held-out predictions are accepted, {self.errors} of them wrong"
        if self.delta is not None:
            return f"{what} <= {self.target:g} on new data with probability {1 - self.delta:g}; {found}"
        if self.method == "conformal":
            return f"{what} <= {self.target:g} on new data in the mean over held-out sets; {found}"
        relation = ">=" if self.measure == "coverage" else "<="
        return f"{what} {relation} {self.target:g} on the held-out predictions, without a guarantee; {found}"


def ltt_threshold(
    confidence: Confidence,
    errors: Errors,
    *,
    selective_risk: float | None = None,
    joint_error: float | None = None,
    delta: float = 0.05,
    grid: Float[Array | np.ndarray, "thresholds"] | None = None,
    min_accepted: int = 50,
    starts: int = 2,
    models: int = 1,
) -> Threshold:
    r"""Learn then Test: the lowest threshold that fixed-sequence testing certifies.

    For every threshold t the hypothesis is that the measure exceeds the target a. With the errors e(t) among the k(t)
    accepted its p-value is

    .. math:: p(t) = P(\mathrm{Bin}(m, a) \le e(t))

    with m = k(t) for the selective risk and m = n for the joint error.

    From high thresholds to low, hypotheses are rejected until the first :math:`p(t) > \delta`. The last rejected
    threshold has :math:`P(\text{measure} > a) \le \delta`. For the joint error, which only grows, nothing is lost by
    that; for the selective risk a test of few accepted predictions would end the sequence before it begins. So there
    it starts at several numbers of accepted predictions, spaced evenly in the logarithm between the least that could
    pass and n, each at the level :math:`\delta / \mathrm{starts}`.

    Args:
      confidence: of held-out predictions.
      errors: True where such a prediction is wrong.
      selective_risk: the target a; or
      joint_error: the target a. Exactly one of the two.
      delta: in (0, 1).
      grid: thresholds that were chosen before the data were seen, in place of all distinct confidences. There is one
        start then, at the first threshold that accepts ``min_accepted``.
      min_accepted: see ``grid``.
      starts: starts of the sequence for the selective risk, without ``grid``.
      models: of how many networks the best will be taken; each is tested at ``delta / models``.

    Returns:
      A ``Threshold``; its value is infinity where nothing is certified.

    Raises:
      ValueError: too few predictions for any threshold to be certified, numbers out of range, NaN confidences.

    Warns:
      NoEffectWarning: no threshold is certified. The words say how many predictions might be needed.

    Example:
      >>> confidence = np.linspace(1.0, 0.0, 1000)
      >>> found = ltt_threshold(confidence, np.arange(1000) >= 800, selective_risk=0.1)
      >>> found.accepted, found.errors
      (869, 69)

    Angelopoulos, Bates, Candes, Jordan, Lei 2021, arXiv:2110.01052. The starts' spacing is ours. Given k(t), e(t) is
    binomial for a fixed t; for thresholds that are confidences of the data themselves the first true hypothesis is met
    at its own p-value all the same, as p is constant between two confidences. After a start, that is exact where the
    risk grows as the threshold falls, and else up to the fluctuation of the share before the start.
    """
    measure, target = _target(selective_risk, joint_error)
    check_number("delta", delta, low=0, high=1, open_low=True, open_high=True)
    check_number("models", models, low=1, integer=True)
    check_number("starts", starts, low=1, integer=True)
    check_number("min_accepted", min_accepted, low=1, integer=True)
    level = delta / models
    steps = _Steps.of(confidence, errors, grid)
    _check_enough(steps.n, "ltt", measure, target, level, steps.n)
    promise = {"method": "ltt", "measure": measure, "target": target, "delta": delta, "bound": target}
    if measure == "joint_error":
        p_values = binomial_p_value(steps.errors, np.full_like(steps.accepted, steps.n), target)
        return _chosen(steps, _before_first(p_values > level) - 1, promise)
    p_values = binomial_p_value(steps.errors, steps.accepted, target)
    if grid is not None:
        begin = _before_first(steps.accepted >= min_accepted)
        length = _before_first(p_values[begin:] > level)
        return _chosen(steps, begin + length - 1 if length else -1, promise)
    level /= starts
    least = min(_least_accepted(target, level), steps.n)
    best = -1
    shares = (np.arange(starts) + 0.5) / starts
    for rank in np.unique((least * (steps.n / least) ** shares).astype(int)):
        begin = int(np.searchsorted(steps.accepted, rank))
        # The threshold of a start is one of the data, so the prediction there is not drawn like those above it.
        first = binomial_p_value(steps.errors[begin], max(steps.accepted[begin] - 1, 0), target)
        if first <= level:
            best = max(best, begin + _before_first(p_values[begin:] > level) - 1)
    return _chosen(steps, best, promise)


def sgr_threshold(confidence: Confidence, errors: Errors, *, selective_risk: float, delta: float = 0.05) -> Threshold:
    r"""Selection with guaranteed risk: a binary search whose every probe is bounded.

    At a probe with k accepted and e wrong, b solves

    .. math:: P(\mathrm{Bin}(k, b) \le e) = \delta / \lceil \log_2 n \rceil

    Where b exceeds the target the threshold is raised, else lowered. Of the probes within the target the one that
    accepts most is returned.

    Args:
      confidence: of held-out predictions.
      errors: True where such a prediction is wrong.
      selective_risk: the target, in (0, 1).
      delta: in (0, 1).

    Returns:
      A ``Threshold`` whose ``bound`` is b; its value is infinity where no probe is within the target.

    Raises:
      ValueError: too few predictions for any threshold to be certified, numbers out of range, NaN confidences.

    Warns:
      NoEffectWarning: no probe is within the target.

    Example:
      >>> found = sgr_threshold(np.linspace(1.0, 0.0, 1000), np.arange(1000) >= 800, selective_risk=0.1)
      >>> found.accepted, round(found.bound, 3)
      (863, 0.099)

    Geifman, El-Yaniv 2017, arXiv:1705.08500. Their program returns the last probe, whose bound may exceed the target,
    counts errors by ``int(k * risk)``, which may drop one, and makes one probe more than it pays for.
    """
    check_number("selective_risk", selective_risk, low=0, high=1, open_low=True, open_high=True)
    check_number("delta", delta, low=0, high=1, open_low=True, open_high=True)
    steps = _Steps.of(confidence, errors)
    _check_enough(steps.n, "sgr", "selective_risk", selective_risk, delta, steps.n)
    probes = max(1, math.ceil(math.log2(steps.n)))
    low, high = 0, steps.n - 1  # numbers of predictions below the threshold, in ascending order of confidence
    best, bound = -1, None
    for _ in range(probes):
        middle = math.ceil((low + high) / 2)
        at = int(np.searchsorted(steps.accepted, steps.n - middle))  # all of the same confidence together
        b = float(binomial_upper_bound(steps.errors[at], steps.accepted[at], delta / probes))
        if b > selective_risk:
            low = middle
        else:
            high = middle
            if at > best:
                best, bound = at, b
    promise = {"method": "sgr", "measure": "selective_risk", "target": selective_risk, "delta": delta, "bound": bound}
    return _chosen(steps, best, promise)


def conformal_threshold(confidence: Confidence, errors: Errors, *, joint_error: float) -> Threshold:
    r"""Conformal risk control: a limit on the mean joint error.

    The lowest threshold t is taken with

    .. math:: \frac{e(t) + 1}{n + 1} \le a

    Then the joint error is at most a in the mean over held-out sets of n, not for most of them.

    Args:
      confidence: of held-out predictions.
      errors: True where such a prediction is wrong.
      joint_error: the target a, in (0, 1). There is no such rule for the selective risk, which is not monotone in t.

    Returns:
      A ``Threshold`` without a ``delta``.

    Raises:
      ValueError: fewer than 1 / a - 1 predictions, numbers out of range, NaN confidences.

    Example:
      >>> found = conformal_threshold(np.linspace(1.0, 0.0, 1000), np.arange(1000) >= 800, joint_error=0.1)
      >>> found.accepted, found.errors
      (899, 99)

    Angelopoulos, Bates, Fisch, Lei, Schuster 2022, arXiv:2208.02814.
    """
    check_number("joint_error", joint_error, low=0, high=1, open_low=True, open_high=True)
    steps = _Steps.of(confidence, errors)
    _check_enough(steps.n, "conformal", "joint_error", joint_error, None, steps.n)
    fits = steps.errors + 1 <= joint_error * (steps.n + 1) * (1 + 1e-12)
    promise = {"method": "conformal", "measure": "joint_error", "target": joint_error, "delta": None, "bound": None}
    return _chosen(steps, _before_first(~fits) - 1, promise)


def search_threshold(
    confidence: Confidence,
    errors: Errors,
    *,
    selective_risk: float | None = None,
    joint_error: float | None = None,
    coverage: float | None = None,
    grid: Float[Array | np.ndarray, "thresholds"] | None = None,
) -> Threshold:
    """The threshold that does best on the held-out predictions themselves. It promises nothing.

    For a target error it accepts as many as possible within the target; for a target coverage as few as possible, and
    so the fewest errors, that reach it. The error on new data is larger on average, the more so the more thresholds
    and networks were tried: use ``ltt_threshold`` where that matters.

    Args:
      confidence: of held-out predictions.
      errors: True where such a prediction is wrong.
      selective_risk: most errors among the accepted; or
      joint_error: most accepted errors among all; or
      coverage: least share accepted. Exactly one of the three.
      grid: thresholds to choose from; None for all distinct confidences. Of several that accept the same, the lowest.

    Returns:
      A ``Threshold`` without ``delta`` and ``bound``.

    Raises:
      ValueError: not exactly one target, numbers out of range, NaN confidences.

    Warns:
      NoEffectWarning: no threshold is within the target.

    Example:
      >>> found = search_threshold(np.array([0.9, 0.8, 0.7]), np.array([False, False, True]), selective_risk=0.2)
      >>> found.value, found.accepted
      (0.8, 2)

    Gangrade, Kag, Saligrama 2021 (PMLR 130:2179-2187) choose their thresholds so, on a grid.
    """
    measure, target = _target(selective_risk, joint_error, coverage, closed=True)
    steps = _Steps.of(confidence, errors, grid)
    slack = 1 + 1e-12
    if measure == "coverage":
        at = _before_first(steps.accepted >= target * steps.n / slack)
        # Lower thresholds of the grid may accept the same.
        at = int(np.flatnonzero(steps.accepted == steps.accepted[at])[-1]) if at < len(steps.accepted) else -1
    else:
        most = target * (steps.accepted if measure == "selective_risk" else steps.n) * slack
        within = np.flatnonzero((steps.errors <= most) & (steps.accepted > 0))
        at = int(within[-1]) if within.size else -1
    promise = {"method": "search", "measure": measure, "target": target, "delta": None, "bound": None}
    return _chosen(steps, at, promise)


def calibration_examples(
    target: float,
    *,
    delta: float | None = 0.05,
    method: str = "ltt",
    measure: str = "selective_risk",
    error_rate: float = 0.0,
    coverage: float = 1.0,
    starts: int = 2,
    models: int = 1,
) -> int:
    """How many held-out predictions a method needs to certify a target.

    Args:
      target: of the measure, in (0, 1).
      delta: see ``ltt_threshold``; None with ``'conformal'``.
      method: ``'ltt'``, ``'sgr'`` or ``'conformal'``.
      measure: ``'selective_risk'`` or ``'joint_error'``.
      error_rate: the measure that the network really has at the wanted threshold, below the target. At 0 the result is
        the least number with which anything can be certified at all (with ``starts=1``).
      coverage: share of the predictions that the wanted threshold accepts; only for the selective risk.
      starts: see ``ltt_threshold``.
      models: see ``ltt_threshold``.

    Returns:
      The number. With it, a network of exactly this error rate passes about half of the time.

    Raises:
      ValueError: a rate that is not below the target: no number is enough. Numbers out of range.

    Example:
      >>> calibration_examples(0.01, delta=0.05, method="ltt", measure="joint_error")
      299
      >>> calibration_examples(0.01, delta=0.05, method="sgr", error_rate=0.005, coverage=0.8)
      5157
    """
    check_number("target", target, low=0, high=1, open_low=True, open_high=True)
    check_choice("method", method, ("ltt", "sgr", "conformal"))
    check_choice("measure", measure, MEASURES)
    check_number("coverage", coverage, low=0, high=1, open_low=True)
    hint = "No number of examples certifies a target that is not above it."
    check_number("error_rate", error_rate, low=0, high=target, open_high=True, hint=hint)
    _check_pair(method, measure)
    if method == "conformal":
        return math.ceil((1 - target) / (target - error_rate) * (1 - 1e-12))
    check_number("delta", delta, low=0, high=1, open_low=True, open_high=True)
    assert delta is not None
    share = coverage if measure == "selective_risk" else 1.0
    if method == "sgr":
        # The search gets to a coverage by way of 1/2, 1/4, ... and turns away from where these few do not pass.
        share = 0.5 ** max(1, math.ceil(-math.log2(coverage)))

    def passes(n: int) -> bool:
        level = delta / models
        if method == "sgr":
            level = delta / max(1, math.ceil(math.log2(n)))
        elif measure == "selective_risk":
            level /= starts
        accepted = n * share - (method == "ltt" and measure == "selective_risk")  # see the start in `ltt_threshold`
        wrong = accepted * error_rate
        # The binomial distribution function, for a number of errors that need not be an integer.
        return wrong < accepted and special.betainc(accepted - wrong, wrong + 1, 1 - target) <= level

    high = 1
    while not passes(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def binomial_p_value(errors: Any, accepted: Any, target: Any) -> Float[np.ndarray, "..."]:
    r"""The p-value of "the error rate exceeds the target": :math:`P(\mathrm{Bin}(k, a) \le e)`.

    Args:
      errors: integers e.
      accepted: integers k.
      target: a.

    Returns:
      float64; 1 where nothing was accepted.

    Example:
      >>> round(float(binomial_p_value(0, 299, 0.01)), 4)
      0.0495
    """
    return np.asarray(special.bdtr(np.asarray(errors, float), np.asarray(accepted, np.int64), target), float)


def binomial_upper_bound(errors: Any, accepted: Any, delta: Any) -> Float[np.ndarray, "..."]:
    r"""The Clopper-Pearson bound b: an error rate above it gives so few errors with probability ``delta`` at most.

    .. math:: P(\mathrm{Bin}(k, b) \le e) = \delta

    Args:
      errors: integers e.
      accepted: integers k.
      delta: in (0, 1).

    Returns:
      float64; 1 where all are wrong or nothing was accepted.

    Example:
      >>> round(float(binomial_upper_bound(0, 299, 0.05)), 4)
      0.01
    """
    e, k = np.asarray(errors, float), np.asarray(accepted, float)
    open_end = np.maximum(k - e, 1e-300)
    return np.where(k > e, special.betaincinv(e + 1, open_end, 1 - np.asarray(delta, float)), 1.0)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Counts at thresholds in descending order."""

    values: np.ndarray
    accepted: Int[np.ndarray, "thresholds"]
    errors: Int[np.ndarray, "thresholds"]
    n: int

    @classmethod
    def of(cls, confidence: Any, errors: Any, grid: Any = None) -> "_Steps":
        confidence, errors = np.asarray(confidence), np.asarray(errors)
        if confidence.ndim != 1 or not confidence.size:
            raise ValueError(
                f"confidence has shape {confidence.shape}; expected [n], one number for each held-out prediction, and "
                "at least one."
            )
        check_shape("errors", errors, confidence.shape, "One for each prediction.")
        if errors.dtype != bool:
            raise TypeError(f"errors is {errors.dtype}; bool is needed: True where the prediction is wrong.")
        confidence = confidence.astype(np.float64)
        if missing := int(np.isnan(confidence).sum()):
            raise ValueError(
                f"confidence holds NaN in {missing} of {confidence.size} predictions. Repair the network, or leave "
                "those rows out of the held-out predictions: a NaN is never accepted."
            )
        order = np.argsort(-confidence, kind="stable")
        sorted_, totals = confidence[order], np.cumsum(errors[order], dtype=np.int64)
        if grid is None:
            last = np.flatnonzero(np.append(sorted_[1:] != sorted_[:-1], True))
            return cls(sorted_[last], last + 1, totals[last], confidence.size)
        values = np.sort(np.asarray(grid, np.float64))[::-1]
        if values.ndim != 1 or not values.size or np.isnan(values).any():
            raise ValueError(f"grid has shape {values.shape}; expected [thresholds], at least one, without NaN.")
        accepted = np.searchsorted(-sorted_, -values, side="right")
        return cls(values, accepted, np.append(0, totals)[accepted], confidence.size)


def _target(selective_risk: Any, joint_error: Any, coverage: Any = None, *, closed: bool = False) -> tuple[str, float]:
    given = {"selective_risk": selective_risk, "joint_error": joint_error, "coverage": coverage}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"{given or 'no target'} was given; expected one. selective_risk limits P(wrong | accepted), joint_error "
            "P(accepted and wrong)."
        )
    ((measure, target),) = given.items()
    if measure == "coverage":
        return measure, check_number(measure, target, low=0, high=1, open_low=True)
    return measure, check_number(measure, target, low=0, high=1, open_low=not closed, open_high=True)


def _check_pair(method: str, measure: str) -> None:
    if (method, measure) in (("sgr", "joint_error"), ("conformal", "selective_risk")):
        raise ValueError(f"method={method!r} has no guarantee for measure={measure!r}. Use 'ltt'.")


def _check_enough(n: int, method: str, measure: str, target: float, delta: float | None, held: int) -> None:
    # At the fewest starts, as a single one may be asked for.
    needed = calibration_examples(target, delta=delta, method=method, measure=measure, starts=1)
    if n < needed:
        level = "" if delta is None else f" with delta={delta:g}"
        raise ValueError(
            f"{held} held-out predictions cannot certify {measure}={target:g}{level}, even without one error: "
            f"{method!r} needs {needed} at least. Hold out more, or allow a larger {measure}"
            + ("." if delta is None else " or delta.")
        )


def _least_accepted(target: float, level: float) -> int:
    """The least number of accepted predictions at which a sequence can start: one more than can pass without error."""
    return math.ceil(math.log(level) / math.log1p(-target)) + 1


def _before_first(flags: Integer[np.ndarray, "n"] | Bool[np.ndarray, "n"]) -> int:
    """How many entries come before the first True."""
    return int(np.argmax(flags)) if flags.any() else len(flags)


def _chosen(steps: _Steps, at: int, promise: dict[str, Any]) -> Threshold:
    if at >= 0 and steps.accepted[at] > 0:
        counts = {"accepted": int(steps.accepted[at]), "errors": int(steps.errors[at])}
        return Threshold(value=float(steps.values[at]), examples=steps.n, **counts, **promise)
    warnings.warn(_unreached(steps, promise), NoEffectWarning, stacklevel=3)
    return Threshold(value=math.inf, examples=steps.n, accepted=0, errors=0, **promise)


def _unreached(steps: _Steps, promise: dict[str, Any]) -> str:
    method, measure, target = promise["method"], promise["measure"], promise["target"]
    rates = steps.errors / (np.maximum(steps.accepted, 1) if measure == "selective_risk" else steps.n)
    enough = steps.accepted >= min(50, steps.n)
    lowest = float(rates[enough].min()) if enough.any() else 1.0
    words = f"no threshold reaches {measure}={target:g}, so the rule always abstains"
    if measure == "coverage" or method == "search":
        return f"{words}. Of {steps.n} predictions, the lowest {measure} of a threshold is {rates.min():g}."
    if lowest >= target:
        return f"{words}. The lowest {measure} of a threshold that accepts 50 is {lowest:g}: train a better network."
    share = float(steps.accepted[enough][np.argmin(rates[enough])]) / steps.n
    needed = calibration_examples(
        target, delta=promise["delta"], method=method, measure=measure, error_rate=lowest, coverage=max(share, 1e-9)
    )
    return f"{words}. With {lowest:g} at a coverage of {share:.0%}, about {needed} held-out predictions are needed."
