"""Error node isolation: nodes that are probably wrong receive messages and send none (part of GEENI).

A reconstruction of Nagarajan, Raghunathan (DAC 2022) from its abstracts. What counts is the compacted matrix of
``isolate``; ``isolated_values`` on the unchanged pattern computes the same and saves nothing.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from effjax.core.errors import check_choice, check_number
from effjax.core.shapes import smallest_fit
from effjax.graph.sparse.checks import check_array
from effjax.graph.sparse.matrix import SparseMatrix, SparsePattern, check_matrix, select_entries
from effjax.graph.sparse.products import row_sums, take_columns, take_rows
from effjax.graph.stages import nnz_ladder

__all__ = ["alike_edges", "isolate", "isolated_values", "strongest_edges"]

Mode = Literal["none", "full", "rowscale"]
MODES = ("none", "full", "rowscale")


def isolated_values(
    matrix: SparseMatrix,
    active: Bool[Array | np.ndarray, "nodes"] | Float[Array | np.ndarray, "nodes"],
    *,
    mode: Mode = "full",
    weights: Float[Array, "*members entries"] | None = None,
) -> Float[Array, "*members entries"]:
    r"""Values of the matrix when node j's messages are multiplied by :math:`s_j`; its message to itself stays.

    .. math::
        \text{none:}\quad & S'_{ij} = S_{ij} s_j, \qquad S'_{ii} = S_{ii} \\
        \text{full:}\quad & S'_{ij} = S_{ij} s_j \sqrt{d_i / r_i}, \quad d_i = \sum_j A_{ij}, r_i = \sum_j A_{ij} s_j \\
        \text{rowscale:}\quad & S'_{ij} = S_{ij} s_j \frac{\sum_j S_{ij}}{\sum_j S_{ij} s_j}

    (with :math:`s_i = 1` on the diagonal). So ``'full'`` normalises by the receiver's new and the sender's old degree,
    and ``'rowscale'`` keeps the row sums. Hard isolation is s in {0, 1}; estimated probabilities of being right make it
    soft, and differentiable. Traceable; the pattern does not change.

    Args:
      matrix: S, normalised, with self-loops; values [nnz], or [K, nnz].
      active: s, [N]; True or 1 for nodes that send messages.
      mode: see above.
      weights: A, the values before normalisation, shaped as ``matrix.values``; ones when None.

    Returns:
      Values shaped as ``matrix.values``.

    Raises:
      ValueError: an unknown mode, an ``active`` that is not [N], or weights of another shape.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> pair = gcn_adjacency([0, 1], [1, 0], 2)
      >>> isolated_values(pair, jnp.array([True, False]), mode="none").round(2).tolist()
      [0.5, 0.0, 0.5, 0.5]
    """
    check_choice("mode", mode, MODES)
    pattern, values = check_matrix("matrix", matrix, square=True, stacked=True)
    active = check_array("active", active, (matrix.shape[1],), "bool or floating", "True for nodes that send messages.")
    if weights is not None:
        check_array("weights", weights, values.shape, "numbers")
    return _isolated(mode, pattern, values, active, weights)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _isolated(mode: Mode, pattern: SparsePattern, values: jax.Array, active: jax.Array, weights: jax.Array | None):
    if values.ndim == 2:
        one = lambda values, weights: _isolated(mode, pattern, values, active, weights)
        return jax.vmap(one, in_axes=(0, None if weights is None else 0))(values, weights)
    active = active.astype(values.dtype)
    factor = jnp.where(pattern.rows == pattern.columns, 1, take_columns(pattern, active))
    kept = values * factor
    if mode == "none":
        return kept
    if mode == "full":
        before = pattern.valid.astype(values.dtype) if weights is None else weights
        scale = jnp.sqrt(_ratio(row_sums(pattern, before), row_sums(pattern, before * factor)))
    else:
        scale = _ratio(row_sums(pattern, values), row_sums(pattern, kept))
    return kept * take_rows(pattern, scale)


def _ratio(over: jax.Array, under: jax.Array) -> jax.Array:
    return jnp.where(under == 0, 1, over / jnp.where(under == 0, 1, under))


def isolate(
    matrix: SparseMatrix,
    active: Bool[Array | np.ndarray, "nodes"],
    *,
    mode: Mode = "full",
    weights: Float[Array, "*members entries"] | None = None,
    capacity: int | None = None,
) -> SparseMatrix:
    """The matrix without the messages of the error nodes, its entries compacted. Runs on the host.

    Error nodes keep their rows, so they still receive and get a prediction, and their diagonal entries. Without error
    nodes the result equals the matrix bit for bit; in mode ``'none'`` a row that loses nothing does.

    Args:
      matrix: S, normalised, with self-loops; values [nnz].
      active: bool [N], True for nodes that send messages (``active_nodes``), False for error nodes.
      mode: of ``isolated_values``.
      weights: of ``isolated_values``.
      capacity: entries of the result, the rest padded: a rung of ``nnz_ladder`` bounds the number of programs.

    Returns:
      A ``SparseMatrix`` with ``nnz - (messages of the error nodes)`` entries.

    Raises:
      ValueError: ``active`` is no mask of the nodes, an unknown mode, or more entries than ``capacity``.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> path = gcn_adjacency([0, 1, 1, 2], [1, 0, 2, 1], 3)
      >>> path.nnz, isolate(path, np.array([True, False, True])).nnz
      (7, 5)
    """
    check_matrix("matrix", matrix, square=True)
    check_array("active", active, (matrix.shape[1],), "bool", "True for nodes that send messages.")
    values = isolated_values(matrix, active, mode=mode, weights=weights)
    return select_entries(matrix._replace(values=values), active_entries(matrix.pattern, active), capacity=capacity)


def isolate_to_ladder(
    matrix: SparseMatrix,
    active: Float[Array, "nodes"],
    *,
    mode: Mode = "full",
    weights: Float[Array, "*members entries"] | None = None,
) -> SparseMatrix:
    """``isolated_values`` without the entries that are zero for every member, padded to one of a few sizes.

    Where ``isolate`` takes error nodes and one graph, this takes any numbers in [0, 1] and one graph per member. Runs
    on the host.

    Args:
      matrix: S, normalised, with self-loops; values [nnz], or [K, nnz].
      active: s, [N]; 1 for nodes that send messages, 0 for those that send none.
      mode: of ``isolated_values``.
      weights: A before normalisation, shaped as ``matrix.values``; ones when None.

    Returns:
      A ``SparseMatrix``; its sizes are powers of 0.9 times the entries of ``matrix``, so few programs are compiled.

    Raises:
      ValueError: an unknown mode, or an ``active`` that is not [N].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> path = gcn_adjacency([0, 1, 1, 2], [1, 0, 2, 1], 3)
      >>> isolate_to_ladder(path, jnp.array([1.0, 0.0, 1.0])).pattern.size.item()
      5
    """
    isolated = np.asarray(isolated_values(matrix, active, mode=mode, weights=weights))
    rows = isolated.reshape(-1, matrix.nnz)
    kept = np.any(rows != 0, axis=0)
    capacity = smallest_fit(int(kept.sum()), nnz_ladder(int(matrix.pattern.size), shrink=0.9, least=0.05))
    found = select_entries(matrix._replace(values=rows[0]), kept, capacity=capacity)
    if isolated.ndim == 1:
        return found
    return found._replace(values=jax.device_put(np.pad(rows[:, kept], ((0, 0), (0, capacity - kept.sum())))))


def active_entries(pattern: SparsePattern, active: Bool[Array | np.ndarray, "nodes"]) -> Bool[np.ndarray, "entries"]:
    """Which entries stay when only these nodes send: theirs, and the diagonal. Runs on the host."""
    rows, columns = np.asarray(pattern.rows), np.asarray(pattern.columns)
    return (np.asarray(active)[columns] | (rows == columns)) & np.asarray(pattern.valid)


# Edge pruning


def random_edges(key: jax.Array, pattern: SparsePattern, keep_rate: float | jax.Array) -> Bool[Array, "entries"]:
    """A random subset of a graph's edges, as members see in training; both directions of an edge share their fate.

    Args:
      key: of the draw.
      pattern: symmetric, as of an undirected graph; the diagonal always stays.
      keep_rate: probability of an edge.

    Returns:
      bool [nnz].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> random_edges(jax.random.key(0), gcn_adjacency([0, 1], [1, 0], 2).pattern, 0.0).tolist()
      [True, False, False, True]
    """
    check_number("keep_rate", keep_rate, low=0, high=1)
    return _drawn_edges(key, pattern, keep_rate)


@functools.partial(jax.jit, inline=True)
def _drawn_edges(key: jax.Array, pattern: SparsePattern, keep_rate: float | jax.Array) -> jax.Array:
    draw = jax.random.uniform(key, (pattern.nnz,))
    # In a symmetric pattern entry e of the transpose stands where entry e does.
    first = jnp.minimum(jnp.arange(pattern.nnz), pattern.t_order)
    return pattern.valid & ((draw[first] < keep_rate) | (pattern.rows == pattern.columns))


def strongest_edges(matrix: SparseMatrix, fraction: float) -> Bool[np.ndarray, "entries"]:
    """Which entries stay when the edges of smallest value go; for ``select_entries``. Runs on the host.

    Args:
      matrix: S; the diagonal always stays.
      fraction: of the entries off the diagonal that go, in [0, 1]; of equal values the first.

    Returns:
      bool [nnz].

    Raises:
      TypeError: no ``SparseMatrix``.
      ValueError: ``fraction`` out of [0, 1].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> path = gcn_adjacency([0, 1, 1, 2], [1, 0, 2, 1], 3)
      >>> strongest_edges(path, 0.5).tolist()
      [True, False, False, True, True, True, True]
    """
    check_matrix("matrix", matrix)
    check_number("fraction", fraction, low=0, high=1)
    rows, columns = np.asarray(matrix.pattern.rows), np.asarray(matrix.pattern.columns)
    valid = np.asarray(matrix.pattern.valid)
    edges = np.flatnonzero(valid & (rows != columns))
    order = np.argsort(np.asarray(matrix.values)[edges], kind="stable")
    keep = valid.copy()
    keep[edges[order[: int(fraction * len(edges))]]] = False
    return keep


def edge_jaccard(pattern: SparsePattern, support: Bool[np.ndarray, "nodes features"]) -> Float[np.ndarray, "entries"]:
    r""":math:`|X_i \cap X_j| / |X_i \cup X_j|` for every entry; 1 on the diagonal, 0 without features. On the host.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> pair = gcn_adjacency([0, 1], [1, 0], 2)
      >>> edge_jaccard(pair.pattern, np.array([[True, True], [True, False]])).tolist()
      [1.0, 0.5, 0.5, 1.0]
    """
    rows, columns = np.asarray(pattern.rows), np.asarray(pattern.columns)
    bits, sizes = np.packbits(support, axis=1), support.sum(1)
    common = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), 1 << 14):  # the joined rows of all edges at once would be large
        part = slice(start, start + (1 << 14))
        common[part] = np.bitwise_count(bits[rows[part]] & bits[columns[part]]).sum(1)
    union = sizes[rows] + sizes[columns] - common
    return np.where(rows == columns, 1, common / np.maximum(union, 1)).astype(np.float32)


def alike_edges(
    features: SparseMatrix | Float[Array, "nodes features"], pattern: SparsePattern, *, threshold: float = 0.01
) -> Bool[Array, "entries"]:
    r"""Which entries stay when edges between nodes of unlike features go. Runs on the host.

    .. math:: |X_i \cap X_j| / |X_i \cup X_j| \ge \mathrm{threshold}

    with :math:`X_i` the features of node i that are not zero. Poisoned edges join unlike nodes, so members that do not
    see those edges err elsewhere.

    Args:
      features: X, [N, F].
      pattern: of a matrix [N, N].
      threshold: least similarity of the two ends of an edge, in [0, 1].

    Returns:
      bool [nnz].

    Raises:
      ValueError: ``threshold`` out of [0, 1], or features of other nodes.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> path = gcn_adjacency([0, 1, 1, 2], [1, 0, 2, 1], 3)
      >>> alike_edges(jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), path.pattern).tolist()
      [True, True, True, True, False, False, True]

    Wu et al. 2019 (IJCAI, arXiv:1903.01610).
    """
    check_number("threshold", threshold, low=0, high=1)
    if isinstance(features, SparseMatrix):
        check_matrix("features", features)
    if len(features.shape) != 2 or features.shape[0] != pattern.shape[0]:
        raise ValueError(f"features has shape {features.shape}; [{pattern.shape[0]}, F] is needed.")
    features = features.todense() if isinstance(features, SparseMatrix) else features
    return jax.device_put(edge_jaccard(pattern, np.asarray(features) != 0) >= threshold)


def top_entries(matrix: SparseMatrix, capacity: int) -> SparseMatrix:
    """The ``capacity`` largest entries, in the order of the matrix; traceable, so it works on masked values in ``jit``.

    Args:
      matrix: values [nnz], not negative. Zeros go first, then the smallest; of equal values the last.
      capacity: entries of the result, static.

    Returns:
      A ``SparseMatrix`` for products; what did not fill the capacity stays zero.

    Raises:
      ValueError: ``capacity`` outside [1, nnz].

    Example:
      >>> from effjax.graph.sparse.matrix import sparse_matrix
      >>> top_entries(sparse_matrix([0, 0, 1], [0, 1, 1], [3.0, 1.0, 2.0], (2, 2)), 2).todense().tolist()
      [[3.0, 0.0], [0.0, 2.0]]
    """
    check_matrix("matrix", matrix)
    check_number("capacity", capacity, low=1, high=matrix.nnz, integer=True)
    pattern = matrix.pattern
    kept = jnp.sort(jax.lax.top_k(matrix.values, capacity)[1])
    rows, columns = pattern.rows[kept], pattern.columns[kept]
    t_order = jnp.lexsort((rows, columns)).astype(jnp.int32)
    starts = lambda numbers, bound: jnp.searchsorted(numbers, jnp.arange(bound + 1)).astype(jnp.int32)
    smaller = SparsePattern(
        indptr=starts(rows, pattern.shape[0]),
        columns=columns,
        rows=rows,
        t_indptr=starts(columns[t_order], pattern.shape[1]),
        t_rows=rows[t_order],
        t_order=t_order,
        size=jnp.minimum(pattern.size, capacity),
        buckets=None,
        shape=pattern.shape,
    )
    return SparseMatrix(smaller, matrix.values[kept])
