"""Adjacency matrices of graphs: rows receive, columns send."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from effjax.core.errors import check_number
from effjax.graph.sparse.checks import check_array
from effjax.graph.sparse.matrix import SparseMatrix, SparsePattern, check_matrix, sparse_matrix
from effjax.graph.sparse.products import row_sums, take_columns, take_rows

__all__ = ["adjacency", "gcn_adjacency", "gcn_normalize", "loopless_adjacency", "row_normalize"]


def adjacency(
    senders: ArrayLike,
    receivers: ArrayLike,
    nodes: int,
    *,
    weights: ArrayLike | None = None,
    self_loops: bool = False,
    capacity: int | None = None,
    buckets: bool = False,
) -> SparseMatrix:
    """The matrix whose entry (i, j) is the edge from j to i. Runs on the host.

    Args:
      senders: integers [E].
      receivers: integers [E].
      nodes: N.
      weights: finite numbers [E]; ones when None.
      self_loops: add an edge of weight 1 to every node that has none to itself.
      capacity: entries of the result, the rest padded (``sparse_matrix``).
      buckets: as for ``sparse_matrix``.

    Returns:
      A ``SparseMatrix`` [N, N].

    Raises:
      ValueError: senders and receivers of unlike length, an edge outside 0..N-1, two between the same nodes in one
        direction, or a weight that is not finite.

    Example:
      >>> adjacency([0, 1], [1, 0], 3, self_loops=True).todense()
      Array([[1., 1., 0.],
             [1., 1., 0.],
             [0., 0., 1.]], dtype=float32)
    """
    nodes = check_number("nodes", nodes, low=0, integer=True)
    senders, receivers = (np.asarray(ends) if np.size(ends) else np.zeros(0, np.int32) for ends in (senders, receivers))
    check_array("senders", senders, (None,), "integers", "Of an edge_index [2, E] give the two rows.")
    check_array("receivers", receivers, senders.shape, "integers", "One for every sender.")
    weights = np.ones(len(senders), np.float32) if weights is None else np.asarray(weights)
    check_array("weights", weights, senders.shape, "numbers", "One for every edge.")
    weights = weights.astype(np.float32) if weights.dtype.kind in "biu" else weights  # counts
    check_weights("weights", weights, low=None, hint="Drop these edges.")
    if self_loops:
        bare = np.setdiff1d(np.arange(nodes), senders[senders == receivers])
        senders, receivers = np.concatenate([senders, bare]), np.concatenate([receivers, bare])
        weights = np.concatenate([weights, np.ones(len(bare), weights.dtype)])
    return sparse_matrix(receivers, senders, weights, (nodes, nodes), capacity=capacity, buckets=buckets)


_DEGREES = "Degrees are sums of weights and need a square root. Drop these edges."


def check_weights(argument: str, weights: ArrayLike, *, low: float | None = 0.0, hint: str = _DEGREES) -> None:
    """Raise ``ValueError`` where a weight is not finite or below ``low``; traced weights are not known yet."""
    if isinstance(weights, jax.core.Tracer):
        return
    values = np.asarray(weights)
    legal = np.isfinite(values) if low is None else np.isfinite(values) & (values >= low)
    if not legal.all():
        bad = tuple(int(place) for place in np.argwhere(~legal)[0])
        raise ValueError(
            f"{argument}: {np.sum(~legal)} of {values.size} are {'' if low is None else 'negative or '}not finite, the "
            f"first is {argument}[{', '.join(map(str, bad))}]={values[bad]:g}. {hint}"
        )


def gcn_normalize(matrix: SparseMatrix) -> SparseMatrix:
    r"""The symmetric normalisation of graph convolutions.

    .. math:: S = D^{-1/2} A\, D^{-1/2}, \qquad D_{ii} = \sum_j A_{ij}

    With the receivers' degrees on both sides, as in PyTorch Geometric; zero rows stay zero.

    Args:
      matrix: [N, N], values not negative, self-loops included where wanted; [nnz], or [K, nnz] for K graphs.

    Returns:
      A ``SparseMatrix`` of the same pattern, floating.

    Raises:
      ValueError: a matrix that is not square, or a weight that is negative or not finite (unless traced).
    """
    pattern = check_matrix("matrix", matrix, square=True, stacked=True).pattern
    check_weights("matrix.values", matrix.values)
    if not jnp.issubdtype(matrix.values.dtype, jnp.floating):
        matrix = matrix._replace(values=matrix.values.astype(jnp.float32))
    return SparseMatrix(pattern, _normalized_by_degrees(pattern, matrix.values))


@functools.partial(jax.jit, inline=True)
def _normalized_by_degrees(pattern: SparsePattern, values: jax.Array) -> jax.Array:
    if values.ndim == 2:
        return jax.vmap(functools.partial(_normalized_by_degrees, pattern))(values)
    degree = row_sums(pattern, values)
    scale = jnp.where(degree > 0, jax.lax.rsqrt(jnp.where(degree > 0, degree, 1)), 0)
    return take_rows(pattern, scale) * values * take_columns(pattern, scale)


def gcn_adjacency(
    senders: ArrayLike,
    receivers: ArrayLike,
    nodes: int,
    *,
    weights: ArrayLike | None = None,
    capacity: int | None = None,
    buckets: bool = False,
) -> SparseMatrix:
    """``gcn_normalize`` of the adjacency with self-loops; arguments as for ``adjacency``.

    Args:
      senders: [E] source nodes.
      receivers: [E] target nodes.
      nodes: N.
      weights: [E]; None for ones.
      capacity: entries to pad to, self-loops included.
      buckets: whether rows are also sorted into buckets of like length, for the kernel ``'buckets'``.

    Returns:
      A ``SparseMatrix`` [N, N].

    Raises:
      ValueError: as ``adjacency``; or a weight is negative or not finite, so that degrees have no square root.

    Example:
      >>> gcn_adjacency([0, 1], [1, 0], 2).todense().round(3)
      Array([[0.5, 0.5],
             [0.5, 0.5]], dtype=float32)
    """
    if weights is not None:
        check_weights("weights", weights)
    return gcn_normalize(
        adjacency(senders, receivers, nodes, weights=weights, self_loops=True, capacity=capacity, buckets=buckets)
    )


def row_normalize(matrix: SparseMatrix) -> SparseMatrix:
    """Rows divided by their sums, as mean aggregation and bag-of-words features have it; zero rows stay zero.

    Args:
      matrix: [R, C], entries at least 0.

    Returns:
      The same pattern with other values, floating.

    Raises:
      ValueError: numbers that are negative or not finite, whose sums are no measure of a row (unless traced).
    """
    hint = "Their sum is no measure of a row: standardise the columns instead, or leave the rows as they are."
    check_weights("matrix.values", check_matrix("matrix", matrix).values, hint=hint)
    if not jnp.issubdtype(matrix.values.dtype, jnp.floating):
        matrix = matrix._replace(values=matrix.values.astype(jnp.float32))
    return SparseMatrix(matrix.pattern, _normalized_by_rows(matrix.pattern, matrix.values))


@functools.partial(jax.jit, inline=True)
def _normalized_by_rows(pattern: SparsePattern, values: jax.Array) -> jax.Array:
    total = row_sums(pattern, values)
    scale = jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))
    return take_rows(pattern, scale) * values


def loopless_adjacency(matrix: SparseMatrix) -> SparseMatrix:
    r"""``gcn_normalize`` of the edges of a normalised adjacency, without its self-loops. Runs on the host.

    Labels are spread along it (``label_propagation``, ``correct_and_smooth``): a node's own label is no neighbour's.
    A self-loop of weight 1 became 1 / D_ii, which tells the weights:

    .. math:: A_{ij} = S_{ij} / \sqrt{S_{ii} S_{jj}}

    Args:
      matrix: [N, N], of ``gcn_adjacency``, or of ``adjacency`` with self-loops.

    Returns:
      A ``SparseMatrix`` [N, N].

    Raises:
      ValueError: a node without a self-loop, so that the weights of its edges cannot be told, or negative weights.

    Example:
      >>> loopless_adjacency(gcn_adjacency([0, 1], [1, 0], 2)).todense()
      Array([[0., 1.],
             [1., 0.]], dtype=float32)
    """
    check_weights("matrix.values", check_matrix("matrix", matrix, square=True).values)
    size = int(matrix.pattern.size)
    rows, columns = np.asarray(matrix.pattern.rows)[:size], np.asarray(matrix.pattern.columns)[:size]
    values, loops = np.asarray(matrix.values)[:size].astype(np.float64), np.zeros(matrix.shape[0])
    edges = rows != columns
    loops[rows[~edges]] = values[~edges]
    if (bare := np.flatnonzero(loops[np.union1d(rows, columns)] <= 0)).size:
        raise ValueError(
            f"matrix: {bare.size} nodes with edges have no self-loop, so that the weights of their edges cannot be "
            "told. Make it by gcn_adjacency."
        )
    rows, columns = rows[edges], columns[edges]
    weights = values[edges] / np.sqrt(loops[rows] * loops[columns])
    # Rounding of the matrix aside, an edge without a weight has exactly 1.
    weights = np.where(np.abs(weights - 1) < 1e-5, 1, weights).astype(np.float32)
    return gcn_normalize(adjacency(columns, rows, matrix.shape[0], weights=weights))
