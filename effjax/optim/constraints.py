"""Statistics of a network's predictions that DCL can constrain: entropy, marginal, risks, consistency, moments.

Every mean is over the rows that ``mask`` takes, of the whole batch. With sharded arrays under ``jit`` that is so by
itself; inside ``shard_map`` or ``pmap`` name the devices' ``axis``, as a divergence of a mean is no mean of
divergences. Logits may have any floating dtype; everything is computed in float32 or wider.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from effjax.core.errors import check_number, check_shape
from effjax.core.rows import Axis, row_labels, row_mask, row_mean, row_sum, wide_logits
from effjax.core.tree import wide

__all__ = [
    "class_counts",
    "class_risk",
    "consistency_kl",
    "feature_moment",
    "guided_risk",
    "marginal_kl",
    "mean_prediction",
    "optimal_guide",
    "prediction_entropy",
    "reference_kl",
]

Logits = Shaped[Array | np.ndarray, "rows classes"]
Rows = Shaped[Array | np.ndarray, "rows"]
Mask = Bool[Array | np.ndarray, "rows"] | None


def prediction_entropy(logits: Logits, mask: Mask = None, *, axis: Axis = None) -> Float[Array, ""]:
    r"""Mean entropy of the predictions, in nats; ``>=`` 0.1 to 0.3 of log K keeps them from being too sure.

    .. math:: \frac1n \sum_i H(p_i), \qquad p_i = \mathrm{softmax}(z_i)

    Args:
      logits: z.
      mask: rows that take part; None for all.
      axis: mesh axes that the rows are spread over inside ``shard_map``.

    Returns:
      A number in [0, log K]; 0 where no row takes part.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> round(float(prediction_entropy(jnp.zeros((3, 2)))), 3)
      0.693
    """
    log_p = _log_softmax("logits", logits, mask)
    return row_mean(-_expected(log_p, log_p), mask, axis)


def mean_prediction(logits: Logits, mask: Mask = None, *, axis: Axis = None) -> Float[Array, "classes"]:
    r"""The prediction marginal, :math:`\bar p = \frac1n \sum_i p_i`.

    Args:
      logits: z.
      mask: rows that take part; None for all.
      axis: mesh axes that the rows are spread over inside ``shard_map``.

    Returns:
      A distribution; zeros where no row takes part.

    Example:
      >>> mean_prediction(jnp.array([[0.0, 0.0], [0.0, 50.0]])).tolist()
      [0.25, 0.75]
    """
    return row_mean(jnp.exp(_log_softmax("logits", logits, mask)), mask, axis)


def marginal_kl(
    logits: Logits,
    prior: Shaped[ArrayLike, "classes"],
    mask: Mask = None,
    *,
    reverse: bool = False,
    around: Shaped[ArrayLike, "classes"] | None = None,
    axis: Axis = None,
) -> Float[Array, ""]:
    r"""Divergence of the prediction marginal from a class prior, in nats; ``<=`` 0.01 holds the shares of classes.

    .. math::
        \mathrm{KL}(\pi \,\|\, \bar p), \qquad \mathrm{KL}(\bar p \,\|\, \pi) \text{ with } reverse

    It is convex in :math:`\bar p`, so that small batches overestimate it, and the mean over parts of an accumulated
    batch is not that of the whole. With ``around``, a running mean :math:`m` of many batches' marginals, it is replaced
    by its tangent there, which has no such bias:
    :math:`\mathrm{KL}(m) + \nabla \mathrm{KL}(m) \cdot (\bar p - m)`.

    Args:
      logits: z.
      prior: :math:`\pi`, positive and of sum 1.
      mask: rows that take part; None for all.
      reverse: the other direction, which punishes predicting what is rare.
      around: m, such as a running mean of ``mean_prediction``.
      axis: mesh axes that the rows are spread over inside ``shard_map``.

    Returns:
      A number; 0 at the least, but for the tangent.

    Raises:
      ValueError: shapes that do not fit, or a prior that is no distribution or has a class of probability 0.

    Example:
      >>> round(float(marginal_kl(jnp.zeros((4, 2)), jnp.array([0.9, 0.1]))), 3)
      0.368
    """
    classes = jnp.shape(logits)[-1]
    prior = _distribution("prior", prior, classes)
    mean = mean_prediction(logits, mask, axis=axis)

    def divergence(p: Array) -> Array:
        p = jnp.maximum(p, jnp.finfo(p.dtype).tiny)
        terms = p * (jnp.log(p) - jnp.log(prior)) if reverse else prior * (jnp.log(prior) - jnp.log(p))
        return jnp.sum(terms)

    if around is None:
        return divergence(mean)
    check_shape("around", around, (classes,), "One probability per class.")
    point = jax.lax.stop_gradient(wide(around)).astype(mean.dtype)
    value, slope = jax.value_and_grad(divergence)(point)
    return value + jnp.sum(slope * (mean - point))


def class_counts(
    labels: Int[Array | np.ndarray, "rows"], classes: int, mask: Mask = None, *, axis: Axis = None
) -> Float[Array, "classes"]:
    """Rows of every class or group; ``class_counts(...) > 0`` is what ``present`` of ``dcl_update`` takes.

    Args:
      labels: in [0, classes); others, such as -1 for unknown, count nowhere.
      classes: K.
      mask: rows that take part; None for all.
      axis: mesh axes that the rows are spread over inside ``shard_map``.

    Returns:
      [K], float32.

    Example:
      >>> class_counts(jnp.array([0, 2, 2, -1]), 3).tolist()
      [1.0, 0.0, 2.0]
    """
    return row_sum(_members(labels, classes, mask, jnp.zeros((), float).dtype), axis)


def class_risk(
    losses: Rows,
    labels: Int[Array | np.ndarray, "rows"],
    classes: int,
    mask: Mask = None,
    *,
    excess: bool = False,
    axis: Axis = None,
) -> Float[Array, "classes"]:
    r"""Mean loss of every class or group: one constraint each, for long tails and fairness.

    .. math:: \frac{1}{n_k} \sum_{i:\, y_i = k} \ell_i

    Args:
      losses: :math:`\ell`, one per row.
      labels: y, classes or groups in [0, classes); others, such as -1 for unknown, count nowhere.
      classes: K.
      mask: rows that take part; None for all.
      excess: take the mean loss of all counted rows off.
      axis: mesh axes that the rows are spread over inside ``shard_map``.

    Returns:
      K numbers; 0 for a class without rows, whose multiplier ``present=class_counts(...) > 0`` leaves as it is.

    Raises:
      ValueError: shapes that do not fit, or ``classes`` below 1.

    Example:
      >>> class_risk(jnp.array([1.0, 2.0, 4.0]), jnp.array([0, 1, 1]), 2).tolist()
      [1.0, 3.0]
    """
    losses = wide(losses)
    check_shape("losses", losses, jnp.shape(labels), "One loss for each label.")
    members = _members(labels, classes, mask, losses.dtype)
    # A row that counts nowhere may have a loss that is not finite.
    sums = row_sum(members * jnp.where(members > 0, losses[:, None], 0.0), axis)
    counts = row_sum(members, axis)
    risks = sums / jnp.maximum(counts, 1.0)
    if not excess:
        return risks
    mean = sums.sum() / jnp.maximum(counts.sum(), 1.0)
    return jnp.where(counts > 0, risks - mean, 0.0)


def consistency_kl(
    logits: Logits, other: Logits, mask: Mask = None, *, stop_first: bool = False, axis: Axis = None
) -> Float[Array, ""]:
    r"""Mean divergence between predictions on two views of the same rows, in nats; ``<=`` 0.03 to 0.3.

    .. math:: \frac1n \sum_i \mathrm{KL}(p_i \,\|\, q_i)

    The second view (noise, augmentation, dropout) takes one more forward pass; a part of the rows will do.

    Args:
      logits: of the first view, p.
      other: of the second, q.
      mask: rows that take part; None for all.
      stop_first: no gradient through p.
      axis: mesh axes that the rows are spread over inside ``shard_map``.

    Returns:
      A number, 0 where the views agree.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> view = jnp.array([[0.0, 1.0]])
      >>> float(consistency_kl(view, view + 3.0))
      0.0
    """
    check_shape("other", other, jnp.shape(logits), "That of logits: the same rows.")
    log_p, log_q = _log_softmax("logits", logits, mask), _log_softmax("other", other, mask)
    if stop_first:
        log_p = jax.lax.stop_gradient(log_p)
    return row_mean(_expected(log_p, log_p - log_q), mask, axis)


def reference_kl(logits: Logits, reference: Logits, mask: Mask = None, *, axis: Axis = None) -> Float[Array, ""]:
    r"""Mean divergence of the predictions from given distributions: a teacher's, an average network's, a prior.

    .. math:: \frac1n \sum_i \mathrm{KL}(r_i \,\|\, p_i)

    Args:
      logits: of the network, p.
      reference: r, one distribution per row; no gradient goes through it.
      mask: rows that take part; None for all.
      axis: mesh axes that the rows are spread over inside ``shard_map``.

    Returns:
      A number, in nats.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> round(float(reference_kl(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))), 3)
      0.693
    """
    check_shape("reference", reference, jnp.shape(logits), "One distribution for each row of logits.")
    log_p, reference = _log_softmax("logits", logits, mask), jax.lax.stop_gradient(wide(reference))
    log_r = jnp.log(jnp.where(reference > 0, reference, 1.0))
    return row_mean(jnp.where(reference > 0, reference * (log_r - log_p), 0.0).sum(-1), mask, axis)


def guided_risk(
    losses: Rows, guide: Rows, mask: Mask = None, *, renormalise: bool = True, axis: Axis = None
) -> Float[Array, ""]:
    r"""Mean loss with a discount on hard rows.

    .. math:: \frac{\sum_i (1 - g_i)\, \ell_i}{\sum_i (1 - g_i)}

    Args:
      losses: :math:`\ell`, one per row.
      guide: g, in [0, 1]: 1 takes a row out; no gradient goes through it.
      mask: rows that take part; None for all.
      renormalise: divide by the remaining weight; else by the number of rows.
      axis: mesh axes that the rows are spread over inside ``shard_map``.

    Returns:
      A number.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> float(guided_risk(jnp.array([1.0, 9.0]), jnp.array([0.0, 1.0])))
      1.0
    """
    check_shape("guide", guide, jnp.shape(losses), "One number for each loss.")
    losses, kept = wide(losses), 1.0 - jax.lax.stop_gradient(wide(guide))
    member = _weights(mask, losses)
    total = row_sum(member * kept * jnp.where(member > 0, losses, 0.0), axis)
    weight = row_sum(member * kept if renormalise else member, axis)
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def optimal_guide(losses: Rows, budget: ArrayLike, mask: Mask = None) -> Float[Array, "rows"]:
    r"""The guide of a given mean that makes ``guided_risk`` least: it takes the largest losses out, one partly.

    .. math:: \min_g \frac{\sum_i (1 - g_i)\, \ell_i}{\sum_i (1 - g_i)} \quad \text{s.t.} \quad \sum_i g_i = b\,n

    which is a trimmed loss. Equal losses are taken in the order of the rows.

    Args:
      losses: :math:`\ell`, one per row; no gradient goes through the guide.
      budget: b in [0, 1); a number, or a traced scalar such as a schedule's.
      mask: rows that take part; None for all.

    Returns:
      g, in [0, 1]; 0 where ``mask`` is False.

    Raises:
      ValueError: a budget out of range.

    Example:
      >>> optimal_guide(jnp.array([3.0, 1.0, 2.0, 0.0]), 0.375).tolist()
      [1.0, 0.0, 0.5, 0.0]
    """
    check_number("budget", budget, low=0, high=1, open_high=True)
    losses = jax.lax.stop_gradient(wide(losses))
    member = _weights(mask, losses)
    order = jnp.argsort(jnp.where(member > 0, -losses, jnp.inf), stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    return member * jnp.clip(budget * member.sum() - rank, 0.0, 1.0).astype(losses.dtype)


def feature_moment(
    features: Shaped[Array | np.ndarray, "rows features"],
    labels: Int[Array | np.ndarray, "rows"],
    means: Shaped[ArrayLike, "classes features"],
    mask: Mask = None,
    *,
    axis: Axis = None,
) -> Float[Array, "classes"]:
    r"""Squared distance of every class's mean feature from a given one.

    .. math:: \Bigl\| \frac{1}{n_k} \sum_{i:\, y_i = k} z_i - \mu_k \Bigr\|^2

    Args:
      features: z.
      labels: y, in [0, classes); others, such as -1 for unknown, count nowhere.
      means: :math:`\mu`, such as running means; no gradient goes through them.
      mask: rows that take part; None for all.
      axis: mesh axes that the rows are spread over inside ``shard_map``.

    Returns:
      One number per class; 0 for a class without rows, see ``class_risk``.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> feature_moment(jnp.array([[1.0], [3.0]]), jnp.array([0, 0]), jnp.array([[0.0], [5.0]])).tolist()
      [4.0, 0.0]
    """
    features, means = wide(features), jax.lax.stop_gradient(wide(means))
    if features.ndim != 2 or means.ndim != 2 or features.shape[1] != means.shape[1]:
        raise ValueError(
            f"features have shape {features.shape} and means {means.shape}; give [rows, features] and "
            "[classes, features]."
        )
    check_shape("labels", labels, features.shape[:1], "One label for each row of features.")
    members = _members(labels, means.shape[0], mask, features.dtype)
    used = members.sum(1) > 0
    sums, counts = members.T @ jnp.where(used[:, None], features, 0.0), members.sum(0)
    if axis is not None:
        sums, counts = jax.lax.psum((sums, counts), axis)
    centres = sums / jnp.maximum(counts, 1.0)[:, None]
    return jnp.where(counts > 0, jnp.square(centres - means.astype(centres.dtype)).sum(1), 0.0)


# Means over rows


def _log_softmax(argument: str, logits: Any, mask: Any) -> Array:
    return jax.nn.log_softmax(wide_logits(argument, logits, mask))


def _expected(log_p: Array, values: Array) -> Array:
    """The mean of ``values`` under every row's distribution; a class of probability 0 adds nothing."""
    possible = jnp.isfinite(log_p)
    # Twice: the gradient of what is left out must not be 0 times infinity either.
    return jnp.where(possible, jnp.exp(log_p) * jnp.where(possible, values, 0.0), 0.0).sum(-1)


def _weights(mask: Any, like: Array) -> Array:
    """1 for rows that take part, 0 for others."""
    if like.ndim != 1:
        raise ValueError(f"losses have shape {like.shape}; expected [rows], one for each row.")
    return row_mask(mask, like.shape[0]).astype(like.dtype)


def _members(labels: Any, classes: int, mask: Any, dtype: Any) -> Float[Array, "rows classes"]:
    """1 where a row belongs to a class."""
    check_number("classes", classes, low=1, integer=True)
    labels = row_labels(labels, jnp.shape(labels)[0])
    mine = labels[:, None] == jnp.arange(classes)[None, :]
    return (mine & row_mask(mask, labels.shape[0])[:, None]).astype(dtype)


def _distribution(argument: str, values: Any, classes: int) -> Array:
    check_shape(argument, values, (classes,), "One probability per class.")
    if not isinstance(values, jax.core.Tracer):
        least, total = float(np.min(values)), float(np.sum(values))
        if not (least > 0 and abs(total - 1) < 1e-3):
            raise ValueError(
                f"{argument} has the sum {total:.4g} and the least entry {least:.4g}; give positive probabilities that "
                "add up to 1. Smooth a count of 0: (counts + 1) / (counts + 1).sum()."
            )
    return wide(values)
