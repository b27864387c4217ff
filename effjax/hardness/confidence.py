"""Confidence of a prediction from its logits, and which predictions are wrong."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Num

from effjax.core.errors import check_choice, check_shape
from effjax.core.tree import wide

__all__ = ["confidence_score", "prediction_errors"]

Logits = Float[Array | np.ndarray, "*batch outputs"] | list[list[float]]


def confidence_score(logits: Logits, score: str = "log_odds") -> Float[Array, "*batch"]:
    r"""A number that is larger the surer the prediction is.

    With the probabilities :math:`p = \mathrm{softmax}(z)` in descending order

    ====================== =================================================================================
    ``'log_odds'``         :math:`\log p_{(1)} - \log(1 - p_{(1)})`
    ``'max_probability'``  :math:`p_{(1)}`
    ``'margin'``           :math:`p_{(1)} - p_{(2)}`
    ``'negative_entropy'`` :math:`\sum_k p_k \log p_k`
    ``'max_logit'``        :math:`z_{(1)}`
    ``'abstain_logit'``    :math:`\log(1 - p_{K+1}) - \log p_{K+1}`, the last column is the choice to abstain
    ====================== =================================================================================

    The first two rank alike (softmax response), but a float32 probability ends at 1 where the log odds go on: many
    of the surest predictions would share one confidence, and no threshold could part them.

    Args:
      logits: ``[..., K]``, or ``[..., K + 1]`` with ``'abstain_logit'``; probabilities come in as their logarithms.
      score: a name of the table.

    Returns:
      ``[...]``, float32 at least; NaN where a logit is NaN.

    Raises:
      ValueError: an unknown score, or fewer than two classes.

    Example:
      >>> confidence_score(jnp.array([[3.0, 1.0, -jnp.inf]])).tolist()
      [2.0]
    """
    check_choice("score", score, tuple(_SCORES))
    logits = np.asarray(logits) if isinstance(logits, list) else logits
    _check_logits(logits, score)
    return _scored(logits, score)


def predicted_class(logits: Logits, score: str = "log_odds") -> Int[Array, "*batch"]:
    """The class of the largest logit; with ``'abstain_logit'`` the last column is none.

    Example:
      >>> predicted_class(jnp.array([[1.0, 2.0, 3.0]]), "abstain_logit").tolist()
      [1]
    """
    _check_logits(logits, score)
    return jnp.argmax(jnp.asarray(logits)[..., : class_count(logits, score)], -1).astype(jnp.int32)


def class_count(logits: Any, score: str) -> int:
    """Classes of these logits: all columns, but the last of ``'abstain_logit'``."""
    return jnp.shape(logits)[-1] - (score == "abstain_logit")


def prediction_errors(
    logits: Logits, labels: Integer[Array | np.ndarray, "*batch"] | list[int], score: str = "log_odds"
) -> tuple[Bool[Array, "*batch"], Bool[Array, "*batch"]]:
    """Which predictions are wrong, and for which the label is known.

    Args:
      logits: see ``confidence_score``.
      labels: classes from 0 on; -1 where unknown, which counts nowhere.
      score: of ``confidence_score``; with ``'abstain_logit'`` the last column is no class.

    Returns:
      ``(errors, where)``, as the measures of ``effjax.hardness`` take them.

    Raises:
      ValueError: labels of another shape, or, where their values are known already, beyond the classes.

    Example:
      >>> errors, where = prediction_errors(jnp.array([[2.0, 1.0], [2.0, 1.0]]), jnp.array([1, -1]))
      >>> errors.tolist(), where.tolist()
      ([True, False], [True, False])
    """
    logits, labels = (np.asarray(x) if isinstance(x, list) else x for x in (logits, labels))
    _check_logits(logits, score)
    check_shape("labels", labels, jnp.shape(logits)[:-1], "One class for each row.")
    check_labels(labels, class_count(logits, score))
    return _compared(logits, labels, score)


@functools.partial(jax.jit, static_argnums=1)
def _scored(logits: Any, score: str) -> jax.Array:
    return _SCORES[score](wide(logits))


@functools.partial(jax.jit, static_argnums=2)
def _compared(logits: Any, labels: Any, score: str) -> tuple[jax.Array, jax.Array]:
    known = labels >= 0
    return known & (predicted_class(logits, score) != labels), known


def check_labels(labels: Any, classes: int, argument: str = "labels") -> None:
    """Refuse labels that are no classes; the values of traced labels are not known and not checked."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{argument} are {labels.dtype}; integer classes are needed, -1 where unknown.")
    if (found := extremes(labels)) is None:
        return
    lowest, highest = found
    if lowest < -1 or highest >= classes:
        raise ValueError(
            f"{argument} go from {lowest} to {highest}, but must be classes in [0, {classes - 1}], or -1 where unknown."
        )


def extremes(values: Any) -> tuple[int, int] | None:
    """The least and the largest integer; None where there are none, or they are not known here: traced, or far off."""
    far = isinstance(values, jax.Array) and (isinstance(values, jax.core.Tracer) or not values.is_fully_addressable)
    if far or not values.size:
        return None
    values = np.asarray(values)  # JAX would trace the minimum of what a jitted function captures
    return int(values.min()), int(values.max())


def _check_logits(logits: Any, score: str) -> None:
    shape = jnp.shape(logits)
    if not shape or class_count(logits, score) < 2:
        hint = "" if score == "abstain_logit" else " One logit z of a binary classifier is two: [..., (0, z)]."
        raise ValueError(f"logits have shape {shape}; expected [..., classes] with at least two classes.{hint}")


def _log_odds(z: Num[Array, "*batch classes"]) -> jax.Array:
    top = jnp.argmax(z, -1, keepdims=True)
    others = jnp.where(jnp.arange(z.shape[-1]).reshape((1,) * (z.ndim - 1) + (-1,)) == top, -jnp.inf, z)
    return jnp.max(z, -1) - jax.nn.logsumexp(others, -1)


def _margin(z: jax.Array) -> jax.Array:
    first, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(z), 2)[0], -1, 0)
    return first - second


def _negative_entropy(z: jax.Array) -> jax.Array:
    logs = jax.nn.log_softmax(z)
    finite = jnp.where(jnp.isneginf(logs), 0.0, logs)  # p log p is 0 at p = 0, and so is its gradient
    return jnp.sum(jnp.exp(logs) * finite, -1)


_SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "log_odds": _log_odds,
    "max_probability": lambda z: jnp.max(jax.nn.softmax(z), -1),
    "margin": _margin,
    "negative_entropy": _negative_entropy,
    "max_logit": lambda z: jnp.max(z, -1),
    "abstain_logit": lambda z: jax.nn.logsumexp(z[..., :-1], -1) - z[..., -1],
}
