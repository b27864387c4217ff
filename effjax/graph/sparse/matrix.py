"""Sparse matrices whose structure knows its transpose, so that products are fast in both directions."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from effjax.core.errors import check_number
from effjax.graph.sparse.buckets import BucketTable, bucket_table
from effjax.graph.sparse.checks import check_array

__all__ = [
    "SparseMatrix",
    "SparsePattern",
    "select_entries",
    "sparse_matrix",
]

# What a call on the host runs is one program; inside another program it leaves no trace.
one_program = functools.partial(jax.jit, inline=True)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("indptr", "columns", "rows", "t_indptr", "t_rows", "t_order", "size", "buckets"),
    meta_fields=("shape",),
)
@dataclasses.dataclass(frozen=True)
class SparsePattern:
    """Where the entries of a matrix [R, C] stand, by row and, for the transpose, by column.

    Attributes:
      indptr: int32 [R + 1], start of every row.
      columns: int32 [nnz], of every entry; entries are sorted by row, then column.
      rows: int32 [nnz].
      t_indptr: int32 [C + 1], start of every column in the transposed order.
      t_rows: int32 [nnz], rows of the entries in that order.
      t_order: int32 [nnz], the entries in that order: ``values[t_order]`` are the transpose's.
      size: int32 scalar, the entries that are real; those after it are padding at (R - 1, C - 1).
      buckets: tables of the kernel ``'buckets'``, for the matrix and its transpose; None without.
      shape: (R, C), static.
    """

    indptr: jax.Array | np.ndarray
    columns: jax.Array | np.ndarray
    rows: jax.Array | np.ndarray
    t_indptr: jax.Array | np.ndarray
    t_rows: jax.Array | np.ndarray
    t_order: jax.Array | np.ndarray
    size: jax.Array | np.ndarray
    buckets: tuple[BucketTable, BucketTable] | None
    shape: tuple[int, int]

    @property
    def nnz(self) -> int:
        """Entries, padding included."""
        return self.columns.shape[-1]

    @property
    def valid(self) -> jax.Array:
        """bool [nnz], False for padding."""
        return _valid(self.nnz, self.size)

    @property
    def transpose(self) -> "SparsePattern":
        """The pattern of the transpose, whose values are ``values[t_order]``."""
        rows, inverse = _transposed(self.columns, self.t_order)
        return SparsePattern(
            indptr=self.t_indptr,
            columns=self.t_rows,
            rows=rows,
            t_indptr=self.indptr,
            t_rows=self.columns,
            t_order=inverse,
            size=self.size,
            buckets=None if self.buckets is None else self.buckets[::-1],
            shape=self.shape[::-1],
        )


@functools.partial(one_program, static_argnums=0)
def _valid(nnz: int, size: jax.Array) -> jax.Array:
    return jnp.arange(nnz, dtype=jnp.int32) < size


@one_program
def _transposed(columns: jax.Array, t_order: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = jnp.zeros_like(t_order).at[t_order].set(jnp.arange(t_order.shape[0], dtype=jnp.int32))
    return columns[t_order], inverse


@one_program
def _entries_at(values: jax.Array, places: jax.Array) -> jax.Array:
    return values[places]


@functools.partial(one_program, static_argnums=0)
def _to_dense(shape: tuple[int, int], rows: jax.Array, columns: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.zeros(shape, values.dtype).at[rows, columns].add(values)


class SparseMatrix(NamedTuple):
    """A pattern and the values of its entries; ``matrix @ x`` is ``spmm(matrix, x)``.

    Attributes:
      pattern: where the entries stand.
      values: numbers [nnz]; they may be traced and differentiated.
    """

    pattern: SparsePattern
    values: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        return self.pattern.shape

    @property
    def nnz(self) -> int:
        """Entries, padding included."""
        return self.pattern.nnz

    @property
    def transpose(self) -> "SparseMatrix":
        """The transposed matrix."""
        return SparseMatrix(self.pattern.transpose, _entries_at(self.values, self.pattern.t_order))

    def __matmul__(self, x: ArrayLike) -> jax.Array:
        from effjax.graph.sparse.products import spmm  # which needs the matrices

        return spmm(self, x)

    def todense(self) -> jax.Array:
        """The matrix as an array [R, C]."""
        return _to_dense(self.pattern.shape, self.pattern.rows, self.pattern.columns, self.values)


def check_matrix(argument: str, matrix: Any, *, square: bool = False, stacked: bool = False) -> SparseMatrix:
    """Return ``matrix`` if it is a ``SparseMatrix`` with a value for every entry; else raise. Nothing is computed.

    Args:
      argument: the argument's name, for the message.
      matrix: what was given.
      square: whether it must be [N, N], as a graph's.
      stacked: whether values [K, nnz], of K graphs with one pattern, are legal too.

    Raises:
      TypeError: another kind of matrix, with the way to convert it.
      ValueError: values of another length, or a matrix that is not square.
    """
    if not isinstance(matrix, SparseMatrix):
        shape, kind = getattr(matrix, "shape", None), f"{type(matrix).__module__}.{type(matrix).__name__}"
        if hasattr(matrix, "tocoo"):
            way = "found = a.tocoo(); effjax.graph.sparse_matrix(found.row, found.col, found.data, found.shape)"
        elif hasattr(matrix, "indices") and hasattr(matrix, "data"):
            way = "effjax.graph.sparse_matrix(*a.indices.T, a.data, a.shape)"
        else:
            way = "rows, columns = np.nonzero(a); effjax.graph.sparse_matrix(rows, columns, a[rows, columns], a.shape)"
        raise TypeError(
            f"{argument} is a {kind}{'' if shape is None else f' of shape {tuple(shape)}'}; a SparseMatrix is needed. "
            f"From edges: effjax.graph.adjacency(senders, receivers, nodes). From a matrix a: {way}."
        )
    axes, nnz = np.shape(matrix.values), matrix.pattern.nnz
    if axes[-1:] != (nnz,) or len(axes) > 1 + stacked:
        raise ValueError(
            f"{argument}.values has shape {axes}, but the pattern has {nnz} entries (self-loops and padding count). "
            f"Give numbers [{nnz}]{f' or [K, {nnz}]' if stacked else ''}, in the order of the pattern."
        )
    if square and matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{argument} has shape {matrix.shape}, but a graph's has a row and a column for every node.")
    return matrix


def check_entries(argument: str, pattern: SparsePattern, entries: Any, kind: str = "numbers") -> jax.Array:
    """Return ``entries`` [nnz, ...] if there is one for every entry of the pattern; else raise ``ValueError``."""
    hint = "One for every entry of the pattern, self-loops and padding included."
    return jnp.asarray(check_array(argument, entries, (pattern.nnz, ...), kind, hint))


# Building, on the host


def sparse_matrix(
    rows: ArrayLike,
    columns: ArrayLike,
    values: ArrayLike | None,
    shape: tuple[int, int],
    *,
    capacity: int | None = None,
    buckets: bool = False,
) -> SparseMatrix:
    """A matrix from its entries, in any order. Runs on the host.

    Args:
      rows: integers [nnz] in [0, R).
      columns: integers [nnz] in [0, C).
      values: numbers [nnz]; None for ones (float32).
      shape: (R, C).
      capacity: entries of the result; the rest is padded with zeros at (R - 1, C - 1), which change no
        product and no gradient, so that matrices of several sizes run one program. None for nnz.
      buckets: also build the tables of the kernel ``'buckets'``.

    Returns:
      A ``SparseMatrix`` sorted by row, then column.

    Raises:
      ValueError: lengths that differ, an entry outside the shape, two at one place, or more than ``capacity``.

    Example:
      >>> matrix = sparse_matrix([1, 0, 1], [0, 1, 1], [2.0, 3.0, 4.0], (2, 2))
      >>> matrix @ jnp.eye(2)
      Array([[0., 3.],
             [2., 4.]], dtype=float32)
    """
    rows, columns = _indices("rows", rows, shape[0]), _indices("columns", columns, shape[1])
    values = np.ones(len(rows), np.float32) if values is None else np.asarray(values)
    if not rows.shape == columns.shape == values.shape:
        raise ValueError(
            f"rows, columns and values have the shapes {rows.shape}, {columns.shape} and {values.shape}. Give one "
            "number of each for every entry."
        )
    if not jnp.issubdtype(values.dtype, jnp.number) and values.dtype != bool:
        raise ValueError(f"values are {values.dtype}; numbers are needed.")
    if values.dtype.kind in "iu" and not np.array_equal(np.asarray(jnp.asarray(values)), values):
        raise ValueError(
            f"values of {values.dtype} do not fit into {jnp.asarray(values).dtype}. Give floating numbers."
        )
    order = np.lexsort((columns, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    twice = np.flatnonzero((np.diff(rows) == 0) & (np.diff(columns) == 0))
    if len(twice):
        raise ValueError(
            f"{len(twice)} entries stand twice, the first at row {rows[twice[0]]}, column {columns[twice[0]]}. "
            "Add up or drop duplicates first."
        )
    nnz = len(rows)
    capacity = nnz if capacity is None else check_number("capacity", capacity, low=1, integer=True)
    if nnz > capacity:
        raise ValueError(f"capacity={capacity} is less than the {nnz} entries. Give at least as many.")
    if capacity > nnz:
        check_number("shape", min(shape), low=1, hint="Padding needs a row and a column.")
        pad = (0, capacity - nnz)
        rows = np.pad(rows, pad, constant_values=shape[0] - 1)
        columns = np.pad(columns, pad, constant_values=shape[1] - 1)
        values = np.pad(values, pad)
    return SparseMatrix(_pattern(rows, columns, nnz, shape, buckets), jax.device_put(values))


def _indices(argument: str, numbers: ArrayLike, bound: int) -> np.ndarray:
    numbers = np.asarray(numbers)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise ValueError(f"{argument} has shape {numbers.shape} and dtype {numbers.dtype}; integers [nnz] are needed.")
    outside = (numbers < 0) | (numbers >= bound)
    if outside.any():
        raise ValueError(
            f"{argument} holds {numbers[outside][0]} and {outside.sum() - 1} more numbers outside 0..{bound - 1}. "
            "Enlarge the shape, or drop these entries."
        )
    return numbers.astype(np.int32)


def _pattern(rows: np.ndarray, columns: np.ndarray, size: int, shape: tuple[int, int], buckets: bool) -> SparsePattern:
    """The pattern of sorted entries."""
    t_order = np.lexsort((rows, columns)).astype(np.int32)
    starts = lambda numbers, bound: np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=bound))])
    indptr, t_indptr = starts(rows, shape[0]).astype(np.int32), starts(columns, shape[1]).astype(np.int32)
    tables = None
    if buckets:
        tables = (bucket_table(indptr, columns), bucket_table(t_indptr, rows[t_order]))
    return SparsePattern(
        indptr=jax.device_put(indptr),
        columns=jax.device_put(columns),
        rows=jax.device_put(rows),
        t_indptr=jax.device_put(t_indptr),
        t_rows=jax.device_put(rows[t_order]),
        t_order=jax.device_put(t_order),
        size=jax.device_put(np.int32(size)),
        buckets=tables,
        shape=(int(shape[0]), int(shape[1])),
    )


def select_entries(matrix: SparseMatrix, keep: np.ndarray, *, capacity: int | None = None) -> SparseMatrix:
    """The matrix without the entries that are not kept; products shrink with it. Runs on the host.

    Args:
      matrix: [R, C]; its padding goes in any case.
      keep: bool [nnz].
      capacity: as for ``sparse_matrix``.

    Returns:
      A ``SparseMatrix`` of the kept entries, their values unchanged.

    Raises:
      ValueError: ``keep`` is no mask of the entries, or more are kept than ``capacity``.

    Example:
      >>> matrix = sparse_matrix([0, 0, 1], [0, 1, 1], [1.0, 2.0, 3.0], (2, 2))
      >>> select_entries(matrix, np.array([True, False, True])).nnz
      2
    """
    pattern = check_matrix("matrix", matrix).pattern
    keep = np.asarray(check_array("keep", keep, (matrix.nnz,), "bool"))
    keep = keep & (np.arange(matrix.nnz) < int(pattern.size))
    rows, columns, values = (np.asarray(part)[keep] for part in (pattern.rows, pattern.columns, matrix.values))
    return sparse_matrix(rows, columns, values, matrix.shape, capacity=capacity, buckets=pattern.buckets is not None)
