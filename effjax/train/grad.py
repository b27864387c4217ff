"""Gradients with accumulation over micro-batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core.errors import check_number
from effjax.train.loaders import examples_in

PyTree = Any
ValueAndGrad = Callable[..., tuple[tuple[jax.Array, PyTree], PyTree]]


def accumulated(
    value_and_grad: ValueAndGrad,
    micro_batches: int,
    *,
    argument: int = 1,
    weight: Callable[[PyTree], Any] | None = None,
) -> ValueAndGrad:
    r"""``value_and_grad`` over equal parts of a batch, each weighted by its real examples.

    .. math:: \frac{\sum_i w_i \nabla L_i}{\sum_i w_i}

    where ``L_i`` is a mean over the ``w_i`` real examples of part i: the gradient of the whole batch, also where parts
    hold different numbers of dummy rows. One part is computed after another, so that only one part's activations are
    alive. The loop is unrolled on CPU, where XLA runs convolutional gradients inside ``lax.scan`` tens of times slower,
    and scanned elsewhere.

    Args:
      value_and_grad: returns ``((value, aux), gradients)``, with whatever arguments; ``value`` may be an array.
      micro_batches: number of parts; the batch's leading axis must divide by it.
      argument: position of the batch among the arguments.
      weight: ``part -> w_i``; None for ``examples_in``.

    Returns:
      A function with the same arguments and results. Floating leaves of ``aux`` are averaged with the same weights;
      others are the last part's.

    Raises:
      ValueError: the rows do not divide.
    """
    check_number("accumulate", micro_batches, low=1, integer=True)
    if micro_batches == 1:
        return value_and_grad
    weight = weight or examples_in

    def run(*arguments: Any):
        parts = jax.tree.map(lambda rows: _split(rows, micro_batches), arguments[argument])

        def one(index):
            part = jax.tree.map(lambda rows: rows[index], parts)
            share = jnp.asarray(weight(part), jnp.float32)
            found = value_and_grad(*arguments[:argument], part, *arguments[argument + 1 :])
            return share, jax.tree.map(lambda x: _scaled(x, share), found)

        def add(total, index):
            share, found = one(index)
            return total[0] + share, _add(total[1], found)

        if jax.default_backend() == "cpu":
            total = one(0)
            for index in range(1, micro_batches):
                total = add(total, index)
        else:
            total, _ = jax.lax.scan(lambda acc, i: (add(acc, i), None), one(0), jnp.arange(1, micro_batches))
        whole, found = total
        return jax.tree.map(lambda x: _scaled(x, 1 / jnp.maximum(whole, 1e-9)), found)

    return run


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every floating-point number of a tree is finite; a bool scalar.

    Example:
      >>> bool(all_finite({"w": jnp.ones(3), "n": 1})), bool(all_finite([jnp.array([1.0, jnp.nan])]))
      (True, False)
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])) if leaves else jnp.bool_(True)


def _split(rows: Any, parts: int) -> Any:
    if rows.shape[0] % parts:
        raise ValueError(
            f"accumulate={parts} does not divide the batch of {rows.shape[0]} rows. Choose a divisor of the batch size."
        )
    return rows.reshape(parts, rows.shape[0] // parts, *rows.shape[1:])


def _scaled(x: Any, factor: Any) -> jax.Array:
    return x * factor.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def _add(total: PyTree, new: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a + b if jnp.issubdtype(a.dtype, jnp.inexact) else b, total, new)
