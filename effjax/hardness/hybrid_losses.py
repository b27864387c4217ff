"""Who should have answered: the oracle of hybrid models, and the losses of router, base and expert."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import check_choice, check_number, check_shape
from effjax.core.tree import wide

__all__ = ["coverage_penalty", "hybrid_weights", "query_oracle", "router_loss", "weighted_cross_entropy"]

Oracle = Literal["gain", "wrong", "disagree"]


def query_oracle(
    base: Int[Array | np.ndarray, "rows"],
    expert: Int[Array | np.ndarray, "rows"],
    labels: Int[Array | np.ndarray, "rows"],
    kind: Oracle = "gain",
) -> Bool[Array | np.ndarray, "rows"]:
    r"""Which rows to ask about, in hindsight.

    .. math:: o(x) = 1\{ b(x) \neq y \text{ and } g(x) = y \}

    Only where the base is wrong and the expert right does a query help; where both are wrong it costs and does not.
    Keeping the others gives the best accuracy there is, :math:`P(b = y \text{ or } g = y)`, at the coverage
    :math:`1 - P(b \neq y, g = y)`.

    Args:
      base: classes that the base model predicts; of float32 logits, as those of bfloat16 tie.
      expert: classes that the expert predicts.
      labels: true classes; -1, unknown, asks for nothing.
      kind: ``'gain'``, the above; ``'wrong'``, ask where the base is wrong; ``'disagree'``, ask where the two differ,
        which needs no labels.

    Returns:
      True where the row should ask. The paper's code has the opposite sign, and calls the kinds ``margin``,
      ``margin-upper`` and ``agreement``.

    Raises:
      ValueError: an unknown kind, or arrays of different lengths.

    Example:
      >>> query_oracle(jnp.array([0, 1, 1]), jnp.array([0, 0, 1]), jnp.array([0, 0, 0])).tolist()
      [False, True, False]

    Source: Kag, Fedorov, Gangrade, Whatmough, Saligrama 2023, ICLR (OpenReview jpR98ZdIm2q).
    """
    check_choice("kind", kind, ("gain", "wrong", "disagree"))
    check_shape("expert", expert, jnp.shape(base), "One prediction for each row.")
    check_shape("labels", labels, jnp.shape(base), "One label for each row.")
    if kind == "disagree":
        return base != expert
    wrong = (base != labels) & (labels >= 0)
    return wrong & (expert == labels) if kind == "gain" else wrong


def router_loss(
    need: Float[Array | np.ndarray, "rows"],
    oracle: Bool[Array | np.ndarray, "rows"] | Float[Array | np.ndarray, "rows"],
    weights: Float[Array | np.ndarray, "rows"] | Bool[Array | np.ndarray, "rows"] | None = None,
) -> Float[Array, ""]:
    r"""Binary cross-entropy of the router.

    .. math:: -\frac{1}{\sum_i w_i} \sum_i w_i \big[ o_i \log \sigma(\mathrm{need}_i)
        + (1 - o_i) \log \sigma(-\mathrm{need}_i) \big]

    Args:
      need: logits of asking.
      oracle: of ``query_oracle``, or soft in [0, 1].
      weights: 0 or False where a row does not count; None for all alike.

    Returns:
      A float32 scalar; 0 where nothing counts.

    Raises:
      ValueError: an oracle of another length than the need.

    Example:
      >>> router_loss(jnp.zeros(2), jnp.array([True, False])).round(4).item()
      0.6930999755859375
    """
    check_shape("oracle", oracle, jnp.shape(need), "One for each row.")
    need = wide(need)
    return _mean(optax.sigmoid_binary_cross_entropy(need, oracle.astype(need.dtype)), weights)


def coverage_penalty(
    need: Float[Array | np.ndarray, "rows"],
    coverage: float,
    *,
    kind: Literal["squared", "linear", "released"] = "squared",
    weights: Float[Array | np.ndarray, "rows"] | Bool[Array | np.ndarray, "rows"] | None = None,
) -> Float[Array, ""]:
    r"""What a router pays for keeping too few rows.

    .. math:: \text{squared: } (c - \overline{\sigma(-\mathrm{need})})_+^2, \quad
        \text{linear: } (c - \overline{\sigma(-\mathrm{need})})_+, \quad
        \text{released: } (\overline{-\mathrm{need}} - c)_+

    Args:
      need: logits of asking.
      coverage: c, the share of rows that the base model should answer, in (0, 1).
      kind: ``'released'`` is what the paper's code does: it holds the mean logit of keeping below c, which bounds no
        coverage; for comparison only.
      weights: 0 or False where a row does not count.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: ``coverage`` outside (0, 1).

    Example:
      >>> coverage_penalty(jnp.zeros(4), 0.7).round(4).item()
      0.03999999910593033

    Source: Kag, Fedorov, Gangrade, Whatmough, Saligrama 2023, ICLR (OpenReview jpR98ZdIm2q).
    """
    check_choice("kind", kind, ("squared", "linear", "released"))
    check_number("coverage", coverage, low=0, high=1, open_low=True, open_high=True)
    need = wide(need)
    if kind == "released":
        return jax.nn.relu(_mean(-need, weights) - coverage)
    short = jax.nn.relu(coverage - _mean(jax.nn.sigmoid(-need), weights))
    return short**2 if kind == "squared" else short


def hybrid_weights(
    request: Bool[Array | np.ndarray, "rows"] | Float[Array | np.ndarray, "rows"],
) -> tuple[Float[Array, "rows"], Float[Array, "rows"]]:
    r"""Weights of the rows in the losses of the base model and the expert.

    .. math:: w_b = 2 - r, \qquad w_g = 1 + r

    Each model works twice as hard on the rows that it will answer. The mean of :math:`w_b` is 1 + coverage.

    Args:
      request: r, which rows ask, or their probability. No gradient passes.

    Returns:
      The two weights, [rows] each.

    Example:
      >>> [weights.tolist() for weights in hybrid_weights(jnp.array([True, False]))]
      [[1.0, 2.0], [2.0, 1.0]]
    """
    r = jax.lax.stop_gradient(wide(request))
    return 2 - r, 1 + r


def weighted_cross_entropy(
    logits: Float[Array | np.ndarray, "rows classes"],
    labels: Int[Array | np.ndarray, "rows"],
    weights: Float[Array | np.ndarray, "rows"],
    *,
    smoothing: float = 0.0,
) -> Float[Array, ""]:
    r"""Cross-entropy with a weight for each row.

    .. math:: -\frac{1}{N} \sum_i w_i \sum_c q_{ic} \log p_{ic}, \qquad
        q_i = (1 - s)\, \mathrm{onehot}(y_i) + s / K

    Args:
      logits: [rows, classes].
      labels: -1 where unknown: such a row counts nowhere, nor in N.
      weights: [rows]. The paper's code has them as [rows, 1], whose product with the losses is a matrix: there every
        row gets the mean weight, and the weighting is lost.
      smoothing: s, in [0, 1).

    Returns:
      A float32 scalar.

    Raises:
      ValueError: arrays of other shapes; nothing is broadcast.

    Example:
      >>> weighted_cross_entropy(jnp.zeros((2, 4)), jnp.array([1, -1]), jnp.array([2.0, 1.0])).round(1).item()
      2.799999952316284

    Source: Kag, Fedorov, Gangrade, Whatmough, Saligrama 2023, ICLR (OpenReview jpR98ZdIm2q).
    """
    check_number("smoothing", smoothing, low=0, high=1, open_high=True)
    rows = jnp.shape(logits)[:1]
    check_shape("labels", labels, rows, "One label for each row.")
    check_shape("weights", weights, rows, "One weight for each row.")
    logits, known = wide(logits), labels >= 0
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype), smoothing)
    return _mean(weights * optax.softmax_cross_entropy(logits, targets), known)


def _mean(values: Any, weights: Any) -> jax.Array:
    """The weighted mean; rows of weight 0 may hold anything."""
    if weights is None:
        return jnp.sum(values) / max(values.size, 1)
    check_shape("weights", weights, jnp.shape(values), "One for each row.")
    w = weights.astype(values.dtype)
    total = jnp.sum(w)
    return jnp.sum(jnp.where(w > 0, w * values, 0.0)) / jnp.where(total > 0, total, 1.0)
