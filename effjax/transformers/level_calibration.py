"""When to stop: thresholds of every level from held-out predictions, with the guarantees of ``effjax.hardness``."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from effjax.core.errors import check_choice, check_number, check_shape
from effjax.hardness.thresholds import Threshold, conformal_threshold, ltt_threshold, search_threshold

__all__ = ["LevelThresholds", "level_temperatures", "level_thresholds", "stop_levels"]

Confidences = Float[Array | np.ndarray, "rows levels"]
Errors = Bool[Array | np.ndarray, "rows levels"]
_METHODS = ("ltt", "conformal", "search")


def stop_levels(confidence: Confidences, thresholds: Sequence[float]) -> Int[np.ndarray, "rows"]:
    r"""The level at which every row stops, from the confidences of all levels.

    .. math:: a_i = \min \{ k : c_{ik} \ge \tau_k \text{ or } k = K - 1 \}

    Args:
      confidence: [rows, K], the largest probability at each level; NaN never stops.
      thresholds: of the levels but the last.

    Returns:
      int64 [rows].

    Raises:
      ValueError: another number of thresholds, or ones that are negative or NaN.

    Example:
      >>> stop_levels(np.array([[0.95, 0.5], [0.5, 0.95]]), (0.9,)).tolist()
      [0, 1]
    """
    confidence = np.asarray(confidence)
    if confidence.ndim != 2 or confidence.shape[1] != len(thresholds) + 1:
        raise ValueError(
            f"confidence has shape {confidence.shape}; expected [rows, levels] with {len(thresholds) + 1} levels, one "
            "more than thresholds."
        )
    for i, threshold in enumerate(thresholds):
        if threshold != np.inf:
            check_number(f"thresholds[{i}]", threshold, low=0)
    limits = np.append(np.asarray(thresholds, np.float64), -np.inf)
    sure = confidence >= limits[None, :]
    sure[:, -1] = True
    return sure.argmax(1)


class LevelThresholds(NamedTuple):
    """Thresholds of a cascade and what is promised of it.

    Attributes:
      values: of each level but the last: the ``thresholds`` of ``LevelCascade``.
      levels: the ``Threshold`` of each, with its counts.
      loss: the most accuracy that the cascade loses, all levels together.
      delta: most probability that it loses more on new data; None where that is not limited.
    """

    values: tuple[float, ...]
    levels: tuple[Threshold, ...]
    loss: float
    delta: float | None


def level_thresholds(
    confidence: Confidences,
    errors: Errors,
    *,
    loss: float = 0.005,
    delta: float = 0.05,
    method: Literal["ltt", "conformal", "search"] = "ltt",
    against: Literal["last", "labels"] = "last",
) -> LevelThresholds:
    r"""The lowest thresholds with which a cascade loses at most ``loss`` of accuracy against its largest level.

    A row that stops at level k < K - 1 does harm where level k is wrong and the last one is right. With h_k(t) the
    share of *all* rows that reach level k, stop there at t, and do harm, the accuracies are

    .. math:: \mathrm{acc}(\mathrm{cascade}) \ge \mathrm{acc}(\mathrm{last}) - \sum\nolimits_k h_k(\tau_k)

    so every level gets :math:`\mathrm{loss} / (K - 1)` as the limit of a joint error, which only grows as its threshold
    falls, and :math:`\delta / (K - 1)`. With more than two levels, level k is fitted on every (K - 1)-th row, as who
    reaches it depends on the thresholds before it.

    Args:
      confidence: [rows, K], the largest probability at each level, of held-out rows in random order.
      errors: [rows, K], True where the level's prediction is wrong.
      loss: the limit, in (0, 1): 0.005 is half a point.
      delta: in (0, 1), for ``'ltt'``.
      method: ``'ltt'``: the loss is at most ``loss`` with probability 1 - delta over the held-out rows;
        ``'conformal'``: at most ``loss`` in the mean over held-out sets; ``'search'``: on the held-out rows themselves,
        without a promise.
      against: ``'last'`` as above; ``'labels'`` counts every wrong answer before the last level, whether or not the
        last would have been right.

    Returns:
      A ``LevelThresholds``. A level at which nothing can be certified has an infinite threshold: nobody stops there,
      and the cascade is better without it.

    Raises:
      ValueError: no held-out rows or too few for the guarantee, NaN confidences, shapes that do not fit, numbers out of
        range.

    Warns:
      NoEffectWarning: nothing is certified at a level.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> sure = rng.random(4000)
      >>> wrong = rng.random(4000) > 0.5 + sure / 2  # at the small size; the large one is always right
      >>> found = level_thresholds(np.stack([sure, sure], 1), np.stack([wrong, wrong & False], 1), loss=0.02)
      >>> 0.6 < found.values[0] < 0.9, found.levels[0].errors <= 80
      (True, True)

    ``ltt`` is Learn then Test (Angelopoulos et al. 2021, arXiv:2110.01052), ``conformal`` conformal risk control
    (arXiv:2208.02814). The paper takes one threshold for all levels: 0.9 or 0.75.
    """
    check_choice("method", method, _METHODS)
    check_choice("against", against, ("last", "labels"))
    check_number("loss", loss, low=0, high=1, open_low=True, open_high=True)
    check_number("delta", delta, low=0, high=1, open_low=True, open_high=True)
    confidence, errors = np.asarray(confidence, np.float64), np.asarray(errors)
    if confidence.ndim != 2 or confidence.shape[1] < 2 or not len(confidence):
        raise ValueError(
            f"confidence has shape {confidence.shape}; expected [rows, levels], one row of held-out data at least and "
            "two levels."
        )
    check_shape("errors", errors, confidence.shape, "One for each confidence.")
    if errors.dtype != bool:
        raise TypeError(f"errors is {errors.dtype}; bool is needed: True where the prediction is wrong.")
    steps = confidence.shape[1] - 1
    harm = errors & ~errors[:, -1:] if against == "last" else errors
    values: list[float] = []
    found: list[Threshold] = []
    for place in range(steps):
        part = slice(place, None, steps)
        rows = confidence[part]
        reached = np.ones(len(rows), bool)
        for before, value in enumerate(values):
            reached &= ~(rows[:, before] >= value)
        # Who stopped before counts among all rows, but can do no harm: below every probability, and not wrong.
        own = np.where(reached, rows[:, place], -1.0)
        threshold = _fit(method, own, harm[part, place] & reached, loss / steps, delta / steps)
        found.append(threshold)
        values.append(max(threshold.value, 0.0))
    return LevelThresholds(tuple(values), tuple(found), loss, delta if method == "ltt" else None)


def _fit(method: str, confidence: np.ndarray, harm: np.ndarray, loss: float, delta: float) -> Threshold:
    if method == "ltt":
        return ltt_threshold(confidence, harm, joint_error=loss, delta=delta)
    return {"conformal": conformal_threshold, "search": search_threshold}[method](confidence, harm, joint_error=loss)


def level_temperatures(
    logits: Float[Array | np.ndarray, "rows levels classes"], labels: Integer[Array | np.ndarray, "rows"]
) -> tuple[float, ...]:
    r"""One temperature for each level, as confidence means something else at every size.

    .. math:: T_k = \arg\min_T -\sum\nolimits_i \log \mathrm{softmax}(z_{ik} / T)_{y_i}

    convex in 1 / T; found by bisection of its derivative, in float64, between 1/1000 and 1000.

    Args:
      logits: [rows, levels, classes], of held-out rows.
      labels: integers [rows] from 0 on; below 0 where unknown, which counts nowhere.

    Returns:
      A temperature for each level: the ``temperatures`` of ``LevelCascade``.

    Raises:
      ValueError: no known label, labels outside the classes, logits that are not finite, shapes that do not fit.

    Example:
      >>> logits = np.array([[[4.0, 0.0]], [[4.0, 0.0]], [[4.0, 0.0]], [[4.0, 0.0]]])
      >>> (temperature,) = level_temperatures(logits, np.array([0, 0, 0, 1]))  # right in three of four
      >>> round(1 / (1 + np.exp(-4.0 / temperature)), 3).item()
      0.75

    Guo et al. 2017, arXiv:1706.04599.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 3:
        raise ValueError(f"logits have shape {logits.shape}; expected [rows, levels, classes].")
    check_shape("labels", labels, logits.shape[:1], "One for each row.")
    known = labels >= 0
    if not known.any() or labels.max() >= logits.shape[2]:
        raise ValueError(
            f"labels hold {int(known.sum())} known ones up to {labels.max(initial=-1)}: one at least is needed, in "
            f"[0, {logits.shape[2] - 1}]."
        )
    logits, labels = logits[known], labels[known]
    if bad := int((~np.isfinite(logits)).any((1, 2)).sum()):
        raise ValueError(f"logits of {bad} of {len(logits)} rows hold NaN or infinity. Repair the network.")
    return tuple(_temperature(logits[:, level], labels) for level in range(logits.shape[1]))


def _temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    own = np.take_along_axis(logits, labels[:, None], 1)[:, 0]
    highest = logits.max(1, keepdims=True)

    def slope(inverse: float) -> float:
        weights = np.exp(inverse * (logits - highest))
        expected = (weights * logits).sum(1) / weights.sum(1)
        return float((expected - own).mean())

    low, high = np.log(1e-3), np.log(1e3)  # of 1 / T
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(float(np.exp(middle))) > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))
