"""Selective classification: fit a threshold on held-out logits, then predict or abstain."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from effjax.core.errors import check_choice, check_number, check_shape
from effjax.hardness.confidence import class_count, confidence_score, predicted_class, prediction_errors
from effjax.hardness.risk_coverage import SelectiveMeasures, selective_measures
from effjax.hardness.thresholds import (
    Threshold,
    conformal_threshold,
    ltt_threshold,
    search_threshold,
    sgr_threshold,
)

__all__ = ["SelectiveRule", "selective"]

METHODS = {
    "selective_risk": ("ltt", "sgr", "search"),
    "joint_error": ("ltt", "conformal", "search"),
    "coverage": ("search",),
}


@dataclasses.dataclass(frozen=True)
class SelectiveRule:
    """A rule that predicts or abstains, from ``selective``.

    Its methods are traceable, so that the comparison is part of the program that computes the logits.

    Attributes:
      threshold: with what it promises.
      score: the confidence that it is a threshold of, see ``confidence_score``.
      classes: number of them.
    """

    threshold: Threshold
    score: str
    classes: int

    def accepts(self, logits: Float[Array | np.ndarray, "*batch outputs"]) -> Bool[Array, "*batch"]:
        """Where the rule predicts. A NaN among a row's logits is never accepted."""
        self._check(logits)
        return confidence_score(logits, self.score) >= self.threshold.value

    def predict(self, logits: Float[Array | np.ndarray, "*batch outputs"]) -> Int[Array, "*batch"]:
        """The class where the rule predicts, -1 where it abstains."""
        # By the very numbers that accepts() compares: another program may round a score on the threshold elsewhere.
        return jnp.where(self.accepts(logits), predicted_class(logits, self.score), -1)

    def measure(
        self, logits: Float[Array | np.ndarray, "n outputs"], labels: Integer[Array | np.ndarray, "n"]
    ) -> SelectiveMeasures:
        """Coverage, selective risk and joint error on other labelled logits; labels of -1 count nowhere."""
        self._check(logits)
        errors, where = prediction_errors(logits, labels, self.score)
        return selective_measures(confidence_score(logits, self.score), errors, self.threshold.value, where=where)

    def __str__(self) -> str:
        """What is promised, in a sentence."""
        return f"{self.score} >= {self.threshold.value:g}: {self.threshold}"

    def _check(self, logits: Any) -> None:
        shape = jnp.shape(logits)
        if not shape or class_count(logits, self.score) != self.classes:
            wanted = self.classes + (self.score == "abstain_logit")
            raise ValueError(f"logits have shape {shape}; this rule was fitted to [..., {wanted}].")


def selective(
    logits: Float[Array | np.ndarray, "n outputs"],
    labels: Integer[Array | np.ndarray, "n"],
    *,
    selective_risk: float | None = None,
    joint_error: float | None = None,
    coverage: float | None = None,
    delta: float | None = None,
    method: str | None = None,
    score: str = "log_odds",
    models: int = 1,
) -> SelectiveRule:
    r"""Fit a rule that predicts or abstains, on the held-out logits of any classifier.

    It predicts where the confidence c of a row of logits reaches the threshold t,

    .. math:: \hat y(z) = \arg\max_k z_k \text{ if } c(z) \ge t, \text{ else } -1

    and t is the lowest threshold whose error on new data is certified to be within the target with probability
    :math:`1 - \delta`::

        rule = effjax.selective(held_out_logits, held_out_labels, selective_risk=0.02)
        print(rule)                                # the promise, and the coverage
        answers = rule.predict(new_logits)         # -1 where it abstains
        rule.measure(test_logits, test_labels)     # coverage and errors that came out

    Args:
      logits: [n, K], of examples that had no part in training and in the choice of the network, from the network in
        evaluation mode; or the logarithms of probabilities.
      labels: [n], classes from 0 on; -1 where unknown, which is left out.
      selective_risk: the target for P(wrong | predicted); or
      joint_error: the target for P(predicted and wrong), which is coverage times selective risk; or
      coverage: the least share of predictions, with as few errors as it allows. Exactly one of the three.
      delta: most probability that the target is exceeded on new data; None for 0.05. Only for ``'ltt'`` and ``'sgr'``,
        which promise it.
      method: ``'ltt'``, see ``ltt_threshold``; ``'sgr'``, see ``sgr_threshold``; ``'conformal'``, see
        ``conformal_threshold``; ``'search'``, see ``search_threshold``, which promises nothing. None for ``'ltt'``, or
        ``'search'`` where a coverage is the target.
      score: the confidence, see ``confidence_score``.
      models: of how many rules on the same held-out logits the best will be taken; it takes a promise to pay for that.

    Returns:
      A ``SelectiveRule``.

    Raises:
      ValueError: too few examples to certify the target (the message says how many are needed), NaN logits, labels
        that do not fit, a method that cannot promise the target.

    Warns:
      NoEffectWarning: no threshold can be certified, and the rule always abstains.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> logits = 3 * rng.normal(size=(2000, 5))
      >>> labels = (logits + rng.gumbel(size=(2000, 5))).argmax(1)  # drawn with probabilities softmax(logits)
      >>> rule = selective(logits[:1000], labels[:1000], selective_risk=0.1)
      >>> found = rule.measure(logits[1000:], labels[1000:])
      >>> bool(found.selective_risk < 0.1), bool(found.coverage > 0.3)
      (True, True)

    The promise holds for data like the held-out ones: after a shift, fit the rule again. Which rule is best is open:
    at equal weights, no confidence beats the largest probability in general (Feng et al. 2023, arXiv:2206.09034).
    """
    shape = jnp.shape(logits)
    if len(shape) != 2:
        raise ValueError(f"logits have shape {shape}; expected [n, classes].")
    targets = {"selective_risk": selective_risk, "joint_error": joint_error, "coverage": coverage}
    targets = {name: value for name, value in targets.items() if value is not None}
    if len(targets) != 1:
        raise ValueError(
            f"{targets or 'no target'} was given; expected one of selective_risk (P(wrong | predicted)), joint_error "
            "(P(predicted and wrong)) and coverage."
        )
    (measure,) = targets
    method = method or METHODS[measure][0]
    check_choice(f"method for {measure}", method, METHODS[measure])
    certifies = method in ("ltt", "sgr")
    if not certifies and (delta is not None or models != 1):
        way = "limit an error" if measure == "coverage" else "take method='ltt'"
        raise ValueError(
            f"delta={delta}, models={models}: method={method!r} promises nothing that they change. Leave them out, or "
            f"{way}."
        )
    delta = 0.05 if delta is None else delta
    check_number("models", models, low=1, integer=True)
    check_shape("labels", labels, shape[:1], "One class for each row.")
    errors, where = (np.asarray(x) for x in prediction_errors(logits, labels, score))
    confidence = np.asarray(confidence_score(logits, score))
    if bad := int(np.isnan(confidence[where]).sum()):
        raise ValueError(f"logits hold NaN in {bad} of {len(confidence)} rows. Repair the network or drop those rows.")
    if not where.any():
        raise ValueError(f"labels: none of {len(where)} is known, so there is nothing to fit a threshold to.")
    options: dict[str, Any] = dict(targets)
    if certifies:
        options["delta"] = delta / models
    fit = {"ltt": ltt_threshold, "sgr": sgr_threshold, "conformal": conformal_threshold, "search": search_threshold}
    found = fit[method](confidence[where], errors[where], **options)
    if certifies:
        found = dataclasses.replace(found, delta=delta)  # over all of the models
    return SelectiveRule(found, score, class_count(logits, score))
