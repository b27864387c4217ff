"""Products of sparse matrices, fast in both directions: the one primitive of message passing.

On CPUs XLA's scatter is many times slower than its CSR kernel once a graph leaves the cache, and the kernel
is lost in derivatives and under ``vmap``. Here it stays: the derivative of a product is the product with the
transposed pattern, and a batch of right sides becomes more columns.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse as jax_sparse
from numpy.typing import ArrayLike

from effjax.core.errors import check_choice, check_number
from effjax.core.timing import fastest
from effjax.core.tree import wide_dtype
from effjax.graph.sparse.buckets import BucketTable, bucket_product
from effjax.graph.sparse.checks import check_array
from effjax.graph.sparse.matrix import SparseMatrix, SparsePattern, check_entries, check_matrix, one_program

__all__ = ["column_sums", "fastest_spmm", "row_sums", "spmm", "take_columns", "take_rows"]

Kernel = Literal["auto", "csr", "segment", "buckets", "dense"]
KERNELS: tuple[Kernel, ...] = ("csr", "segment", "buckets", "dense")
_UNROLLED = 16


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
      >>> from effjax.graph import sparse_matrix
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


@functools.partial(one_program, static_argnums=0)
def _product(kernel: Kernel, matrix: SparseMatrix, x: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(wide_dtype(x.dtype), wide_dtype(matrix.values.dtype))
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:])).astype(dtype)
    product = _spmm(kernel, matrix.pattern, matrix.values.astype(dtype), flat)
    return product.reshape(matrix.shape[0], *x.shape[1:]).astype(x.dtype)


def matmul(x: SparseMatrix | jax.Array, kernel: jax.Array) -> jax.Array:
    """``x @ kernel``, whether the rows of ``x`` are kept sparse or not.

    Example:
      >>> from effjax.graph import sparse_matrix
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

    Raises:
      TypeError: no ``SparseMatrix``.
      ValueError: ``width`` below 1.

    Example:
      >>> from effjax.graph import sparse_matrix
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

    Args:
      pattern: of a matrix [R, C].
      x: [R, ...].

    Returns:
      [nnz, ...].

    Raises:
      ValueError: ``x`` has not R rows.
    """
    return _taken(_take_rows, pattern, jnp.asarray(check_array("x", x, (pattern.shape[0], ...))))


def take_columns(pattern: SparsePattern, x: jax.Array) -> jax.Array:
    """``x[column]`` for every entry: [C, ...] -> [nnz, ...]; its gradient is ``column_sums``.

    Args:
      pattern: of a matrix [R, C].
      x: [C, ...].

    Returns:
      [nnz, ...].

    Raises:
      ValueError: ``x`` has not C rows.
    """
    return _taken(_take_columns, pattern, jnp.asarray(check_array("x", x, (pattern.shape[1], ...))))


def row_sums(pattern: SparsePattern, entries: jax.Array) -> jax.Array:
    """Sums over the entries of every row, [nnz, ...] -> [R, ...], by the CSR kernel on CPU.

    Padding counts as part of the last row: make it zero (``pattern.valid``). Sums of integers are exact.

    Args:
      pattern: of a matrix [R, C].
      entries: [nnz, ...], in the pattern's order.

    Returns:
      [R, ...].

    Raises:
      ValueError: ``entries`` holds more or less than one for every entry of the pattern.

    Example:
      >>> from effjax.graph import sparse_matrix
      >>> matrix = sparse_matrix([0, 1, 1], [1, 0, 1], [1.0, 2.0, 3.0], (2, 2))
      >>> row_sums(matrix.pattern, matrix.values)
      Array([1., 5.], dtype=float32)
    """
    entries = check_entries("entries", pattern, entries)
    if not jnp.issubdtype(entries.dtype, jnp.inexact):
        return _exact_sums(entries, pattern.rows, pattern.shape[0])
    return _flat(_row_sums, pattern, entries)


def column_sums(pattern: SparsePattern, entries: jax.Array) -> jax.Array:
    """Sums over the entries of every column, [nnz, ...] -> [C, ...]; as ``row_sums``.

    Args:
      pattern: of a matrix [R, C].
      entries: [nnz, ...], in the pattern's order.

    Returns:
      [C, ...].

    Raises:
      ValueError: ``entries`` holds more or less than one for every entry of the pattern.
    """
    entries = check_entries("entries", pattern, entries)
    if not jnp.issubdtype(entries.dtype, jnp.inexact):
        return _exact_sums(entries, pattern.columns, pattern.shape[1])
    return _flat(_column_sums, pattern, entries)


@functools.partial(one_program, static_argnums=2)
def _exact_sums(entries: jax.Array, rows: jax.Array | np.ndarray, count: int) -> jax.Array:
    entries = entries.astype(jnp.int32) if entries.dtype == bool else entries
    return jax.ops.segment_sum(entries, rows, count)


@functools.partial(one_program, static_argnums=0)
def _flat(sums, pattern: SparsePattern, entries: jax.Array) -> jax.Array:
    dtype = wide_dtype(entries.dtype)
    flat = entries.reshape(entries.shape[0], math.prod(entries.shape[1:])).astype(dtype)
    found = sums(pattern, flat)
    return found.reshape(found.shape[0], *entries.shape[1:]).astype(entries.dtype)


@functools.partial(one_program, static_argnums=0)
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
