"""Recurrent baselines: plain RNN, LSTM with Chrono biases, GRU, and a loop for all cells.

Every cell runs in ``nn.RNN``, and faster in ``Recurrent``, with inputs that are projected before the loop. Row vectors
multiply kernels from the left, ``h @ U``; states are float32 at least, and ``dtype`` is that of the matrix products'
operands alone. LRU and minGRU, which need no loop, are in ``effjax.models.linear_recurrence``; the cells that only the
studies compare with are in ``effjax.models.sequence_rivals``.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.cells import Cell, Params, PyTree, Table
from effjax.core.errors import check_number
from effjax.core.layers import OverTime, fitted_carry
from effjax.core.products import add_bias, dot
from effjax.core.time_scan import scan_time
from effjax.core.tree import wide

__all__ = ["GRUCell", "LSTMCell", "RNNCell", "Recurrent", "chrono_bias"]

Projected = Float[Array, "*batch width"]
Hidden = Float[Array | np.ndarray, "*batch hidden"]


def project_inputs(
    params: Params, xs: Float[Array | np.ndarray, "*batch inputs"], *, dtype: DTypeLike | None = None
) -> jax.Array:
    """``xs @ W`` (``+ b`` where there is one): what the cells here take, for all time steps at once."""
    return add_bias(dot(xs, params["W"], dtype), params.get("b"))


def chrono_bias(key: jax.Array, width: int, length: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    r"""Biases of forget gates that keep for times up to ``length``: :math:`b \sim \log U(1, T - 1)`.

    Args:
      key: PRNG key.
      width: number of biases.
      length: T, the longest time to remember, 3 or more.
      dtype: of the result.

    Returns:
      ``[width]``. Input gates take the negative.

    Raises:
      ValueError: ``length`` below 3.

    Example:
      >>> bias = chrono_bias(jax.random.key(0), 1000, 100)
      >>> bool((bias >= 0).all() and (bias <= jnp.log(99.0)).all())
      True

    Reference: Tallec, Ollivier, "Can recurrent neural networks warp time?", ICLR 2018.
    """
    check_number("length", length, low=3, integer=True, hint="The biases are drawn from log U(1, length - 1).")
    return jnp.log(jax.random.uniform(key, (width,), dtype, 1.0, length - 1.0))


def check_carry(carry: PyTree, batch: tuple[int, ...], width: int) -> PyTree:
    """The carry in float32 at least, if all its arrays are ``[*batch, width]``."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        if jnp.shape(leaf) != (*batch, width):
            raise ValueError(
                f"carry{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but the inputs and parameters ask for "
                f"a state of {(*batch, width)}. Was it carried over from another batch size or another width?"
            )
    return jax.tree.map(wide, carry)


