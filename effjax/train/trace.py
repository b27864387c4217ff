"""A trace of a few steps of a run by JAX's profiler."""

from pathlib import Path
from typing import Any

import jax

__all__: list[str] = []

WARM = 10
"""Steps before the trace, where a run has as many."""
STEPS = 5
"""Steps in the trace."""


class Trace:
    """The profiler, which is on for ``STEPS`` steps once ``WARM`` are done; of a shorter run for those after its first.

    Args:
      folder: for TensorBoard or Perfetto, a subfolder of each process's own; None traces nothing.
      began: steps done before this start of the run.
      total: steps of the run.
    """

    def __init__(self, folder: str | None, began: int, total: int):
        left = total - began
        self._folder = folder
        self._first = began + (WARM if left >= WARM + STEPS else min(1, left - 1))
        self._last = min(self._first + STEPS, total)
        self._on = False

    def before(self, done: int) -> None:
        """Called before a step, with the number of steps done."""
        if self._folder is not None and done == self._first:
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, done: int, state: Any) -> None:
        """Called after a step; ends the trace once the device has done what was traced."""
        if self._on and done >= self._last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """End the trace if it is on, as where the run stops in the middle of it."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
