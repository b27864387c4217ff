"""Low-rank terms of layers with several axes of inputs or outputs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def through_axes(
    x: jax.Array,
    axes: Sequence[int],
    term: tuple[jax.Array, jax.Array, Sequence[int]],
    how: tuple[Any, Callable[[tuple[int, int]], None]],
) -> jax.Array:
    """``x a b``, summed over several axes of x at once, as ``nn.DenseGeneral`` sums.

    Args:
      x: the layer's input.
      axes: those that are summed over, in the order of the kernel's.
      term: a [inputs, r] and b [r, outputs], and the axes into which the outputs are folded.
      how: precision of the products, and a check of the numbers of inputs and outputs.

    Returns:
      [the other axes of x, *features].

    Example:
      >>> x, a, b = jnp.ones((5, 2, 3)), jnp.ones((6, 1)), jnp.ones((1, 8))
      >>> through_axes(x, (-2, -1), (a, b, (2, 4)), (None, lambda sides: None)).shape
      (5, 2, 4)
    """
    (a, b, features), (precision, check) = term, how
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    rest, summed = x.shape[: x.ndim - len(axes)], x.shape[x.ndim - len(axes) :]
    check((math.prod(summed), math.prod(features)))
    narrow = jnp.matmul(x.reshape(*rest, -1), a.reshape(-1, a.shape[-1]), precision=precision)
    return jnp.matmul(narrow, b, precision=precision).reshape(*rest, *features)


def low_rank_einsum(
    layer: tuple[str, Sequence[int]], x: jax.Array, factors: tuple[jax.Array, jax.Array], how: tuple[Any, str]
) -> jax.Array:
    """``einsum(string, x, a b)``, ``a b`` never formed.

    Args:
      layer: the einsum's string, the kernel second, and the kernel's shape.
      x: the layer's input.
      factors: a [first axes of the kernel as one, r] and b [r, its last axes as one].
      how: precision of the products, and the layer's name for errors.

    Returns:
      What the einsum of x and a kernel gives.

    Raises:
      ValueError: an einsum of which the factors are no two parts.

    Example:
      >>> x, a, b = jnp.ones((1, 5, 6)), jnp.ones((6, 1)), jnp.ones((1, 8))
      >>> low_rank_einsum(("btd,dhw->bthw", (6, 2, 4)), x, (a, b), (None, "layer")).shape
      (1, 5, 2, 4)
    """
    (string, shape), (precision, name) = layer, how
    (first, takes_a), second, dims = einsum_parts(string, shape, factors, name)
    a, b = factors[0].reshape(*dims[0], -1), factors[1].reshape(-1, *dims[1])
    left, right = (a, b) if takes_a else (b, a)
    return jnp.einsum(second, jnp.einsum(first, x, left, precision=precision), right, precision=precision)


def einsum_parts(
    string: str, shape: Sequence[int], factors: tuple[jax.Array, jax.Array], name: str
) -> tuple[tuple[str, bool], str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """``einsum(string, x, kernel)`` as two, of x with one factor and of the outcome with the other.

    Args:
      string: such as ``"btd,dhw->bthw"``, the kernel second.
      shape: of the kernel.
      factors: a [first axes of the kernel as one, r] and b [r, its last axes as one].
      name: of the layer, for errors.

    Returns:
      The first einsum and whether it takes a; the second; the kernel's axes of a and of b.

    Raises:
      ValueError: an einsum of which the factors are no two parts.

    Example:
      >>> factors = jnp.ones((6, 1)), jnp.ones((1, 8))
      >>> einsum_parts("btd,dhw->bthw", (6, 2, 4), factors, "layer")
      (('btd,dZ->btZ', True), 'btZ,Zhw->bthw', ((6,), (2, 4)))
    """
    inputs, _, outputs = string.replace(" ", "").partition("->")
    x, kernel = inputs.split(",")
    a, b = (math.prod(factors[0].shape[:-1]), factors[1].shape[-1])
    cuts = [cut for cut in range(1, len(shape)) if (math.prod(shape[:cut]), math.prod(shape[cut:])) == (a, b)]
    for cut in cuts:
        sides = kernel[:cut], kernel[cut:]
        for first, second in (sides, sides[::-1]):
            if set(first) <= set(x) - set(outputs) and set(second) <= set(outputs) - set(x):
                rank = next(letter for letter in "ZYXWVU" if letter not in string)
                narrow = "".join(letter for letter in x if letter not in first) + rank
                takes_a = first is sides[0]
                left, right = (first + rank, rank + second) if takes_a else (rank + first, second + rank)
                return (
                    (f"{x},{left}->{narrow}", takes_a),
                    f"{narrow},{right}->{outputs}",
                    (
                        tuple(shape[:cut]),
                        tuple(shape[cut:]),
                    ),
                )
    raise ValueError(
        f"lora: {name} computes {string!r} with a kernel of shape {tuple(shape)}, whose adapter has {a} inputs and {b} "
        "outputs: no split into axes that are summed over and axes that are made. Tell the numbers of both by "
        "LoraRule(..., inputs=, outputs=); a kernel for each entry of a batch, whose axes are neither, has no adapter."
    )
