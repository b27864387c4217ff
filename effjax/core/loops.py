"""Functions over the slices of a leading axis, in the form of loop that is fastest here."""

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core.errors import check_choice, check_number
from effjax.core.timing import Name, fastest

PyTree = Any

LOOPS = ("auto", "vmap", "map", "unroll")

# Keyed by the function, weakly: a lambda made anew in every trace leaves nothing behind.
_chosen: weakref.WeakKeyDictionary[Callable[..., Any], dict[Any, str]] = weakref.WeakKeyDictionary()


def stacked_map(fn: Callable[..., PyTree], stacked: PyTree, *shared: PyTree, size: int, loop: str = "auto") -> PyTree:
    """Apply ``fn`` to every slice of a leading axis and stack the results.

    ``out[i] = fn(stacked[i], *shared)`` for ``i`` in ``[0, size)``.

    Args:
      fn: function of one slice and the shared arguments; pure.
      stacked: pytree of arrays ``[size, ...]``.
      *shared: pytrees that every call receives whole.
      size: length of the leading axis.
      loop: ``'vmap'``, ``'map'`` (``lax.map``), ``'unroll'`` (a Python loop) or ``'auto'``, the fastest of the
        three as measured by ``fastest_loop``. The forms may differ in the last bits, so name one where two
        processes must agree bitwise.

    Returns:
      Pytree of arrays ``[size, ...]``.

    Raises:
      ValueError: an unknown ``loop``, or a leaf whose leading axis is not ``size``.

    Example:
      >>> stacked_map(lambda x, y: x + y, jnp.arange(3), 10, size=3, loop="unroll").tolist()
      [10, 11, 12]
    """
    check_choice("loop", loop, LOOPS)
    _check_size(stacked, size)
    if loop == "auto":
        loop = fastest_loop(fn, stacked, *shared, size=size)
    return _FORMS[loop](fn, stacked, shared, size)


def fastest_loop(fn: Callable[..., PyTree], stacked: PyTree, *shared: PyTree, size: int) -> str:
    """The fastest of ``'vmap'``, ``'map'`` and ``'unroll'`` for ``stacked_map`` on the default device.

    Each form is compiled and run on zeros of the arguments' shapes, in turns, and a form that falls far behind is
    dropped after one run. The answer is kept for this function, these shapes and this backend. Works before and
    inside ``jit``, since only shapes and dtypes of the arguments are read.

    Args:
      fn: as in ``stacked_map``. It must not close over traced values.
      stacked: arrays or ``jax.ShapeDtypeStruct`` of shape ``[size, ...]``.
      *shared: arrays or ``jax.ShapeDtypeStruct``.
      size: length of the leading axis.

    Returns:
      The name of the form.

    Raises:
      ValueError: ``fn`` closes over values of an enclosing ``jit``, ``grad`` or ``vmap``.

    Example:
      >>> x = jax.ShapeDtypeStruct((3, 8), jnp.float32)
      >>> fastest_loop(jnp.sin, x, size=3) in ("vmap", "map", "unroll")
      True
    """
    check_number("size", size, low=1, integer=True)
    _check_size(stacked, size)
    if size == 1:
        return "unroll"
    avals = jax.tree.map(_aval, (stacked, shared))
    leaves, treedef = jax.tree.flatten(avals)
    signature = (treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves), size, jax.default_backend())
    try:
        known = _chosen.setdefault(fn, {})
    except TypeError:  # not hashable or not weakly referable: measure every time
        known = {}
    if signature not in known:
        known[signature] = _measure(fn, avals, size)
    return known[signature]


def _measure(fn: Callable[..., PyTree], avals: tuple[PyTree, tuple[PyTree, ...]], size: int) -> str:
    forms = {name: lambda xs, shared, form=form: form(fn, xs, shared, size) for name, form in _FORMS.items()}
    return fastest_form(forms, *avals, way_out="name the loop: 'vmap', 'map' or 'unroll'")


def fastest_form(forms: Mapping[Name, Callable[..., PyTree]], *args: PyTree, way_out: str) -> Name:
    """The name of the function that is fastest on the default device, of several that compute the same.

    Each is compiled and run on zeros of the arguments' shapes, in turns; one that falls far behind is dropped after
    one run.

    Args:
      forms: functions of ``args`` by name; those that may be hopeless last.
      *args: pytrees of arrays or ``jax.ShapeDtypeStruct``, of which only shapes and dtypes are read.
      way_out: for the error message, how to do without a measurement.

    Returns:
      A key of ``forms``.

    Raises:
      ValueError: a form closes over values of an enclosing ``jit``, ``grad`` or ``vmap``.

    Example:
      >>> x = jax.ShapeDtypeStruct((8,), jnp.float32)
      >>> fastest_form({"a": lambda x: 2 * x, "b": lambda x: x + x}, x, way_out="choose a") in ("a", "b")
      True
    """
    avals = jax.tree.map(_aval, args)
    # Evaluated at once even inside a trace, where it would otherwise become part of the program.
    with jax.ensure_compile_time_eval():
        zeros = jax.tree.map(lambda aval: jnp.zeros(aval.shape, aval.dtype), avals)
    programs = {name: jax.jit(form).lower(*avals).compile() for name, form in forms.items()}
    try:
        return fastest({name: functools.partial(program, *zeros) for name, program in programs.items()})
    except TypeError as error:  # enclosing tracers were hoisted into extra inputs
        raise ValueError(
            "A function that closes over values of an enclosing jit, grad or vmap cannot be measured. "
            f"Pass them as arguments, or {way_out}."
        ) from error


def _aval(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _check_size(stacked: PyTree, size: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(stacked):
        if jnp.shape(leaf)[:1] != (size,):
            raise ValueError(
                f"stacked{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but its leading axis must be "
                f"size={size}. Stack one slice per call along axis 0."
            )


def _vmap(fn: Callable[..., PyTree], stacked: PyTree, shared: tuple[PyTree, ...], size: int) -> PyTree:
    return jax.vmap(lambda one: fn(one, *shared), axis_size=size)(stacked)


def _unroll(fn: Callable[..., PyTree], stacked: PyTree, shared: tuple[PyTree, ...], size: int) -> PyTree:
    outputs = [fn(jax.tree.map(lambda leaf: leaf[i], stacked), *shared) for i in range(size)]  # noqa: B023
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _map(fn: Callable[..., PyTree], stacked: PyTree, shared: tuple[PyTree, ...], size: int) -> PyTree:
    del size
    return jax.lax.map(lambda one: fn(one, *shared), stacked)


# `map` last: it is the one that may be hopeless.
_FORMS = {"vmap": _vmap, "unroll": _unroll, "map": _map}
