"""DiSK's losses: distillation with a guide's help, what the help costs, and the guide that is best for a batch."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from effjax.core.errors import check_choice, check_number, check_shape
from effjax.core.rows import row_labels, row_mask, row_mean, wide_logits
from effjax.core.tree import wide

__all__ = ["best_guide", "disk_help", "disk_loss", "disk_normaliser", "top_logits"]

Logits = Shaped[Any, "rows classes"]
Labels = Int[Any, "rows"]
Number = float | Array
Mask = Bool[Any, "rows"] | None
Target = Literal["teacher", "label"]
Rows = Literal["wrong", "all"]


class TopLogits(NamedTuple):
    """What DiSK reads of a teacher's logits; small enough to keep for every example.

    Attributes:
      indices: of the k largest, in falling order.
      values: those logits.
      of_label: the label's logit; any number for an unknown label.
      least: the smallest logit, for all classes that are not among them.
    """

    indices: Int[Array, "rows k"]
    values: Float[Array, "rows k"]
    of_label: Float[Array, "rows"]
    least: Float[Array, "rows"]


def top_logits(teacher_logits: Logits, labels: Labels, k: int) -> TopLogits:
    """The k largest logits, the label's and the smallest one: a teacher's cache, made once for all passes of training.

    Args:
      teacher_logits: b.
      labels: in [0, classes); -1 for unknown.
      k: size of the support, at most the number of classes.

    Returns:
      A ``TopLogits``, int32 and float32; no gradient goes through it.

    Raises:
      ValueError: k out of range, or shapes that do not fit.

    Example:
      >>> top = top_logits(jnp.array([[1.0, 3.0, 2.0]]), jnp.array([0]), 2)
      >>> top.indices.tolist(), top.values.tolist(), top.of_label.tolist(), top.least.tolist()
      ([[1, 2]], [[3.0, 2.0]], [1.0], [1.0])
    """
    logits = jax.lax.stop_gradient(wide_logits("teacher_logits", teacher_logits))
    rows, classes = logits.shape
    hint = "It is the number of classes that the guide lifts."
    check_number("k", k, low=1, high=classes, integer=True, hint=hint)
    own = jnp.maximum(row_labels(labels, rows), 0)
    values, indices = jax.lax.top_k(logits, k)
    of_label = jnp.take_along_axis(logits, own[:, None], axis=1)[:, 0]
    return TopLogits(indices.astype(jnp.int32), values, of_label, logits.min(1))


def disk_loss(
    student_logits: Logits,
    teacher: TopLogits | Logits,
    labels: Labels,
    guide_logits: Float[Any, "rows"],
    *,
    k: int | None = None,
    student_temperature: Number = 4.0,
    teacher_temperature: Number = 4.0,
    mask: Mask = None,
) -> Float[Array, ""]:
    r"""Cross-entropy between the teacher and the student with the guide's help, on the teacher's k best classes.

    .. math::
        -\frac{T_s T_t}{n} \sum_i \sum_{c \in S_i} u_{ic} \log(z_{ic} + q_i), \qquad
        z = \mathrm{softmax}(a / T_s), \quad q = \sigma(h)

    with the support :math:`S_i`, the teacher's k best classes and the label. There the teacher's probabilities are
    those of :math:`b / T_t`; a class outside counts in their sum as :math:`\min_c b_c`. Where q grows, the gradient in
    the student's logits goes to 0: the guide takes hard rows off the student. Computed by ``logaddexp``, so that no
    probability is too small for it.

    Args:
      student_logits: a.
      teacher: its logits b, or the ``TopLogits`` of them; no gradient goes through it. A constant added to all of b
        changes the loss unless :math:`T_t = 1`, as the smallest logit is not divided by it.
      labels: in [0, classes); -1 for unknown, which leaves the support at the teacher's k.
      guide_logits: h, the guide's output before the sigmoid; ``-inf`` for no help.
      k: size of the support; None for all classes, or for that of ``TopLogits``.
      student_temperature: :math:`T_s`.
      teacher_temperature: :math:`T_t`.
      mask: rows that take part; None for all.

    Returns:
      A number; 0 where no row takes part.

    Raises:
      ValueError: shapes that do not fit, or numbers out of range.

    Example:
      >>> a, b = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[0.0, 4.0, 0.0]])
      >>> loss = lambda h: float(disk_loss(a, b, jnp.array([1]), jnp.array([h]), k=2))
      >>> loss(-5.0) > loss(0.0) > loss(5.0)
      True

    The released form (``use_prob=50``) of Kag, Acar, Gangrade, Saligrama 2023 (ICLR, OpenReview N4K5ck-BTT).
    """
    logits, labels, top = _inputs(student_logits, teacher, labels, k, mask)
    log_z, log_u = _on_support(logits, labels, top, student_temperature, teacher_temperature)
    log_q = jax.nn.log_sigmoid(_guide(guide_logits, logits.shape[0], mask))
    used = jnp.isfinite(log_u)
    # Twice: the gradient of what is left out must not be 0 times infinity either.
    log_helped = jnp.logaddexp(jnp.where(used, log_z, 0.0), log_q[:, None])
    each = -jnp.where(used, jnp.exp(log_u) * log_helped, 0.0).sum(1)
    return student_temperature * teacher_temperature * row_mean(each, mask)


def disk_help(
    student_logits: Logits,
    teacher: TopLogits | Logits,
    labels: Labels,
    guide_logits: Float[Any, "rows"],
    *,
    target: Target = "teacher",
    over: Rows = "wrong",
    clamp: Number | None = 5.0,
    mask: Mask = None,
) -> Float[Array, ""]:
    r"""How much the guide helps, dearer on rows that the student finds hard: what the budget limits.

    .. math:: \frac{1}{n} \sum_i q_i \min(-\log s_{t_i}, \mathrm{clamp}), \qquad s = \mathrm{softmax}(a)

    Args:
      student_logits: a.
      teacher: its logits, or the ``TopLogits`` of them.
      labels: in [0, classes); -1 for unknown.
      guide_logits: h, with :math:`q = \sigma(h)`.
      target: t, ``"teacher"`` for the teacher's best class, as released, or ``"label"``, as in the paper; an unknown
        label then costs nothing.
      over: n counts the rows whose label the student misses now, as released (1 where there are none), or ``"all"``.
      clamp: largest cost of a row; None for no limit.
      mask: rows that take part; None for all.

    Returns:
      A number, 0 or more.

    Raises:
      ValueError: shapes that do not fit, or an unknown ``target`` or ``over``.

    Example:
      >>> a, b, y = jnp.zeros((2, 2)), jnp.array([[0.0, 1.0]] * 2), jnp.array([1, 0])
      >>> round(float(disk_help(a, b, y, jnp.zeros(2))), 3)  # half of 2 log 2, one row wrong
      0.693

    Source: Kag, Acar, Gangrade, Saligrama 2023, ICLR (OpenReview N4K5ck-BTT).
    """
    check_choice("target", target, ("teacher", "label"))
    check_choice("over", over, ("wrong", "all"))
    # The largest logit alone is asked for.
    logits, labels, top = _inputs(student_logits, teacher, labels, None if isinstance(teacher, TopLogits) else 1, mask)
    used, known = row_mask(mask, labels.shape[0]), labels >= 0
    classes = top.indices[:, 0] if target == "teacher" else jnp.maximum(labels, 0)
    counts = used if target == "teacher" else used & known
    q = jax.nn.sigmoid(_guide(guide_logits, labels.shape[0], mask))
    total = jnp.sum(jnp.where(counts, q * _cost(logits, classes, clamp), 0.0))
    rows = used & known & (logits.argmax(1) != labels) if over == "wrong" else counts
    return total / jnp.maximum(rows.sum(), 1).astype(total.dtype)


def disk_normaliser(guide_logits: Float[Any, "rows"], k: Number, mask: Mask = None) -> Float[Array, ""]:
    r"""What the missing normaliser of the helped student adds: the mean of :math:`\log(1 + k\,q_i)`.

    The helped probabilities :math:`z + q` on k classes add up to :math:`1 + k q`. To divide by that is to add
    :math:`T_s T_t` times this number to ``disk_loss``; the release adds it once, which is far less than the help earns.

    Args:
      guide_logits: h, with :math:`q = \sigma(h)`.
      k: classes that are helped.
      mask: rows that take part; None for all.

    Returns:
      A float32 scalar, in nats.

    Example:
      >>> round(float(disk_normaliser(jnp.zeros(3), 2)), 3)  # log 2
      0.693
    """
    guide = _guide(guide_logits, jnp.shape(guide_logits)[0], mask)
    return row_mean(jnp.log1p(k * jax.nn.sigmoid(guide)), mask)


def best_guide(
    student_logits: Logits,
    teacher: TopLogits | Logits,
    labels: Labels,
    budget: Number,
    *,
    k: int | None = None,
    student_temperature: Number = 4.0,
    teacher_temperature: Number = 4.0,
    clamp: Number | None = 5.0,
    mask: Mask = None,
) -> tuple[Float[Array, "rows"], Float[Array, ""]]:
    r"""The guide that helps this batch most within the budget: no guide network and no phase that trains it.

    .. math::
        \min_{q \in [0, 1]^n} \sum_i \sum_{c \in S_i} -u_{ic} \log(z_{ic} + q_i) \quad \text{s.t.} \quad
        \frac1n \sum_i q_i\, \min(-\log s_{t_i}, \mathrm{clamp}) \le \delta

    The problem is convex and falls apart by rows once the multiplier of the budget is known: for a multiplier, each
    :math:`q_i` is the root of a falling function, and the help spent falls in the multiplier. Both are found by
    bisection, in a fixed number of steps.

    Args:
      student_logits: a.
      teacher: its logits, or the ``TopLogits`` of them; t is its best class.
      labels: in [0, classes); -1 for unknown.
      budget: :math:`\delta`, above 0; a number or a traced scalar. Unlike with ``over="wrong"`` of ``disk_help`` it is
        a mean over all rows.
      k: size of the support, as in ``disk_loss``.
      student_temperature: :math:`T_s`.
      teacher_temperature: :math:`T_t`.
      clamp: largest cost of a row; None for no limit.
      mask: rows that take part; None for all.

    Returns:
      The guide's logits, for ``disk_loss``, and the multiplier of the budget, 0 where help everywhere is within it. No
      gradient goes through them.

    Raises:
      ValueError: shapes that do not fit, or numbers out of range.

    Example:
      >>> a = jnp.array([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
      >>> b, y = jnp.array([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]]), jnp.array([0, 1])
      >>> h, price = best_guide(a, b, y, 0.3)
      >>> round(float(disk_help(a, b, y, h, over="all")), 3), bool(price > 0)
      (0.3, True)

    Not in the paper, where the guide is a network on the teacher's features.

    Source: Kag, Acar, Gangrade, Saligrama 2023, ICLR (OpenReview N4K5ck-BTT).
    """
    check_number("budget", budget, low=0, open_low=True)
    logits, labels, top = _inputs(student_logits, teacher, labels, k, mask)
    log_z, log_u = _on_support(logits, labels, top, student_temperature, teacher_temperature)
    z, u = jnp.exp(log_z), jnp.exp(log_u)
    used = row_mask(mask, labels.shape[0])
    cost = jnp.where(used, _cost(logits, top.indices[:, 0], clamp), 0.0)
    rows = jnp.maximum(used.sum(), 1).astype(z.dtype)

    def guide(price: Array) -> Array:
        """Where the help's gain falls to its price, row by row; the gain is infinite at most at q = 0."""

        def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = 0.5 * (low + high)
            gain = jnp.sum(u / jnp.maximum(z + middle[:, None], _TINY), axis=1)
            worth = gain > price * cost
            return jnp.where(worth, middle, low), jnp.where(worth, high, middle)

        ends = jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(cost), jnp.ones_like(cost)))
        # A row that would take more than all help ends just below it.
        return jnp.where(ends[1] == 1.0, 1.0, 0.5 * (ends[0] + ends[1]))

    def spent(price: Array) -> Array:
        return jnp.sum(guide(price) * cost) / rows

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = 0.5 * (ends[0] + ends[1])
        over = spent(jnp.exp(middle)) > budget
        return jnp.where(over, middle, ends[0]), jnp.where(over, ends[1], middle)

    log_price = jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.asarray(-_FAR, z.dtype), jnp.asarray(_FAR, z.dtype)))[1]
    free = jnp.sum(cost) / rows <= budget
    price = jnp.where(free, 0.0, jnp.exp(log_price))
    q = guide(price)
    h = jnp.log(jnp.maximum(q, _TINY)) - jnp.log(jnp.maximum(1.0 - q, _TINY))
    return jax.lax.stop_gradient(h), jax.lax.stop_gradient(price)


