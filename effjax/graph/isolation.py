"""Error node isolation: nodes that are probably wrong receive messages and send none (part of GEENI).

A reconstruction of Nagarajan, Raghunathan (DAC 2022) from its abstracts. What counts is the compacted matrix of
``isolate``; ``isolated_values`` on the unchanged pattern computes the same and saves nothing.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from effjax.core.errors import check_choice, check_number
from effjax.core.shapes import smallest_fit
from effjax.graph.sparse.matrix import SparseMatrix, SparsePattern, compact, row_sums, take_columns, take_rows
from effjax.graph.stages import nnz_ladder

__all__ = [
    "affected_nodes",
    "agreeing_edges",
    "alike_edges",
    "edge_jaccard",
    "isolate",
    "isolate_to_ladder",
    "isolated_values",
    "random_edges",
    "strongest_edges",
    "top_entries",
]

Mode = Literal["none", "full", "rowscale"]
MODES = ("none", "full", "rowscale")


def isolated_values(
    matrix: SparseMatrix,
    send: Bool[Array, "nodes"] | Float[Array, "nodes"],
    *,
    mode: Mode = "full",
    weights: Float[Array, "entries"] | None = None,
) -> Float[Array, "entries"]:
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
      send: s, [N].
      mode: see above.
      weights: A, the values before normalisation, shaped as ``matrix.values``; ones when None.

    Returns:
      Values shaped as ``matrix.values``.

    Raises:
      ValueError: an unknown mode, or a ``send`` that is not [N].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> pair = gcn_adjacency([0, 1], [1, 0], 2)
      >>> isolated_values(pair, jnp.array([True, False]), mode="none").round(2).tolist()
      [0.5, 0.0, 0.5, 0.5]
    """
    check_choice("mode", mode, MODES)
    pattern, values = matrix.pattern, matrix.values
    if jnp.shape(send) != (matrix.shape[1],):
        raise ValueError(f"send has shape {jnp.shape(send)}, but the matrix {matrix.shape} needs [{matrix.shape[1]}].")
    if values.ndim == 2:
        one = lambda values, weights: isolated_values(SparseMatrix(pattern, values), send, mode=mode, weights=weights)
        return jax.vmap(one, in_axes=(0, None if weights is None else 0))(values, weights)
    send = jnp.asarray(send).astype(values.dtype)
    factor = jnp.where(pattern.rows == pattern.columns, 1, take_columns(pattern, send))
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
    errors: Bool[np.ndarray, "nodes"],
    *,
    mode: Mode = "full",
    weights: Float[Array, "entries"] | None = None,
    capacity: int | None = None,
) -> SparseMatrix:
    """The matrix without the messages of the error nodes, its entries compacted. Runs on the host.

    Error nodes keep their rows, so they still receive and get a prediction, and their diagonal entries. Without error
    nodes the result equals the matrix bit for bit; in mode ``'none'`` a row that loses nothing does.

    Args:
      matrix: S, normalised, with self-loops; values [nnz].
      errors: bool [N], such as of ``error_set``.
      mode: of ``isolated_values``.
      weights: likewise.
      capacity: entries of the result, the rest padded: a rung of ``nnz_ladder`` bounds the number of programs.

    Returns:
      A ``SparseMatrix`` with ``nnz - (messages of the error nodes)`` entries.

    Raises:
      ValueError: ``errors`` is no mask of the nodes, an unknown mode, or more entries than ``capacity``.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> path = gcn_adjacency([0, 1, 1, 2], [1, 0, 2, 1], 3)
      >>> path.nnz, isolate(path, np.array([False, True, False])).nnz
      (7, 5)
    """
    errors = np.asarray(errors)
    if errors.shape != (matrix.shape[1],) or errors.dtype != bool:
        raise ValueError(f"errors is {errors.dtype}{list(errors.shape)}; bool [{matrix.shape[1]}] is needed.")
    values = isolated_values(matrix, ~errors, mode=mode, weights=weights)
    return compact(matrix._replace(values=values), sent_entries(matrix.pattern, errors), capacity=capacity)


