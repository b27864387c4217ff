"""One-sided prediction: a loss whose largest probability ranks predictions better (Gangrade, Kag, Saligrama 2021).

AISTATS, PMLR 130:2179-2187, arXiv:2010.07853.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from effjax.core.errors import check_number, check_shape
from effjax.core.tree import wide
from effjax.hardness.confidence import check_labels

__all__ = ["OspTerms", "osp_loss", "osp_terms"]


class OspTerms(NamedTuple):
    """The two parts of the loss, one number per class.

    Attributes:
      cover: L_k, small where class k is covered: its examples have a large f_k.
      exclude: C_k, small where no other example has a large f_k.
    """

    cover: Float[Array, "classes"]
    exclude: Float[Array, "classes"]


def osp_terms(
    logits: Float[Array | np.ndarray, "batch classes"],
    labels: Integer[Array | np.ndarray, "batch"],
    *,
    weights: Float[Array | np.ndarray, "batch"] | None = None,
    axis_name: str | None = None,
) -> OspTerms:
    r"""What covering a class costs, and what its false positives cost.

    With :math:`f = \mathrm{softmax}(z)`, n_k the number of examples of class k and m_k that of all others

    .. math::
        L_k = \frac1{n_k} \sum_{i : y_i = k} -\log f_k(x_i), \qquad
        C_k = \frac1{m_k} \sum_{i : y_i \ne k} -\log(1 - f_k(x_i))

    A class that is absent from the batch has :math:`L_k = 0`, one that has it to itself :math:`C_k = 0`.

    Args:
      logits: z, any floating dtype; computed in float32 at least.
      labels: classes from 0 on; -1 where unknown, which counts nowhere.
      weights: of the examples, 0 for padding; None for 1.
      axis_name: the batch's mesh axis inside ``shard_map``: n_k and m_k are of the whole batch, and a loss of local
        counts would be another one. Under ``jit`` on sharded arrays it is None.

    Returns:
      ``OspTerms``.

    Raises:
      ValueError: labels or weights that are not ``[batch]``.

    Example:
      >>> found = osp_terms(jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]])), jnp.array([0, 1]))
      >>> found.cover.round(3).tolist(), found.exclude.round(3).tolist()
      ([0.6930000185966492, 1.3860000371932983], [1.3860000371932983, 0.6930000185966492])
    """
    shape = jnp.shape(logits)
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"logits have shape {shape}; expected [batch, classes], two classes at least.")
    hot, others = _members(labels, weights, shape)
    log_f, log_not_f = _log_softmax_and_complement(wide(logits))
    total = lambda x: jnp.sum(x, 0) if axis_name is None else jax.lax.psum(jnp.sum(x, 0), axis_name)
    mean = lambda member, values: -total(jnp.where(member > 0, member * values, 0.0)) / _at_least(total(member))
    return OspTerms(cover=mean(hot, log_f), exclude=mean(others, log_not_f))


def osp_loss(
    logits: Float[Array | np.ndarray, "batch classes"],
    labels: Integer[Array | np.ndarray, "batch"],
    mu: Any,
    *,
    weights: Float[Array | np.ndarray, "batch"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""The loss of one-sided prediction in its direct form.

    .. math:: \sum_k L_k + \mu_k C_k

    with the parts of ``osp_terms``. It is a sum over classes of means over the batch, so its gradient is no mean over
    parts of the batch: micro-batches train another loss.

    Args:
      logits: ``[batch, K]``.
      labels: classes from 0 on; -1 where unknown, which counts nowhere.
      mu: price of false positives, 0 or more; or one for each class, ``[K]``. The larger, the better the ranking of
        the surest predictions; 1, 3, 10, 30 are worth trying.
      weights: see ``osp_terms``.
      axis_name: see ``osp_terms``.

    Returns:
      The loss, float32 at least.

    Raises:
      ValueError: a negative ``mu``, or arrays of other shapes.

    Example:
      >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
      >>> round(float(osp_loss(logits, jnp.array([0, 1]), 10.0)), 3)  # two classes: (1 + mu)(L_0 + L_1)
      22.874

    The paper trains the saddle point of ``osp_saddle``, with levels and multipliers for every class. Where mu > 0 its
    minimum is that of this loss: at the saddle the level is C_k and the multiplier mu. The authors' later PyTorch
    program leaves the multiplier out of the gradient of the network, so that every mu trains the loss of mu = 1.

    Source: Gangrade, Kag, Saligrama 2021, AISTATS, arXiv:2010.07853.
    """
    terms = osp_terms(logits, labels, weights=weights, axis_name=axis_name)
    if jnp.ndim(mu):
        check_shape("mu", mu, terms.cover.shape, "One number, or one for each class.")
    else:
        check_number("mu", mu, low=0)
    return jnp.sum(terms.cover + wide(mu) * terms.exclude)


def _members(labels: Any, weights: Any, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The weight of every example in the class of every column, and outside it."""
    check_shape("labels", labels, shape[:1], "One class for each row.")
    check_labels(labels, shape[1])
    labels = jnp.asarray(labels)
    counts = (labels >= 0).astype(jnp.result_type(float))
    if weights is not None:
        check_shape("weights", weights, shape[:1], "One for each row.")
        counts = counts * wide(weights)
    hot = jax.nn.one_hot(labels, shape[1], dtype=counts.dtype)
    return hot * counts[:, None], (1 - hot) * counts[:, None]


def _log_softmax_and_complement(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log f and log(1 - f), without the loss of digits where f is near 1, and with finite gradients there."""
    log_f = jax.nn.log_softmax(z)
    top = jax.nn.one_hot(jnp.argmax(z, -1), z.shape[-1], dtype=bool)
    # Only the largest may be near 1: the others are 1/2 at most.
    largest = jax.nn.logsumexp(jnp.where(top, -jnp.inf, z), -1) - jax.nn.logsumexp(z, -1)
    others = jnp.log1p(-jnp.exp(jnp.where(top, -1.0, log_f)))
    return log_f, jnp.where(top, largest[:, None], others)


def _at_least(count: jax.Array) -> jax.Array:
    return jnp.where(count > 0, count, 1.0)
