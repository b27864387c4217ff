"""Sparse products by padded rows: rows in buckets of similar length, gathers and sums, no scatter."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class BucketTable(NamedTuple):
    """Rows of a sparse matrix in buckets whose rows are padded to one length.

    Attributes:
      entries: per bucket int32 [rows, length], numbers of the entries; -1 where there is none.
      columns: per bucket int32 [rows, length].
      position: int32 [R], where each row stands in the concatenation of the buckets.
    """

    entries: tuple[jax.Array, ...]
    columns: tuple[jax.Array, ...]
    position: jax.Array


def bucket_table(indptr: np.ndarray, columns: np.ndarray) -> BucketTable:
    """Buckets whose lengths are powers of two, so that less than half of a bucket is padding.

    Args:
      indptr: int [R + 1], row starts.
      columns: int [nnz], of the entries row by row.

    Example:
      >>> table = bucket_table(np.array([0, 1, 3]), np.array([1, 0, 1]))
      >>> [part.shape for part in table.entries]
      [(1, 1), (1, 2)]
    """
    degrees = np.diff(indptr)
    lengths = np.where(degrees > 1, 2 ** np.ceil(np.log2(np.maximum(degrees, 1))).astype(int), degrees)
    parts, position, done = [], np.zeros(len(degrees), np.int32), 0
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        at = indptr[rows][:, None] + np.arange(length)
        inside = np.arange(length) < degrees[rows][:, None]
        at = np.where(inside, at, 0)
        parts.append((np.where(inside, at, -1), np.where(inside, columns[at], 0)))
        position[rows] = done + np.arange(len(rows))
        done += len(rows)
    as_arrays = lambda which: tuple(jax.device_put(part[which].astype(np.int32)) for part in parts)
    return BucketTable(as_arrays(0), as_arrays(1), jax.device_put(position))


def bucket_product(table: BucketTable, values: jax.Array, x: jax.Array) -> jax.Array:
    """The product of the table's matrix, of the given values [nnz], with ``x`` [C, F]: [R, F]."""
    parts = []
    for entries, columns in zip(table.entries, table.columns, strict=True):
        weights = jnp.where(entries < 0, 0, values[entries]).astype(x.dtype)
        parts.append(jnp.einsum("rl,rlf->rf", weights, x[columns], precision=jax.lax.Precision.HIGHEST))
    return jnp.concatenate(parts)[table.position] if parts else jnp.zeros((0, x.shape[1]), x.dtype)


_UNROLLED = 8  # slots; longer rows are looped over, as gathering them all at once moves each message through memory


def bucket_max(table: BucketTable, edge: jax.Array, x: jax.Array) -> jax.Array:
    """Row maxima of ``x`` [C, F] over the columns of a row's entries, [R, F]; -inf where ``edge`` [nnz] has none.

    Slot by slot: on a CPU several times as fast as the scatter of a segment maximum.
    """
    parts = []
    for entries, columns in zip(table.entries, table.columns, strict=True):
        kept = (entries >= 0) & edge[entries]

        def with_slot(slot, found, kept=kept, columns=columns):
            return jnp.maximum(found, jnp.where(kept[:, slot, None], x[columns[:, slot]], -jnp.inf))

        rows, slots = entries.shape
        found = jnp.full((rows, x.shape[1]), -jnp.inf, x.dtype)
        if slots > _UNROLLED:
            found = jax.lax.fori_loop(0, slots, with_slot, found)
        else:
            for slot in range(slots):
                found = with_slot(slot, found)
        parts.append(found)
    return jnp.concatenate(parts)[table.position] if parts else jnp.zeros((0, x.shape[1]), x.dtype)
