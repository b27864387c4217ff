"""Annotations that are checked while the tests run: shapes and dtypes by jaxtyping, the rest by beartype."""

import contextlib
from collections.abc import Iterator
from typing import Any

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


def install() -> None:
    """Check the whole package from now on, but inside ``pytest.raises``."""
    jaxtyping.install_import_hook("effjax", "typecheck.typechecked")
    jax.tree_util.register_dataclass = register_dataclass
    pytest.raises = raises
