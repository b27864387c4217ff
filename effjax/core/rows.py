"""Means over the rows of a batch that take part, and checks of what comes row by row."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from effjax.core.errors import check_shape
from effjax.core.tree import wide

Axis = str | tuple[str, ...] | None


def row_mask(mask: Any, rows: int) -> Array:
    """The mask, all rows for None.

    Raises:
      ValueError: another shape than ``[rows]``.
      TypeError: no bools.

    Example:
      >>> row_mask(None, 2).tolist()
      [True, True]
    """
    if mask is None:
        return jnp.ones(rows, bool)
    check_shape("mask", mask, (rows,), "One bool for each row.")
    if jnp.result_type(mask) != jnp.bool_:
        raise TypeError(f"mask is {jnp.result_type(mask)}; give bools, True for rows that take part.")
    return jnp.asarray(mask)


def row_sum(rows: Array, axis: Axis = None) -> Array:
    """The sum over the first axis, and over the devices of a mesh axis inside ``shard_map``."""
    total = rows.sum(0)
    return total if axis is None else jax.lax.psum(total, axis)


def row_mean(each: Array, mask: Any = None, axis: Axis = None) -> Array:
    """The mean over rows that take part, of numbers or vectors; 0 where none does. Others may hold anything.

    Example:
      >>> float(row_mean(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])))
      2.0
    """
    member = row_mask(mask, each.shape[0])
    column = member.reshape(member.shape + (1,) * (each.ndim - 1))
    total = row_sum(jnp.where(column, each, 0.0), axis)
    return total / jnp.maximum(row_sum(member.astype(each.dtype), axis), 1.0)


def wide_logits(argument: str, logits: Any, mask: Any = None) -> Array:
    """Logits ``[rows, classes]`` in float32 or wider, 0 in rows that do not take part.

    A softmax's gradient in such a row would else be 0 times whatever the row holds.

    Raises:
      ValueError: other axes.
    """
    logits = wide(logits)
    if logits.ndim != 2:
        raise ValueError(
            f"{argument} have shape {logits.shape}; expected [rows, classes]. Flatten other axes into rows."
        )
    return logits if mask is None else jnp.where(row_mask(mask, logits.shape[0])[:, None], logits, 0.0)


def row_labels(labels: Any, rows: int, argument: str = "labels") -> Array:
    """Labels ``[rows]``.

    Raises:
      ValueError: another shape, or no integers.

    Example:
      >>> row_labels(jnp.zeros((3, 1), int), 3)
      Traceback (most recent call last):
      ValueError: labels are int32[3, 1]; give integers [3], one class for each row.
    """
    labels = jnp.asarray(labels)
    if labels.shape != (rows,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"{argument} are {labels.dtype}{list(labels.shape)}; give integers [{rows}], one class for each row."
        )
    return labels