_TINY = 1e-20
_HALVINGS = 40
_FAR = 30.0
"""Logarithm of the largest multiplier that is looked for."""


def _on_support(
    logits: Array, labels: Array, top: TopLogits, student_temperature: Any, teacher_temperature: Any
) -> tuple[Array, Array]:
    """Log-probabilities of student and teacher on the support [rows, k + 1]; the teacher's are -inf where unused."""
    check_number("student_temperature", student_temperature, low=0, open_low=True)
    check_number("teacher_temperature", teacher_temperature, low=0, open_low=True)
    own = jnp.maximum(labels, 0)[:, None].astype(top.indices.dtype)
    # The label's column has no weight where the label is among the k already, or unknown.
    extra = (labels[:, None] >= 0) & ~(top.indices == own).any(1, keepdims=True)
    indices = jnp.concatenate([top.indices, own], axis=1)
    used = jnp.concatenate([jnp.ones(top.indices.shape, bool), extra], axis=1)
    b = wide(jnp.concatenate([top.values, top.of_label[:, None]], axis=1)) / teacher_temperature
    b = jnp.where(used, b, -jnp.inf)
    others = (logits.shape[1] - used.sum(1)).astype(b.dtype)
    outside = jnp.where(others > 0, jnp.log(jnp.maximum(others, 1.0)) + wide(top.least), -jnp.inf)
    log_u = jax.lax.stop_gradient(b - jnp.logaddexp(jax.nn.logsumexp(b, axis=1), outside)[:, None])
    return jnp.take_along_axis(jax.nn.log_softmax(logits / student_temperature), indices, axis=1), log_u


