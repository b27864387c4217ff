"""What each arm costs: counted, compiled and timed, arms interleaved."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.cost import Executables, count_params
from effjax.core.macs import MacCount, count_macs
from effjax.core.timing import Timing, time_interleaved
from effjax.data.pipeline import prefetch_to_device
from effjax.train.loop import Prepared
from effjax.train.options import TrainOptions
from effjax.train.program import BatchShape, Program

SECONDS = 60.0
"""Time after which the steps of one group are timed in fewer rounds, down to ``LEAST_ROUNDS``."""
LEAST_ROUNDS = 5


class _Ready(NamedTuple):
    """One arm, initialised and compiled, before its state is consumed by the timing."""

    prepared: Prepared
    state: Any
    aux: Any
    params: Any
    shapes: list["_Shape"]
    extra: dict[str, float]


class _Shape(NamedTuple):
    """One batch shape of an arm and what a step on it costs."""

    batches: list[Any]
    declared: BatchShape
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
    timings = _time_steps(ready, programs, rounds)
    costs = {}
    for name, program in programs.items():
        arm, step = ready[name], ready[name].prepared.step
        step_ms, low, high = (
            _mean_step(arm, [getattr(timing, q) / program.step_period for timing in timings[name]])
            for q in ("median_ms", "q25_ms", "q75_ms")
        )
        analysis = step.analysis()
        examples = _mean_step(arm, [shape.declared.examples for shape in arm.shapes])
        costs[name] = {
            "params": count_params(arm.params),
            "macs_per_example": _per_example(
                _mean_step(arm, [_expected(shape.macs) for shape in arm.shapes]), examples
            ),
            "xla_flops_per_step": _mean_step(arm, [shape.flops for shape in arm.shapes]),
            "peak_bytes": analysis.peak_bytes,
            "temp_bytes": analysis.temp_bytes,
            "step_ms": step_ms,
            "examples_per_s": 1e3 * examples / step_ms,
            "compile_s": step.compile_s,
            "compiles": step.compiles,
            "step_ms_quartiles": [low, high],
            "inference": inference[name],
        }
        tokens = sum(shape.declared.steps * shape.declared.tokens for shape in arm.shapes)
        costs[name] |= arm.extra | ({"tokens": tokens} if tokens else {})
    return costs, {name: arm.prepared for name, arm in ready.items()}


def _prepare(name: str, program: Program, options: TrainOptions, say: Callable[[str], None]) -> _Ready:
    prepared = Prepared(program, options)
    state = prepared.init(jax.random.key(0))
    aux = program.derive(state) if program.derive else None
    prepared.warm_up(
        program, state, aux, lambda done, total: done < total and say(f"compiling {name}, shape {done + 1} of {total}")
    )
    shapes = []
    for batches, declared in _batches(program, prepared):
        prepared.step.compile(state, batches[0], aux)
        macs = count_macs(program.step, state, batches[0], aux, branch_probabilities=program.branch_probabilities)
        shapes.append(_Shape(batches, declared, macs, prepared.step.analysis(state, batches[0], aux).flops))
    params = jax.tree.map(jnp.copy, program.params(state))  # the timing donates the state's own buffers
    extra = {} if program.trained is None else {"trained_params": count_params(program.trained(state))}
    between_ms = _between_ms(program, state)
    extra |= {} if between_ms is None else {"between_ms": between_ms}
    return _Ready(prepared, state, aux, params, shapes, extra)


def _between_ms(program: Program, state: Any, repeats: int = 5) -> float | None:
    """Median time of the first work between steps; None where there is none in the whole run."""
    if program.between is None:
        return None
    copy = lambda: jax.block_until_ready(jax.tree.map(jnp.copy, state))
    probe = copy()
    first = (done for done in range(1, program.total_steps) if program.between(probe, done) is not probe)
    done = next(first, None)  # this call has compiled it
    if done is None:
        return None
    times = []
    for _ in range(repeats):
        fresh = copy()
        start = time.perf_counter()
        jax.block_until_ready(program.between(fresh, done))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _batches(program: Program, prepared: Prepared, some: int = 4) -> list[tuple[list[Any], BatchShape]]:
    """Batches on the device, by shape."""
    if program.shapes is not None:
        return [([prepared.put(shape.batch)], shape) for shape in program.shapes()]
    with prefetch_to_device(program.batches(0), some, prepared.batch_sharding) as source:
        batches = [next(source) for _ in range(some)]
    return [(batches, BatchShape(None, 1, program.batch_size))]


def _time_steps(ready: Mapping[str, _Ready], programs: Mapping[str, Program], rounds: int) -> dict[str, list[Timing]]:
    """Step times of every shape of every arm, all of them interleaved; the shapes of an arm share its state."""
    runners = {}
    for name, arm in ready.items():
        run = _shared_state(_period(arm.prepared.step, arm.aux, programs[name].step_period), arm.state)
        for index, shape in enumerate(arm.shapes):
            runners[name, index] = (run, None, shape.batches)
    start = time.perf_counter()
    for run, _, batches in runners.values():
        jax.block_until_ready(run(None, batches[0]))
    rounds = min(rounds, max(LEAST_ROUNDS, int(SECONDS / (time.perf_counter() - start))))
    times = time_interleaved(runners, rounds=rounds, warmup=3 if rounds > LEAST_ROUNDS else 1, min_time=0.01)
    return {name: [times[name, index] for index in range(len(arm.shapes))] for name, arm in ready.items()}


def _shared_state(step: Callable[[Any, Any], tuple[Any, Any]], state: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """A step for ``time_interleaved`` that keeps its state to itself."""

    def run(_, batch):
        nonlocal state
        state, metrics = step(state, batch)
        return None, (state, metrics)

    return run


def _mean_step(arm: _Ready, values: Sequence[float | None]) -> float | None:
    """Mean over the steps of a run of what one step of each shape has; None where one is not known."""
    if None in values:
        return None
    steps = [shape.declared.steps for shape in arm.shapes]
    return sum(count * value for count, value in zip(steps, values, strict=True)) / sum(steps)


def _inference(programs: Mapping[str, Program], params: Mapping[str, Any], rounds: int) -> dict[str, dict[str, Any]]:
    """Cost of inference; arms that end in the same network share one measurement."""
    owners: dict[Any, str] = {}
    shared = {}
    for name, program in programs.items():
        arguments = jax.tree.leaves((params[name], program.example_inputs))
        layout = tuple((np.shape(leaf), leaf.dtype) for leaf in arguments)
        shared[name] = owners.setdefault((program.infer, layout), name)
    calls = {name: Executables(programs[name].infer, donate_argnums=()) for name in owners.values()}
    inputs = {name: jax.device_put(programs[name].example_inputs) for name in calls}
    times = time_interleaved(
        {name: lambda name=name: calls[name](params[name], inputs[name]) for name in calls},
        rounds=rounds,
        min_time=0.002,
    )
    costs = {}
    for name, call in calls.items():
        rows = int(np.shape(jax.tree.leaves(inputs[name])[0])[0])
        macs = count_macs(programs[name].infer, params[name], inputs[name])
        costs[name] = {
            "macs_per_example": _per_example(_expected(macs), rows),
            "peak_bytes": call.analysis().peak_bytes,
            "call_ms": times[name].median_ms,
            "examples_per_s": 1e3 * rows / times[name].median_ms,
            "batch": rows,
        }
    return {name: costs[owner] for name, owner in shared.items()}


def _period(step: Executables, aux: Any, steps: int):
    """One call for as many steps as the cost needs to repeat."""

    def run(state, batch):
        for _ in range(steps):
            state, metrics = step(state, batch, aux)
        return state, metrics

    return run


def _expected(macs: MacCount) -> float | None:
    """Expected multiply-accumulates; None where they cannot be known."""
    return None if macs.unknown else macs.expected


def _per_example(macs: float | None, examples: float) -> float | None:
    return None if macs is None else macs / examples
