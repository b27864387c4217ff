"""Losses of networks that learn when to abstain: Deep Gamblers, self-adaptive training, SelectiveNet.

Rank the predictions of all three by the largest probability over the K classes (``confidence_score`` of
``logits[:, :K]``) and not by what the network says of abstaining: that is better at most coverages (Feng, Ahmed,
Hajimirsadeghi, Abdi 2023, arXiv:2206.09034).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from effjax.core.errors import check_number, check_shape
from effjax.core.tree import wide
from effjax.hardness.confidence import check_labels, extremes

__all__ = ["gamblers_loss", "sat_init", "sat_loss", "sat_update", "selectivenet_loss"]

Labels = Integer[Array | np.ndarray, "batch"]
Weights = Float[Array | np.ndarray, "batch"]


def gamblers_loss(
    logits: Float[Array | np.ndarray, "batch outputs"],
    labels: Labels,
    reward: Any = 2.2,
    *,
    weights: Weights | None = None,
) -> Float[Array, ""]:
    r"""Deep Gamblers: a bet on the classes, of which the share kept back returns as it is.

    With :math:`p = \mathrm{softmax}(z)` over K classes and the choice to abstain

    .. math:: \frac1N \sum_i -\log\!\left(p_{y_i} + \frac{p_{K+1}}{o}\right)

    Args:
      logits: z ``[batch, K + 1]``, the last column to abstain.
      labels: classes from 0 on; -1 where unknown, which counts nowhere.
      reward: o in (1, K]. The smaller, the more the network abstains; with a very large one it is the cross-entropy
        over K + 1 columns. Below about 6, train by cross-entropy first.
      weights: of the examples, 0 for padding; None for 1.

    Returns:
      The weighted mean, float32 at least.

    Raises:
      ValueError: a reward out of range, or arrays of other shapes.

    Example:
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
      >>> round(float(gamblers_loss(logits, jnp.array([0]), 2.0)), 4)  # -log(0.5 + 0.125)
      0.47

    Liu, Wang, Liang, Salakhutdinov, Morency, Ueda 2019, arXiv:1907.00208.
    """
    classes = _classes(logits, labels, abstain=True)
    check_number("reward", reward, low=1, open_low=True, hint=f"It pays for 1 < reward <= {classes}, the classes.")
    logs = jax.nn.log_softmax(wide(logits))
    each = -jnp.logaddexp(_at(logs, labels), logs[:, -1] - jnp.log(wide(reward)))
    return _mean(each, labels, weights)


def sat_init(labels: Integer[Array | np.ndarray, "rows"], classes: int) -> Float[Array, "rows classes"]:
    """The table of self-adaptive training before the first step: the labels, one-hot.

    Args:
      labels: of the training set, in the order of the examples' indices; -1 where unknown.
      classes: K.

    Returns:
      float32 [rows, K]. It is part of the training state; shard it along its rows, or keep it in bfloat16.

    Raises:
      ValueError: fewer than two classes, labels that are no vector, or labels outside [-1, K).

    Example:
      >>> sat_init(jnp.array([1, -1]), 2).tolist()
      [[0.0, 1.0], [0.0, 0.0]]
    """
    check_number("classes", classes, low=2, integer=True)
    check_shape("labels", labels, (jnp.size(labels),), "One class for each training example.")
    check_labels(labels, classes)
    return jax.nn.one_hot(jnp.asarray(labels), classes, dtype=jnp.float32)


def sat_update(
    table: Float[Array, "rows classes"],
    index: Integer[Array | np.ndarray, "batch"],
    logits: Float[Array | np.ndarray, "batch outputs"],
    *,
    momentum: Any = 0.9,
) -> Float[Array, "rows classes"]:
    r"""The table after a batch: the rows of its examples move to the network's predictions.

    .. math:: t_i \leftarrow \beta\, t_i + (1 - \beta)\, \mathrm{softmax}(z_{1..K})

    Args:
      table: from ``sat_init``; its dtype is kept.
      index: the examples' rows, all different.
      logits: z ``[batch, K + 1]``; no gradient flows through them.
      momentum: beta in [0, 1]; at 1 the targets stay the labels.

    Returns:
      The new table. Donate the old one.

    Raises:
      ValueError: a momentum out of range, arrays of other shapes, or, where its values are known already, an index
        beyond the table. A traced one beyond it changes nothing.

    Example:
      >>> table = sat_init(jnp.array([1, 0]), 2)
      >>> sat_update(table, jnp.array([0]), jnp.zeros((1, 3)), momentum=0.5).tolist()
      [[0.25, 0.75], [1.0, 0.0]]
    """
    check_number("momentum", momentum, low=0, high=1)
    rows = _rows(table, index, logits)
    predicted = jax.lax.stop_gradient(jax.nn.softmax(wide(logits)[:, : table.shape[1]]))
    moved = wide(momentum) * wide(rows) + (1 - wide(momentum)) * predicted
    return table.at[index].set(moved.astype(table.dtype), mode="drop")


def sat_loss(
    table: Float[Array, "rows classes"],
    index: Integer[Array | np.ndarray, "batch"],
    logits: Float[Array | np.ndarray, "batch outputs"],
    labels: Labels,
    *,
    weights: Weights | None = None,
) -> Float[Array, ""]:
    r"""Self-adaptive training for selective classification: what the table doubts, the network may abstain from.

    With :math:`p = \mathrm{softmax}(z)` over K classes and the choice to abstain

    .. math:: -\frac1N \sum_i t_{i y_i} \log p_{y_i} + (1 - t_{i y_i}) \log p_{K+1}

    In a step the table comes first: ``table = sat_update(table, index, logits)``, then the loss. Train by
    cross-entropy for the first epochs, as the table of a network that knows nothing yet doubts everything.

    Args:
      table: t, from ``sat_update``; no gradient flows through it.
      index: the examples' rows.
      logits: z ``[batch, K + 1]``, the last column to abstain.
      labels: classes from 0 on; -1 where unknown, which counts nowhere.
      weights: of the examples, 0 for padding; None for 1.

    Returns:
      The weighted mean, float32 at least; NaN where a traced index is beyond the table.

    Raises:
      ValueError: arrays of other shapes.

    Example:
      >>> table = jnp.array([[0.75, 0.25]])
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
      >>> round(float(sat_loss(table, jnp.array([0]), logits, jnp.array([0]))), 4)  # 0.75 log 2 + 0.25 log 4
      0.8664

    Huang, Zhang, Zhang 2020, arXiv:2002.10319. Add ``-beta * confidence_score(logits[:, :K], "negative_entropy")``
    averaged, with beta between 0.001 and 0.01, for the SAT+EM of Feng et al. 2023.
    """
    classes = _classes(logits, labels, abstain=True)
    check_shape("table", table, (jnp.shape(table)[0], classes), "One column for each class.")
    logs = jax.nn.log_softmax(wide(logits))
    trust = jax.lax.stop_gradient(_at(wide(_rows(table, index, logits)), labels))
    each = -(trust * _at(logs, labels) + (1 - trust) * logs[:, -1])
    return _mean(each, labels, weights)


def selectivenet_loss(
    logits: Float[Array | np.ndarray, "batch classes"],
    auxiliary: Float[Array | np.ndarray, "batch classes"],
    selector: Float[Array | np.ndarray, "batch"],
    labels: Labels,
    *,
    coverage: Any = 0.8,
    penalty: Any = 32.0,
    alpha: Any = 0.5,
    normalize: bool = True,
    weights: Weights | None = None,
) -> Float[Array, ""]:
    r"""SelectiveNet: the risk among what a selector lets through, at a fixed coverage.

    With :math:`g = \sigma(s)`, the cross-entropies :math:`\ell_f, \ell_h` of two heads, and means over the batch

    .. math::
        \alpha \left[\frac{\overline{g\, \ell_f}}{\bar g} + \lambda \max(0, c - \bar g)^2 \right]
        + (1 - \alpha)\, \overline{\ell_h}

    Args:
      logits: of the head f that predicts.
      auxiliary: logits of the head h, which sees all examples and is dropped after training.
      selector: s, one number for each example.
      labels: classes from 0 on; -1 where unknown, which counts nowhere.
      coverage: c in (0, 1]. One network serves one coverage.
      penalty: lambda.
      alpha: in [0, 1].
      normalize: False leaves out the division by the coverage, as the authors' program does.
      weights: of the examples, 0 for padding; None for 1.

    Returns:
      The loss, float32 at least. It holds the batch's own coverage, so micro-batches train another loss.

    Raises:
      ValueError: numbers out of range, or arrays of other shapes.

    Example:
      >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.5]]))
      >>> open_ = jnp.array([50.0, 50.0])
      >>> round(float(selectivenet_loss(logits, logits, open_, jnp.array([0, 1]))), 4)  # g = 1: the cross-entropy
      0.6931

    Geifman, El-Yaniv 2019, arXiv:1901.09192. Their selector is a head of its own with a hidden layer, and it is the
    confidence at test time.
    """
    _classes(logits, labels, abstain=False)
    check_shape("auxiliary", auxiliary, jnp.shape(logits), "The same classes.")
    check_shape("selector", selector, jnp.shape(labels), "One number for each row.")
    check_number("coverage", coverage, low=0, high=1, open_low=True)
    check_number("penalty", penalty, low=0)
    check_number("alpha", alpha, low=0, high=1)
    mean = lambda each: _mean(each, labels, weights)
    cross_entropy = lambda z: -_at(jax.nn.log_softmax(wide(z)), labels)
    passed = jax.nn.sigmoid(wide(selector))
    covered = mean(passed)
    risk = mean(passed * cross_entropy(logits))
    if normalize:
        risk = risk / jnp.maximum(covered, jnp.finfo(covered.dtype).tiny)
    short = jnp.maximum(wide(coverage) - covered, 0.0)
    return wide(alpha) * (risk + wide(penalty) * short**2) + (1 - wide(alpha)) * mean(cross_entropy(auxiliary))


def _classes(logits: Any, labels: Any, *, abstain: bool) -> int:
    shape = jnp.shape(logits)
    least = 3 if abstain else 2
    if len(shape) != 2 or shape[1] < least:
        wanted = "[batch, classes + 1], the last column to abstain" if abstain else "[batch, classes]"
        raise ValueError(f"logits have shape {shape}; expected {wanted}, with two classes at least.")
    check_shape("labels", labels, shape[:1], "One class for each row.")
    check_labels(labels, shape[1] - abstain)
    return shape[1] - abstain


def _rows(table: Any, index: Any, logits: Any) -> jax.Array:
    check_shape("index", index, jnp.shape(logits)[:1], "One row of the table for each example.")
    found = extremes(index)
    if found is not None and not 0 <= found[0] <= found[1] < len(table):
        raise ValueError(f"index goes from {found[0]} to {found[1]}; the table has the rows 0 to {len(table) - 1}.")
    return table.at[index].get(mode="fill", fill_value=jnp.nan)


def _at(values: jax.Array, labels: Any) -> jax.Array:
    """The entry of each row's label; of an unknown label, that of class 0, which counts nowhere."""
    return jnp.take_along_axis(values, jnp.maximum(jnp.asarray(labels), 0)[:, None], 1)[:, 0]


def _mean(each: jax.Array, labels: Any, weights: Any) -> jax.Array:
    """The weighted mean over the known labels; 0 where there are none."""
    counts = (jnp.asarray(labels) >= 0).astype(each.dtype)
    if weights is not None:
        check_shape("weights", weights, each.shape, "One for each row.")
        counts = counts * wide(weights)
    total = jnp.sum(counts)
    return jnp.sum(jnp.where(counts > 0, counts * each, 0.0)) / jnp.where(total > 0, total, 1.0)
