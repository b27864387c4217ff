"""What compiling and a step take on this machine, measured on batches of two shapes."""

import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from effjax.core.beside import cores, workers
from effjax.core.cost import Executables
from effjax.core.errors import check_number
from effjax.core.tree import copied
from effjax.data.step_costs import StepCosts, fit_step_costs

__all__ = ["measure_costs"]

_SAVED = "/jax/compilation_cache/compile_time_saved_sec"


def measure_costs(step: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, rounds: int = 5) -> StepCosts:
    """Compile a step for two batch shapes, time it on both, and tell what batches of any shape take.

    For ``BucketSampler(max_shapes="auto", costs=...)`` and ``choose_batches``. Take the shortest and the longest
    batches of the run, such as those of ``BucketSampler(..., max_shapes=2)``. Both programs are compiled here; JAX's
    folder of compiled programs, where one is kept, spares that at the next start: what compiling took then counts.

    How many programs compile in the time of one follows from the processor seconds that one takes, the cores here, and
    how many effjax compiles at a time.
    On several processes the numbers are those of the first one, in all of them.

    Args:
      step: what ``jax.jit`` returned, or a function to be jitted without donation; called with positional arguments.
      arguments: two calls, each a tuple that holds a batch, a mapping with ``input_ids`` [rows, tokens]. Nothing of
        them is donated: the calls get copies.
      rounds: steps timed in each shape; the median counts.

    Returns:
      The costs, plain numbers.

    Raises:
      ValueError: not two calls with batches of different lengths.

    Example:
      >>> step = jax.jit(lambda table, batch: table[batch["input_ids"]].sum(1))
      >>> batches = [{"input_ids": np.zeros((32, length), np.int32)} for length in (8, 64)]
      >>> costs = measure_costs(step, [(np.ones((10, 4), np.float32), batch) for batch in batches])
      >>> costs.compile_s > 0 and costs.of_step(32, 64) >= costs.of_step(32, 8) > 0
      True
    """
    check_number("rounds", rounds, low=1, integer=True)
    shapes = [_shape(args) for args in arguments]
    if len(shapes) != 2 or shapes[0][1] == shapes[1][1]:
        raise ValueError(f"arguments hold batches of (rows, tokens) {shapes}; two of different lengths are needed.")
    if not isinstance(step, Executables):
        jitted: Any = step if hasattr(step, "trace") else jax.jit(step)
        step = Executables.of(jitted)
    compiled = [_compile(step, args) for args in arguments]
    counts = [step.macs(*args) for args in arguments]
    macs = [float(count.expected) for count in counts if count.expected is not None and not count.unknown]
    times = _times(step, arguments, rounds)
    found = fit_step_costs(
        shapes,
        times,
        compile_s=statistics.fmean(seconds for seconds, _ in compiled),
        at_once=max(1.0, min(workers(), cores() / max(1.0, statistics.fmean(busy for _, busy in compiled)))),
        macs=macs if len(macs) == len(arguments) else None,
    )
    return from_first_process(found)


def _shape(args: tuple[Any, ...]) -> tuple[int, int]:
    """Rows and tokens of the batch among a call's arguments, of the whole batch where processes share it."""
    for arg in args:
        if isinstance(arg, Mapping) and "input_ids" in arg:
            rows, length = np.shape(arg["input_ids"])
            return rows, length
    raise ValueError("arguments: a call holds no batch, a mapping with 'input_ids' [rows, tokens].")


def _compile(step: Executables, args: tuple[Any, ...]) -> tuple[float, float]:
    """Seconds of compiling one program, and processor seconds over them."""
    with _saved_by_cache() as saved:
        wall, busy = time.perf_counter(), time.process_time()
        step.compile(*args)
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
    if saved:  # it came from JAX's folder, which tells what compiling took; by one core, as XLA does on CPUs
        return wall + sum(saved), 1.0
    return wall, busy / wall


@contextmanager
def _saved_by_cache() -> Generator[list[float]]:
    """Seconds of compiling that JAX's folder of compiled programs saved inside the block."""
    saved: list[float] = []

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        if event == _SAVED:
            saved.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield saved
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _times(step: Executables, arguments: Sequence[tuple[Any, ...]], rounds: int) -> list[float]:
    """Median seconds of a call, of each of the arguments, in turn."""
    samples: list[list[float]] = [[] for _ in arguments]
    for index in range(rounds + 1):  # the first one is a warm-up
        for args, found in zip(arguments, samples, strict=True):
            fresh = jax.block_until_ready(copied(jax.tree.map(jax.numpy.asarray, args)))
            start = time.perf_counter()
            jax.block_until_ready(step(*fresh))
            if index:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in samples]


def from_first_process(costs: StepCosts) -> StepCosts:
    """The first process's costs, in every process."""
    if jax.process_count() == 1:
        return costs
    from jax.experimental import multihost_utils

    numbers = multihost_utils.broadcast_one_to_all(np.array(costs, np.float32))
    return StepCosts(*(float(number) for number in numbers))
