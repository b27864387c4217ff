"""Programs that compile on threads while their owner goes on."""

import concurrent.futures
import os
from collections.abc import Iterator
from typing import Any

import jax

from effjax.core.files import first_line

__all__: list[str] = []


class CompileError(RuntimeError):
    """A program that was to be compiled on a thread could not be; its cause is what the compiler raised."""


class Beside:
    """Traced programs by name, compiled in the order in which they come, by as many threads as ``workers`` says.

    The threads live as long as there is something to compile.
    """

    def __init__(self) -> None:
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._waiting: dict[Any, concurrent.futures.Future] = {}
        self._about: dict[Any, tuple[Any, Any]] = {}  # shapes and jaxpr

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, name: Any) -> bool:
        return name in self._waiting

    def add(self, name: Any, shapes: Any, traced: Any) -> None:
        """Lower a traced program here, and compile it on a thread."""
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(workers(), "effjax-compile")
        self._about[name] = shapes, traced.jaxpr
        self._waiting[name] = self._pool.submit(traced.lower().compile)

    def take(self, name: Any) -> tuple[Any, Any, Any, Any]:
        """Wait for a program; its name, shapes, the executable and its jaxpr. It is forgotten here.

        Raises:
          CompileError: it could not be compiled. What has not begun is left out.
        """
        if (error := self._waiting[name].exception()) is not None:
            raise self._refused(name, error) from error
        compiled = self._waiting[name].result()
        del self._waiting[name]
        shapes, jaxpr = self._about.pop(name)
        if not self._waiting and self._pool is not None:
            self._pool.shutdown()  # its threads are idle
            self._pool = None
        return name, shapes, compiled, jaxpr

    def as_completed(self) -> Iterator[Any]:
        """The names of all programs as they are ready, to be taken."""
        names = {future: name for name, future in self._waiting.items()}
        for future in concurrent.futures.as_completed(names):
            yield names[future]

    def check(self) -> None:
        """Raise ``CompileError`` if any program could not be compiled."""
        for name, future in self._waiting.items():
            if future.done() and not future.cancelled() and (error := future.exception()) is not None:
                raise self._refused(name, error) from error

    def _refused(self, name: Any, error: BaseException) -> CompileError:
        _, *leaves = self._about[name][0]
        self.cancel()
        return CompileError(
            f"the program for {_named(leaves)} could not be compiled: {type(error).__name__}: {first_line(error)}"
        )

    def cancel(self) -> None:
        """Leave out what has not begun, wait for the rest, and forget all; idempotent."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool, self._waiting, self._about = None, {}, {}


def workers() -> int:
    """Programs to compile at a time: one for two cores, as XLA's compiler itself keeps more than one core busy.

    Two at a time are no faster on two cores. Several processes compile one program at a time, all of them in one order.
    """
    return max(1, cores() // 2) if jax.process_count() == 1 else 1


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _named(leaves: list[Any]) -> str:
    """Arguments but the first by dtype and shape, as in ``int32[32, 64]``; each kind once.

    Example:
      >>> import numpy as np
      >>> _named([((4, 8), np.dtype("int32")), ((4,), np.dtype("float32")), ((4, 8), np.dtype("int32"))])
      'int32[4, 8], float32[4]'
    """
    words = [f"{getattr(dtype, 'name', dtype)}{list(shape)}" for shape, dtype in leaves]
    return ", ".join(dict.fromkeys(words)) or "no arguments"
