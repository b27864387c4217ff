"""How smooth a network is, in its inputs and its parameters, as numbers that DCL can constrain."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from effjax.core.errors import check_number, check_shape
from effjax.core.rows import Axis, row_mean
from effjax.core.tree import wide
from effjax.optim.constraints import Logits, Mask, Rows

__all__ = ["logit_slope", "sharpness", "squared_input_gradient"]

PyTree = Any


def sharpness(loss: Callable[[PyTree], Array], params: PyTree, radius: ArrayLike = 0.05) -> Float[Array, ""]:
    r"""Rise of the loss along its gradient: the width of the loss surface.

    .. math:: \ell(\theta + r\, g / \|g\|) - \ell(\theta), \qquad g = \nabla \ell(\theta)

    It costs a forward and a backward pass more; a part of the batch will do. No gradient goes through the direction.

    Args:
      loss: ``params -> loss``, of a batch.
      params: :math:`\theta`.
      radius: r, above 0.

    Returns:
      A number; near 0 on a flat surface.

    Raises:
      ValueError: a radius out of range.

    Example:
      >>> round(float(sharpness(lambda w: (w**2).sum(), jnp.array([3.0, 4.0]), 1.0)), 3)
      11.0
    """
    check_number("radius", radius, low=0, open_low=True)
    value, grads = jax.value_and_grad(loss)(params)
    squares = [jnp.sum(jnp.square(wide(leaf))) for leaf in jax.tree.leaves(grads)]
    norm = jnp.sqrt(sum(squares, jnp.zeros((), float)))
    scale = jax.lax.stop_gradient(radius / jnp.where(norm > 0, norm, 1.0))
    move = lambda p, g: (wide(p) + scale * wide(jax.lax.stop_gradient(g))).astype(p.dtype)
    return wide(loss(jax.tree.map(move, params, grads))) - wide(value)


def squared_input_gradient(
    losses: Callable[[Array], Array], inputs: Shaped[Array, "rows ..."], mask: Mask = None, *, axis: Axis = None
) -> Float[Array, ""]:
    r"""Mean squared gradient of the loss in the inputs: how steep the network is; ``<=`` L squared.

    .. math:: \frac1n \sum_i \Bigl\| \frac{\partial \ell_i}{\partial x_i} \Bigr\|^2

    Args:
      losses: ``inputs -> [rows]``; a row's loss may depend on that row's input alone.
      inputs: x, floating.
      mask: rows that take part; None for all.
      axis: mesh axes that the rows are spread over inside ``shard_map``.

    Returns:
      A number.

    Raises:
      ValueError: losses that are not one per row.

    Example:
      >>> float(squared_input_gradient(lambda x: 3.0 * x[:, 0], jnp.ones((2, 4))))
      9.0
    """

    def total(inputs: Array) -> Array:
        each = losses(inputs)
        check_shape("losses(inputs)", each, jnp.shape(inputs)[:1], "One loss for each row.")
        return jnp.sum(wide(each))

    grads = wide(jax.grad(total)(inputs))
    return row_mean(jnp.sum(jnp.square(grads), axis=tuple(range(1, grads.ndim))), mask, axis)


def logit_slope(
    logits: Logits, other: Logits, distances: Rows, mask: Mask = None, *, axis: Axis = None
) -> Float[Array, ""]:
    r"""Mean squared slope of the logits between two views: the network's Lipschitz constant there; ``<=`` L squared.

    .. math:: \frac1n \sum_i \frac{\|z_i - z'_i\|^2}{\|x_i - x'_i\|^2}

    Args:
      logits: z, of the first view.
      other: z', of the second.
      distances: :math:`\|x - x'\|`, one per row; a row of distance 0 does not take part.
      mask: rows that take part; None for all.
      axis: mesh axes that the rows are spread over inside ``shard_map``.

    Returns:
      A number.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> float(logit_slope(jnp.zeros((1, 2)), jnp.array([[0.0, 4.0]]), jnp.array([2.0])))
      4.0
    """
    check_shape("other", other, jnp.shape(logits), "That of logits: the same rows.")
    check_shape("distances", distances, jnp.shape(logits)[:1], "One for each row of logits.")
    apart, squares = wide(distances) > 0, jnp.square(wide(distances))
    slopes = jnp.square(wide(logits) - wide(other)).sum(-1) / jnp.where(apart, squares, 1.0)
    return row_mean(slopes, apart if mask is None else apart & mask, axis)
