"""The protocol between a method and everything that runs it: a Program is data, not a subclass."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax.core.partition import Rules
from effjax.data.pipeline import ResumableIterator
from effjax.tasks.task import Task

__all__ = ["Curve", "Loader", "Phase", "Program"]

PyTree = Any
State = PyTree
Batch = PyTree
Aux = PyTree


class BatchShape(NamedTuple):
    """One of the batch shapes that a run uses.

    Attributes:
      batch: an example, as the loader gives it.
      steps: how many steps of a run have this shape; where seeds differ, of seed 0.
      examples: real examples in such a batch, on average over those steps.
      tokens: positions that one such batch makes the model process, padding included; 0 where the data
        are no tokens.
    """

    batch: Batch
    steps: float
    examples: float
    tokens: int = 0


class Loader(NamedTuple):
    """Where the batches of a run come from.

    Attributes:
      open: ``seed -> iterator`` over batches, with ``get_state`` and ``set_state``; None where the steps take no
        batches (``batch`` is then None), as those on a whole graph.
      batch_size: examples consumed by one step, over all processes; where batches differ in size, that of
        the batches the learning rate is meant for.
      epoch_steps: ``epoch -> steps``, for budgets in epochs.
      shapes: every batch shape of every seed, for runs that have several: all are compiled before the
        first step, and a batch of another shape is an error. Empty where all batches are alike.
    """

    open: Callable[[int], ResumableIterator] | None
    batch_size: int
    epoch_steps: Callable[[int], int] | None = None
    shapes: tuple[BatchShape, ...] = ()


class Phase(NamedTuple):
    """A part of a run with one step function.

    Attributes:
      step: ``(state, batch, aux) -> (state, metrics)``; traceable, never jitted by the recipe, compiled once for all
        phases that share it. ``metrics`` is a flat dictionary of scalars and holds ``loss``; a step that knows its
        gradients may say in ``sound`` whether they are finite, for runs that skip such updates.
      steps: at most; None for as many as the budget allows.
      over: ``state -> bool``, traced and read after every step: the phase ends early where it is True.
      leave: ``state -> state`` on the host, after the last step: a knot, new pseudolabels, a pruning decision.
      aux: ``state -> aux`` on the host, when the phase begins or a run continues in it: what ``step`` reads and what
        is never saved.
      period: steps after which the cost of a step repeats (some work is done every n steps only).
    """

    step: Callable[[State, Batch, Aux], tuple[State, Mapping[str, jax.Array]]]
    steps: int | None
    over: Callable[[State], jax.Array] | None = None
    leave: Callable[[State], State] | None = None
    aux: Callable[[State], Aux] | None = None
    period: int = 1


class Curve(NamedTuple):
    """What an evaluation may give beside numbers: one quantity against another.

    Attributes:
      x: [points], increasing and the same for every seed of an arm, so that seeds can be averaged.
      y: [points].
      points: single places by name, ``(x, y)``, such as what a model does alone.

    Example:
      ``Curve(coverages, errors, points={"all answered": (1.0, error)})``
    """

    x: Sequence[float] | np.ndarray | jax.Array
    y: Sequence[float] | np.ndarray | jax.Array
    points: Mapping[str, tuple[float, float]] = MappingProxyType({})


class Program(NamedTuple):
    """One trainable thing as pure functions. The loop, the checkpoint, the cost meter and the report know no more.

    The structure, shapes and dtypes of the state are fixed for the whole run, so that any checkpoint restores.

    Attributes:
      task: what is learned; ``infer``, ``evaluate``, ``example_inputs`` and ``source`` are the task's.
      init: ``key -> state``; traceable.
      phases: one after another.
      params: ``state -> variables`` for the task's ``infer`` and ``evaluate``, and for export.
      loader: of the batches; None as ``Loader(None, 1)``.
      evaluate: ``state -> {name: number or Curve}``; None for the task's, of ``params(state)``. Curves are reported of
        the last evaluation, and a study's group says what they are.
      sharding: ``(regex, axis names)`` rules over the state's paths, first match wins; the rest is
        replicated. Used only on a mesh of several devices.
      trained: ``state -> tree`` of what the optimizer moves, where that is not all of ``params``.
      export: ``(state, path, merged=False)``, writes a folder that other libraries read: adapters, or the merged
        network.
      train_metrics: from the means of the step metrics over the run to what the report shows.
    """

    task: Task
    init: Callable[[jax.Array], State]
    phases: tuple[Phase, ...]
    params: Callable[[State], PyTree]
    loader: Loader | None = None
    evaluate: Callable[[State], Mapping[str, Any]] | None = None
    sharding: Rules = ()
    trained: Callable[[State], PyTree] | None = None
    export: Callable[..., None] | None = None
    train_metrics: Callable[[Mapping[str, float]], Mapping[str, float]] = dict

    @property
    def total_steps(self) -> int:
        """Steps of a run in which no phase ends early."""
        total = 0
        for index, phase in enumerate(self.phases):
            if phase.steps is None:
                raise ValueError(
                    f"phase {index} of {self.task.name!r} has no number of steps. Give steps= to the trainer, or a "
                    "budget to `compare`."
                )
            total += phase.steps
        return total

    @property
    def has_batches(self) -> bool:
        """Whether steps are given batches."""
        return self.loader is not None and self.loader.open is not None

    @property
    def shapes(self) -> tuple[BatchShape, ...]:
        """Every batch shape, where there are several."""
        return self.loader.shapes if self.loader else ()

    @property
    def batch_size(self) -> int:
        """Examples of one step; 1 where there are no batches."""
        return self.loader.batch_size if self.loader else 1

    @property
    def compiles(self) -> int:
        """Executables that a run may need: one per batch shape, of every step function.

        A phase with ``aux`` of its own may need one more.
        """
        shared = {phase.step for phase in self.phases if phase.aux is None}
        own = sum(phase.aux is not None for phase in self.phases)
        return (len(shared) + own) * max(1, len(self.shapes))

    def judged(self, state: State) -> dict[str, float]:
        """The metrics of a state on the held-out data."""
        return self.measured(state)[0]

    def measured(self, state: State) -> tuple[dict[str, float], dict[str, Curve]]:
        """The metrics of a state on the held-out data, and its curves."""
        found = self.task.evaluate(self.params(state)) if self.evaluate is None else self.evaluate(state)
        curves = {name: value for name, value in found.items() if isinstance(value, Curve)}
        return {name: float(value) for name, value in found.items() if name not in curves}, curves

    def within(self, steps: int) -> "Program":
        """The program whose open-ended phases share ``steps`` steps equally."""
        free = [index for index, phase in enumerate(self.phases) if phase.steps is None]
        phases = list(self.phases)
        for part, index in enumerate(free):
            first, last = (round(steps * edge / len(free)) for edge in (part, part + 1))
            phases[index] = phases[index]._replace(steps=last - first)
        return self._replace(phases=tuple(phases))
