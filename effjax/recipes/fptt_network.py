"""A recurrent network taken apart for the drivers of FPTT and BPTT: cell, encoding of the inputs, read-out."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.errors import check_choice
from effjax.core.tree import wide
from effjax.data.sequences import SequenceData
from effjax.models.linear_recurrence import LRUCell
from effjax.models.sequence import Cell, GRUCell, LSTMCell
from effjax.recurrent.irnn import IncrementalRNNCell
from effjax.recurrent.tarnn import TARNNCell

PyTree = Any

CELLS = ("lstm", "torch-lstm", "chrono-lstm", "gru", "irnn", "tarnn", "lru")


class Network(NamedTuple):
    """Pure functions over one tree of parameters, ``{"cell", "head"}`` and, where inputs are ids, ``"embedding"``.

    Attributes:
      init: ``key -> params``.
      start: ``rows -> carry`` of zeros.
      encode: ``(params, xs) -> xs``: the embedding, and the cell's products with the inputs where it can be taken
        apart; for any number of steps at once.
      cell: ``(params, carry, x) -> (carry, state)``, one step in time.
      read: ``(params, states) -> outputs``.
      infer: ``(params, inputs [rows, time, ...]) -> outputs``, of the last state, or of all for tokens.
    """

    init: Callable[[jax.Array], PyTree]
    start: Callable[[int], PyTree]
    encode: Callable[[PyTree, jax.Array], PyTree]
    cell: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, jax.Array]]
    read: Callable[[PyTree, jax.Array], Float[Array, "... outputs"]]
    infer: Callable[[PyTree, jax.Array], Float[Array, "... outputs"]]


def network(data: SequenceData, kind: str, hidden: int, dtype: DTypeLike | None = None) -> Network:
    """One layer of cells between an embedding of the same width, where inputs are ids, and a dense read-out.

    Args:
      data: gives the sizes of inputs and outputs.
      kind: one of ``CELLS``. ``"torch-lstm"`` starts from PyTorch's initial values, as in the authors' programs: its
        forget gates are half open, while ``"lstm"`` has a bias of 1 there, and orthogonal recurrent kernels. The
        trained step sizes of ``"irnn"`` and ``"tarnn"`` belong to time steps, but are shared by all of them in texts,
        which go on.
      hidden: width of the state.
      dtype: of the matrix products' operands.

    Returns:
      A ``Network``.

    Example:
      >>> from effjax.data.sequences import sequence_data
      >>> net = network(sequence_data("add-20"), "lstm", 8)
      >>> net.infer(net.init(jax.random.key(0)), jnp.ones((4, 20, 2))).shape
      (4, 1)
    """
    layer = _layer(data, kind, hidden, dtype)
    embedding = nn.Embed(data.vocabulary, hidden, dtype=dtype) if data.vocabulary else None
    head = nn.Dense(data.outputs, dtype=dtype)
    width = hidden if data.vocabulary else data.features
    apart = isinstance(layer, Cell)

    def start(rows: int) -> PyTree:
        return layer.initialize_carry(jax.random.key(0), (rows, width))

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, 3)
        params = {"cell": layer.init(keys[0], start(1), jnp.zeros((1, width)))["params"]}
        if kind == "torch-lstm":
            params["cell"] = _as_torch(keys[0], params["cell"], hidden)
        params["head"] = head.init(keys[1], jnp.zeros((1, hidden)))["params"]
        if embedding is not None:
            params["embedding"] = embedding.init(keys[2], jnp.zeros(1, int))["params"]
        return params

    def encode(params: PyTree, xs: jax.Array) -> PyTree:
        if embedding is not None:
            xs = embedding.apply({"params": params["embedding"]}, xs)
        return layer.project(params["cell"], xs) if apart else xs

    def cell(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, jax.Array]:
        if apart:
            return layer.advance(params["cell"], carry, x)
        return layer.apply({"params": params["cell"]}, carry, x)

    def read(params: PyTree, states: jax.Array) -> jax.Array:
        return wide(head.apply({"params": params["head"]}, states))

    def infer(params: PyTree, inputs: jax.Array) -> jax.Array:
        xs = encode(params, jnp.swapaxes(inputs, 0, 1))
        carry = start(len(inputs))
        _, states = jax.lax.scan(lambda carry, x: cell(params, carry, x), carry, xs)
        return read(params, jnp.swapaxes(states, 0, 1) if data.kind == "tokens" else states[-1])

    return Network(init, start, encode, cell, read, infer)


def _layer(data: SequenceData, kind: str, hidden: int, dtype: DTypeLike | None) -> nn.RNNCellBase:
    check_choice("cell", kind, CELLS)
    if kind == "gru":
        return GRUCell(hidden, dtype=dtype)
    if kind == "lru":
        return LRUCell(hidden, dtype=dtype, r_min=0.99, r_max=0.9999, max_phase=math.pi / 10)
    if kind.endswith("lstm"):
        return LSTMCell(hidden, dtype=dtype, chrono_length=data.length if kind == "chrono-lstm" else None)
    steps = {"eta_mode": "shared"} if data.kind == "tokens" else {"eta_mode": "per_time", "length": data.length}
    return {"irnn": IncrementalRNNCell, "tarnn": TARNNCell}[kind](hidden, dtype=dtype, **steps)


def _as_torch(key: jax.Array, params: PyTree, hidden: int) -> PyTree:
    """Every number from U(-1, 1) / sqrt(hidden), and two biases for each gate, which add up."""
    bound = 1 / math.sqrt(hidden)
    draw = lambda key, leaf: jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)
    keys = dict(zip((*params, "second"), jax.random.split(key, len(params) + 1), strict=True))
    drawn = {name: draw(keys[name], leaf) for name, leaf in params.items()}
    return drawn | {"b": drawn["b"] + draw(keys["second"], params["b"])}
