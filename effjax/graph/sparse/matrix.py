"""Sparse matrices whose products are fast in both directions: the one primitive of message passing.

On CPUs XLA's scatter is many times slower than its CSR kernel once a graph leaves the cache, and the kernel
is lost in derivatives and under ``vmap``. Here it stays: the derivative of a product is the product with the
transposed pattern, and a batch of right sides becomes more columns.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse as jax_sparse
from numpy.typing import ArrayLike

from effjax.core.errors import check_choice, check_number
from effjax.core.timing import fastest
from effjax.core.tree import wide_dtype
from effjax.graph.sparse.buckets import BucketTable, bucket_product, bucket_table
from effjax.graph.sparse.checks import check_array

__all__ = [
    "SparseMatrix",
    "SparsePattern",
    "column_sums",
    "fastest_spmm",
    "row_sums",
    "select_entries",
    "sparse_matrix",
    "spmm",
    "take_columns",
    "take_rows",
]

Kernel = Literal["auto", "csr", "segment", "buckets", "dense"]
KERNELS: tuple[Kernel, ...] = ("csr", "segment", "buckets", "dense")
_UNROLLED = 16
# What a call on the host runs is one program; inside another program it leaves no trace.
_one_program = functools.partial(jax.jit, inline=True)


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


@functools.partial(_one_program, static_argnums=0)
def _valid(nnz: int, size: jax.Array) -> jax.Array:
    return jnp.arange(nnz, dtype=jnp.int32) < size


@_one_program
def _transposed(columns: jax.Array, t_order: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = jnp.zeros_like(t_order).at[t_order].set(jnp.arange(t_order.shape[0], dtype=jnp.int32))
    return columns[t_order], inverse


@_one_program
def _entries_at(values: jax.Array, places: jax.Array) -> jax.Array:
    return values[places]


@functools.partial(_one_program, static_argnums=0)
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


# Products


def spmm(matrix: SparseMatrix, x: ArrayLike, *, kernel: Kernel = "auto") -> jax.Array:
    r"""Product of a sparse matrix with columns.

    .. math:: Y_{r\cdot} = \sum_{e:\, row(e) = r} v_e\, X_{column(e)\cdot}

    The gradients are products again: :math:`\bar X = A^\top \bar Y` over the transposed pattern, and
    :math:`\bar v_e = \langle \bar Y_{row(e)}, X_{column(e)}\rangle`, computed only if asked for.

    Args:
      matrix: [R, C]; structure and values may be traced.
      x: [C] or [C, ...]; integers count as float32. Products of less than 32 bits are summed in float32.
      kernel: ``'csr'``, XLA's CSR kernel (native on CPU); ``'segment'``, gathers and sorted segment sums;
        ``'buckets'``, rows in buckets of padded length, no scatter (the matrix must have been built with
        ``buckets=True``); ``'dense'``, for small graphs on matrix units. ``'auto'``: ``'csr'`` on CPU,
        else ``'segment'``; ``fastest_spmm`` measures.

    Returns:
      [R, ...] of the dtype of ``x``, floating.

    Raises:
      TypeError: ``matrix`` is of another kind.
      ValueError: ``x`` has not C rows, or a kernel that the matrix or the library lacks.

    Example:
      >>> matrix = sparse_matrix([0, 1, 1], [1, 0, 1], [1.0, 2.0, 3.0], (2, 2))
      >>> spmm(matrix, jnp.array([1.0, 10.0]))
      Array([10., 32.], dtype=float32)
    """
    x = jnp.asarray(x)
    check_matrix("matrix", matrix)
    if x.ndim == 0 or x.shape[0] != matrix.shape[1]:
        raise ValueError(f"x has shape {x.shape}, but the matrix {matrix.shape} needs {matrix.shape[1]} rows.")
    x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
    return _product(_resolve(kernel, matrix.pattern), matrix, x)


@functools.partial(_one_program, static_argnums=0)
def _product(kernel: Kernel, matrix: SparseMatrix, x: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(wide_dtype(x.dtype), wide_dtype(matrix.values.dtype))
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:])).astype(dtype)
    product = _spmm(kernel, matrix.pattern, matrix.values.astype(dtype), flat)
    return product.reshape(matrix.shape[0], *x.shape[1:]).astype(x.dtype)


def matmul(x: SparseMatrix | jax.Array, kernel: jax.Array) -> jax.Array:
    """``x @ kernel``, whether the rows of ``x`` are kept sparse or not.

    Example:
      >>> matmul(sparse_matrix([0], [1], [2.0], (1, 2)), jnp.ones((2, 1)))
      Array([[2.]], dtype=float32)
    """
    return spmm(x, kernel) if isinstance(x, SparseMatrix) else x @ kernel


def fastest_spmm(matrix: SparseMatrix, width: int) -> Kernel:
    """The fastest kernel of a product with ``width`` columns and its gradient, measured on the default device.

    Args:
      matrix: the kernels ``'buckets'`` and ``'dense'`` take part if it was built with buckets, and if it
        is small enough to be dense (2**26 numbers).
      width: columns of the right side.

    Returns:
      The name of a kernel.

    Example:
      >>> fastest_spmm(sparse_matrix([0, 1], [1, 0], None, (2, 2)), 4) in KERNELS
      True
    """
    check_matrix("matrix", matrix)
    check_number("width", width, low=1, integer=True)
    legal: list[Kernel] = ["csr", "segment"]
    if matrix.pattern.buckets is not None:
        legal.append("buckets")
    if math.prod(matrix.shape) <= 2**26:
        legal.append("dense")

    def both_ways(kernel: Kernel, matrix: SparseMatrix, x: jax.Array) -> tuple[jax.Array]:
        product, pull = jax.vjp(lambda x: spmm(matrix, x, kernel=kernel), x)
        return pull(product)

    x = jnp.ones((matrix.shape[1], width), matrix.values.dtype)
    compiled = {kernel: jax.jit(functools.partial(both_ways, kernel)).lower(matrix, x).compile() for kernel in legal}
    return fastest({kernel: functools.partial(program, matrix, x) for kernel, program in compiled.items()})


def _resolve(kernel: Kernel, pattern: SparsePattern) -> Kernel:
    if kernel == "auto":
        return "csr" if jax.default_backend() == "cpu" else "segment"
    check_choice("kernel", kernel, ("auto", *KERNELS))
    if kernel == "buckets":
        _tables(pattern)
    return kernel


def _tables(pattern: SparsePattern) -> tuple[BucketTable, BucketTable]:
    if pattern.buckets is None:
        raise ValueError("kernel='buckets' needs tables. Build the matrix with sparse_matrix(..., buckets=True).")
    return pattern.buckets


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spmm(kernel: str, pattern: SparsePattern, values: jax.Array, x: jax.Array) -> jax.Array:
    return _batched(kernel)(pattern, values, x)


def _spmm_forward(kernel, pattern, values, x):
    return _spmm(kernel, pattern, values, x), (pattern, values, x)


def _spmm_backward(kernel, residuals, g):
    pattern, values, x = residuals
    to_values = jnp.sum(take_rows(pattern, g) * take_columns(pattern, x), axis=1)
    return None, to_values, _spmm(kernel, pattern.transpose, values[pattern.t_order], g)


_spmm.defvjp(_spmm_forward, _spmm_backward)


# Messages: rows and columns of the entries, and sums back. Each is the other's derivative.


def take_rows(pattern: SparsePattern, x: jax.Array) -> jax.Array:
    """``x[row]`` for every entry: [R, ...] -> [nnz, ...]; its gradient is ``row_sums``.

    Raises:
      ValueError: ``x`` has not R rows.
    """
    return _taken(_take_rows, pattern, jnp.asarray(check_array("x", x, (pattern.shape[0], ...))))


def take_columns(pattern: SparsePattern, x: jax.Array) -> jax.Array:
    """``x[column]`` for every entry: [C, ...] -> [nnz, ...]; its gradient is ``column_sums``.

    Raises:
      ValueError: ``x`` has not C rows.
    """
    return _taken(_take_columns, pattern, jnp.asarray(check_array("x", x, (pattern.shape[1], ...))))


def row_sums(pattern: SparsePattern, entries: jax.Array) -> jax.Array:
    """Sums over the entries of every row, [nnz, ...] -> [R, ...], by the CSR kernel on CPU.

    Padding counts as part of the last row: make it zero (``pattern.valid``). Sums of integers are exact.

    Raises:
      ValueError: ``entries`` holds more or less than one for every entry of the pattern.

    Example:
      >>> matrix = sparse_matrix([0, 1, 1], [1, 0, 1], [1.0, 2.0, 3.0], (2, 2))
      >>> row_sums(matrix.pattern, matrix.values)
      Array([1., 5.], dtype=float32)
    """
    entries = check_entries("entries", pattern, entries)
    if not jnp.issubdtype(entries.dtype, jnp.inexact):
        return _exact_sums(entries, pattern.rows, pattern.shape[0])
    return _flat(_row_sums, pattern, entries)


def column_sums(pattern: SparsePattern, entries: jax.Array) -> jax.Array:
    """Sums over the entries of every column, [nnz, ...] -> [C, ...]; as ``row_sums``."""
    entries = check_entries("entries", pattern, entries)
    if not jnp.issubdtype(entries.dtype, jnp.inexact):
        return _exact_sums(entries, pattern.columns, pattern.shape[1])
    return _flat(_column_sums, pattern, entries)


@functools.partial(_one_program, static_argnums=2)
def _exact_sums(entries: jax.Array, rows: jax.Array | np.ndarray, count: int) -> jax.Array:
    entries = entries.astype(jnp.int32) if entries.dtype == bool else entries
    return jax.ops.segment_sum(entries, rows, count)


@functools.partial(_one_program, static_argnums=0)
def _flat(sums, pattern: SparsePattern, entries: jax.Array) -> jax.Array:
    dtype = wide_dtype(entries.dtype)
    flat = entries.reshape(entries.shape[0], math.prod(entries.shape[1:])).astype(dtype)
    found = sums(pattern, flat)
    return found.reshape(found.shape[0], *entries.shape[1:]).astype(entries.dtype)


@functools.partial(_one_program, static_argnums=0)
def _taken(take: Callable, pattern: SparsePattern, x: jax.Array) -> jax.Array:
    return take(pattern, x)


@jax.custom_vjp
def _take_rows(pattern: SparsePattern, x: jax.Array) -> jax.Array:
    return x[pattern.rows]


@jax.custom_vjp
def _take_columns(pattern: SparsePattern, x: jax.Array) -> jax.Array:
    return x[pattern.columns]


@jax.custom_vjp
def _row_sums(pattern: SparsePattern, entries: jax.Array) -> jax.Array:
    return _summed(pattern.indptr, jnp.arange(pattern.nnz, dtype=jnp.int32), pattern.rows, entries)


@jax.custom_vjp
def _column_sums(pattern: SparsePattern, entries: jax.Array) -> jax.Array:
    return _summed(pattern.t_indptr, pattern.t_order, pattern.columns[pattern.t_order], entries)


def _summed(
    indptr: jax.Array | np.ndarray, order: jax.Array | np.ndarray, rows: jax.Array | np.ndarray, entries: jax.Array
) -> jax.Array:
    """Sums of ``entries[order]`` between ``indptr``, as the product with a matrix of ones."""
    ones = jnp.ones(order.shape, entries.dtype)
    return _batched("csr" if jax.default_backend() == "cpu" else "segment")(
        _Rows(indptr, order, rows, indptr.shape[0] - 1), ones, entries
    )


def _saved(function):
    return lambda pattern, x: (function(pattern, x), pattern)


_take_rows.defvjp(_saved(_take_rows), lambda pattern, g: (None, row_sums(pattern, g)))
_take_columns.defvjp(_saved(_take_columns), lambda pattern, g: (None, column_sums(pattern, g)))
_row_sums.defvjp(_saved(_row_sums), lambda pattern, g: (None, take_rows(pattern, g)))
_column_sums.defvjp(_saved(_column_sums), lambda pattern, g: (None, take_columns(pattern, g)))


# The kernels


@functools.partial(jax.tree_util.register_dataclass, data_fields=("indptr", "columns", "rows"), meta_fields=("height",))
@dataclasses.dataclass(frozen=True)
class _Rows:
    """A pattern without its transpose."""

    indptr: jax.Array | np.ndarray
    columns: jax.Array | np.ndarray
    rows: jax.Array | np.ndarray
    height: int

    @property
    def shape(self) -> tuple[int, None]:
        return self.height, None


def _csr(pattern: Any, values: jax.Array, x: jax.Array) -> jax.Array:
    shape = (pattern.shape[0], x.shape[0])
    if values.shape[0] == 0:  # the kernel refuses matrices without entries
        return jnp.zeros((shape[0], x.shape[1]), x.dtype)
    # Off a multiple of 8 columns the kernel takes three to five times as long.
    width = x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, -width % 8)))
    return (jax_sparse.BCSR((values, pattern.columns, pattern.indptr), shape=shape) @ x)[:, :width]


def _segment(pattern: Any, values: jax.Array, x: jax.Array) -> jax.Array:
    messages = values[:, None] * x[pattern.columns]
    return jax.ops.segment_sum(messages, pattern.rows, pattern.shape[0], indices_are_sorted=True)


def _buckets(pattern: SparsePattern, values: jax.Array, x: jax.Array) -> jax.Array:
    return bucket_product(_tables(pattern)[0], values, x)


def _dense(pattern: SparsePattern, values: jax.Array, x: jax.Array) -> jax.Array:
    return SparseMatrix(pattern, values).todense() @ x


_PRODUCTS = {"csr": _csr, "segment": _segment, "buckets": _buckets, "dense": _dense}


@functools.cache
def _batched(kernel: str):
    """A kernel whose batches become columns, or a loop where the values differ too."""
    product = jax.custom_batching.custom_vmap(_PRODUCTS[kernel])

    @product.def_vmap
    def rule(size, batched, pattern, values, x):
        if any(jax.tree.leaves(batched[0])) or batched[1]:
            return _looped(product, size, tuple(batched), (pattern, values, x)), True
        wide = jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
        found = product(pattern, values, wide)
        return jnp.moveaxis(found.reshape(found.shape[0], size, -1), 1, 0), True

    return product


def _looped(product, size: int, batched: tuple, arguments: tuple) -> jax.Array:
    """One product after another; unrolled while they are few."""

    def one(index):
        taken = jax.tree.map(lambda is_batched, leaf: leaf[index] if is_batched else leaf, batched, arguments)
        return product(*taken)

    if size <= _UNROLLED:
        return jnp.stack([one(index) for index in range(size)])
    return jax.lax.map(one, jnp.arange(size))
