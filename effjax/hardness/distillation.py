"""What DiSK is compared with: knowledge distillation, decoupled distillation, and distillation of relations."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from effjax.core.errors import check_number, check_shape
from effjax.core.rows import row_labels, row_mask, row_mean, wide_logits

__all__ = ["dist_loss", "dkd_loss", "kd_loss"]

Logits = Shaped[Any, "rows classes"]
Number = float | Array
Mask = Bool[Any, "rows"] | None


def kd_loss(
    student_logits: Logits, teacher_logits: Logits, *, temperature: Number = 4.0, mask: Mask = None
) -> Float[Array, ""]:
    r"""Knowledge distillation (Hinton, Vinyals, Dean 2015, arXiv:1503.02531).

    .. math:: \frac{T^2}{n} \sum_i \mathrm{KL}(\mathrm{softmax}(b_i / T) \,\|\, \mathrm{softmax}(a_i / T))

    Args:
      student_logits: a.
      teacher_logits: b; no gradient goes through them.
      temperature: T.
      mask: rows that take part; None for all.

    Returns:
      A number, 0 where the two agree.

    Raises:
      ValueError: shapes that do not fit, or a temperature out of range.

    Example:
      >>> float(kd_loss(jnp.zeros((1, 3)), jnp.ones((1, 3))))
      0.0
    """
    a, b = _both(student_logits, teacher_logits, mask)
    return temperature**2 * row_mean(_divergence(*_soft(a, b, temperature)), mask)


def dkd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Int[Any, "rows"],
    *,
    alpha: Number = 1.0,
    beta: Number = 8.0,
    temperature: Number = 4.0,
    mask: Mask = None,
) -> Float[Array, ""]:
    r"""Decoupled distillation (Zhao et al. 2022, CVPR, arXiv:2203.08679): the label against the rest, and the rest.

    .. math::
        \frac{T^2}{n} \sum_i \alpha\,\mathrm{KL}\bigl((u_y, 1 - u_y) \,\|\, (z_y, 1 - z_y)\bigr)
        + \beta\,\mathrm{KL}(\hat u \,\|\, \hat z)

    where u and z are the teacher's and student's probabilities at temperature T, and the hat leaves the label's class
    out. Plain distillation weighs the second term by :math:`1 - u_y`, so that sure teachers hardly teach it.

    Args:
      student_logits: a.
      teacher_logits: b; no gradient goes through them.
      labels: y, in [0, classes); rows of unknown labels (-1) do not take part.
      alpha: weight of the first term.
      beta: weight of the second.
      temperature: T.
      mask: rows that take part; None for all.

    Returns:
      A number, 0 where the two agree.

    Raises:
      ValueError: shapes that do not fit, or numbers out of range.

    Example:
      >>> float(dkd_loss(jnp.zeros((1, 3)), jnp.ones((1, 3)), jnp.array([0])))
      0.0
    """
    check_number("alpha", alpha, low=0)
    check_number("beta", beta, low=0)
    a, b = _both(student_logits, teacher_logits, mask)
    labels = row_labels(labels, a.shape[0])
    log_u, log_z = _soft(a, b, temperature)
    own = jnp.arange(a.shape[1])[None, :] == labels[:, None]

    def target(log_p: Array) -> Array:
        inside = jnp.where(own, log_p, 0.0).sum(1)
        outside = jax.nn.logsumexp(jnp.where(own, -jnp.inf, log_p), axis=1)
        return jnp.stack([inside, outside], axis=1)

    def rest(log_p: Array) -> Array:
        return jnp.where(own, -jnp.inf, log_p) - target(log_p)[:, 1:]

    first = _divergence(target(log_u), target(log_z))
    second = _divergence(rest(log_u), jnp.where(own, 0.0, rest(log_z)))
    used = row_mask(mask, a.shape[0]) & (labels >= 0)
    return temperature**2 * row_mean(alpha * first + beta * second, used)


def dist_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: Number = 1.0,
    between_classes: Number = 1.0,
    within_classes: Number = 1.0,
    mask: Mask = None,
) -> Float[Array, ""]:
    r"""Distillation of relations (DIST; Huang et al. 2022, NeurIPS, arXiv:2205.10536): correlations, not values.

    .. math::
        \beta\,T^2 \Bigl(1 - \frac1n \sum_i \rho(z_{i \cdot}, u_{i \cdot})\Bigr)
        + \gamma\,T^2 \Bigl(1 - \frac1K \sum_c \rho(z_{\cdot c}, u_{\cdot c})\Bigr)

    with Pearson's correlation over the classes of a row, and over the rows of a class.

    Args:
      student_logits: a, with z their softmax at temperature T.
      teacher_logits: b, with u theirs; no gradient goes through them.
      temperature: T.
      between_classes: beta; 2, with gamma 2 and T = 4, on CIFAR, 1, 1 and 1 on ImageNet.
      within_classes: gamma.
      mask: rows that take part; None for all.

    Returns:
      A number, 0 where all correlations are 1.

    Raises:
      ValueError: shapes that do not fit, or numbers out of range.

    Example:
      >>> logits = jnp.array([[0.0, 1.0], [2.0, 0.0]])
      >>> abs(round(float(dist_loss(logits, logits)), 5))
      0.0
    """
    check_number("between_classes", between_classes, low=0)
    check_number("within_classes", within_classes, low=0)
    a, b = _both(student_logits, teacher_logits, mask)
    log_u, log_z = _soft(a, b, temperature)
    z, u = jnp.exp(log_z), jnp.exp(log_u)
    used = row_mask(mask, a.shape[0])
    rows = 1.0 - row_mean(_correlation(z, u, jnp.ones_like(z)), used)
    columns = 1.0 - jnp.mean(_correlation(z.T, u.T, jnp.broadcast_to(used.astype(z.dtype)[None, :], z.T.shape)))
    return temperature**2 * (between_classes * rows + within_classes * columns)


def _both(student_logits: Any, teacher_logits: Any, mask: Any) -> tuple[Array, Array]:
    a = wide_logits("student_logits", student_logits, mask)
    check_shape("teacher_logits", teacher_logits, a.shape, "Those of student_logits.")
    return a, jax.lax.stop_gradient(wide_logits("teacher_logits", teacher_logits, mask))


def _soft(a: Array, b: Array, temperature: Any) -> tuple[Array, Array]:
    """Log-probabilities of teacher and student."""
    check_number("temperature", temperature, low=0, open_low=True)
    return jax.nn.log_softmax(b / temperature), jax.nn.log_softmax(a / temperature)


def _divergence(log_p: Array, log_q: Array) -> Array:
    """KL(p || q) row by row; a class of probability 0 adds nothing."""
    possible = jnp.isfinite(log_p)
    difference = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    return jnp.where(possible, jnp.exp(log_p) * difference, 0.0).sum(1)


def _correlation(x: Array, y: Array, weights: Array) -> Array:
    """Pearson's, over the last axis."""
    total = jnp.maximum(weights.sum(1, keepdims=True), 1.0)
    centre = lambda v: weights * (v - (weights * v).sum(1, keepdims=True) / total)
    x, y = centre(x), centre(y)
    squares = (x * x).sum(1) * (y * y).sum(1)
    return (x * y).sum(1) / jnp.sqrt(squares + _TINY)


_TINY = 1e-16
