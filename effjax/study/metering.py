"""What each arm costs: counted, compiled and timed, arms interleaved."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.cost import Executables, count_params
from effjax.core.macs import MacCount, count_macs
from effjax.core.timing import time_interleaved
from effjax.data.pipeline import prefetch_to_device
from effjax.train.loop import Prepared
from effjax.train.options import TrainOptions
from effjax.train.program import Program


class _Ready(NamedTuple):
    """One arm, initialised and compiled, before its state is consumed by the timing."""

    prepared: Prepared
    state: Any
    batches: list[Any]
    aux: Any
    macs: MacCount
    params: Any


def measure(
    programs: Mapping[str, Program], options: TrainOptions, *, rounds: int = 40
) -> tuple[dict[str, dict[str, Any]], dict[str, Prepared]]:
    """Cost of one training step and one inference call of every program.

    Args:
      programs: arms by name; their states are alive together, so pass arms of comparable size.
      options: as for training.
      rounds: timed rounds; every round runs each arm, in alternating order.

    Returns:
      ``{arm: cost}`` with the fields of results.json, and the compiled arms for reuse.
    """
    ready = {name: _prepare(program, options) for name, program in programs.items()}
    inference = _inference(programs, {name: arm.params for name, arm in ready.items()}, rounds)
    training = time_interleaved(
        {
            name: (_period(arm.prepared.step, arm.aux, programs[name].step_period), arm.state, arm.batches)
            for name, arm in ready.items()
        },
        rounds=rounds,
        min_time=0.01,
    )
    costs = {}
    for name, program in programs.items():
        arm, step = ready[name], ready[name].prepared.step
        step_ms, low, high = (
            getattr(training[name], q) / program.step_period for q in ("median_ms", "q25_ms", "q75_ms")
        )
        analysis = step.analysis()
        costs[name] = {
            "params": count_params(arm.params),
            "macs_per_example": _per_example(arm.macs, program.batch_size),
            "xla_flops_per_step": analysis.flops,
            "peak_bytes": analysis.peak_bytes,
            "step_ms": step_ms,
            "examples_per_s": 1e3 * program.batch_size / step_ms,
            "compile_s": step.compile_s,
            "compiles": step.compiles,
            "step_ms_quartiles": [low, high],
            "inference": inference[name],
        }
    return costs, {name: arm.prepared for name, arm in ready.items()}


def _prepare(program: Program, options: TrainOptions, batches: int = 4) -> _Ready:
    prepared = Prepared(program, options)
    state = prepared.init(jax.random.key(0))
    with prefetch_to_device(program.batches(0), batches, prepared.batch_sharding) as source:
        some = [next(source) for _ in range(batches)]
    aux = program.derive(state) if program.derive else None
    prepared.step.compile(state, some[0], aux)
    macs = count_macs(program.step, state, some[0], aux, branch_probabilities=program.branch_probabilities)
    params = jax.tree.map(jnp.copy, program.params(state))  # the timing donates the state's own buffers
    return _Ready(prepared, state, some, aux, macs, params)


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
            "macs_per_example": _per_example(macs, rows),
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


def _per_example(macs: MacCount, rows: int) -> float | None:
    """Expected multiply-accumulates an example; None where they cannot be known."""
    return None if macs.unknown or macs.expected is None else macs.expected / rows
