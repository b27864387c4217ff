"""Self-training of node classifiers: the plain loop that FASTRAIN accelerates, its rivals' selections, and guards."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import check_number
from effjax.core.tree import wide
from effjax.graph.sparse.checks import check_array
from effjax.graph.stages import select_pseudolabels, unanimous

__all__ = ["most_confident", "self_training"]

PyTree = Any
Select = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class SelfTrained(NamedTuple):
    """What ``self_training`` leaves.

    Attributes:
      params: of the last stage.
      labels: int [N], true and pseudolabels; what was given for all other nodes.
      mask: bool [N], where those are.
      added: int [N], the stage that labelled a node: 0 for given labels, -1 for none.
    """

    params: PyTree
    labels: jax.Array
    mask: jax.Array
    added: jax.Array


def self_training(
    train: Callable[[jax.Array, jax.Array, int], PyTree],
    predict: Callable[[PyTree], jax.Array],
    labels: Int[Array, "nodes"],
    mask: Bool[Array, "nodes"],
    *,
    stages: int = 4,
    threshold: float = 0.8,
    select: Select | None = None,
) -> SelfTrained:
    """Train in stages; after each but the last, confident predictions become labels. The loop runs on the host.

    Labels are never changed or taken back once they are set.

    Args:
      train: ``(labels, mask, stage) -> params``, from scratch or not; it may read ``labels`` only where ``mask``.
      predict: ``params -> probabilities [N, C]``, calibrated where the threshold is to mean something.
      labels: true labels where ``mask``; anything elsewhere.
      mask: nodes with a true label.
      stages: how often to train.
      threshold: probability above which a prediction becomes a label.
      select: ``(confidence, predictions, mask) -> new [N]``, in place of the threshold; ``functools.partial`` of
        ``select_pseudolabels``, ``most_confident``, ... fits.

    Returns:
      A ``SelfTrained``.

    Raises:
      ValueError: no label at all, or numbers out of range.

    Example:
      >>> probabilities = jnp.array([[0.9, 0.1], [0.1, 0.9], [0.4, 0.6]])
      >>> found = self_training(
      ...     lambda labels, mask, stage: None, lambda params: probabilities,
      ...     jnp.array([0, -1, -1]), jnp.array([True, False, False]), stages=2,
      ... )
      >>> found.labels.tolist(), found.added.tolist()
      ([0, 1, -1], [0, 1, -1])
    """
    check_number("stages", stages, low=1, integer=True)
    check_array("labels", labels, (None,), "integers")
    check_array("mask", mask, labels.shape, "bool")
    check_number("labelled nodes", int(jnp.sum(mask)), low=1, integer=True, hint="Label at least one node of a class.")
    if select is None:
        select = lambda confidence, predictions, mask: select_pseudolabels(confidence, mask, threshold)
    added = jnp.where(mask, 0, -1)
    params = train(labels, mask, 0)
    for stage in range(1, stages):
        probabilities = predict(params)
        confidence, predictions = _said(probabilities)
        new = select(confidence, predictions, mask)
        labels, mask, added = _grown(labels, mask, added, new, predictions, stage)
        params = train(labels, mask, stage)
    return SelfTrained(params, labels, mask, added)


@jax.jit
def _said(probabilities: jax.Array) -> tuple[jax.Array, jax.Array]:
    return probabilities.max(-1), probabilities.argmax(-1)


@jax.jit
def _grown(labels, mask, added, new, predictions, stage) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Labels, where they are and since when, with those of the new nodes."""
    return jnp.where(new, predictions, labels).astype(labels.dtype), mask | new, jnp.where(new, stage, added)


def most_confident(
    candidates: Bool[Array, "nodes"],
    confidence: Float[Array, "nodes"],
    predictions: Int[Array, "nodes"],
    classes: int,
    count: int | jax.Array,
) -> Bool[Array, "nodes"]:
    """Of each predicted class the ``count`` most confident candidates, ties by node number; traceable.

    With all unlabelled nodes as candidates it is the selection of Li, Han, Wu (2018, AAAI); with the nodes above a
    threshold it keeps confident classes from crowding out the others.

    Args:
      candidates: nodes that may be chosen.
      confidence: of the predictions.
      predictions: classes in [0, C).
      classes: C.
      count: most nodes a class; a number or a traced scalar.

    Returns:
      Mask of the chosen nodes.

    Raises:
      ValueError: ``classes`` or ``count`` out of range.

    Example:
      >>> confidence, predictions = jnp.array([0.6, 0.9, 0.8, 0.7]), jnp.array([0, 0, 0, 1])
      >>> most_confident(jnp.ones(4, bool), confidence, predictions, 2, 1).tolist()
      [False, True, False, True]
    """
    check_number("classes", classes, low=1, integer=True)
    check_number("count", count, low=0, integer=True)
    check_array("candidates", candidates, (None,), "bool")
    check_array("confidence", confidence, candidates.shape, "floating")
    check_array("predictions", predictions, candidates.shape, "integers")
    return _most_confident(candidates, confidence, predictions, classes, count)


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _most_confident(
    candidates: jax.Array, confidence: jax.Array, predictions: jax.Array, classes: int, count: int | jax.Array
) -> jax.Array:
    group = jnp.where(candidates, predictions, classes)
    order = jnp.lexsort((-confidence, group))
    sizes = jnp.bincount(group, length=classes + 1)
    rank = jnp.arange(len(order)) - (jnp.cumsum(sizes) - sizes)[group[order]]
    return jnp.zeros(len(order), bool).at[order].set(rank < count) & candidates


