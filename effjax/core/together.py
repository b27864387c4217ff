"""Several processes of one run that do a thing all or none."""

from collections.abc import Callable
from typing import TypeVar, cast

import jax
import numpy as np

__all__: list[str] = []

Result = TypeVar("Result")


class ElsewhereError(ValueError):
    """Another process of a distributed run was refused."""


def together(action: Callable[[], Result]) -> Result:
    """Do something in every process; where one of them is refused all are, in place of waiting for it.

    Raises:
      ElsewhereError: in the processes where it worked.
    """
    if jax.process_count() == 1:
        return action()
    from jax.experimental import multihost_utils

    error, result = None, None
    try:
        result = action()
    except Exception as refused:
        error = refused
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
    if error is not None:
        raise error
    if failed.size:
        raise ElsewhereError(f"process {failed[0]} of this run was refused; its message says why.")
    return cast(Result, result)
