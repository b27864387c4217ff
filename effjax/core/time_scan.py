"""Loops over time whose backward pass may store less."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core.errors import NoEffectWarning, check_number
from effjax.core.loops import fastest_form

__all__ = ["fastest_unroll", "scan_time"]

PyTree = Any


def scan_time(
    step: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    *,
    chunk: int | None = None,
    unroll: int = 1,
) -> tuple[PyTree, PyTree]:
    r"""A cell over a sequence: ``lax.scan`` whose backward pass may store one carry a chunk.

    With chunks of c steps the backward pass stores T / c carries and recomputes inside one chunk at a time: memory
    :math:`O(T / c + c)` states, least at :math:`c = \sqrt T`, for one more forward pass. ``chunk=1`` stores the carries
    and none of what a step computes inside; on CPUs, where fresh memory is slow, that often trains faster than None.

    Args:
      step: ``(params, carry, x) -> (carry, y)``.
      params: handed to every step.
      carry: pytree of arrays.
      xs: pytree of arrays ``[time, ...]``.
      chunk: steps between stored carries; the last chunk may be shorter. None stores every step.
      unroll: steps in one iteration of the compiled loop. On CPUs 1 was fastest or near it in training, and compiles
        several times sooner; accelerators may gain, as ``fastest_unroll`` tells.

    Returns:
      The last carry, and the pytree of the steps' outputs, ``[time, ...]``.

    Raises:
      ValueError: ``chunk`` or ``unroll`` below 1, or an empty sequence.

    Warns:
      NoEffectWarning: ``chunk`` is not below the number of steps.

    Example:
      >>> add = lambda scale, total, x: (total + scale * x, total)
      >>> total, before = scan_time(add, 2.0, jnp.float32(0.0), jnp.arange(5.0), chunk=2)
      >>> float(total), before.tolist()
      (20.0, [0.0, 0.0, 2.0, 6.0, 12.0])
    """
    check_number("unroll", unroll, low=1, integer=True)
    length = len(jax.tree.leaves(xs)[0])
    if not length:
        raise ValueError("xs holds 0 time steps, but at least 1 is needed. The leading axis is time.")

    def run(carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        return jax.lax.scan(functools.partial(step, params), carry, xs, unroll=unroll)

    if chunk is None:
        return run(carry, xs)
    check_number("chunk", chunk, low=1, integer=True)
    if chunk >= length:
        warnings.warn(
            f"chunk={chunk} is not below the {length} steps: the sequence would be one chunk and no memory saved. "
            f"Choose chunk in [1, {length - 1}], such as {max(1, round(length**0.5))}.",
            NoEffectWarning,
            stacklevel=2,
        )
        return run(carry, xs)
    if chunk == 1:
        step = jax.checkpoint(step, prevent_cse=False)
        return run(carry, xs)
    run = jax.checkpoint(run, prevent_cse=False)
    whole = length // chunk * chunk
    chunks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, chunk, *leaf.shape[1:]), xs)
    carry, ys = jax.lax.scan(run, carry, chunks)
    ys = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), ys)
    if whole < length:
        carry, tail = run(carry, jax.tree.map(lambda leaf: leaf[whole:], xs))
        ys = jax.tree.map(lambda *parts: jnp.concatenate(parts), ys, tail)
    return carry, ys


def fastest_unroll(
    fn: Callable[[int], Callable[..., PyTree]], *args: PyTree, candidates: Sequence[int] = (1, 2, 4, 8, 16)
) -> int:
    """The ``unroll`` of ``scan_time`` that is fastest on the default device.

    The function of every candidate is compiled and run on zeros of the arguments' shapes, in turns, and one that falls
    far behind is dropped after one run. Two processes may choose differently, and results may then differ in the last
    bits, so give a number where runs must agree bitwise.

    Args:
      fn: from ``unroll`` to what will be run: the whole training step, as forward and backward passes differ.
      *args: of that function: arrays or ``jax.ShapeDtypeStruct``, of which only shapes and dtypes are read.
      candidates: what to try, in this order; each compiles once, the larger the longer.

    Returns:
      One of ``candidates``.

    Raises:
      ValueError: no candidates, one below 1, or a function that closes over values of an enclosing ``jit``, ``grad``
        or ``vmap``.

    Example:
      >>> decay = lambda rate, h, x: (rate * h + x,) * 2
      >>> last = lambda rate, xs, unroll: scan_time(decay, rate, jnp.float32(0.0), xs, unroll=unroll)[0]
      >>> gradient = lambda unroll: jax.grad(lambda rate, xs: last(rate, xs, unroll))
      >>> rate, xs = jnp.float32(0.5), jax.ShapeDtypeStruct((40,), jnp.float32)
      >>> fastest_unroll(gradient, rate, xs, candidates=(1, 4)) in (1, 4)
      True
    """
    sizes = [check_number(f"candidates[{i}]", size, low=1, integer=True) for i, size in enumerate(candidates)]
    if not sizes:
        raise ValueError("candidates is empty: give at least one number of steps, such as 1.")
    return fastest_form({size: fn(size) for size in sizes}, *args, way_out="name the unroll")