def orthogonal_blocks(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    blocks = jax.random.split(key, shape[1] // shape[0])
    return jnp.concatenate([nn.initializers.orthogonal()(one, (shape[0], shape[0]), dtype) for one in blocks], -1)


class PlainCell(Cell):
    """What the cells of this file share: the product with the inputs, and a carry of zeros that is checked.

    A cell defines ``table`` and ``step``, and ``states`` if its carry is several arrays ``[*batch, features]``.

    Attributes:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.
    """

    features: int
    dtype: DTypeLike | None = None

    states: ClassVar[int] = 1

    @nn.nowrap
    def step(self, params: Params, carry: PyTree, projected: Projected) -> tuple[PyTree, jax.Array]:
        """``advance`` for a carry that fits and is float32 at least."""
        raise NotImplementedError

    @nn.nowrap
    def project(self, params: Params, xs: jax.Array | np.ndarray) -> jax.Array:
        return project_inputs(params, xs, dtype=self.dtype)

    @nn.nowrap
    def advance(self, params: Params, carry: PyTree, projected: Projected) -> tuple[PyTree, jax.Array]:
        return self.step(params, check_carry(carry, projected.shape[:-1], self.features), projected)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> PyTree:
        del rng
        one = jnp.zeros((*input_shape[:-1], self.features))
        return one if self.states == 1 else (one,) + (jnp.zeros_like(one),) * (self.states - 1)


class Recurrent(OverTime):
    """A cell over whole sequences, its products with the inputs hoisted out of the loop.

    Equal to ``nn.RNN(cell)`` and faster; the parameters are the same, and so is the call.

    Args:
      cell: ``LSTMCell``, ``GRUCell``, ``RNNCell``, ``LRUCell``, ``MinGRUCell``, ``IncrementalRNNCell``, ``TARNNCell``,
        or another ``effjax.core.cells.Cell``.
      chunk: as in ``effjax.recurrent.scan_time``.
      unroll: as in ``effjax.recurrent.scan_time``.

    Returns:
      When called with x ``[batch, time, features_in]``: what the cell gives at every step, ``[batch, time, features]``;
      with ``return_carry=True`` the last carry before it. ``initial_carry`` goes on from an earlier one, and
      ``seq_lengths`` ``[batch]`` tells where each sequence ends. ``reverse``, ``keep_order``, ``time_major`` and
      ``init_key`` are those of ``nn.RNN``.

    Raises:
      TypeError: a cell of another kind.
      ValueError: a carry of another shape or structure, lengths beyond the sequence, a sequence longer than the cell's
        ``length``, a cell whose states mix the sequences of a batch with ``seq_lengths``, or as ``scan_time``.

    Example:
      >>> layer = Recurrent(LSTMCell(features=8), unroll=4)
      >>> states, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
      >>> apply = lambda variables: layer.apply(
      ...     variables, jnp.ones((4, 20, 3)), seq_lengths=jnp.array([20, 3, 7, 1]), return_carry=True
      ... )
      >>> (c, h), _ = jax.eval_shape(apply, variables)
      >>> h.shape
      (4, 8)
    """

    cell: Cell
    chunk: int | None = None
    unroll: int = 1

    def run(
        self, xs: jax.Array, carry: PyTree, lengths: jax.Array | None, key: jax.Array | None
    ) -> tuple[PyTree, jax.Array]:
        cell = self._cell()
        cell.check_steps(len(xs))
        params = cell.weights(xs.shape[-1])
        projected = cell.project(params, xs)
        first = cell.initialize_carry(jax.random.key(0) if key is None else key, xs.shape[1:])
        carry = first if carry is None else fitted_carry(carry, first, type(cell).__name__)
        loop = {"chunk": self.chunk, "unroll": self.unroll}
        if lengths is None:
            return scan_time(cell.advance, params, carry, projected, **loop)
        ends = jnp.arange(len(xs))[:, None] == lengths[None] - 1
        (_, last), ys = scan_time(_keeping_ends(cell.advance), params, (carry, carry), (projected, ends), **loop)
        return last, ys

    def check_padding(self) -> None:
        self._cell().check_padding()

    def _cell(self) -> Cell:
        if not isinstance(self.cell, Cell):
            raise TypeError(
                f"cell={type(self.cell).__name__} cannot be taken apart. Use nn.RNN(cell), or a cell that is an "
                "effjax.core.cells.Cell."
            )
        return self.cell


def _keeping_ends(advance: Callable[..., tuple[PyTree, jax.Array]]) -> Callable[..., tuple[PyTree, jax.Array]]:
    """``advance`` that carries along the carry at the end of each sequence."""

    def step(params: Params, carries: tuple[PyTree, PyTree], now: PyTree) -> tuple[PyTree, jax.Array]:
        (carry, kept), (projected, ends) = carries, now
        carry, y = advance(params, carry, projected)
        keep = lambda new, old: jnp.where(ends.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        return (carry, jax.tree.map(keep, carry, kept)), y

    return step


class RNNCell(PlainCell):
    r"""Plain RNN cell.

    .. math:: h' = \tanh(x W + h U + b)

    Args:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.

    Raises:
      ValueError: when called, a carry of another shape.

    Example:
      >>> rnn = nn.RNN(RNNCell(features=8))
      >>> states, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    @nn.nowrap
    def table(self, inputs: int) -> Table:
        return {
            "W": (nn.initializers.lecun_normal(), (inputs, self.features)),
            "U": (orthogonal_blocks, (self.features, self.features)),
            "b": (nn.initializers.zeros, (self.features,)),
        }

    @nn.nowrap
    def step(self, params: Params, carry: jax.Array, projected: Projected) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(projected + dot(carry, params["U"], self.dtype))
        return h, h


class GRUCell(PlainCell):
    r"""GRU cell with one product per step; its reset gate comes after that product, as in Flax and PyTorch.

    .. math::
        (r, z) = \sigma(x W_{rz} + h U_{rz} + b_{rz}), \qquad
        n = \tanh(x W_n + b_n + r \odot (h U_n + c)), \qquad h' = (1 - z) \odot n + z \odot h

    The blocks of ``W``, ``U`` and ``b`` are in the order r, z, n.

    Args:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.

    Raises:
      ValueError: when called, a carry of another shape.

    Example:
      >>> rnn = nn.RNN(GRUCell(features=8))
      >>> states, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    @nn.nowrap
    def table(self, inputs: int) -> Table:
        return {
            "W": (nn.initializers.lecun_normal(), (inputs, 3 * self.features)),
            "U": (orthogonal_blocks, (self.features, 3 * self.features)),
            "b": (nn.initializers.zeros, (3 * self.features,)),
            "c": (nn.initializers.zeros, (self.features,)),
        }

    @nn.nowrap
    def step(self, params: Params, carry: jax.Array, projected: Projected) -> tuple[jax.Array, jax.Array]:
        xr, xz, xn = jnp.split(projected, 3, -1)
        hr, hz, hn = jnp.split(dot(carry, params["U"], self.dtype), 3, -1)
        z = nn.sigmoid(xz + hz)
        h = (1 - z) * jnp.tanh(xn + nn.sigmoid(xr + hr) * add_bias(hn, params["c"])) + z * carry
        return h, h


class LSTMCell(PlainCell):
    r"""LSTM cell with one product per step and a choice of forget bias; the carry is (c, h), as Flax's.

    .. math::
        (i, f, g, o) = x W + h U + b, \qquad
        c' = \sigma(f) \odot c + \sigma(i) \odot \tanh(g), \qquad h' = \sigma(o) \odot \tanh(c')

    Args:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.
      chrono_length: draw the forget biases from log U(1, chrono_length - 1) and give the input gates the negative, so
        that the cell remembers over such times (``chrono_bias``). None starts the forget biases at 1.

    Raises:
      ValueError: when called, a carry of another shape.

    Example:
      >>> rnn = nn.RNN(LSTMCell(features=8, chrono_length=20))
      >>> states, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    chrono_length: int | None = None

    states: ClassVar[int] = 2

    @nn.nowrap
    def table(self, inputs: int) -> Table:
        return {
            "W": (nn.initializers.lecun_normal(), (inputs, 4 * self.features)),
            "U": (orthogonal_blocks, (self.features, 4 * self.features)),
            "b": (self._bias, (4 * self.features,)),
        }

    @nn.nowrap
    def _bias(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        del shape
        zeros = jnp.zeros(self.features)
        if self.chrono_length is None:
            return jnp.concatenate([zeros, zeros + 1, zeros, zeros])
        forget = chrono_bias(key, self.features, self.chrono_length)
        return jnp.concatenate([-forget, forget, zeros, zeros])

    @nn.nowrap
    def step(
        self, params: Params, carry: tuple[jax.Array, jax.Array], projected: Projected
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        c, h = carry
        gates = projected + dot(h, params["U"], self.dtype)
        # All four through one sigmoid: XLA CPU vectorises the whole array, but not expressions in its quarters.
        i, f, _, o = jnp.split(nn.sigmoid(gates), 4, -1)
        c = f * c + i * jnp.tanh(jnp.split(gates, 4, -1)[2])
        h = o * jnp.tanh(c)
        return (c, h), h


def torch_lstm_init(key: jax.Array, params: Params) -> Params:
    r"""PyTorch's initial values of an LSTM in place of ``LSTMCell``'s, whose forget gates start open.

    Every number is drawn from :math:`U(-1, 1) / \sqrt{hidden}`; there are two biases per gate, which add up.

    Args:
      key: PRNG key.
      params: ``W``, ``U`` and ``b`` of an ``LSTMCell``.

    Returns:
      New parameters of the same shapes.
    """
    bound = 1 / math.sqrt(len(params["U"]))
    draw = lambda key, leaf: jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)
    keys = dict(zip((*params, "second"), jax.random.split(key, len(params) + 1), strict=True))
    drawn = {name: draw(keys[name], leaf) for name, leaf in params.items()}
    return drawn | {"b": drawn["b"] + draw(keys["second"], params["b"])}
