"""What each arm costs: counted, compiled and timed, arms interleaved."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax.core.cost import Executables, count_params
from effjax.core.macs import MacCount
from effjax.core.timing import Timing, agreed, time_interleaved
from effjax.core.tree import copied
from effjax.data.pipeline import prefetch_to_device
from effjax.train.loop import Prepared
from effjax.train.options import TrainOptions
from effjax.train.program import BatchShape, Phase, Program
from effjax.train.signals import check_stop

SECONDS = 60.0
"""Time after which the steps of one group are timed in fewer rounds, down to ``LEAST_ROUNDS``."""
LEAST_ROUNDS = 5


class _Ready(NamedTuple):
    """One arm, initialised and compiled, before its state is consumed by the timing."""

    prepared: Prepared
    state: Any
    params: Any
    kinds: list["_Kind"]
    extra: dict[str, float]


class _Kind(NamedTuple):
    """Steps of an arm that cost the same: those of phases with one step function, on one batch shape."""

    phase: Phase
    aux: Any
    steps: float
    examples: float
    tokens: int
    batches: list[Any]
    macs: MacCount
    flops: float | None


def measure(
    programs: Mapping[str, Program],
    options: TrainOptions,
    *,
    rounds: int = 40,
    say: Callable[[str], None] = lambda what: None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Prepared]]:
    """Cost of one training step and one inference call of every program.

    Of a program with several batch shapes every shape is measured, and a number is the mean over the
    steps of a run.

    Args:
      programs: arms by name; their states are alive together, so pass arms of comparable size.
      options: as for training.
      rounds: timed rounds; every round runs each arm, in alternating order. Fewer where a round is long.
      say: told what is being compiled, where that takes several executables.

    Returns:
      ``{arm: cost}`` with the fields of results.json, and the compiled arms for reuse.
    """
    ready = {name: _prepare(name, program, options, say) for name, program in programs.items()}
    inference = _inference(programs, {name: arm.params for name, arm in ready.items()}, rounds)
    timings = _time_steps(ready, rounds)
    return {
        name: _cost(ready[name], timings[name]) | {"inference": inference[name]} | ready[name].extra
        for name in programs
    }, {name: arm.prepared for name, arm in ready.items()}


def _cost(arm: _Ready, timings: list[Timing]) -> dict[str, Any]:
    """The numbers of one arm; a number of its step is the mean over the steps of a run."""
    step_ms, low, high = (
        _weighted(
            arm, [getattr(timing, q) / kind.phase.period for timing, kind in zip(timings, arm.kinds, strict=True)]
        )
        for q in ("median_ms", "q25_ms", "q75_ms")
    )
    analyses = (arm.prepared.step(kind.phase).analysis() for kind in arm.kinds)
    largest = max(analyses, key=lambda analysis: analysis.peak_bytes or 0)
    examples = _weighted(arm, [kind.examples for kind in arm.kinds])
    macs = _mean_step(arm, [_expected(kind.macs) for kind in arm.kinds])
    tokens = sum(kind.steps * kind.tokens for kind in arm.kinds)
    return {
        "params": count_params(arm.params),
        "macs_per_example": None if macs is None else macs / examples,
        "xla_flops_per_step": _mean_step(arm, [kind.flops for kind in arm.kinds]),
        "peak_bytes": largest.peak_bytes,
        "temp_bytes": largest.temp_bytes,
        "step_ms": step_ms,
        "examples_per_s": 1e3 * examples / step_ms,
        "compile_s": arm.prepared.compile_s,
        "compiles": arm.prepared.compiles,
        "step_ms_quartiles": [low, high],
        "examples": sum(kind.steps * kind.examples for kind in arm.kinds),
    } | ({"tokens": tokens} if tokens else {})


def _prepare(name: str, program: Program, options: TrainOptions, say: Callable[[str], None]) -> _Ready:
    prepared = Prepared(program, options)
    state = prepared.init(jax.random.key(0))
    told = lambda done, total: done < total and say(f"compiling {name}, shape {done + 1} of {total}")
    kinds = []
    by_step: dict[Any, list[Phase]] = {}
    for phase in program.phases:
        by_step.setdefault(phase.step, []).append(phase)
    for phases in by_step.values():
        phase, steps = phases[0], sum(phase.steps or 0 for phase in phases)
        aux = phase.aux(state) if phase.aux else None
        prepared.warm_up(phase, state, aux, told)
        compiled = prepared.step(phase)
        declared = _batches(program, prepared)
        whole = sum(shape.steps for _, shape in declared)
        for batches, shape in declared:
            check_stop()
            macs = compiled.macs(state, batches[0], aux)
            flops = compiled.analysis(state, batches[0], aux).flops
            share = steps * shape.steps / whole
            kinds.append(_Kind(phase, aux, share, shape.examples, shape.tokens, batches, macs, flops))
    params = copied(program.params(state))  # the timing donates the state's own buffers
    extra = {} if program.trained is None else {"trained_params": count_params(program.trained(state))}
    between_ms = _between_ms(program, state)
    extra |= {} if between_ms is None else {"between_ms": between_ms}
    return _Ready(prepared, state, params, kinds, extra)


def _between_ms(program: Program, state: Any, repeats: int = 5) -> float | None:
    """Median time of the first work between two phases; None where there is none."""
    leave = next((phase.leave for phase in program.phases[:-1] if phase.leave is not None), None)
    if leave is None:
        return None
    copy = lambda: jax.block_until_ready(copied(state))
    jax.block_until_ready(leave(copy()))  # this call compiles it
    times = []
    for _ in range(repeats):
        fresh = copy()
        start = time.perf_counter()
        jax.block_until_ready(leave(fresh))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _batches(program: Program, prepared: Prepared, some: int = 4) -> list[tuple[list[Any], BatchShape]]:
    """Batches on the device, by shape."""
    loader = program.loader
    if loader is None or loader.open is None:
        return [([None], BatchShape(None, 1, program.batch_size))]
    if program.shapes:
        return [([prepared.put(shape.batch)], shape) for shape in program.shapes]
    with prefetch_to_device(loader.open(0), some, prepared.batch_sharding) as source:
        batches = [next(source) for _ in range(some)]
    return [(batches, BatchShape(None, 1, program.batch_size))]


def _time_steps(ready: Mapping[str, _Ready], rounds: int) -> dict[str, list[Timing]]:
    """Step times of every kind of step of every arm, all of them interleaved; those of one arm share its state."""
    runners: dict[Any, Any] = {}
    for name, arm in ready.items():
        shared = _shared_state(arm.state)
        for index, kind in enumerate(arm.kinds):
            step = _period(arm.prepared.step(kind.phase), kind.aux, kind.phase.period)
            runners[name, index] = (functools.partial(shared, step), None, kind.batches)
    start = time.perf_counter()
    for run, _, batches in runners.values():
        jax.block_until_ready(run(None, batches[0]))
    rounds = agreed(min(rounds, max(LEAST_ROUNDS, int(SECONDS / (time.perf_counter() - start)))))
    times: Mapping[Any, Timing] = time_interleaved(
        runners, rounds=rounds, warmup=3 if rounds > LEAST_ROUNDS else 1, min_time=0.01, on_round=check_stop
    )
    return {name: [times[name, index] for index in range(len(arm.kinds))] for name, arm in ready.items()}


def _shared_state(state: Any) -> Callable[..., tuple[Any, Any]]:
    """A runner for ``time_interleaved`` that keeps the state of all steps of an arm to itself."""

    def run(step, _, batch):
        nonlocal state
        state, metrics = step(state, batch)
        return None, (state, metrics)

    return run


def _mean_step(arm: _Ready, values: Sequence[float | None]) -> float | None:
    """``_weighted``; None where a number is not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return _weighted(arm, known)