def _inputs(student_logits: Any, teacher: Any, labels: Any, k: int | None, mask: Any) -> tuple[Array, Array, TopLogits]:
    """Logits, labels and the teacher's largest logits, checked."""
    logits = wide_logits("student_logits", student_logits, mask)
    labels = row_labels(labels, logits.shape[0])
    if not isinstance(teacher, TopLogits):
        check_shape("teacher", teacher, logits.shape, "Logits of the same rows and classes as student_logits.")
        return logits, labels, top_logits(teacher, labels, logits.shape[1] if k is None else k)
    held = teacher.indices.shape[1]
    if k not in (None, held):
        raise ValueError(f"k={k}, but teacher holds the {held} largest logits. Leave k out, or make it anew.")
    check_shape("teacher.indices", teacher.indices, (logits.shape[0], held), "One row for each row of student_logits.")
    return logits, labels, teacher


def _guide(guide_logits: Any, rows: int, mask: Any) -> Array:
    check_shape("guide_logits", guide_logits, (rows,), "One number for each row: take the last axis off with [:, 0].")
    return jnp.where(row_mask(mask, rows), wide(guide_logits), 0.0)


def _cost(logits: Array, classes: Array, clamp: Any) -> Array:
    """What a unit of help costs, row by row."""
    cost = -jnp.take_along_axis(jax.nn.log_softmax(logits), classes[:, None], axis=1)[:, 0]
    return cost if clamp is None else jnp.minimum(cost, clamp)
