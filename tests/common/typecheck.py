"""Annotations that are checked while the tests run: shapes and dtypes by jaxtyping, the rest by beartype."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
from beartype import BeartypeConf, FrozenDict, beartype

# NumPy's scalars count as Python's, and an int as a float, as to type checkers.
_NUMBERS = {int: int | np.integer, float: float | int | np.integer | np.floating, bool: bool | np.bool_}
_beartype = beartype(conf=BeartypeConf(hint_overrides=FrozenDict(_NUMBERS)))
# JAX unflattens these through their constructor, with tracers, shapes or placeholders in the place of arrays.
_PYTREES = {
    *("SparsePattern", "SparseMatrix", "ShardedMatrix", "_Rows", "BucketTable", "StageGraph", "GeeniProblem"),
    *("SequencePart", "LoraKernel"),
}
_raises = pytest.raises


def typechecked(function: Any) -> Any:
    """What the import hook applies to every function of the package."""
    owner, _, name = getattr(function, "__qualname__", "").rpartition(".")
    return function if name == "__init__" and owner in _PYTREES else _beartype(function)


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


def install() -> None:
    """Check the whole package from now on, but inside ``pytest.raises``."""
    jaxtyping.install_import_hook("effjax", "typecheck.typechecked")
    pytest.raises = raises
