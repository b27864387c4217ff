"""Classifiers without parameters: label propagation, and Correct & Smooth behind any base predictor."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import check_number
from effjax.core.tree import wide
from effjax.graph.sparse.matrix import SparseMatrix, check_matrix
from effjax.graph.sparse.products import spmm

__all__ = ["correct_and_smooth", "label_propagation"]

# A node whose correction is this many times smaller than the usual error lies too far from any label to be scaled.
_FARTHEST = 1000.0


def label_propagation(
    matrix: SparseMatrix,
    labels: Int[ArrayLike, "nodes"],
    mask: Bool[ArrayLike, "nodes"],
    classes: int,
    *,
    steps: int = 50,
    alpha: float = 0.9,
) -> Float[Array, "nodes classes"]:
    r"""Spread known labels over the edges.

    .. math:: Y_{t+1} = \mathrm{clip}(\alpha\, S\, Y_t + (1 - \alpha)\, Y_0,\ 0,\ 1)

    where :math:`Y_0` has one-hot rows at the nodes of ``mask`` and zero rows elsewhere. Labels outside ``mask`` are
    never read: hidden ones may be anything.

    Args:
      matrix: S, [N, N]; usually ``gcn_normalize`` of the adjacency without self-loops.
      labels: classes in [0, C) at the nodes of ``mask``.
      mask: the nodes whose labels are known.
      classes: C.
      steps: 0 or more; a label travels one edge per step.
      alpha: in [0, 1], the share of the neighbours.

    Returns:
      Float32 scores, not normalised; zero rows for nodes that no label reaches.

    Raises:
      ValueError: shapes that do not fit, arguments out of range, or a known label outside [0, C) (unless traced).

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency, gcn_normalize
      >>> path = gcn_normalize(adjacency([0, 1, 1, 2], [1, 0, 2, 1], 4))
      >>> scores = label_propagation(path, jnp.array([1, -1, -1, -1]), jnp.arange(4) < 1, 2)
      >>> scores.argmax(-1).tolist(), scores[3].tolist()
      ([1, 1, 1, 0], [0.0, 0.0])

    Zhu, Ghahramani 2002 (CMU-CALD-02-107), in the form of Zhou et al. 2004 (NIPS 16), as PyTorch Geometric has it.
    """
    check_number("classes", classes, low=2, integer=True)
    mask, start = _known(matrix, labels, mask, classes)
    return _propagate(matrix, start, steps, alpha)


def correct(
    matrix: SparseMatrix,
    probabilities: Float[ArrayLike, "nodes classes"],
    labels: Int[ArrayLike, "nodes"],
    mask: Bool[ArrayLike, "nodes"],
    *,
    steps: int = 50,
    alpha: float = 0.8,
    scale: float | None = None,
) -> Float[Array, "nodes classes"]:
    r"""Spread the errors of a base predictor at known nodes, and add them to its predictions elsewhere.

    With :math:`E_0 = Y - P` at the nodes of ``mask`` and 0 elsewhere, by default (autoscale)

    .. math::
        E_{t+1} &= \mathrm{clip}(\alpha\, S\, E_t + (1 - \alpha)\, E_0,\ -1,\ 1), \qquad
        \sigma = \tfrac{1}{L} \textstyle\sum_{j \in \mathrm{mask}} \lVert E_{0,j} \rVert_1 \\
        P'_i &= P_i + \frac{\sigma}{\lVert E_{T,i} \rVert_1} E_{T,i}

    (factor 1 where the ratio is above 1000 or the denominator 0). With a ``scale`` s, :math:`E_{t+1}` is not clipped
    but reset to :math:`E_0` at known nodes, and :math:`P' = P + s\, E_T`.

    Args:
      matrix: S, [N, N]; usually ``gcn_normalize`` of the adjacency without self-loops.
      probabilities: P, of the base predictor at all nodes; rows sum to 1.
      labels: classes at the nodes of ``mask``; others are never read.
      mask: the L nodes whose labels are known.
      steps: T, 0 or more.
      alpha: in [0, 1].
      scale: s; None scales by itself.

    Returns:
      Corrected scores; they may leave [0, 1].

    Raises:
      ValueError: as for ``label_propagation``.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency, gcn_normalize
      >>> pair = gcn_normalize(adjacency([0, 1], [1, 0], 2))
      >>> labels, known = jnp.array([1, -1]), jnp.array([True, False])
      >>> correct(pair, jnp.full((2, 2), 0.5), labels, known, steps=1, scale=1.0).argmax(-1).tolist()
      [1, 1]

    Huang, He, Singh, Lim, Benson 2021 (ICLR, arXiv:2010.13993), in the form of PyTorch Geometric.
    """
    probabilities = _scores("probabilities", matrix, probabilities)
    mask, known = _known(matrix, labels, mask, probabilities.shape[1])
    at = mask[:, None]
    error = jnp.where(at, known - probabilities, 0)
    if scale is not None:
        check_number("scale", scale, low=0, open_low=True, hint="None scales by itself.")
        return probabilities + scale * _propagate(matrix, error, steps, alpha, low=-jnp.inf, high=jnp.inf, fixed=at)
    smoothed = _propagate(matrix, error, steps, alpha, low=-1.0)
    usual = jnp.sum(jnp.abs(error)) / jnp.maximum(jnp.sum(mask), 1).astype(error.dtype)
    size = jnp.sum(jnp.abs(smoothed), axis=1, keepdims=True)
    near = usual <= _FARTHEST * size
    return probabilities + jnp.where(near & (size > 0), usual / jnp.where(size > 0, size, 1), 1) * smoothed


def smooth(
    matrix: SparseMatrix,
    scores: Float[ArrayLike, "nodes classes"],
    labels: Int[ArrayLike, "nodes"],
    mask: Bool[ArrayLike, "nodes"],
    *,
    steps: int = 50,
    alpha: float = 0.8,
) -> Float[Array, "nodes classes"]:
    r"""Set the known nodes to their labels and spread all scores over the edges.

    .. math:: Z_{t+1} = \mathrm{clip}(\alpha\, S\, Z_t + (1 - \alpha)\, Z_0,\ 0,\ 1)

    with :math:`Z_0` the one-hot labels at the nodes of ``mask`` and the scores elsewhere.

    Args:
      matrix: S, [N, N].
      scores: of a base predictor, or of ``correct``.
      labels: classes at the nodes of ``mask``; others are never read.
      mask: the nodes whose labels are known.
      steps: 0 or more.
      alpha: in [0, 1].

    Returns:
      Smoothed scores.

    Raises:
      ValueError: as for ``label_propagation``.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency, gcn_normalize
      >>> pair = gcn_normalize(adjacency([0, 1], [1, 0], 2))
      >>> smooth(pair, jnp.full((2, 2), 0.5), jnp.array([1, -1]), jnp.array([True, False]), steps=1, alpha=0.5).tolist()
      [[0.25, 0.75], [0.25, 0.75]]

    Source as for ``correct``.
    """
    scores = _scores("scores", matrix, scores)
    mask, known = _known(matrix, labels, mask, scores.shape[1])
    return _propagate(matrix, jnp.where(mask[:, None], known, scores), steps, alpha)


def correct_and_smooth(
    matrix: SparseMatrix,
    probabilities: Float[ArrayLike, "nodes classes"],
    labels: Int[ArrayLike, "nodes"],
    mask: Bool[ArrayLike, "nodes"],
    *,
    correct_steps: int = 50,
    correct_alpha: float = 0.8,
    scale: float | None = None,
    smooth_steps: int = 50,
    smooth_alpha: float = 0.8,
) -> Float[Array, "nodes classes"]:
    """``smooth`` of ``correct``.

    Args:
      matrix: S, [N, N]; usually ``gcn_normalize`` of the adjacency without self-loops.
      probabilities: of the base predictor at all nodes; rows sum to 1.
      labels: classes at the nodes of ``mask``; others are never read.
      mask: the nodes whose labels are known.
      correct_steps: of ``correct``.
      correct_alpha: of ``correct``.
      scale: of ``correct``; None scales by itself.
      smooth_steps: of ``smooth``.
      smooth_alpha: of ``smooth``.

    Returns:
      Scores; the class of a node is their argmax.

    Raises:
      ValueError: as for ``label_propagation``.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency, gcn_normalize
      >>> pair = gcn_normalize(adjacency([0, 1], [1, 0], 2))
      >>> labels, known = jnp.array([1, -1]), jnp.array([True, False])
      >>> correct_and_smooth(pair, jnp.full((2, 2), 0.5), labels, known).argmax(-1).tolist()
      [1, 1]

    Source as for ``correct``.
    """
    corrected = correct(matrix, probabilities, labels, mask, steps=correct_steps, alpha=correct_alpha, scale=scale)
    return smooth(matrix, corrected, labels, mask, steps=smooth_steps, alpha=smooth_alpha)


def _propagate(
    matrix: SparseMatrix,
    start: Array,
    steps: int,
    alpha: float,
    *,
    low: float = 0.0,
    high: float = 1.0,
    fixed: Array | None = None,
) -> Array:
    check_number("steps", steps, low=0, integer=True)
    check_number("alpha", alpha, low=0, high=1)
    return _run(matrix, start, int(steps), float(alpha), low, high, fixed)


@functools.partial(jax.jit, static_argnums=2)
def _run(matrix, start, steps, alpha, low, high, fixed):
    def step(_, y):
        y = jnp.clip(alpha * spmm(matrix, y) + (1 - alpha) * start, low, high)
        return y if fixed is None else jnp.where(fixed, start, y)

    return jax.lax.fori_loop(0, steps, step, start)


def _known(matrix: SparseMatrix, labels: ArrayLike, mask: ArrayLike, classes: int) -> tuple[Array, Array]:
    """The mask, and one-hot labels inside it; zero rows outside."""
    nodes = check_matrix("matrix", matrix, square=True).shape[0]
    labels, mask = jnp.asarray(labels), jnp.asarray(mask)
    if labels.shape != (nodes,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels is {labels.dtype}{list(labels.shape)}; one integer for each of {nodes} nodes is needed."
        )
    if mask.shape != (nodes,) or mask.dtype != bool:
        raise ValueError(
            f"mask is {mask.dtype}{list(mask.shape)}; it must be bool [{nodes}]. From node numbers: "
            "np.isin(np.arange(nodes), numbers)."
        )
    if not any(isinstance(part, jax.core.Tracer) for part in (labels, mask)):
        _check_known(np.asarray(labels), np.asarray(mask), classes)
    return mask, jax.nn.one_hot(jnp.where(mask, labels, -1), classes, dtype=jnp.float32)


def _check_known(labels: np.ndarray, mask: np.ndarray, classes: int) -> None:
    if not mask.any():
        raise ValueError(
            "mask is False at every node: there is no label to spread. Mark the nodes whose label is known."
        )
    bad = np.flatnonzero(mask & ((labels < 0) | (labels >= classes)))
    if len(bad):
        raise ValueError(
            f"labels[{bad[0]}]={labels[bad[0]]} at a node of mask, and {len(bad) - 1} more, lie outside "
            f"[0, {classes - 1}]. Leave nodes without a class out of the mask."
        )


def _scores(argument: str, matrix: SparseMatrix, scores: ArrayLike) -> Array:
    check_matrix("matrix", matrix, square=True)
    scores = wide(scores)
    if scores.ndim != 2 or scores.shape[0] != matrix.shape[0] or scores.shape[1] < 2:
        raise ValueError(f"{argument} has shape {scores.shape}; [{matrix.shape[0]}, classes] is needed.")
    return scores
