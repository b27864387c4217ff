"""Gradients with accumulation over micro-batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core.errors import check_number

PyTree = Any


def accumulated(loss: Callable[..., tuple[jax.Array, PyTree]], micro_batches: int) -> Callable[..., Any]:
    """``value_and_grad(loss, has_aux=True)`` averaged over equal micro-batches.

    ``(1/k) sum_i grad loss(params, batch_i)``, computed one micro-batch after another, so that only
    one micro-batch's activations are alive. The loop is unrolled on CPU, where XLA runs
    convolutional gradients inside ``lax.scan`` tens of times slower, and scanned elsewhere.

    Args:
      loss: ``(params, batch, *rest) -> (scalar, aux)``, a mean over the batch's leading axis.
      micro_batches: number of parts; the batch's leading axis must divide by it.

    Returns:
      A function with the arguments of ``loss`` returning ``((value, aux), gradients)``. Floating aux
      leaves are averaged over micro-batches; others are the last one's.
    """
    check_number("accumulate", micro_batches, low=1, integer=True)
    single = jax.value_and_grad(loss, has_aux=True)
    if micro_batches == 1:
        return single

    def run(params: PyTree, batch: PyTree, *rest: Any):
        parts = jax.tree.map(lambda rows: _split(rows, micro_batches), batch)

        def one(index):
            return single(params, jax.tree.map(lambda rows: rows[index], parts), *rest)

        if jax.default_backend() == "cpu":
            total = one(0)
            for index in range(1, micro_batches):
                total = _add(total, one(index))
        else:
            total, _ = jax.lax.scan(lambda acc, i: (_add(acc, one(i)), None), one(0), jnp.arange(1, micro_batches))
        return jax.tree.map(lambda x: x / micro_batches if jnp.issubdtype(x.dtype, jnp.inexact) else x, total)

    return run


def _split(rows: jax.Array, parts: int) -> jax.Array:
    if rows.shape[0] % parts:
        raise ValueError(
            f"accumulate={parts} does not divide the batch of {rows.shape[0]} rows. Choose a divisor of the batch size."
        )
    return rows.reshape(parts, rows.shape[0] // parts, *rows.shape[1:])


def _add(total: PyTree, new: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a + b if jnp.issubdtype(a.dtype, jnp.inexact) else b, total, new)
