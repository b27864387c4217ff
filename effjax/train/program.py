"""The protocol between a method's study and everything that runs it: an arm is data, not a subclass."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from effjax.data.pipeline import ResumableIterator

PyTree = Any
State = PyTree
Batch = PyTree
Aux = PyTree


class BatchShape(NamedTuple):
    """One of the batch shapes that a run uses.

    Attributes:
      batch: an example, as ``Program.batches`` gives it.
      steps: how many steps of a run have this shape; where seeds differ, of seed 0.
      examples: real examples in such a batch, on average over those steps.
      tokens: positions that one such batch makes the model process, padding included; 0 where the data
        are no tokens.
    """

    batch: Batch
    steps: float
    examples: float
    tokens: int = 0


class Program(NamedTuple):
    """One trainable thing as pure functions. The loop, the checkpoint, the cost meter and the report know no more.

    The structure, shapes and dtypes of ``state`` are fixed for the whole run, so that any
    checkpoint restores.

    Attributes:
      init: ``key -> state``; traceable.
      step: ``(state, batch, aux) -> (state, metrics)``; traceable, never jitted by the recipe.
        ``metrics`` is a flat dictionary of scalars and holds ``loss``.
      batches: ``seed -> iterator`` over batches, with ``get_state`` and ``set_state``.
      evaluate: ``state -> {name: float}`` on held-out data.
      infer: ``(params, inputs) -> outputs``; traceable.
      params: ``state -> params`` used by ``infer`` and export.
      example_inputs: inputs for ``infer``, with the batch axis leading.
      total_steps: steps of one run, the same for all seeds.
      batch_size: examples consumed by one step, over all processes; where batches differ in size, that of
        the batches the learning rate is meant for.
      source: where the data came from, for the record; a run is not continued on other data.
      compiles: executables of ``step`` that a run may need.
      shapes: every batch shape of every seed, for runs that have several: all are compiled before the
        first step, and a batch of another shape is an error. None where all batches are alike.
      step_period: steps after which the cost of a step repeats (some work is done every n steps only).
      between: host work after a step, ``(state, steps_done) -> state``; returns the very same object
        when it did nothing.
      derive: ``state -> aux``; rebuilt on start, on resume and after ``between``; never saved.
      sharding: ``(regex, axis names)`` rules over the state's paths, first match wins; the rest is
        replicated. Used only on a mesh of several devices.
      branch_probabilities: for the MAC counter, ``{scope regex: probabilities}`` of the ``cond``s in ``step``.
      trained: ``state -> tree`` of what the optimizer moves, where that is not all of ``params``.
      folder: ``(state, path, merged=False)``, writes a folder that other libraries read: adapters, or the merged
        network.
      train_metrics: reduces the running means of the step metrics to what the report shows.
    """

    init: Callable[[jax.Array], State]
    step: Callable[[State, Batch, Aux], tuple[State, Mapping[str, jax.Array]]]
    batches: Callable[[int], ResumableIterator]
    evaluate: Callable[[State], Mapping[str, float]]
    infer: Callable[[PyTree, PyTree], PyTree]
    params: Callable[[State], PyTree]
    example_inputs: PyTree
    total_steps: int
    batch_size: int
    source: str = ""
    compiles: int = 1
    shapes: Callable[[], Sequence[BatchShape]] | None = None
    step_period: int = 1
    between: Callable[[State, int], State] | None = None
    derive: Callable[[State], Aux] | None = None
    sharding: tuple[tuple[str, tuple[str | None, ...]], ...] = ()
    branch_probabilities: Mapping[str, Sequence[float]] = MappingProxyType({})
    trained: Callable[[State], PyTree] | None = None
    folder: Callable[..., None] | None = None
    train_metrics: Callable[[Mapping[str, float]], Mapping[str, float]] = dict
