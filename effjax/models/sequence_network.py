"""A classifier, regressor or language model around any layer of states over time, whole or step by step."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from effjax.core.cells import Cell, Params, PyTree
from effjax.core.errors import check_choice, check_number
from effjax.core.layers import at_end, check_lengths
from effjax.core.tree import wide

__all__ = ["SequenceNetwork"]


class SequenceNetwork(nn.Module):
    """Embedding (of ids), a layer of states over time, and a linear head on the last state, their mean, or all.

    Args:
      layer: from ``[batch, time, features]`` to states ``[batch, time, hidden]``: ``IncrementalRNN``, ``TARNN``,
        ``LRU``, ``Recurrent(LSTMCell(64))``, ``nn.RNN(nn.GRUCell(64))``, an ``nn.Sequential`` of several, ...
      outputs: classes, numbers to predict, or words of the output vocabulary.
      read: ``"last"`` or ``"mean"``, of the states over time, for one answer per sequence; ``"all"`` for one per time
        step.
      vocabulary: of ids to embed; None where inputs are vectors.
      embedding: width of the embedding.
      dropout: rate on the states that the head reads, and on embeddings.

    Returns:
      When called with vectors ``[batch, time, features]`` or ids ``[batch, time]``: ``[batch, outputs]``, or
      ``[batch, time, outputs]``, float32 at least. With ``seq_lengths``, integers ``[batch]``, what follows the end of
      a sequence is padding: the last state is that of its end, the mean that of its own steps, and outputs for each
      time step mean nothing at the padding.

    Raises:
      ValueError: inputs of another rank, an unknown ``read``, an embedding without a vocabulary, lengths outside
        [1, time], or ``seq_lengths`` with a layer that takes none.

    Example:
      >>> from effjax.recurrent.irnn import IncrementalRNN
      >>> network = SequenceNetwork(IncrementalRNN(8, length=20), outputs=3)
      >>> outputs, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.ones((4, 20, 2)))
      >>> outputs.shape
      (4, 3)
    """

    layer: nn.Module
    outputs: int
    read: str = "last"
    vocabulary: int | None = None
    embedding: int | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array | np.ndarray, "batch time features"] | Int[Array | np.ndarray, "batch time"],
        train: bool = False,
        seq_lengths: Int[Array | np.ndarray, "series"] | None = None,
    ) -> jax.Array:
        check_choice("read", self.read, ("last", "mean", "all"))
        if (self.vocabulary is None) != (self.embedding is None):
            raise ValueError(
                f"vocabulary={self.vocabulary} and embedding={self.embedding}: ids need both, vectors neither."
            )
        drop = nn.Dropout(self.dropout, deterministic=not train)
        rank = 3 if self.vocabulary is None else 2
        if jnp.ndim(x) != rank:
            wanted = "vectors [batch, time, features]" if rank == 3 else "ids [batch, time]"
            raise ValueError(f"x has shape {jnp.shape(x)}, but vocabulary={self.vocabulary} asks for {wanted}.")
        lengths = None if seq_lengths is None else check_lengths(seq_lengths, x.shape[0], x.shape[1], least=1)
        if lengths is not None:
            # Whatever fills the padding, NaN included, must not reach a gradient.
            x = jnp.where(_real(x, lengths), x, 0)
        if self.vocabulary is not None and self.embedding is not None:
            check_number("embedding", self.embedding, low=1, integer=True)
            x = drop(nn.Embed(self.vocabulary, self.embedding, name="embed")(x))
        if lengths is not None:
            states = _read_at_ends(_states(self.layer, x, lengths), lengths, self.read)
        else:
            states = self.layer(x)
            if self.read != "all":
                states = states[:, -1] if self.read == "last" else states.mean(1)
        return wide(nn.Dense(self.outputs, name="head")(drop(states)))


def _real(x: jax.Array | np.ndarray, lengths: jax.Array) -> jax.Array:
    """True at the steps of ``x`` ``[batch, time, ...]`` that are no padding."""
    real = jnp.arange(x.shape[1])[None] < lengths[:, None]
    return real.reshape(*real.shape, *[1] * (x.ndim - 2))


def _read_at_ends(states: jax.Array, lengths: jax.Array, read: str) -> jax.Array:
    if read == "last":
        return at_end(jnp.swapaxes(states, 0, 1), lengths)
    if read == "mean":
        total = jnp.where(_real(states, lengths), wide(states), 0).sum(1)
        return (total / jnp.maximum(lengths, 1)[:, None]).astype(states.dtype)
    return states


_STEPWISE = (nn.Dense, nn.DenseGeneral, nn.LayerNorm, nn.RMSNorm, nn.Dropout)


def takes_lengths(module: Any) -> bool:
    """Whether a module is called with ``seq_lengths``."""
    return "seq_lengths" in inspect.signature(type(module).__call__).parameters


def _states(layer: Any, x: Any, lengths: jax.Array) -> Any:
    """The states of a layer, or of several in an ``nn.Sequential``, that are told where sequences end."""
    if isinstance(layer, nn.Sequential):
        for part in layer.layers:
            x = _states(part, x, lengths)
        return x
    if isinstance(layer, nn.Module):
        if takes_lengths(layer):
            return layer(x, seq_lengths=lengths)
        if not isinstance(layer, _STEPWISE):
            raise ValueError(
                f"seq_lengths with the layer {type(layer).__name__}, which takes none: its states may depend on the "
                "padding. Give its __call__ a keyword seq_lengths, or give sequences of one length."
            )
    return layer(x)


class StepNetwork(NamedTuple):
    """A recurrent network as pure functions of one time step, for ``fptt_step`` and ``bptt_step``.

    The parameters are one tree: ``{"cell", "head"}`` and, where inputs are ids, ``"embedding"``.

    Attributes:
      init: ``key -> params``; traceable.
      start: ``rows -> carry`` of zeros.
      encode: ``(params, xs) -> xs``: the embedding and the cell's products with the inputs, for any number of steps at
        once.
      cell: ``(params, carry, x) -> (carry, state)``, one step in time.
      read: ``(params, states) -> outputs``, float32 at least.
      infer: ``(params, inputs [rows, time, ...], seq_lengths=None) -> outputs``; with ``seq_lengths``, integers
        ``[rows]``, the last state is that of each sequence's end.
    """

    init: Callable[[jax.Array], PyTree]
    start: Callable[[int], PyTree]
    encode: Callable[[PyTree, jax.Array], PyTree]
    cell: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, jax.Array]]
    read: Callable[[PyTree, jax.Array], Float[Array, "... outputs"]]
    infer: Callable[..., Float[Array, "... outputs"]]


def step_network(
    cell: Cell,
    outputs: int,
    *,
    inputs: int | None = None,
    vocabulary: int | None = None,
    read: str = "last",
    dtype: DTypeLike | None = None,
    adjust: Callable[[jax.Array, Params], Params] = lambda key, params: params,
) -> StepNetwork:
    """A cell between an embedding of its own width, where inputs are ids, and a linear head.

    Args:
      cell: an ``effjax.core.cells.Cell``, such as ``LSTMCell(64)`` or ``IncrementalRNNCell(64, length=200)``.
      outputs: classes, numbers to predict, or words of the output vocabulary.
      inputs: size of an input vector; None where inputs are ids.
      vocabulary: of ids to embed; None where inputs are vectors.
      read: ``"last"`` or ``"all"``: the states that ``infer`` reads.
      dtype: of the operands of embedding and head, by default their own.
      adjust: ``(key, the cell's initial parameters) -> parameters``.

    Returns:
      A ``StepNetwork``.

    Raises:
      TypeError: a cell of another kind.
      ValueError: none or both of ``inputs`` and ``vocabulary``, or an unknown ``read``.

    Example:
      >>> from effjax.models.sequence import LSTMCell
      >>> net = step_network(LSTMCell(8), outputs=3, inputs=2)
      >>> net.infer(net.init(jax.random.key(0)), jnp.ones((4, 20, 2))).shape
      (4, 3)
    """
    if not isinstance(cell, Cell):
        raise TypeError(f"cell={type(cell).__name__} cannot be taken apart. Give an effjax.core.cells.Cell.")
    check_choice("read", read, ("last", "all"))
    if (inputs is None) == (vocabulary is None):
        raise ValueError(f"inputs={inputs} and vocabulary={vocabulary}: give the one for vectors or the other for ids.")
    embedding = None if vocabulary is None else nn.Embed(vocabulary, cell.features, dtype=dtype)
    head = nn.Dense(outputs, dtype=dtype)
    width = cell.features if inputs is None else inputs

    def start(rows: int) -> PyTree:
        return cell.initialize_carry(jax.random.key(0), (rows, width))

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, 3)
        params = {"cell": adjust(keys[0], cell.init(keys[0], start(1), jnp.zeros((1, width)))["params"])}
        params["head"] = head.init(keys[1], jnp.zeros((1, cell.features)))["params"]
        if embedding is not None:
            params["embedding"] = embedding.init(keys[2], jnp.zeros(1, int))["params"]
        return params

    def encode(params: PyTree, xs: jax.Array | np.ndarray) -> PyTree:
        vectors: Any = xs if embedding is None else embedding.apply({"params": params["embedding"]}, xs)
        return cell.project(params["cell"], vectors)

    def advance(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, jax.Array]:
        return cell.advance(params["cell"], carry, x)

    def outputs_of(params: PyTree, states: jax.Array) -> jax.Array:
        return wide(head.apply({"params": params["head"]}, states))

    def infer(params: PyTree, inputs: jax.Array | np.ndarray, seq_lengths: Any = None) -> jax.Array:
        cell.check_steps(inputs.shape[1])
        lengths = None
        if seq_lengths is not None:
            cell.check_padding()
            lengths = check_lengths(seq_lengths, *inputs.shape[:2], least=1)
        xs = encode(params, jnp.swapaxes(inputs, 0, 1))
        _, states = jax.lax.scan(lambda carry, x: advance(params, carry, x), start(len(inputs)), xs)
        return outputs_of(params, jnp.swapaxes(states, 0, 1) if read == "all" else at_end(states, lengths))

    return StepNetwork(init, start, encode, advance, outputs_of, infer)
