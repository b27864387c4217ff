"""Recurrent baselines: plain RNN, LSTM with Chrono biases, GRU, FastRNN, FastGRNN, AntisymmetricRNN, coRNN.

Every cell runs in ``nn.RNN``, and faster in ``Recurrent``, and is a pure step over inputs that are projected before
the loop: ``step(params, carry, projected) -> (carry, y)``. Row vectors multiply kernels from the left, ``h @ U``;
states are float32 at least, and ``dtype`` is that of the matrix products' operands alone. LRU and minGRU, which need
no loop, are in ``effjax.models.linear_recurrence``.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.cells import Cell, Params, PyTree
from effjax.core.errors import check_number
from effjax.core.products import dot
from effjax.core.time_scan import scan_time
from effjax.core.tree import wide

__all__ = [
    "AntisymmetricRNNCell",
    "CoRNNCell",
    "FastGRNNCell",
    "FastRNNCell",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "chrono_bias",
]

Projected = Float[Array, "*batch width"]
Hidden = Float[Array | np.ndarray, "*batch hidden"]


def project_inputs(params: Params, xs: Float[Array, "*batch inputs"], *, dtype: DTypeLike | None = None) -> jax.Array:
    """``xs @ W`` (``+ b`` where there is one): what the steps of this file take, for all time steps at once."""
    product = dot(xs, params["W"], dtype)
    return product + wide(params["b"]) if "b" in params else product


def chrono_bias(key: jax.Array, features: int, length: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    r"""Biases of forget gates that keep for times up to ``length``: :math:`b \sim \log U(1, T - 1)`.

    Args:
      key: PRNG key.
      features: how many.
      length: T, the longest time to remember, 3 or more.
      dtype: of the result.

    Returns:
      ``[features]``. Input gates take the negative.

    Raises:
      ValueError: ``length`` below 3.

    Example:
      >>> bias = chrono_bias(jax.random.key(0), 1000, 100)
      >>> bool((bias >= 0).all() and (bias <= jnp.log(99.0)).all())
      True

    Reference: Tallec, Ollivier, "Can recurrent neural networks warp time?", ICLR 2018.
    """
    check_number("length", length, low=3, integer=True, hint="The biases are drawn from log U(1, length - 1).")
    return jnp.log(jax.random.uniform(key, (features,), dtype, 1.0, length - 1.0))


def rnn_step(
    params: Params, h: Hidden, projected: Projected, *, dtype: DTypeLike | None = None
) -> tuple[jax.Array, jax.Array]:
    r"""One step of a plain RNN: :math:`h' = \tanh(x W + h U + b)`.

    Args:
      params: ``W`` ``[features, hidden]``, ``U`` ``[hidden, hidden]``, ``b`` ``[hidden]``.
      h: state.
      projected: a time step of ``project_inputs``.
      dtype: of the matrix products' operands.

    Returns:
      h', twice.

    Raises:
      ValueError: a state of another shape.
    """
    h = check_carry(h, projected.shape[:-1], params["U"].shape[0])
    h = jnp.tanh(projected + dot(h, params["U"], dtype))
    return h, h


def gru_step(
    params: Params, h: Hidden, projected: Projected, *, dtype: DTypeLike | None = None
) -> tuple[jax.Array, jax.Array]:
    r"""One step of a GRU, its reset gate behind the recurrent product, as in Flax and PyTorch.

    .. math::
        (r, z) = \sigma(x W_{rz} + h U_{rz} + b_{rz}), \qquad
        n = \tanh(x W_n + b_n + r \odot (h U_n + c)), \qquad h' = (1 - z) \odot n + z \odot h

    Args:
      params: ``W`` ``[features, 3 * hidden]``, ``U`` ``[hidden, 3 * hidden]``, ``b`` ``[3 * hidden]``, in the order r,
        z, n; ``c`` ``[hidden]``.
      h: state.
      projected: a time step of ``project_inputs``.
      dtype: of the matrix products' operands.

    Returns:
      h', twice.

    Raises:
      ValueError: a state of another shape.
    """
    h = check_carry(h, projected.shape[:-1], params["U"].shape[0])
    xr, xz, xn = jnp.split(projected, 3, -1)
    hr, hz, hn = jnp.split(dot(h, params["U"], dtype), 3, -1)
    z = nn.sigmoid(xz + hz)
    h = (1 - z) * jnp.tanh(xn + nn.sigmoid(xr + hr) * (hn + params["c"])) + z * h
    return h, h


def lstm_step(
    params: Params, carry: tuple[Hidden, Hidden], projected: Projected, *, dtype: DTypeLike | None = None
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    r"""One step of an LSTM; the carry is (c, h), as Flax's.

    .. math::
        (i, f, g, o) = x W + h U + b, \qquad
        c' = \sigma(f) \odot c + \sigma(i) \odot \tanh(g), \qquad h' = \sigma(o) \odot \tanh(c')

    Args:
      params: ``W`` ``[features, 4 * hidden]``, ``U`` ``[hidden, 4 * hidden]``, ``b`` ``[4 * hidden]``.
      carry: (c, h).
      projected: a time step of ``project_inputs``.
      dtype: of the matrix products' operands.

    Returns:
      The new carry, and h'.

    Raises:
      ValueError: a carry of another shape.
    """
    c, h = check_carry(carry, projected.shape[:-1], params["U"].shape[0])
    gates = projected + dot(h, params["U"], dtype)
    # All four through one sigmoid: XLA CPU vectorises the whole array, but not expressions in its quarters.
    i, f, _, o = jnp.split(nn.sigmoid(gates), 4, -1)
    c = f * c + i * jnp.tanh(jnp.split(gates, 4, -1)[2])
    h = o * jnp.tanh(c)
    return (c, h), h


def fastrnn_step(
    params: Params, h: Hidden, projected: Projected, *, dtype: DTypeLike | None = None
) -> tuple[jax.Array, jax.Array]:
    r"""One step of FastRNN, a plain RNN with a weighted residual connection.

    .. math:: h' = \sigma(\alpha) \tanh(x W + h U + b) + \sigma(\beta)\, h

    Args:
      params: ``W`` ``[features, hidden]``, ``U`` ``[hidden, hidden]``, ``b`` ``[hidden]``, ``alpha`` and ``beta``
        scalars, or ``[*batch, 1]``.
      h: state.
      projected: a time step of ``project_inputs``.
      dtype: of the matrix products' operands.

    Returns:
      h', twice.

    Raises:
      ValueError: a state of another shape.

    Reference: Kusupati et al., "FastGRNN", NeurIPS 2018 (arXiv 1901.02358), full rank and dense.
    """
    h = check_carry(h, projected.shape[:-1], params["U"].shape[0])
    new = jnp.tanh(projected + dot(h, params["U"], dtype))
    h = nn.sigmoid(wide(params["alpha"])) * new + nn.sigmoid(wide(params["beta"])) * h
    return h, h


def fastgrnn_step(
    params: Params, h: Hidden, projected: Projected, *, dtype: DTypeLike | None = None
) -> tuple[jax.Array, jax.Array]:
    r"""One step of FastGRNN, whose gate and candidate share their kernels.

    .. math::
        p = x W + h U, \qquad z = \sigma(p + b_g), \qquad
        h' = z \odot h + (\sigma(\zeta) (1 - z) + \sigma(\nu)) \odot \tanh(p + b_h)

    Args:
      params: ``W`` ``[features, hidden]``, ``U`` ``[hidden, hidden]``, ``bias_gate`` and ``bias_update`` ``[hidden]``,
        ``zeta`` and ``nu`` scalars.
      h: state.
      projected: a time step of ``project_inputs``.
      dtype: of the matrix products' operands.

    Returns:
      h', twice.

    Raises:
      ValueError: a state of another shape.

    Reference: Kusupati et al., "FastGRNN", NeurIPS 2018 (arXiv 1901.02358), full rank and dense: without its low-rank
    kernels, sparsification and quantisation.
    """
    h = check_carry(h, projected.shape[:-1], params["U"].shape[0])
    p = projected + dot(h, params["U"], dtype)
    z = nn.sigmoid(p + params["bias_gate"])
    write = nn.sigmoid(wide(params["zeta"])) * (1 - z) + nn.sigmoid(wide(params["nu"]))
    h = z * h + write * jnp.tanh(p + params["bias_update"])
    return h, h


def antisymmetric_step(
    params: Params,
    h: Hidden,
    projected: Projected,
    *,
    epsilon: float = 0.05,
    gamma: float = 0.01,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""One step of the AntisymmetricRNN, a forward Euler step of a stable ODE.

    .. math::
        m = h (U^\top - U) - \gamma h, \qquad h' = h + \epsilon\, \tanh(m + x W + b)

    With gate, where ``W`` and ``b`` are twice as wide:
    :math:`h' = h + \epsilon\, \sigma(m + x W_z + b_z) \odot \tanh(m + x W + b)`.

    Args:
      params: ``U`` ``[hidden, hidden]``, of which only the antisymmetric part counts; ``W`` ``[features, hidden]`` and
        ``b`` ``[hidden]``, or ``[features, 2 * hidden]`` and ``[2 * hidden]``, candidate first.
      h: state.
      projected: a time step of ``project_inputs``.
      epsilon: step size.
      gamma: diffusion.
      dtype: of the matrix products' operands.

    Returns:
      h', twice.

    Raises:
      ValueError: a state of another shape.

    Reference: Chang, Chen, Haber, Chi, "AntisymmetricRNN", ICLR 2019, equations 12 and 13.
    """
    U = params["U"]
    h = check_carry(h, projected.shape[:-1], len(U))
    m = dot(h, U.T - U, dtype) - gamma * h
    candidate, *gate = jnp.split(projected, projected.shape[-1] // len(U), -1)
    change = jnp.tanh(m + candidate)
    h = h + epsilon * (nn.sigmoid(m + gate[0]) * change if gate else change)
    return h, h


def cornn_step(
    params: Params,
    carry: tuple[Hidden, Hidden],
    projected: Projected,
    *,
    dt: float = 0.034,
    gamma: float = 1.3,
    epsilon: float = 12.7,
    dtype: DTypeLike | None = None,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    r"""One step of coRNN, a network of coupled, damped, driven oscillators.

    .. math::
        v' = v + \Delta t \left( \tanh([v, y] U + x W + b) - \gamma y - \epsilon v \right), \qquad
        y' = y + \Delta t\, v'

    Args:
      params: ``W`` ``[features, hidden]``, ``U`` ``[2 * hidden, hidden]``, ``b`` ``[hidden]``.
      carry: (y, v), positions and velocities.
      projected: a time step of ``project_inputs``.
      dt: step size.
      gamma: stiffness.
      epsilon: damping.
      dtype: of the matrix products' operands.

    Returns:
      The new carry, and y'.

    Raises:
      ValueError: a carry of another shape.

    Reference: Rusch, Mishra, "Coupled Oscillatory Recurrent Neural Network", ICLR 2021. The default constants are its
    code's for noise-padded CIFAR-10.
    """
    y, v = check_carry(carry, projected.shape[:-1], params["U"].shape[1])
    drive = jnp.tanh(dot(jnp.concatenate([v, y], -1), params["U"], dtype) + projected)
    v = v + dt * (drive - gamma * y - epsilon * v)
    y = y + dt * v
    return (y, v), y


def check_carry(carry: PyTree, batch: tuple[int, ...], width: int) -> PyTree:
    """The carry in float32 at least, if all its arrays are ``[*batch, width]``."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        if jnp.shape(leaf) != (*batch, width):
            raise ValueError(
                f"carry{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but the inputs and parameters ask for "
                f"a state of {(*batch, width)}. Was it carried over from another batch size or another width?"
            )
    return jax.tree.map(wide, carry)


def _uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def _orthogonal_blocks(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    blocks = jax.random.split(key, shape[1] // shape[0])
    return jnp.concatenate([nn.initializers.orthogonal()(one, (shape[0], shape[0]), dtype) for one in blocks], -1)


class _PlainCell(Cell):
    """What the cells of this file share.

    Attributes:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.
    """

    features: int
    dtype: DTypeLike | None = None

    @nn.nowrap
    def project(self, params: Params, xs: jax.Array) -> PyTree:
        return project_inputs(params, xs, dtype=self.dtype)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Any:
        del rng
        return jnp.zeros((*input_shape[:-1], self.features))


class Recurrent(nn.Module):
    """A cell over whole sequences, its products with the inputs hoisted out of the loop.

    Equal to ``nn.RNN(cell)`` and faster; the parameters are the same.

    Args:
      cell: of this file, ``LRUCell``, ``MinGRUCell``, ``IncrementalRNNCell``, ``TARNNCell``, or another
        ``effjax.core.cells.Cell``.
      chunk: as in ``effjax.scan_time``.
      unroll: as in ``effjax.scan_time``.

    Returns:
      When called with x ``[batch, time, features_in]`` and, if wanted, a first carry: what the cell gives at every
      step, ``[batch, time, features]``.

    Raises:
      TypeError: a cell of another kind.
      ValueError: a carry of another shape, a sequence longer than the cell's ``length``, or as ``scan_time``.

    Example:
      >>> layer = Recurrent(LSTMCell(features=8), unroll=4)
      >>> states, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    cell: Cell
    chunk: int | None = None
    unroll: int = 1

    def __call__(self, x: Float[Array, "batch time inputs"], carry: PyTree = None) -> jax.Array:
        if not isinstance(self.cell, Cell):
            raise TypeError(
                f"cell={type(self.cell).__name__} cannot be taken apart. Use nn.RNN(cell), or a cell that is an "
                "effjax.core.cells.Cell."
            )
        self.cell.check_steps(x.shape[1])
        params = self.cell.weights(x.shape[-1])
        projected = self.cell.project(params, jnp.swapaxes(x, 0, 1))
        if carry is None:
            carry = self.cell.initialize_carry(jax.random.key(0), (x.shape[0], x.shape[-1]))
        _, ys = scan_time(self.cell.advance, params, carry, projected, chunk=self.chunk, unroll=self.unroll)
        return jnp.swapaxes(ys, 0, 1)


class _TwoStateCell(_PlainCell):
    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Any:
        one = super().initialize_carry(rng, input_shape)
        return one, jnp.zeros_like(one)


class RNNCell(_PlainCell):
    """Plain RNN cell; the equation is that of ``rnn_step``.

    Args:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.

    Example:
      >>> rnn = nn.RNN(RNNCell(features=8))
      >>> states, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    @nn.compact
    def weights(self, inputs: int) -> Params:
        return {
            "W": self.param("W", nn.initializers.lecun_normal(), (inputs, self.features)),
            "U": self.param("U", _orthogonal_blocks, (self.features, self.features)),
            "b": self.param("b", nn.initializers.zeros, (self.features,)),
        }

    @nn.nowrap
    def advance(self, params: Params, carry: PyTree, projected: PyTree) -> tuple[PyTree, jax.Array]:
        return rnn_step(params, carry, projected, dtype=self.dtype)


class GRUCell(_PlainCell):
    """GRU cell with one product a step; the equations are those of ``gru_step``.

    Args:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.

    Example:
      >>> rnn = nn.RNN(GRUCell(features=8))
      >>> states, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    @nn.compact
    def weights(self, inputs: int) -> Params:
        return {
            "W": self.param("W", nn.initializers.lecun_normal(), (inputs, 3 * self.features)),
            "U": self.param("U", _orthogonal_blocks, (self.features, 3 * self.features)),
            "b": self.param("b", nn.initializers.zeros, (3 * self.features,)),
            "c": self.param("c", nn.initializers.zeros, (self.features,)),
        }

    @nn.nowrap
    def advance(self, params: Params, carry: PyTree, projected: PyTree) -> tuple[PyTree, jax.Array]:
        return gru_step(params, carry, projected, dtype=self.dtype)


class LSTMCell(_TwoStateCell):
    """LSTM cell with one product a step and a choice of forget bias; the equations are those of ``lstm_step``.

    Args:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.
      chrono_length: draw the forget biases from log U(1, chrono_length - 1) and give the input gates the negative, so
        that the cell remembers over such times (``chrono_bias``). None starts the forget biases at 1.

    Example:
      >>> rnn = nn.RNN(LSTMCell(features=8, chrono_length=20))
      >>> states, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    chrono_length: int | None = None

    @nn.compact
    def weights(self, inputs: int) -> Params:
        return {
            "W": self.param("W", nn.initializers.lecun_normal(), (inputs, 4 * self.features)),
            "U": self.param("U", _orthogonal_blocks, (self.features, 4 * self.features)),
            "b": self.param("b", self._bias),
        }

    @nn.nowrap
    def advance(self, params: Params, carry: PyTree, projected: PyTree) -> tuple[PyTree, jax.Array]:
        return lstm_step(params, carry, projected, dtype=self.dtype)

    @nn.nowrap
    def _bias(self, key: jax.Array) -> jax.Array:
        zeros = jnp.zeros(self.features)
        if self.chrono_length is None:
            return jnp.concatenate([zeros, zeros + 1, zeros, zeros])
        forget = chrono_bias(key, self.features, self.chrono_length)
        return jnp.concatenate([-forget, forget, zeros, zeros])


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


class FastRNNCell(_PlainCell):
    """FastRNN cell; the equation and the source are those of ``fastrnn_step``.

    Args:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.
      length: give alpha and beta a value for every time step of sequences up to this long. The carry is then the state
        and the number of steps done, and beyond ``length`` the state is NaN. None shares them over time.

    Raises:
      ValueError: ``length`` below 1; in ``Recurrent``, a longer sequence.

    Example:
      >>> rnn = nn.RNN(FastRNNCell(features=8))
      >>> states, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    length: int | None = None

    @nn.compact
    def weights(self, inputs: int) -> Params:
        if self.length is not None:
            check_number("length", self.length, low=1, integer=True)
        normal, constant = nn.initializers.normal(0.1), nn.initializers.constant
        times = () if self.length is None else (self.length,)
        return {
            "W": self.param("W", normal, (inputs, self.features)),
            "U": self.param("U", normal, (self.features, self.features)),
            "b": self.param("b", nn.initializers.ones, (self.features,)),
            "alpha": self.param("alpha", constant(-3.0), times),
            "beta": self.param("beta", constant(3.0), times),
        }

    @nn.nowrap
    def advance(self, params: Params, carry: PyTree, projected: PyTree) -> tuple[PyTree, jax.Array]:
        if self.length is None:
            return fastrnn_step(params, carry, projected, dtype=self.dtype)
        h, time = carry
        now = {
            name: jnp.take(params[name], time, mode="fill", fill_value=jnp.nan)[..., None] for name in ("alpha", "beta")
        }
        h, y = fastrnn_step({**params, **now}, h, projected, dtype=self.dtype)
        return (h, time + 1), y

    @nn.nowrap
    def check_steps(self, steps: int) -> None:
        if self.length is not None and steps > self.length:
            raise ValueError(
                f"length={self.length}, but the sequence has {steps} steps, and each needs an alpha and a beta of its "
                f"own. Make the cell with length={steps}, shorten the sequence, or share them with length=None."
            )

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Any:
        h = super().initialize_carry(rng, input_shape)
        return h if self.length is None else (h, jnp.zeros(input_shape[:-1], jnp.int32))


class FastGRNNCell(_PlainCell):
    """FastGRNN cell; the equations and the source are those of ``fastgrnn_step``.

    Args:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.

    Example:
      >>> rnn = nn.RNN(FastGRNNCell(features=8))
      >>> states, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    @nn.compact
    def weights(self, inputs: int) -> Params:
        normal, ones, constant = nn.initializers.normal(0.1), nn.initializers.ones, nn.initializers.constant
        return {
            "W": self.param("W", normal, (inputs, self.features)),
            "U": self.param("U", normal, (self.features, self.features)),
            "bias_gate": self.param("bias_gate", ones, (self.features,)),
            "bias_update": self.param("bias_update", ones, (self.features,)),
            "zeta": self.param("zeta", constant(1.0), ()),
            "nu": self.param("nu", constant(-4.0), ()),
        }

    @nn.nowrap
    def advance(self, params: Params, carry: PyTree, projected: PyTree) -> tuple[PyTree, jax.Array]:
        return fastgrnn_step(params, carry, projected, dtype=self.dtype)


class AntisymmetricRNNCell(_PlainCell):
    """AntisymmetricRNN cell; the equations and the source are those of ``antisymmetric_step``.

    Args:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.
      epsilon: step size, above 0.
      gamma: diffusion, 0 or more.
      gated: gate the step.

    Raises:
      ValueError: a constant out of range.

    Example:
      >>> rnn = nn.RNN(AntisymmetricRNNCell(features=8, gated=True))
      >>> states, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    epsilon: float = 0.05
    gamma: float = 0.01
    gated: bool = False

    @nn.compact
    def weights(self, inputs: int) -> Params:
        check_number("epsilon", self.epsilon, low=0.0, open_low=True)
        check_number("gamma", self.gamma, low=0.0)
        width = self.features * (2 if self.gated else 1)
        return {
            "W": self.param("W", nn.initializers.lecun_normal(), (inputs, width)),
            # U^T - U has twice the variance of U, and 1 / features is wanted of it.
            "U": self.param("U", nn.initializers.normal(1 / math.sqrt(2 * self.features)), (self.features,) * 2),
            "b": self.param("b", nn.initializers.zeros, (width,)),
        }

    @nn.nowrap
    def advance(self, params: Params, carry: PyTree, projected: PyTree) -> tuple[PyTree, jax.Array]:
        return antisymmetric_step(params, carry, projected, epsilon=self.epsilon, gamma=self.gamma, dtype=self.dtype)


class CoRNNCell(_TwoStateCell):
    """coRNN cell; the equations and the source are those of ``cornn_step``.

    Args:
      features: oscillators.
      dtype: of the matrix products' operands, by default their own.
      dt: step size, above 0.
      gamma: stiffness, above 0.
      epsilon: damping, 0 or more.

    Raises:
      ValueError: a constant out of range.

    Example:
      >>> rnn = nn.RNN(CoRNNCell(features=8))
      >>> states, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    dt: float = 0.034
    gamma: float = 1.3
    epsilon: float = 12.7

    @nn.compact
    def weights(self, inputs: int) -> Params:
        check_number("dt", self.dt, low=0.0, open_low=True)
        check_number("gamma", self.gamma, low=0.0, open_low=True)
        check_number("epsilon", self.epsilon, low=0.0)
        init = _uniform(1 / math.sqrt(inputs + 2 * self.features))
        return {
            "W": self.param("W", init, (inputs, self.features)),
            "U": self.param("U", init, (2 * self.features, self.features)),
            "b": self.param("b", init, (self.features,)),
        }

    @nn.nowrap
    def advance(self, params: Params, carry: PyTree, projected: PyTree) -> tuple[PyTree, jax.Array]:
        return cornn_step(
            params, carry, projected, dt=self.dt, gamma=self.gamma, epsilon=self.epsilon, dtype=self.dtype
        )
