"""The one type of every task: data, network, loss and evaluation as pure functions."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax

__all__ = ["Metric", "Task"]

PyTree = Any
Variables = Mapping[str, PyTree]
Batch = PyTree
Loss = Callable[..., tuple[jax.Array, tuple[Variables, Mapping[str, jax.Array]]]]


class Metric(NamedTuple):
    """What a task is judged by.

    Attributes:
      name: the key in the dictionary that ``Task.evaluate`` returns.
      goal: ``'min'`` or ``'max'``.
      label: the words of tables and plots, such as ``'test accuracy'``.
    """

    name: str
    goal: Literal["min", "max"]
    label: str


class Task(NamedTuple):
    """A problem: data, a network for it, its loss, and how it is judged.

    Attributes:
      name: ``data/model``.
      source: where the data came from, and how many rows.
      metric: what the task is judged by.
      init: ``key -> variables``, ``{"params": ..., "batch_stats": ...}``; traceable.
      loss: ``(variables, batch, key=None, *, train=True) -> (loss, (model_state, metrics))``; traceable. ``loss`` is a
        mean over the batch's real examples, ``model_state`` holds the collections other than ``params``, ``metrics``
        scalars among which is ``loss``. ``key`` feeds dropout.
      infer: ``(variables, inputs) -> outputs`` in evaluation mode; traceable.
      evaluate: ``variables -> {name: number}`` on the held-out data.
      train: the training data: columns with one row per example, or what the task's module takes whole.
      example_inputs: inputs of ``infer``, the batch axis leading.
      test: the held-out data, in the form of ``train``.
      classes: number of labels; None where there are none.
      module: the network.
      tokenizer: what made the tokens; None where the data are not text.
      pretrained: the checkpoint that ``init`` starts from; None for fresh parameters.
      weight: ``batch -> number`` of examples (or tokens) that ``loss`` is a mean over; None for the sum of the batch's
        column ``weight``, or its rows where it has none.
      full_batch: whether ``train`` is one batch that every step sees whole, such as a graph.
      dtype: what the network computes in.
      remat: whether the network recomputes activations in the backward pass.
      details: what only tasks of one modality have, by name.
    """

    name: str
    source: str
    metric: Metric
    init: Callable[[jax.Array], Variables]
    loss: Loss
    infer: Callable[[Variables, PyTree], PyTree]
    evaluate: Callable[[Variables], Mapping[str, float]]
    train: Any
    example_inputs: PyTree
    test: Any = None
    classes: int | None = None
    module: Any = None
    tokenizer: Any = None
    pretrained: Any = None
    weight: Callable[[Batch], jax.Array] | None = None
    full_batch: bool = False
    dtype: str = "float32"
    remat: bool = False
    details: Mapping[str, Any] = MappingProxyType({})