def isolate_to_ladder(
    matrix: SparseMatrix,
    send: Float[Array, "nodes"],
    *,
    mode: Mode = "full",
    weights: Float[Array, "entries"] | None = None,
) -> SparseMatrix:
    """``isolated_values`` without the entries that are zero for every member, padded to one of a few sizes.

    Where ``isolate`` takes error nodes and one graph, this takes any numbers in [0, 1] and one graph per member. Runs
    on the host.

    Args:
      matrix: S, normalised, with self-loops; values [nnz], or [K, nnz].
      send: s, [N]; 0 silences a node, 1 lets it send.
      mode: of ``isolated_values``.
      weights: A before normalisation, shaped as ``matrix.values``; ones when None.

    Returns:
      A ``SparseMatrix``; its sizes are powers of 0.9 times the entries of ``matrix``, so few programs are compiled.

    Raises:
      ValueError: an unknown mode, or a ``send`` that is not [N].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> path = gcn_adjacency([0, 1, 1, 2], [1, 0, 2, 1], 3)
      >>> isolate_to_ladder(path, jnp.array([1.0, 0.0, 1.0])).pattern.size.item()
      5
    """
    isolated = np.asarray(isolated_values(matrix, send, mode=mode, weights=weights))
    rows = isolated.reshape(-1, matrix.nnz)
    kept = np.any(rows != 0, axis=0)
    capacity = smallest_fit(int(kept.sum()), nnz_ladder(int(matrix.pattern.size), shrink=0.9, least=0.05))
    found = compact(matrix._replace(values=rows[0]), kept, capacity=capacity)
    if isolated.ndim == 1:
        return found
    return found._replace(values=jnp.pad(rows[:, kept], ((0, 0), (0, capacity - kept.sum()))))


def sent_entries(pattern: SparsePattern, errors: Bool[np.ndarray, "nodes"]) -> Bool[np.ndarray, "entries"]:
    """Which entries stay when these nodes send nothing: those of other senders, and the diagonal. On the host."""
    rows, columns = np.asarray(pattern.rows), np.asarray(pattern.columns)
    return (~np.asarray(errors)[columns] | (rows == columns)) & np.asarray(pattern.valid)


def affected_nodes(
    matrix: SparseMatrix, errors: Bool[np.ndarray, "nodes"], *, layers: int = 2
) -> Bool[np.ndarray, "nodes"]:
    """The nodes whose outputs isolation can change, in mode ``'none'``; all others keep theirs bit for bit.

    Args:
      matrix: S before isolation.
      errors: bool [N].
      layers: of the network that are isolated.

    Returns:
      bool [N].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> path = gcn_adjacency([0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2], 4)
      >>> affected_nodes(path, np.array([True, False, False, False])).tolist()
      [True, True, True, False]
    """
    check_number("layers", layers, low=1, integer=True)
    lost = ~sent_entries(matrix.pattern, errors) & np.asarray(matrix.pattern.valid)
    rows, columns = np.asarray(matrix.pattern.rows), np.asarray(matrix.pattern.columns)
    first = np.zeros(matrix.shape[0], bool)
    first[rows[lost]] = True
    found = first
    for _ in range(layers - 1):
        found = first | found
        found[rows[found[columns] & np.asarray(matrix.pattern.valid) & ~lost]] = True
    return found


# Edge pruning


def random_edges(key: jax.Array, pattern: SparsePattern, keep: float) -> Bool[Array, "entries"]:
    """A random subset of a graph's edges, as members see in training; both directions of an edge share their fate.

    Args:
      key: of the draw.
      pattern: symmetric, as of an undirected graph; the diagonal always stays.
      keep: probability of an edge.

    Returns:
      bool [nnz].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> random_edges(jax.random.key(0), gcn_adjacency([0, 1], [1, 0], 2).pattern, 0.0).tolist()
      [True, False, False, True]
    """
    check_number("keep", keep, low=0, high=1)
    draw = jax.random.uniform(key, (pattern.nnz,))
    # In a symmetric pattern entry e of the transpose stands where entry e does.
    first = jnp.minimum(jnp.arange(pattern.nnz), pattern.t_order)
    return pattern.valid & ((draw[first] < keep) | (pattern.rows == pattern.columns))


