"""Functions over the slices of a leading axis, in the form of loop that is fastest here."""

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from effjax.core.errors import check_choice, check_number
from effjax.core.timing import Name, fastest

PyTree = Any
Marks = tuple[int | None, ...]
Name = TypeVar("Name")

LOOPS = ("auto", "vmap", "map", "unroll")

# Keyed by the function, weakly: a lambda made anew in every trace leaves nothing behind.
_chosen: weakref.WeakKeyDictionary[Callable[..., Any], dict[Any, str]] = weakref.WeakKeyDictionary()


def stacked_map(
    fn: Callable[..., PyTree],
    *args: PyTree,
    size: int,
    in_axes: Sequence[int | None] = (0,),
    loop: str = "auto",
) -> PyTree:
    """Apply ``fn`` to every slice of a leading axis and stack the results.

    ``out[i] = fn(args[0][i], *args[1:])`` for ``i`` in ``[0, size)``, with the default ``in_axes``.

    Args:
      fn: function of the slices and of what they share; pure.
      *args: pytrees: of arrays ``[size, ...]`` where ``in_axes`` says 0; shared by all calls where it says None.
      size: length of the leading axis.
      in_axes: 0 or None per argument, as in ``jax.vmap``; arguments beyond it are shared.
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
    marks = _marks(args, in_axes, size)
    if loop == "auto":
        loop = fastest_loop(fn, *args, size=size, in_axes=in_axes)
    return _FORMS[loop](fn, args, marks, size)


def fastest_loop(fn: Callable[..., PyTree], *args: PyTree, size: int, in_axes: Sequence[int | None] = (0,)) -> str:
    """The fastest of ``'vmap'``, ``'map'`` and ``'unroll'`` for ``stacked_map`` on the default device.

    Each form is compiled and run on zeros of the arguments' shapes, in turns, and a form that falls far behind is
    dropped after one run. The answer is kept for this function, these shapes and this backend. Works before and
    inside ``jit``, since only shapes and dtypes of the arguments are read.

    Args:
      fn: as in ``stacked_map``. It must not close over traced values.
      *args: arrays or ``jax.ShapeDtypeStruct``, as in ``stacked_map``.
      size: length of the leading axis.
      in_axes: as in ``stacked_map``.

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
    marks = _marks(args, in_axes, size)
    if size == 1:
        return "unroll"
    avals = jax.tree.map(_aval, args)
    leaves, treedef = jax.tree.flatten(avals)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    signature = (treedef, shapes, marks, size, jax.default_backend())
    try:
        known = _chosen.setdefault(fn, {})
    except TypeError:  # not hashable or not weakly referable: measure every time
        known = {}
    if signature not in known:
        forms = {name: lambda *args, form=form: form(fn, args, marks, size) for name, form in _FORMS.items()}
        known[signature] = fastest_form(forms, *avals, way_out="name the loop: 'vmap', 'map' or 'unroll'")
    return known[signature]


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


def _marks(args: tuple[PyTree, ...], in_axes: Sequence[int | None], size: int) -> Marks:
    """0 or None per argument; refuses stacked arguments of another size."""
    marks = (*in_axes, *[None] * len(args))[: len(args)]
    for stacked, mark in zip(args, marks, strict=True):
        for path, leaf in jax.tree_util.tree_leaves_with_path(stacked) if mark == 0 else ():
            if jnp.shape(leaf)[:1] != (size,):
                raise ValueError(
                    f"stacked{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but its leading axis must be "
                    f"size={size}. Stack one slice per call along axis 0."
                )
    return marks


def _vmap(fn: Callable[..., PyTree], args: tuple[PyTree, ...], marks: Marks, size: int) -> PyTree:
    return jax.vmap(fn, in_axes=marks, axis_size=size)(*args)


def _unroll(fn: Callable[..., PyTree], args: tuple[PyTree, ...], marks: Marks, size: int) -> PyTree:
    at = lambda i: (
        jax.tree.map(lambda x: x[i], arg) if mark == 0 else arg for arg, mark in zip(args, marks, strict=True)
    )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(fn(*at(i)) for i in range(size)))


def _map(fn: Callable[..., PyTree], args: tuple[PyTree, ...], marks: Marks, size: int) -> PyTree:
    del size
    own = [arg for arg, mark in zip(args, marks, strict=True) if mark == 0]

    def one(own: list[PyTree]) -> PyTree:
        left = iter(own)
        return fn(*(next(left) if mark == 0 else arg for arg, mark in zip(args, marks, strict=True)))

    return jax.lax.map(one, own)


# `map` last: it is the one that may be hopeless.
_FORMS = {"vmap": _vmap, "unroll": _unroll, "map": _map}
