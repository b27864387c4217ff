"""Sequence problems with a recurrent network, whole or step by step, that fits the data."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.core.cells import Cell, Params
from effjax.data.sequences import Kind, SequenceData, sequence_data
from effjax.models.sequence_network import SequenceNetwork, StepNetwork, step_network
from effjax.recurrent.fptt import fptt_terminal_loss
from effjax.recurrent.sequence_problem import SequencePart
from effjax.tasks.sequence import inputs_and_lengths, sequence_loss, sequence_task, task_of_functions
from effjax.tasks.task import Task

PyTree = Any


def layer_task(
    data: str | SequenceData,
    layer: nn.Module,
    *,
    embedding: int = 64,
    read: str = "last",
    dropout: float = 0.0,
    dtype: str = "float32",
    remat: bool = False,
) -> Task:
    """``sequence_task`` of a ``SequenceNetwork`` around a layer: embedding and head are made to fit the data.

    Args:
      data: a name of ``effjax.data.sequences``, or a ``SequenceData``.
      layer: from ``[batch, time, features]`` to states ``[batch, time, hidden]``, as for ``sequence_layer``.
      embedding: width of the embedding, where inputs are ids.
      read: ``"last"`` or ``"mean"``, of the states over time; where there is one answer per time step, all are read.
      dropout: rate on the states that the head reads, and on embeddings.
      dtype: as for ``sequence_task``.
      remat: as for ``sequence_task``.

    Returns:
      A ``Task``.

    Raises:
      ValueError: as ``sequence_task``.

    Example:
      >>> from effjax.tasks.sequence_layers import sequence_layer
      >>> task = layer_task("add-20", sequence_layer("irnn", 8, length=20))
      >>> jax.eval_shape(task.infer, task.init(jax.random.key(0)), task.example_inputs).shape
      (1, 1)
    """
    data = sequence_data(data) if isinstance(data, str) else data
    ids: dict[str, Any] = {"vocabulary": data.vocabulary, "embedding": embedding} if data.vocabulary else {}
    read = "all" if data.kind == "tokens" else read
    network = SequenceNetwork(layer, data.outputs, read=read, dropout=dropout, **ids)
    return sequence_task(data, network, dtype=dtype, remat=remat)


def cell_task(
    data: str | SequenceData,
    cell: Cell,
    *,
    name: str | None = None,
    adjust: Callable[[jax.Array, Params], Params] = lambda key, params: params,
    dtype: str = "float32",
) -> Task:
    """A sequence problem with a ``StepNetwork`` around a cell, for ``effjax.train.through_time``.

    Args:
      data: a name of ``effjax.data.sequences``, or a ``SequenceData``.
      cell: an ``effjax.core.cells.Cell``, as for ``sequence_cell``.
      name: of the network; None for the cell's class.
      adjust: ``(key, the cell's initial parameters) -> parameters``, such as ``torch_lstm_init``.
      dtype: of the matrix products' operands in embedding and head; the cell is made with the same.

    Returns:
      A ``Task`` whose ``details`` hold the ``StepNetwork`` as ``network``.

    Raises:
      TypeError: a cell of another kind.
      ValueError: as ``sequence_task``.

    Example:
      >>> from effjax.tasks.sequence_layers import sequence_cell
      >>> task = cell_task("add-20", sequence_cell("lstm", 8, length=20))
      >>> sorted(task.init(jax.random.key(0))["params"])
      ['cell', 'head']
    """
    data = sequence_data(data) if isinstance(data, str) else data
    network = step_network(
        cell,
        data.outputs,
        inputs=data.features or None,
        vocabulary=data.vocabulary or None,
        read="all" if data.kind == "tokens" else "last",
        dtype=None if dtype == "float32" else jnp.dtype(dtype),
        adjust=adjust,
    )
    task = task_of_functions(
        data,
        name or type(cell).__name__,
        init=lambda key: {"params": network.init(key)},
        apply=lambda variables, inputs, key, train: (
            network.infer(variables["params"], *inputs_and_lengths(inputs)),
            {},
        ),
        dtype=dtype,
    )
    return task._replace(details={**task.details, "network": network})


def part_loss(
    kind: Kind, network: StepNetwork, *, auxiliary: str = "none"
) -> Callable[[PyTree, PyTree, PyTree, SequencePart], Float[Array, ""]]:
    r"""The loss of one part of a sequence, for ``fptt_step``, ``bptt_step`` and ``tbptt_step``.

    .. math:: \ell_p = \frac{p + 1}{P'}\, \ell(o_p, y)

    where the sequence has a single target y, so that it weighs as much as has been seen of the sequence; the mean over
    the part's tokens where every time step has one.

    Args:
      kind: as for ``sequence_loss``; all but ``"tokens"`` need ``terminal=True`` in the step.
      network: whose ``read`` gives the outputs.
      auxiliary: of classes, ``"uniform"`` asks parts before the last for the uniform distribution too, see
        ``fptt_terminal_loss``.

    Returns:
      ``(params, states, targets, part) -> scalar``.

    Example:
      >>> from effjax.models.sequence import LSTMCell
      >>> network = step_network(LSTMCell(8), outputs=1, inputs=2)
      >>> loss, params = part_loss("value", network), network.init(jax.random.key(0))
      >>> first, last = SequencePart(0, 2, 2), SequencePart(1, 2, 2)
      >>> [float(loss(params, jnp.zeros((3, 8)), jnp.ones(3), part)) for part in (first, last)]
      [0.5, 1.0]
    """

    def loss(params: PyTree, states: jax.Array, targets: jax.Array, part: SequencePart) -> jax.Array:
        outputs = network.read(params, states)
        if kind == "class":
            return fptt_terminal_loss(outputs, targets, part, auxiliary=auxiliary)
        value = sequence_loss(kind, outputs, targets)
        return value if kind == "tokens" else part.progress * value

    return loss