def cluster_labels(
    key: jax.Array,
    embeddings: Float[Array, "nodes features"],
    labels: Int[Array, "nodes"],
    mask: Bool[Array, "nodes"],
    classes: int,
    *,
    clusters: int = 200,
    steps: int = 10,
) -> Int[Array, "nodes"]:
    """M3S's check: classes by k-means, a cluster taking the class whose labelled nodes' mean is nearest; traceable.

    A pseudolabel is trusted only where this agrees with the prediction (Sun, Lin, Zhu 2020, AAAI, arXiv:1902.11038).

    Args:
      key: of the nodes that the clusters start from.
      embeddings: of the trained network; the logits will do.
      labels: true and pseudolabels.
      mask: where they are.
      classes: C. A class without a label gets no cluster.
      clusters: K of k-means, at most N.
      steps: iterations of Lloyd's algorithm.

    Returns:
      A class for each node.

    Raises:
      ValueError: numbers out of range.

    Example:
      >>> points = jnp.array([[0.0], [0.1], [5.0], [5.1]])
      >>> labels, mask = jnp.array([1, -1, 0, -1]), jnp.array([True, False, True, False])
      >>> cluster_labels(jax.random.key(0), points, labels, mask, 2, clusters=2).tolist()
      [1, 1, 0, 0]
    """
    nodes = embeddings.shape[0]
    check_array("labels", labels, (nodes,), "integers")
    check_array("mask", mask, (nodes,), "bool")
    check_number("clusters", clusters, low=1, high=nodes, integer=True)
    check_number("steps", steps, low=1, integer=True)

    def nearest(points: jax.Array, centres: jax.Array) -> jax.Array:
        return jnp.argmin(jnp.sum(centres**2, -1)[None] - 2 * points @ centres.T, -1)

    def means(groups: jax.Array, count: int, members: jax.Array, otherwise: jax.Array) -> jax.Array:
        sums = jax.ops.segment_sum(embeddings * members[:, None], groups, count)
        sizes = jax.ops.segment_sum(members, groups, count)[:, None]
        return jnp.where(sizes > 0, sums / jnp.maximum(sizes, 1), otherwise)

    def lloyd(_: jax.Array | int, centres: jax.Array) -> jax.Array:
        return means(nearest(embeddings, centres), clusters, jnp.ones(nodes), centres)

    first = embeddings[jax.random.choice(key, nodes, (clusters,), replace=False)]
    centres = jax.lax.fori_loop(0, steps, lloyd, first)
    # A class without members is infinitely far; not at infinity itself, whose products are no numbers.
    far = jnp.full((classes, embeddings.shape[1]), 1e15, embeddings.dtype)
    owners = nearest(centres, means(jnp.where(mask, labels, 0), classes, mask.astype(embeddings.dtype), far))
    return owners[nearest(embeddings, centres)].astype(labels.dtype)


def pseudolabel_weights(
    confidence: Float[Array, "nodes"],
    predictions: Int[Array, "nodes"],
    sampled: Int[Array, "count nodes"] | None = None,
) -> Float[Array, "nodes"]:
    """Weights of pseudolabels in the loss: the confidence, times the share of sampled predictions that agree with it.

    Args:
      confidence: of the predictions.
      predictions: on the whole graph.
      sampled: predictions on sampled graphs.

    Returns:
      Numbers in [0, 1].

    Example:
      >>> pseudolabel_weights(jnp.array([0.5]), jnp.array([1]), jnp.array([[1], [0]])).tolist()
      [0.25]
    """
    if sampled is None:
        return confidence
    return confidence * (sampled == predictions[None]).mean(0, dtype=confidence.dtype)


def guard_pseudolabels(
    new: Bool[Array, "nodes"],
    candidates: Bool[Array, "nodes"],
    confidence: Float[Array, "nodes"],
    predictions: Int[Array, "nodes"],
    mask: Bool[Array, "nodes"],
    *,
    classes: int,
    sampled: Int[Array, "count nodes"] | None = None,
    agreement: float = 0.8,
    growth: float = 5.0,
) -> Bool[Array, "nodes"]:
    r"""The guard for few labels: none where sampled predictions differ, and of each class only the most confident.

    With one or two labels per class a network is sure of far more than it knows. Per stage and predicted class at most

    .. math:: g\,|T| / C

    nodes, rounded, get a label, and none at all where too few of the candidates have the same class on all samples.

    Args:
      new: mask of the selected nodes.
      candidates: the confident nodes that they were selected from.
      confidence: of the predictions.
      predictions: classes in [0, C).
      mask: T, the nodes that have a label already.
      classes: C.
      sampled: predictions on sampled graphs; without them only the number is limited.
      agreement: least share of the candidates that must be of one class on all samples.
      growth: g, a multiple of the labelled nodes per class.

    Returns:
      A part of ``new``.

    Example:
      >>> confidence = jnp.array([0.9, 0.8, 0.7, 0.6])
      >>> given = jnp.array([False, False, False, True])
      >>> guard_pseudolabels(~given, ~given, confidence, jnp.zeros(4, int), given, classes=1, growth=2.0).tolist()
      [True, True, False, False]
    """
    check_number("growth", growth, low=0)
    check_number("agreement", agreement, low=0, high=1)
    if sampled is not None:
        agreed = wide(jnp.sum(candidates & unanimous(sampled)))
        new = new & (agreed >= agreement * wide(jnp.sum(candidates)))
    most = jnp.round(growth * wide(jnp.sum(mask)) / classes).astype(jnp.int32)
    return most_confident(new, confidence, predictions, classes, most)
