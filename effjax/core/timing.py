"""Steady-state wall-clock of several arms, interleaved in one process."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from effjax.core.errors import check_number

Thunk = Callable[[], Any]
Name = TypeVar("Name")
Step = tuple[Callable[[Any, Any], tuple[Any, Any]], Any, Sequence[Any]]


class Timing(NamedTuple):
    """Milliseconds of one call.

    Attributes:
      median_ms: the median over the rounds.
      q25_ms: lower quartile.
      q75_ms: upper quartile.
      samples_ms: one number a round, in the order of the rounds.
    """

    median_ms: float
    q25_ms: float
    q75_ms: float
    samples_ms: tuple[float, ...]

    @property
    def n(self) -> int:
        """Rounds measured."""
        return len(self.samples_ms)


def time_interleaved(
    arms: Mapping[Name, Thunk | Step],
    *,
    rounds: int = 20,
    warmup: int = 3,
    min_time: float = 0.0,
    on_round: Callable[[], None] = lambda: None,
) -> dict[Name, Timing]:
    """Time several functions in turn, so that a noisy machine hits all of them alike.

    Every round measures every arm once, in alternating order. An arm is either a function without
    arguments, blocked on after each call, or ``(step, state, batches)``: each call consumes the
    state and returns ``(new state, anything)``, batches are cycled through, and the state orders the
    calls, so that they are blocked on only at the end of a sample, as in training. Where several processes compute
    together, all of them make as many calls as the first one finds right.

    Args:
      arms: what to time, by name. States are consumed where ``step`` donates them.
      rounds: samples of every arm.
      warmup: calls of every arm before the first sample; compilation belongs there, so use at least
        one for every shape in ``batches``.
      min_time: seconds a sample lasts at least, by repeating the call; for calls so short that the
        clock or the dispatch would be measured.
      on_round: called before every round.

    Returns:
      A ``Timing`` for every arm.

    Raises:
      ValueError: no arms, no batches, or a number out of range.

    Example:
      >>> x = jax.numpy.ones(3)
      >>> times = time_interleaved({"sin": lambda: jax.numpy.sin(x), "exp": lambda: jax.numpy.exp(x)}, rounds=5)
      >>> times["sin"].n, times["exp"].median_ms > 0
      (5, True)
    """
    check_number("rounds", rounds, low=1, integer=True)
    check_number("warmup", warmup, low=1, integer=True, hint="The first call compiles.")
    check_number("min_time", min_time, low=0)
    if not arms:
        raise ValueError("arms={} is empty: give at least one function to time.")
    runners = {name: _runner(name, arm) for name, arm in arms.items()}
    repeats = {}
    for name, run in runners.items():
        run(warmup)
        repeats[name] = agreed(max(1, math.ceil(min_time / run(1)))) if min_time else 1
    samples: dict[Name, list[float]] = {name: [] for name in arms}
    for index in range(rounds):
        on_round()
        for name in list(arms) if index % 2 == 0 else reversed(list(arms)):
            samples[name].append(1e3 * runners[name](repeats[name]) / repeats[name])
    return {name: _summary(values) for name, values in samples.items()}


def agreed(number: int) -> int:
    """The first process's number, where several processes compute together.

    What follows from a clock differs between them, and each must make the same calls in the same order.

    Example:
      >>> agreed(3)
      3
    """
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    with jax.ensure_compile_time_eval():  # also inside a trace
        return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


# An arm that takes this many times as long as the fastest is out after one run: one run of a convolution's gradient
# inside `lax.map` on a CPU may take as long as thirty of them unrolled.
_HOPELESS = 3.0
_SECONDS = 0.3


def fastest(arms: Mapping[Name, Thunk]) -> Name:
    """The name of the function that is fastest by ``time_interleaved``, within about 0.3 seconds.

    Args:
      arms: functions without arguments, compiled; those that may be hopeless last.

    Returns:
      A key of ``arms``.

    Example:
      >>> fastest({"busy": lambda: sum(range(10**5)), "idle": lambda: None})
      'idle'
    """
    first: dict[Any, float] = {}
    for name, arm in arms.items():
        seconds = _time_thunk(arm, 1)
        if agreed(seconds <= _HOPELESS * min(first.values(), default=math.inf)):
            first[name] = seconds
    rounds = agreed(min(20, max(3, int(_SECONDS / max(sum(first.values()), 1e-9)))))
    alike: dict[Any, Thunk] = {name: arms[name] for name in first}
    times: Mapping[Any, Timing] = time_interleaved(alike, rounds=rounds, warmup=1)
    names = list(times)
    return names[agreed(min(range(len(names)), key=lambda index: min(times[names[index]].samples_ms)))]


def paired_ratio(over: Timing, under: Timing) -> float:
    """Median over the rounds of one arm's time divided by the other's in the same round.

    Args:
      over: the arm in the numerator.
      under: the arm in the denominator, from the same ``time_interleaved``.

    Returns:
      The ratio; noise that lasts longer than a round cancels.

    Example:
      >>> paired_ratio(Timing(4, 3, 5, (3, 4, 50)), Timing(2, 2, 2, (2, 2, 25)))
      2.0
    """
    if over.n != under.n:
        raise ValueError(f"The arms have {over.n} and {under.n} rounds: take both from one time_interleaved.")
    return float(np.median(np.divide(over.samples_ms, under.samples_ms)))


def _runner(name: Any, arm: Thunk | Step) -> Callable[[int], float]:
    """A function that calls the arm so many times and returns the seconds."""
    if callable(arm):
        return lambda calls: _time_thunk(arm, calls)
    step, state, batches = arm
    if not len(batches):
        raise ValueError(f"arms[{name!r}]: batches is empty; give at least one.")
    done = 0

    def run(calls: int) -> float:
        nonlocal state, done
        extra = None
        start = time.perf_counter()
        for _ in range(calls):
            state, extra = step(state, batches[done % len(batches)])
            done += 1
        jax.block_until_ready((state, extra))
        return time.perf_counter() - start

    jax.block_until_ready((state, batches))
    return run


def _time_thunk(thunk: Thunk, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(thunk())
    return time.perf_counter() - start


def _summary(samples: list[float]) -> Timing:
    low, median, high = np.quantile(samples, [0.25, 0.5, 0.75])
    return Timing(float(median), float(low), float(high), tuple(samples))
