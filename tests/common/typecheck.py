"""Annotations that are checked while the tests run: shapes and dtypes by jaxtyping, the rest by beartype."""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jaxtyping
import numpy as np
import pytest
from beartype import BeartypeConf, FrozenDict, beartype

# NumPy's scalars count as Python's, and an int as a float, as to type checkers.
_NUMBERS = {int: int | np.integer, float: float | int | np.integer | np.floating, bool: bool | np.bool_}
typechecked = beartype(conf=BeartypeConf(hint_overrides=FrozenDict(_NUMBERS)))
_raises = pytest.raises
_register = jax.tree_util.register_dataclass
_jaxtyped = jaxtyping.jaxtyped


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Without checks: the input is wrong on purpose, and the library's own error is what a user reads."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@contextlib.contextmanager
def raises(*args: Any, **kwargs: Any) -> Iterator[pytest.ExceptionInfo]:
    """``pytest.raises`` around calls whose annotations are not checked."""
    with unchecked(), _raises(*args, **kwargs) as found:
        yield found


def register_dataclass(nodetype: type, *args: Any, **kwargs: Any) -> type:
    """``jax.tree_util.register_dataclass`` of a class whose fields are not checked.

    JAX rebuilds pytrees of leaves that are no arrays: bools under ``vmap`` and bare objects to compare structures.
    """
    found = _register(nodetype, *args, **kwargs)
    found.__no_type_check__ = True
    return found


def jaxtyped(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``jaxtyping.jaxtyped``, several times faster.

    A function within a function would be compiled again whenever the outer one runs, so it is not checked. Where no
    annotation is a shape, beartype is enough.
    """

    def decorate(item: Any) -> Any:
        if not isinstance(item, types.FunctionType):
            return _jaxtyped(item, typechecker=typechecker)
        if "<locals>" in item.__qualname__:
            return item
        if any(map(_holds_shape, item.__annotations__.values())):
            return _jaxtyped(item, typechecker=typechecker)
        return _beartyped(item)

    return decorate


def _holds_shape(hint: Any) -> bool:
    if hint is jaxtyping.PyTree:  # of any structure
        return False
    return getattr(hint, "__module__", "").startswith("jaxtyping") or any(map(_holds_shape, get_args(hint)))


def _beartyped(function: types.FunctionType) -> types.FunctionType:
    checked = functools.cache(lambda: typechecked(function))  # when it is first called: a process calls few of them

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else checked())(*args, **kwargs)

    return call


def install() -> None:
    """Check the whole package from now on, but inside ``pytest.raises``."""
    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook("effjax", "typecheck.typechecked")
    jax.tree_util.register_dataclass = register_dataclass
    pytest.raises = raises