def _weighted(arm: _Ready, values: Sequence[float]) -> float:
    """Mean over the steps of a run of what one step of each shape has."""
    steps = [kind.steps for kind in arm.kinds]
    return sum(count * value for count, value in zip(steps, values, strict=True)) / sum(steps)


def _inference(programs: Mapping[str, Program], params: Mapping[str, Any], rounds: int) -> dict[str, dict[str, Any]]:
    """Cost of inference; arms that end in the same network share one measurement."""
    owners: dict[Any, str] = {}
    shared = {}
    for name, program in programs.items():
        arguments = jax.tree.leaves((params[name], program.task.example_inputs))
        layout = tuple((np.shape(leaf), leaf.dtype) for leaf in arguments)
        shared[name] = owners.setdefault((program.task.infer, layout), name)
    calls = {name: Executables(programs[name].task.infer, donate_argnums=()) for name in owners.values()}
    inputs = {name: jax.device_put(programs[name].task.example_inputs) for name in calls}
    times = time_interleaved(
        {name: lambda name=name: calls[name](params[name], inputs[name]) for name in calls},
        rounds=rounds,
        min_time=0.002,
        on_round=check_stop,
    )
    costs = {}
    for name, call in calls.items():
        rows = int(np.shape(jax.tree.leaves(inputs[name])[0])[0])
        expected = _expected(call.macs(params[name], inputs[name]))
        costs[name] = {
            "macs_per_example": None if expected is None else expected / rows,
            "peak_bytes": call.analysis().peak_bytes,
            "call_ms": times[name].median_ms,
            "examples_per_s": 1e3 * rows / times[name].median_ms,
            "batch": rows,
        }
    return {name: costs[owner] for name, owner in shared.items()}


def _period(step: Executables, aux: Any, steps: int):
    """One call for as many steps as the cost needs to repeat."""

    def run(state, batch):
        for _ in range(steps - 1):
            state, _ = step(state, batch, aux)
        return step(state, batch, aux)

    return run


def _expected(macs: MacCount) -> float | None:
    """Expected multiply-accumulates; None where they cannot be known."""
    return None if macs.unknown else macs.expected
