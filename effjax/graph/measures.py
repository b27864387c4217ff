"""Losses and measures of node classifiers over some of the nodes.

A node counts by the mask and by its label: a label outside [0, C), such as -1 for unknown, counts nowhere. Shapes are
checked, and nothing is broadcast.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import check_number
from effjax.core.products import aligned
from effjax.core.tree import wide, wide_dtype
from effjax.graph.sparse.checks import check_array

__all__ = ["brier_score", "expected_calibration_error", "masked_accuracy", "masked_cross_entropy"]

Mask = Bool[Array, "nodes"] | Float[Array, "nodes"]


def node_weights(
    scores: Float[Array, "... nodes classes"], labels: Int[Array, "nodes"], mask: Mask, scores_name: str = "logits"
) -> tuple[Float[Array, "nodes"], Int[Array, "nodes"]]:
    """Weights of the nodes, 0 where the label is no class, and labels that are classes everywhere.

    Raises:
      ValueError: labels that are no integers [N], or a mask that is no bool or floating [N].

    Example:
      >>> weights, safe = node_weights(jnp.zeros((3, 2)), jnp.array([1, -1, 0]), jnp.array([True, True, False]))
      >>> weights.tolist(), safe.tolist()
      ([1.0, 0.0, 0.0], [1, 0, 0])
    """
    check_array(scores_name, scores, (*[None] * max(2, jnp.ndim(scores)),), "floating")
    nodes, classes = scores.shape[-2:]
    check_array("labels", labels, (nodes,), "integers", f"One class for each of {nodes} nodes.")
    own = scores.shape[:-1] if scores.ndim == jnp.ndim(mask) + 1 else (nodes,)
    check_array("mask", mask, own, "bool or floating", f"One value for each of {nodes} nodes.")
    labels, mask = jnp.asarray(labels), jnp.asarray(mask)
    weights = mask.astype(wide_dtype(scores.dtype))
    labels = aligned(labels, weights)
    weights = jnp.where((labels >= 0) & (labels < classes), weights, 0)
    return weights, jnp.where(weights > 0, labels, 0)


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted mean over the last axis; 0 without weights."""
    total = jnp.maximum(jnp.sum(weights, axis=-1), 1e-9)
    weights, values = aligned(weights, values), wide(values)
    return jnp.sum(jnp.where(weights > 0, weights * values, 0), axis=-1) / total


def masked_cross_entropy(
    logits: Float[Array, "... nodes classes"], labels: Int[Array, "nodes"], mask: Mask
) -> Float[Array, "..."]:
    r"""Mean cross-entropy over the masked nodes whose label is known, in nats.

    .. math:: \frac{\sum_i m_i\, (-\log p_{i, y_i})}{\sum_i m_i}, \qquad m_i = 0 \text{ where } y_i \notin [0, C)

    Args:
      logits: [N, C]; or [K, N, C] of K networks.
      labels: integers [N]; -1 where unknown.
      mask: bool [N], or floating [N], the weight of each node; [K, N] for networks with nodes of their own.

    Returns:
      A scalar, or [K]; float32 at least. 0 where no node counts.

    Raises:
      ValueError: labels or a mask of another shape or kind, such as [N, 1].

    Example:
      >>> loss = masked_cross_entropy(jnp.zeros((3, 4)), jnp.array([3, -1, 0]), jnp.array([True, True, False]))
      >>> round(float(loss), 4)
      1.3863
    """
    weights, labels = node_weights(logits, labels, mask)
    logits = wide(logits)
    # A sum over the classes, as the gradient of a gather would be a scatter.
    own = aligned(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), logits)
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(own, logits, 0), axis=-1)
    return _mean(losses, weights)


def masked_accuracy(
    logits: Float[Array, "... nodes classes"], labels: Int[Array, "nodes"], mask: Mask
) -> Float[Array, "..."]:
    """Share of the masked nodes whose largest logit is their label; ties go to the lowest class.

    Args:
      logits: [N, C], or probabilities; or [K, N, C] of K networks.
      labels: integers [N]; -1 where unknown, which counts nowhere.
      mask: bool [N], or floating [N], the weight of each node.

    Returns:
      A scalar, or [K]; 0 where no node counts.

    Raises:
      ValueError: labels or a mask of another shape or kind, such as [N, 1].

    Example:
      >>> float(masked_accuracy(jnp.eye(3), jnp.array([0, 2, -1]), jnp.ones(3, bool)))
      0.5
    """
    weights, labels = node_weights(logits, labels, mask)
    found = jnp.argmax(logits, axis=-1)
    return _mean(found == aligned(labels, found), weights)


def expected_calibration_error(
    probabilities: Float[Array, "nodes classes"], labels: Int[Array, "nodes"], mask: Mask, bins: int = 20
) -> Float[Array, ""]:
    r"""How far confidence and accuracy are apart, over bins of confidence.

    .. math:: \sum_b \frac{n_b}{n}\, |\,\mathrm{accuracy}_b - \mathrm{confidence}_b\,|

    Args:
      probabilities: rows sum to 1.
      labels: integers [N]; -1 where unknown, which counts nowhere.
      mask: bool [N], or floating [N], the weight of each node.
      bins: of equal width on (0, 1], open below.

    Returns:
      A scalar; 0 where no node counts.

    Raises:
      ValueError: arrays of another shape or kind, or ``bins`` below 1.

    Example:
      >>> float(expected_calibration_error(jnp.array([[0.75, 0.25]]), jnp.array([0]), jnp.ones(1)))
      0.25
    """
    check_number("bins", bins, low=1, integer=True)
    weights, labels = node_weights(probabilities, labels, mask, "probabilities")
    confidence = probabilities.max(-1)
    right = (probabilities.argmax(-1) == labels).astype(confidence.dtype)
    edges = jnp.linspace(0, 1, bins + 1)
    inside = (confidence[:, None] > edges[None, :-1]) & (confidence[:, None] <= edges[None, 1:])
    return jnp.abs((weights * (right - confidence)) @ inside.astype(weights.dtype)).sum() / jnp.maximum(
        jnp.sum(weights), 1e-9
    )


def brier_score(
    probabilities: Float[Array, "nodes classes"], labels: Int[Array, "nodes"], mask: Mask
) -> Float[Array, ""]:
    """Mean over the masked nodes of the squared error, summed over the classes.

    Args:
      probabilities: rows sum to 1.
      labels: integers [N]; -1 where unknown, which counts nowhere.
      mask: bool [N], or floating [N], the weight of each node.

    Returns:
      A scalar in [0, 2]; 0 where no node counts.

    Raises:
      ValueError: arrays of another shape or kind.

    Example:
      >>> float(brier_score(jnp.array([[0.5, 0.5]]), jnp.array([0]), jnp.ones(1)))
      0.5
    """
    weights, labels = node_weights(probabilities, labels, mask, "probabilities")
    hot = jax.nn.one_hot(labels, probabilities.shape[-1], dtype=probabilities.dtype)
    return _mean(jnp.sum((probabilities - hot) ** 2, -1), weights)