def strongest_edges(matrix: SparseMatrix, fraction: float) -> Bool[np.ndarray, "entries"]:
    """Which entries stay when a fraction of the edges, those of smallest value, goes; for ``compact``. On the host.

    Args:
      matrix: S; the diagonal always stays.
      fraction: of the entries off the diagonal, in [0, 1]; of equal values the first go.

    Returns:
      bool [nnz].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> path = gcn_adjacency([0, 1, 1, 2], [1, 0, 2, 1], 3)
      >>> strongest_edges(path, 0.5).tolist()
      [True, False, False, True, True, True, True]
    """
    check_number("fraction", fraction, low=0, high=1)
    rows, columns = np.asarray(matrix.pattern.rows), np.asarray(matrix.pattern.columns)
    valid = np.asarray(matrix.pattern.valid)
    edges = np.flatnonzero(valid & (rows != columns))
    order = np.argsort(np.asarray(matrix.values)[edges], kind="stable")
    keep = valid.copy()
    keep[edges[order[: int(fraction * len(edges))]]] = False
    return keep


def agreeing_edges(
    pattern: SparsePattern, probabilities: Float[Array, "nodes classes"], *, confidence: float = 0.9
) -> Bool[Array, "entries"]:
    """Which entries stay when edges between nodes of surely different classes go; for ``compact``.

    Args:
      pattern: of S; the diagonal always stays.
      probabilities: of the ensemble.
      confidence: both ends must reach it, and differ in their class, for the edge to go.

    Returns:
      bool [nnz].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> pair = gcn_adjacency([0, 1], [1, 0], 2)
      >>> agreeing_edges(pair.pattern, jnp.array([[0.95, 0.05], [0.05, 0.95]])).tolist()
      [True, False, False, True]
    """
    check_number("confidence", confidence, low=0, high=1)
    label, sure = jnp.argmax(probabilities, axis=1), jnp.max(probabilities, axis=1) >= confidence
    differ = take_rows(pattern, label) != take_columns(pattern, label)
    return pattern.valid & ~(differ & take_rows(pattern, sure) & take_columns(pattern, sure))


def edge_jaccard(pattern: SparsePattern, support: Bool[np.ndarray, "nodes features"]) -> Float[np.ndarray, "entries"]:
    r"""Similarity of the features of the two ends of every entry, :math:`|X_i \cap X_j| / |X_i \cup X_j|`. On the host.

    Poisoned edges join unlike nodes, so members that do not see edges below a small threshold err elsewhere.

    Args:
      pattern: of a matrix [N, N].
      support: where the features are not zero.

    Returns:
      float32 [nnz]; 1 on the diagonal, 0 where both ends are without features.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> pair = gcn_adjacency([0, 1], [1, 0], 2)
      >>> edge_jaccard(pair.pattern, np.array([[True, True], [True, False]])).tolist()
      [1.0, 0.5, 0.5, 1.0]

    Wu et al. 2019 (IJCAI, arXiv:1903.01610).
    """
    support = np.asarray(support)
    if support.dtype != bool or support.shape[:1] != pattern.shape[:1]:
        raise ValueError(f"support is {support.dtype}{list(support.shape)}; bool [{pattern.shape[0]}, F] is needed.")
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
    """Which entries stay when edges between nodes of unlike features go (``edge_jaccard``). On the host.

    Args:
      features: X.
      pattern: of a matrix [N, N].
      threshold: least similarity of the two ends of an edge, in [0, 1].

    Returns:
      bool [nnz].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> path = gcn_adjacency([0, 1, 1, 2], [1, 0, 2, 1], 3)
      >>> alike_edges(jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), path.pattern).tolist()
      [True, True, True, True, False, False, True]
    """
    check_number("threshold", threshold, low=0, high=1)
    features = features.todense() if isinstance(features, SparseMatrix) else features
    return jnp.asarray(edge_jaccard(pattern, np.asarray(features) != 0) >= threshold)


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
