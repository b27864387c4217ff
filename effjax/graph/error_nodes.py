"""Finding the nodes that an ensemble of graph networks gets wrong (part of GEENI).

A reconstruction: how Nagarajan, Raghunathan (DAC 2022) find error nodes is in no text that could be read. What an
ensemble says of itself (``error_scores``) is blind to the errors that all members share. The learned detector therefore
compares it with two views that err elsewhere: labels spread over the edges, which know no features, and distances to
the classes' mean features, which know no edges.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import check_number
from effjax.graph.problems import GeeniProblem, check_geeni_shapes
from effjax.graph.sparse.checks import check_array
from effjax.graph.sparse.matrix import SparseMatrix, SparsePattern, check_matrix
from effjax.graph.sparse.products import matmul, row_sums, spmm, take_columns, take_rows
from effjax.graph.sparse.propagation import label_propagation

__all__ = ["active_nodes", "error_auc", "error_scores", "held_out_correctness", "learned_correctness"]

_TINY = 1e-12


class ErrorScores(NamedTuple):
    """What an ensemble says of its own predictions; in each but the last two low means suspicious.

    Attributes:
      probabilities: [N, C], mean over the members.
      label: int32 [N], the class of the mean; ties go to the lowest.
      vote_share: [N], share of members whose own class it is.
      confidence: [N], its probability.
      score: [N], ``vote_share + confidence - 1``, in (-1, 1].
      entropy: [N], of the mean, nats.
      mutual_information: [N], ``entropy`` minus the mean of the members' entropies: their disagreement, nats.
    """

    probabilities: jax.Array
    label: jax.Array
    vote_share: jax.Array
    confidence: jax.Array
    score: jax.Array
    entropy: jax.Array
    mutual_information: jax.Array


def error_scores(probabilities: Float[Array, "members nodes classes"]) -> ErrorScores:
    """Scores by which wrong nodes can be told from right ones, without any label.

    Args:
      probabilities: of every member; rows sum to 1.

    Returns:
      ``ErrorScores``.

    Raises:
      ValueError: not [K, N, C], or not floating.

    Example:
      >>> scores = error_scores(jnp.array([[[0.8, 0.2]], [[0.4, 0.6]]]))
      >>> scores.label.tolist(), scores.vote_share.tolist(), round(float(scores.score[0]), 4)
      ([0], [0.5], 0.1)
    """
    check_array("probabilities", probabilities, (None, None, None), "floating", "Of every member.")
    return _scores(probabilities)


@functools.partial(jax.jit, inline=True)
def _scores(probabilities: jax.Array) -> ErrorScores:
    mean = jnp.mean(probabilities, axis=0)
    label = jnp.argmax(mean, axis=1).astype(jnp.int32)
    votes = jnp.mean((jnp.argmax(probabilities, axis=2).astype(jnp.int32) == label[None]).astype(mean.dtype), axis=0)
    confidence = jnp.max(mean, axis=1)
    entropy = _entropy(mean)
    disagreement = entropy - jnp.mean(_entropy(probabilities), axis=0)
    return ErrorScores(mean, label, votes, confidence, votes + confidence - 1, entropy, disagreement)


def _entropy(p: jax.Array) -> jax.Array:
    return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)


def neighbour_agreement(
    matrix: SparseMatrix, label: Int[Array, "nodes"], probabilities: Float[Array, "nodes classes"] | None = None
) -> Float[Array, "nodes"]:
    """Share of a node's neighbours that are given the same class; 0 without neighbours.

    Args:
      matrix: any values; entries on the diagonal are no neighbours.
      label: the class of every node.
      probabilities: count neighbours by their probability of the node's class instead.

    Returns:
      [N] in [0, 1].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> path = gcn_adjacency([0, 1, 1, 2], [1, 0, 2, 1], 4)
      >>> neighbour_agreement(path, jnp.array([0, 0, 1, 1])).tolist()
      [1.0, 0.5, 0.0, 0.0]
    """
    pattern = check_matrix("matrix", matrix, square=True).pattern
    if probabilities is not None:
        check_array("probabilities", probabilities, (pattern.shape[0], None), "floating")
    return _agreement(pattern, matrix.values.dtype, label, probabilities)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _agreement(pattern: SparsePattern, dtype: Any, label: jax.Array, probabilities: jax.Array | None) -> jax.Array:
    neighbour = (pattern.valid & (pattern.rows != pattern.columns)).astype(dtype)
    if probabilities is None:
        found = (take_rows(pattern, label) == take_columns(pattern, label)).astype(dtype)
    else:
        found = probabilities[pattern.columns, take_rows(pattern, label)].astype(dtype)
    count = row_sums(pattern, neighbour)
    return row_sums(pattern, neighbour * found) / jnp.maximum(count, 1)


def label_free_correctness(scores: ErrorScores, matrix: SparseMatrix) -> dict[str, Float[Array, "nodes"]]:
    """The detectors that need no labels, by name; low where a node is suspicious.

    Args:
      scores: of the ensemble.
      matrix: S, for the neighbours.

    Returns:
      [N] each: ``'score'``; ``'agreement'``, the score and the share of neighbours of the same class; ``'mutual'``, the
      negative mutual information.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> scores = error_scores(jnp.array([[[0.75, 0.25], [0.5, 0.5]]]))
      >>> label_free_correctness(scores, gcn_adjacency([0, 1], [1, 0], 2))["agreement"].tolist()
      [1.75, 1.5]
    """
    agreement = neighbour_agreement(matrix, scores.label)
    return {"score": scores.score, "agreement": scores.score + agreement, "mutual": -scores.mutual_information}


def active_nodes(
    correctness: Float[Array, "nodes"], fraction: float | jax.Array, known: Bool[Array, "nodes"]
) -> Bool[Array, "nodes"]:
    r"""The nodes that still send messages: all but the error nodes.

    Error nodes are the :math:`\lfloor \rho N \rfloor` nodes of least correctness, without those of known label.

    Args:
      correctness: [N], low where a node is probably wrong; of equal ones the first count as lower.
      fraction: rho, in [0, 1].
      known: labelled nodes, which always send.

    Returns:
      bool [N], False for error nodes.

    Raises:
      ValueError: ``fraction`` out of range, or arrays of unlike length.

    Example:
      >>> known = jnp.array([True, False, False, False])
      >>> active_nodes(jnp.array([0.1, 0.9, 0.2, 0.8]), 0.5, known).tolist()
      [True, True, False, True]
    """
    check_number("fraction", fraction, low=0, high=1)
    check_array("correctness", correctness, (None,), "floating")
    check_array("known", known, correctness.shape, "bool")
    return _active(correctness, fraction * correctness.shape[0] + 1e-6, known)


@functools.partial(jax.jit, inline=True)
def _active(correctness: jax.Array, count: float | jax.Array, known: jax.Array) -> jax.Array:
    order = jnp.argsort(correctness, stable=True)
    rank = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
    return (rank >= jnp.floor(count).astype(rank.dtype)) | known


def error_auc(
    correctness: Float[Array, "nodes"], wrong: Bool[Array, "nodes"], mask: Bool[Array, "nodes"]
) -> Float[Array, ""]:
    """Probability that a wrong node has less correctness than a right one; ties count half. Traceable.

    Args:
      correctness: low where a node is probably wrong.
      wrong: what was to be found.
      mask: the nodes that count.

    Returns:
      A scalar; 0.5 is chance, NaN where the mask holds only wrong or only right nodes.

    Raises:
      ValueError: arrays of unlike length.

    Example:
      >>> everything = jnp.ones(4, bool)
      >>> float(error_auc(jnp.array([0.1, 0.4, 0.3, 0.9]), jnp.array([True, True, False, False]), everything))
      0.75
    """
    check_array("correctness", correctness, (None,), "floating")
    for name, array in (("wrong", wrong), ("mask", mask)):
        check_array(name, array, correctness.shape, "bool")
    return _auc(correctness, wrong, mask)


@functools.partial(jax.jit, inline=True)
def _auc(correctness: jax.Array, wrong: jax.Array, mask: jax.Array) -> jax.Array:
    order = jnp.argsort(correctness)
    ordered = correctness[order]
    right, bad = (mask & ~wrong)[order].astype(ordered.dtype), (mask & wrong)[order].astype(ordered.dtype)
    below = jnp.concatenate([jnp.zeros(1, ordered.dtype), jnp.cumsum(bad)])
    low, high = jnp.searchsorted(ordered, ordered, side="left"), jnp.searchsorted(ordered, ordered, side="right")
    pairs = jnp.sum(right * (below[low] + below[high]) / 2)
    return pairs / (jnp.sum(right) * jnp.sum(bad))


# Views of the labels that err where the members do not


def label_view(
    matrix: SparseMatrix,
    labels: Int[Array, "nodes"],
    known: Bool[Array, "nodes"],
    classes: int,
    *,
    steps: int = 20,
    alpha: float = 0.9,
) -> Float[Array, "nodes classes"]:
    """What the edges say: known labels spread over the graph, rows divided by their sum; zero where none arrives.

    Args:
      matrix: S, normalised.
      labels: read at the nodes of ``known`` only.
      known: bool [N].
      classes: C.
      steps: of ``label_propagation``.
      alpha: of ``label_propagation``.

    Returns:
      [N, C].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> pair = gcn_adjacency([0, 1], [1, 0], 2)
      >>> label_view(pair, jnp.array([1, 0]), jnp.array([True, False]), 2).round(3).tolist()
      [[0.0, 1.0], [0.0, 1.0]]
    """
    spread = label_propagation(matrix, labels, known, classes, steps=steps, alpha=alpha)
    return spread / jnp.maximum(jnp.sum(spread, axis=1, keepdims=True), _TINY)


def feature_view(
    features: SparseMatrix | Float[Array, "nodes features"],
    labels: Int[Array, "nodes"],
    known: Bool[Array, "nodes"],
    classes: int,
) -> Float[Array, "nodes classes"]:
    """What the features say: cosine of every node's features with the mean features of each class.

    Args:
      features: X, dense or sparse.
      labels: read at the nodes of ``known`` only.
      known: bool [N].
      classes: C.

    Returns:
      [N, C]; 0 for nodes without features and for classes without known nodes.

    Example:
      >>> feature_view(jnp.eye(3), jnp.array([0, 1, 0]), jnp.array([True, True, False]), 2).round(2).tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    hot = jnp.where(known[:, None], jax.nn.one_hot(labels, classes), 0)
    if isinstance(features, SparseMatrix):
        sums, squares = spmm(features.transpose, hot), row_sums(features.pattern, jnp.square(features.values))
    else:
        sums, squares = features.T @ hot, jnp.sum(jnp.square(features), axis=1)
    directions = sums / jnp.maximum(jnp.linalg.norm(sums, axis=0, keepdims=True), _TINY)
    return matmul(features, directions) / jnp.maximum(jnp.sqrt(squares), _TINY)[:, None]


