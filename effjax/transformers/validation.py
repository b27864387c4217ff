"""Validation sets of a search: known rows in batches of few shapes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Num

from effjax.core.errors import check_number
from effjax.core.shapes import check_ladder

__all__ = ["PruneBatch", "prune_batches"]

PyTree = Any


class PruneBatch(NamedTuple):
    """A batch of the validation set.

    Attributes:
      inputs: an array or a tree of arrays, rows leading.
      labels: [rows] or [rows, length], for the loss.
      rows: int [rows], places in the validation set; -1 for rows that fill the batch up.
    """

    inputs: Any
    labels: Any
    rows: np.ndarray


def prune_batches(
    inputs: PyTree,
    labels: Num[np.ndarray | Array, "rows *length"],
    *,
    batch_size: int = 128,
    buckets: Sequence[int] | None = None,
) -> list[PruneBatch]:
    """Cut a validation set into batches of one shape, or of one shape for each bucket of lengths.

    Rows whose integer label is unknown (-1; of sequences: whose labels all are) are left out. The last batch of a
    shape is filled up with rows that count nowhere.

    Args:
      inputs: an array or a tree of arrays, rows leading; for ``buckets`` a mapping with ``mask``, True at real tokens,
        padded on the right.
      labels: [rows], or [rows, length].
      batch_size: rows of a batch.
      buckets: lengths that rows are cut to, increasing; a batch holds rows of one bucket. None pads all alike.

    Returns:
      Batches of NumPy arrays, whose ``rows`` are 0, 1, ... over the known rows in their order.

    Raises:
      ValueError: no known row, arrays of different lengths, or buckets without a mask.

    Example:
      >>> batches = prune_batches({"x": np.arange(6.0).reshape(3, 2)}, np.array([0, -1, 1]), batch_size=4)
      >>> len(batches), batches[0].rows.tolist()
      (1, [0, 1, -1, -1])
    """
    check_number("batch_size", batch_size, low=1, integer=True)
    labels = np.asarray(labels)
    inputs = jax.tree.map(np.asarray, inputs)
    sizes = {len(leaf) if leaf.ndim else None for leaf in jax.tree.leaves(inputs)}
    if sizes != {len(labels)}:
        raise ValueError(f"inputs have {sizes} rows, but labels have {len(labels)}. Give one label for each row.")
    known = np.ones(len(labels), bool)
    if labels.dtype.kind in "iu":
        known = (labels >= 0).reshape(len(labels), -1).any(1) if len(labels) else known[:0]
    rows = np.flatnonzero(known)
    if not rows.size:
        raise ValueError(f"The validation set is empty: of {len(labels)} rows 0 have a label. Give at least one.")
    place = np.cumsum(known) - 1
    batches = []
    for length, members in _by_length(inputs, rows, buckets):
        for start in range(0, len(members), batch_size):
            own = members[start : start + batch_size]
            filled = np.concatenate([own, np.repeat(own[:1], batch_size - len(own))])
            number = np.concatenate([place[own], np.full(batch_size - len(own), -1)])
            take = lambda leaf, filled=filled, length=length: _cut(leaf[filled], length)
            batches.append(PruneBatch(jax.tree.map(take, inputs), _cut(labels[filled], length), number))
    return batches


class _Length(NamedTuple):
    whole: int
    kept: int


def _by_length(inputs: Any, rows: np.ndarray, buckets: Sequence[int] | None) -> list[tuple[_Length | None, np.ndarray]]:
    if buckets is None:
        return [(None, rows)]
    if not isinstance(inputs, Mapping) or "mask" not in inputs:
        raise ValueError("buckets need inputs with a mask, True at real tokens. Add it, or leave buckets out.")
    mask = np.asarray(inputs["mask"], bool)
    lengths = mask.sum(1)
    if (mask != (np.arange(mask.shape[1])[None] < lengths[:, None])).any():
        raise ValueError("buckets cut rows on the right, but mask is False before a real token. Leave buckets out.")
    rungs = np.array(check_ladder(buckets, int(lengths[rows].max()), argument="buckets"))
    chosen = np.searchsorted(rungs, lengths[rows])
    whole = mask.shape[1]
    found = ((_Length(whole, int(min(rung, whole))), rows[chosen == i]) for i, rung in enumerate(rungs))
    return [(length, members) for length, members in found if members.size]


def _cut(leaf: np.ndarray, length: _Length | None) -> np.ndarray:
    if length is None or leaf.ndim < 2 or leaf.shape[1] != length.whole:
        return leaf
    return leaf[:, : length.kept]
