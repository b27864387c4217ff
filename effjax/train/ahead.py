"""A jitted step whose batch shapes compile on threads while it trains on the first of them."""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import jax

from effjax.core.cost import Executables

__all__ = ["CompileAhead", "compile_ahead"]


class CompileAhead:
    """What ``compile_ahead`` returns: called like the step; also a context manager.

    Attributes:
      executables: the compiled programs, with ``compiles``, ``compile_s`` (seconds that calls waited, tracing included)
        and ``analysis()``.
    """

    def __init__(self, executables: Executables):
        self.executables = executables

    def __call__(self, *args: Any) -> Any:
        return self.executables(*args)

    def close(self) -> None:
        """Leave out what has not begun to compile, and wait for the rest; idempotent.

        The step can be called on: what it needs is compiled then.
        """
        self.executables.cancel()

    def __enter__(self) -> "CompileAhead":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def compile_ahead(step: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> CompileAhead:
    """Compile a step for several batch shapes on threads, and use it meanwhile.

    The programs compile in the order given, as many at a time as there are pairs of cores, for XLA's compiler keeps
    more than one busy; tracing happens before this returns.
    A call runs the program of its shapes and waits only where that is not ready: give the shapes in the order in which
    the run comes to them, as ``BucketSampler.example_batches`` does. Programs and results are those of ``step``. On
    several processes one program compiles at a time, in the order given, which must be the same in all of them.

    Args:
      step: what ``jax.jit`` returned, or a function to be jitted without donation. It is called with positional
        arguments that are arrays or trees of them; bind static ones by ``functools.partial``. What it donates is
        donated.
      arguments: of one call for every shape; nothing is run or donated. Arrays, or ``jax.ShapeDtypeStruct``.

    Returns:
      The step, to be called in place of ``step``; at its end, also by an exception, ``with`` leaves out what has not
      begun to compile. A call with shapes that were not given compiles them as ``jax.jit`` does.

    Raises:
      TypeError: ``step`` is no function.
      CompileError: of a call, whichever program it needs: one of them could not be compiled. The message names its
        shapes, the cause is what the compiler raised.

    Example:
      >>> import numpy as np
      >>> step = jax.jit(lambda total, batch: total + batch.sum())
      >>> batches = [np.ones((2, 8), np.float32), np.ones((2, 4), np.float32), np.ones((2, 8), np.float32)]
      >>> total = jax.numpy.float32(0)
      >>> with compile_ahead(step, [(total, batch) for batch in batches[:2]]) as ahead:
      ...     for batch in batches:
      ...         total = ahead(total, batch)
      >>> float(total), ahead.executables.compiles
      (40.0, 2)
    """
    if not callable(step):
        raise TypeError(f"step={step!r} is no function. Give the step, not what it returned.")
    jitted: Any = step if hasattr(step, "trace") else jax.jit(step)
    executables = Executables.of(jitted)
    try:
        executables.compile_beside(list(arguments))
    except BaseException:
        executables.cancel()
        raise
    return CompileAhead(executables)