def spread_errors(
    matrix: SparseMatrix,
    wrong: Bool[Array, "nodes"],
    checked: Bool[Array, "nodes"],
    *,
    steps: int = 10,
    alpha: float = 0.8,
) -> Float[Array, "nodes"]:
    """Correctness by the known errors nearby: their excess over the usual rate, spread over the edges.

    Args:
      matrix: S, normalised.
      wrong: read at the nodes of ``checked`` only.
      checked: nodes whose labels are known and were not trained on.
      steps: of the propagation.
      alpha: share of the neighbours.

    Returns:
      [N], low where errors are near.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> pairs = gcn_adjacency([0, 1, 2, 3], [1, 0, 3, 2], 4)
      >>> found = spread_errors(pairs, jnp.array([True, False, False, False]), jnp.array([True, False, True, False]))
      >>> bool(found[1] < found[3])
      True
    """
    rate = jnp.sum(wrong & checked) / jnp.maximum(jnp.sum(checked), 1)
    start = jnp.where(checked, rate - wrong.astype(rate.dtype), 0)
    step = lambda found, _: (alpha * spmm(matrix, found) + (1 - alpha) * start, None)
    return jax.lax.scan(step, start, length=steps)[0]


# The learned detector


class Detector(NamedTuple):
    """A logistic regression for "the ensemble is right here".

    Attributes:
      weights: [D], of standardised inputs.
      bias: scalar.
      mean: [D], of the inputs at the nodes it was fitted on.
      scale: [D], their standard deviation.
    """

    weights: jax.Array
    bias: jax.Array
    mean: jax.Array
    scale: jax.Array

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Probability of being right: [N, D] -> [N]."""
        return jax.nn.sigmoid(((inputs - self.mean) / self.scale) @ self.weights + self.bias)


def fit_detector(
    inputs: Float[Array, "nodes inputs"],
    right: Bool[Array, "nodes"],
    mask: Bool[Array, "nodes"],
    *,
    ridge: float = 5.0,
    steps: int = 20,
) -> Detector:
    r"""Ridge-regularised logistic regression by Newton's method; traceable.

    .. math:: \min_{w, b} \sum_{i \in M} \log(1 + e^{-t_i (w \cdot z_i + b)}) + \tfrac{\lambda}{2} \lVert w \rVert^2

    with :math:`t = \pm 1`, z the standardised inputs and M the mask.

    Args:
      inputs: [N, D].
      right: whether the ensemble is right; read inside the mask only.
      mask: the nodes to fit on.
      ridge: lambda; large values leave little but the base rate.
      steps: of Newton's method.

    Returns:
      A ``Detector``.

    Example:
      >>> inputs = jnp.array([[0.0], [1.0], [2.0], [3.0]])
      >>> detector = fit_detector(inputs, jnp.array([False, False, True, True]), jnp.ones(4, bool), ridge=0.1)
      >>> (detector(inputs) > 0.5).tolist()
      [False, False, True, True]
    """
    check_number("ridge", ridge, low=0, open_low=True, hint="Separable data need some.")
    check_number("steps", steps, low=1, integer=True)
    weight = mask.astype(inputs.dtype)
    count = jnp.maximum(jnp.sum(weight), 1)
    mean = (weight @ inputs / count)[None]
    scale = (jnp.sqrt(weight @ jnp.square(inputs - mean) / count) + 1e-6)[None]
    z = jnp.concatenate([(inputs - mean) / scale, jnp.ones((inputs.shape[0], 1), inputs.dtype)], axis=1)
    z = jnp.where(mask[:, None], z, 0)
    penalty = jnp.full(z.shape[1], ridge, z.dtype).at[-1].set(1e-2)  # the bias is nearly free
    target = right.astype(z.dtype)

    def newton(w, _):
        p = jax.nn.sigmoid(z @ w)
        gradient = z.T @ (weight * (target - p)) - penalty * w
        hessian = (z * (weight * p * (1 - p))[:, None]).T @ z + jnp.diag(penalty)
        return w + jnp.linalg.solve(hessian, gradient), None

    w = jax.lax.scan(newton, jnp.zeros(z.shape[1], z.dtype), length=steps)[0]
    return Detector(w[:-1], w[-1], mean, scale)


def detector_inputs(
    scores: ErrorScores,
    matrix: SparseMatrix,
    edges_say: Float[Array, "nodes classes"],
    features_say: Float[Array, "nodes classes"],
) -> Float[Array, "nodes inputs"]:
    """What the learned detector looks at: the ensemble's confidence, votes and neighbours, and how far the views agree.

    Args:
      scores: of the ensemble.
      matrix: S.
      edges_say: ``label_view``.
      features_say: ``feature_view``.

    Returns:
      [N, 6]: log-odds of the confidence, vote share, neighbours' mean probability of the class, its share in the label
      view, and its margin over the best other class in both views.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> scores = error_scores(jnp.full((2, 3, 4), 0.25))
      >>> graph = gcn_adjacency([0, 1], [1, 0], 3)
      >>> detector_inputs(scores, graph, jnp.zeros((3, 4)), jnp.zeros((3, 4))).shape
      (3, 6)
    """
    sure = jnp.clip(scores.confidence, 1e-4, 1 - 1e-4)
    neighbours = neighbour_agreement(matrix, scores.label, scores.probabilities)
    share, edge_margin = _margin(edges_say, scores.label)
    _, feature_margin = _margin(features_say, scores.label)
    columns = (jnp.log(sure / (1 - sure)), scores.vote_share, neighbours, share, edge_margin, feature_margin)
    return jnp.stack(columns, axis=1)


def _margin(view: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    own = jnp.take_along_axis(view, label[:, None], axis=1)[:, 0]
    others = jnp.where(jax.nn.one_hot(label, view.shape[1], dtype=bool), -jnp.inf, view)
    return own, own - jnp.max(others, axis=1)


def learned_correctness(
    scores: ErrorScores, problem: GeeniProblem, folds: Int[Array, "nodes"], *, fold_count: int, ridge: float = 5.0
) -> Float[Array, "nodes"]:
    """Probability that the ensemble is right at every node, learned on nodes that the members were not trained on.

    The detector reads two views made of known labels. A node it is fitted on must not see its own label there, so the
    validation nodes fall into folds, and the views of a fold are made without its labels. Test labels are never read.
    Traceable; under ``vmap`` over masks (``held_out_correctness``) the propagations become columns.

    Args:
      scores: of the ensemble.
      problem: the graph; labels are read at ``train``, which are in the views, and at ``val``, which the detector is
        fitted on.
      folds: int [N] in [0, fold_count), read at ``val``.
      fold_count: 2 or more.
      ridge: strength of the detector's regularisation.

    Returns:
      [N]. At the validation nodes it comes from views that see their labels: to judge there, take
      ``held_out_correctness``.

    Raises:
      ValueError: arrays of another length, or numbers out of range.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> graph = gcn_adjacency([0, 1, 2, 3], [1, 0, 3, 2], 4)
      >>> train = jnp.array([True, False, True, False])
      >>> problem = GeeniProblem(jnp.eye(4), graph, jnp.array([0, 0, 1, 1]), train, ~train, 2)
      >>> scores = error_scores(jnp.full((2, 4, 2), 0.5))
      >>> learned_correctness(scores, problem, jnp.arange(4) // 2, fold_count=2).shape
      (4,)
    """
    check_number("fold_count", fold_count, low=2, integer=True)
    check_geeni_shapes(problem)
    features, matrix, labels, checked = problem.features, problem.adjacency, problem.labels, problem.val
    check_array("scores.label", scores.label, labels.shape, "integers")
    check_array("folds", folds, labels.shape, "integers")
    classes = scores.probabilities.shape[1]

    def inputs(known):
        views = label_view(matrix, labels, known, classes), feature_view(features, labels, known, classes)
        return detector_inputs(scores, matrix, *views)

    # The last one holds nothing out: it is for the nodes whose labels nobody knows.
    held_out = jnp.concatenate([folds == fold for fold in range(fold_count)] + [jnp.zeros_like(checked)])
    known = (problem.train | checked)[None] & ~(checked[None] & held_out.reshape(fold_count + 1, -1))
    variants = jax.vmap(inputs)(known)
    own = jnp.where(checked, folds, fold_count)
    fitted = variants[own, jnp.arange(own.shape[0])]
    detector = fit_detector(fitted, scores.label == labels, checked, ridge=ridge)
    return detector(variants[-1])


def held_out_correctness(
    scores: ErrorScores, problem: GeeniProblem, folds: Int[Array, "nodes"], *, fold_count: int, ridge: float = 5.0
) -> Float[Array, "folds nodes"]:
    """``learned_correctness`` once for every fold, as if its labels were unknown: for choosing what to isolate.

    How well isolation does at the validation nodes may be judged only by a detector that has not seen their labels,
    neither in its fit nor in its views: row f is such a detector for the nodes of fold f.

    Args:
      scores: of the ensemble.
      problem: the graph.
      folds: int [N] in [0, fold_count), read at ``val``.
      fold_count: 3 or more, as two remain for the fit.
      ridge: strength of the detector's regularisation.

    Returns:
      [fold_count, N].

    Raises:
      ValueError: arrays of another length, or numbers out of range.

    Example:
      >>> import functools
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> graph, none = gcn_adjacency([0, 1, 2, 3], [1, 0, 3, 2], 4), jnp.zeros(4, bool)
      >>> problem = GeeniProblem(jnp.eye(4), graph, jnp.array([0, 0, 1, 1]), none, ~none, 2)
      >>> scores = error_scores(jnp.full((2, 4, 2), 0.5))
      >>> found = functools.partial(held_out_correctness, fold_count=4)
      >>> jax.eval_shape(found, scores, problem, jnp.arange(4)).shape
      (4, 4)
    """
    check_number("fold_count", fold_count, low=3, integer=True)
    check_array("folds", folds, problem.labels.shape, "integers")
    check_array("problem.val", problem.val, problem.labels.shape, "bool")

    def without(fold):
        rest = dataclasses.replace(problem, val=problem.val & (folds != fold))
        return learned_correctness(scores, rest, folds, fold_count=fold_count, ridge=ridge)

    return jax.vmap(without)(jnp.arange(fold_count))
