"""Recurrent baselines: LSTM with Chrono biases, FastGRNN, AntisymmetricRNN, coRNN, and LRU and minGRU by parallel scan.

The plain RNN and the GRU are Flax's own, ``nn.SimpleCell`` and ``nn.GRUCell``. Every cell here runs in ``nn.RNN`` and
is a pure step over inputs that are projected before the loop: ``step(params, carry, projected) -> (carry, y)``. Row
vectors multiply kernels from the left, ``h @ U``; states are float32 at least, and ``dtype`` is that of the matrix
products' operands alone.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Inexact

from effjax.core.errors import check_number
from effjax.core.tree import wide

PyTree = Any
Params = Mapping[str, jax.Array]
Projected = Float[Array, "*batch width"]
Hidden = Float[Array | np.ndarray, "*batch hidden"]


def project_inputs(params: Params, xs: Float[Array, "*batch inputs"], *, dtype: DTypeLike | None = None) -> jax.Array:
    """``xs @ W`` (``+ b`` where there is one): what the steps of this file take, for all time steps at once."""
    product = _dot(xs, params["W"], dtype)
    return product + wide(params["b"]) if "b" in params else product


def _dot(x: jax.Array, kernel: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    if dtype is not None:
        x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    return jnp.dot(x, kernel, preferred_element_type=jnp.promote_types(jnp.result_type(x, kernel), jnp.float32))


def _check_carry(carry: PyTree, batch: tuple[int, ...], width: int) -> PyTree:
    """The carry in float32 at least, if all its arrays are ``[*batch, width]``."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        if jnp.shape(leaf) != (*batch, width):
            raise ValueError(
                f"carry{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but the inputs and parameters ask for "
                f"a state of {(*batch, width)}. Was it carried over from another batch size or another width?"
            )
    return jax.tree.map(wide, carry)


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
    c, h = _check_carry(carry, projected.shape[:-1], params["U"].shape[0])
    i, f, g, o = jnp.split(projected + _dot(h, params["U"], dtype), 4, -1)
    c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
    h = nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


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
    h = _check_carry(h, projected.shape[:-1], params["U"].shape[0])
    p = projected + _dot(h, params["U"], dtype)
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
    h = _check_carry(h, projected.shape[:-1], len(U))
    m = _dot(h, U.T - U, dtype) - gamma * h
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
    y, v = _check_carry(carry, projected.shape[:-1], params["U"].shape[1])
    drive = jnp.tanh(_dot(jnp.concatenate([v, y], -1), params["U"], dtype) + projected)
    v = v + dt * (drive - gamma * y - epsilon * v)
    y = y + dt * v
    return (y, v), y


def linear_scan(
    a: Inexact[Array, "time ..."], u: Inexact[Array, "time ..."], h0: Inexact[Array, "..."] | None = None
) -> jax.Array:
    r"""All states of :math:`h_t = a_t \odot h_{t-1} + u_t` in :math:`O(\log T)` dependent steps.

    .. math:: (a_1, u_1) \circ (a_2, u_2) = (a_1 a_2,\; a_2 u_1 + u_2)

    is associative. The products of many :math:`|a| < 1` underflow to 0, which is what they mean.

    Args:
      a: decays; axes behind the first may be 1 and broadcast to those of ``u``.
      u: inputs.
      h0: first state, zeros by default.

    Returns:
      ``[time, ...]``, of the shape of ``u``.

    Raises:
      ValueError: ``a`` and ``u`` of another number of steps.

    Example:
      >>> linear_scan(jnp.full(4, 0.5), jnp.ones(4)).tolist()
      [1.0, 1.5, 1.75, 1.875]
    """
    if len(a) != len(u):
        raise ValueError(f"a holds {len(a)} time steps and u {len(u)}; each step needs both. The leading axis is time.")
    if h0 is not None:
        u = u.at[0].add(a[0] * h0)
    return _linear_scan(a, u)


@jax.jit  # called eagerly, it would compile every slice by itself
def _linear_scan(a: jax.Array, u: jax.Array) -> jax.Array:
    return jax.lax.associative_scan(lambda one, two: (one[0] * two[0], two[0] * one[1] + two[1]), (a, u))[1]


def min_gru_step(params: Params, h: Hidden, projected: Projected) -> tuple[jax.Array, jax.Array]:
    r"""One step of minGRU: :math:`h' = (1 - z) \odot h + z \odot c` with :math:`z = \sigma(x W_z + b_z)`, linear in h.

    Args:
      params: ``W`` ``[features, 2 * hidden]`` and ``b`` ``[2 * hidden]``, the gate's half before the candidate's.
      h: state.
      projected: a time step of ``project_inputs``, :math:`(x W_z + b_z,\; c)`.

    Returns:
      h', twice.

    Raises:
      ValueError: a state of another shape.

    Reference: Feng et al., "Were RNNs All We Needed?", 2024 (arXiv 2410.01201).
    """
    h = _check_carry(h, projected.shape[:-1], params["W"].shape[1] // 2)
    z, candidate = jnp.split(projected, 2, -1)
    z = nn.sigmoid(z)
    h = (1 - z) * h + z * candidate
    return h, h


def min_gru(
    params: Params,
    xs: Float[Array, "time *batch inputs"],
    h0: Hidden | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """minGRU over a sequence by ``linear_scan``; the parameters are those of ``min_gru_step``.

    Args:
      params: as in ``min_gru_step``.
      xs: inputs.
      h0: first state, zeros by default.
      dtype: of the matrix products' operands.

    Returns:
      The last state ``[*batch, hidden]`` and all states ``[time, *batch, hidden]``.

    Raises:
      ValueError: an ``h0`` of another shape.

    Example:
      >>> params = {"W": jnp.ones((3, 8)), "b": jnp.zeros(8)}
      >>> last, states = min_gru(params, jnp.ones((6, 2, 3)))
      >>> states.shape
      (6, 2, 4)
    """
    z, candidate = jnp.split(project_inputs(params, xs, dtype=dtype), 2, -1)
    if h0 is not None:
        h0 = _check_carry(h0, z.shape[1:-1], z.shape[-1])
    z = nn.sigmoid(z)
    states = linear_scan(1 - z, z * candidate, h0)
    return states[-1], states


def lru_project(
    params: Params, xs: Float[Array, "*batch inputs"], *, dtype: DTypeLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """What ``lru_step`` takes: the complex drive of the state, and the real skip to the output."""
    parts = jnp.concatenate([params["B_re"], params["B_im"], params["D"]], -1)
    state = params["nu"].shape[-1]
    real, imaginary, skip = jnp.split(_dot(xs, parts, dtype), (state, 2 * state), -1)
    decay = jnp.exp(-2 * jnp.exp(wide(params["nu"])))
    return jax.lax.complex(real, imaginary) * jnp.sqrt(1 - decay), skip


def lru_step(
    params: Params,
    h: Inexact[Array, "*batch state"],
    projected: tuple[jax.Array, jax.Array],
    *,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""One step of the linear recurrent unit.

    .. math::
        h' = \lambda \odot h + \gamma \odot (x B), \qquad y = \mathrm{Re}(h' C) + x D, \qquad
        \lambda = \exp(-e^\nu + i e^\theta), \qquad \gamma = \sqrt{1 - |\lambda|^2}

    Args:
      params: ``nu`` and ``theta`` ``[state]``; ``B_re``, ``B_im`` ``[features, state]``; ``C_re``, ``C_im``
        ``[state, hidden]``; ``D`` ``[features, hidden]``.
      h: complex state.
      projected: a time step of ``lru_project``.
      dtype: of the matrix products' operands.

    Returns:
      h' and y.

    Raises:
      ValueError: a state of another shape.

    Reference: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences", ICML 2023 (arXiv
    2303.06349). The recurrence alone, without the norm, gate and skip that a deep stack puts around it.
    """
    drive, skip = projected
    h = _eigenvalues(params) * _check_carry(h, drive.shape[:-1], drive.shape[-1]) + drive
    return h, _lru_read(params, h, skip, dtype)


def _eigenvalues(params: Params) -> jax.Array:
    return jnp.exp(jax.lax.complex(-jnp.exp(wide(params["nu"])), jnp.exp(wide(params["theta"]))))


def _lru_read(params: Params, h: jax.Array, skip: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    kernel = jnp.concatenate([params["C_re"], -params["C_im"]], 0)
    return _dot(jnp.concatenate([h.real, h.imag], -1), kernel, dtype) + skip


def lru(
    params: Params,
    xs: Float[Array, "time *batch inputs"],
    h0: Inexact[Array, "*batch state"] | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The linear recurrent unit over a sequence by ``linear_scan``; the equations are those of ``lru_step``.

    Args:
      params: as in ``lru_step``.
      xs: inputs.
      h0: first complex state, zeros by default.
      dtype: of the matrix products' operands.

    Returns:
      The last complex state ``[*batch, state]`` and all outputs ``[time, *batch, hidden]``.

    Raises:
      ValueError: an ``h0`` of another shape.

    Example:
      >>> params = {"nu": jnp.zeros(8), "theta": jnp.zeros(8), "D": jnp.zeros((3, 4))}
      >>> params |= {"B_re": jnp.ones((3, 8)), "B_im": jnp.ones((3, 8))}
      >>> params |= {"C_re": jnp.ones((8, 4)), "C_im": jnp.ones((8, 4))}
      >>> state, outputs = lru(params, jnp.ones((6, 2, 3)))
      >>> state.shape, outputs.shape
      ((2, 8), (6, 2, 4))
    """
    drive, skip = lru_project(params, xs, dtype=dtype)
    if h0 is not None:
        h0 = _check_carry(h0, drive.shape[1:-1], drive.shape[-1])
    decay = _eigenvalues(params)
    decay = jnp.broadcast_to(decay, (len(drive), *[1] * (drive.ndim - 2), len(decay)))
    states = linear_scan(decay, drive, h0)
    return states[-1], _lru_read(params, states, skip, dtype)


def _uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def _orthogonal_blocks(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    blocks = jax.random.split(key, shape[1] // shape[0])
    return jnp.concatenate([nn.initializers.orthogonal()(one, (shape[0], shape[0]), dtype) for one in blocks], -1)


class _Cell(nn.RNNCellBase):
    """A width, an operand dtype, and a state of zeros."""

    features: int
    dtype: DTypeLike | None = None

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Any:
        del rng
        return jnp.zeros((*input_shape[:-1], self.features))

    @property
    def num_feature_axes(self) -> int:
        return 1


class _TwoStateCell(_Cell):
    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Any:
        one = super().initialize_carry(rng, input_shape)
        return one, jnp.zeros_like(one)


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
    def __call__(self, carry: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[Any, jax.Array]:
        params = {
            "W": self.param("W", nn.initializers.lecun_normal(), (x.shape[-1], 4 * self.features)),
            "U": self.param("U", _orthogonal_blocks, (self.features, 4 * self.features)),
            "b": self.param("b", self._bias),
        }
        return lstm_step(params, carry, project_inputs(params, x, dtype=self.dtype), dtype=self.dtype)

    @nn.nowrap
    def _bias(self, key: jax.Array) -> jax.Array:
        zeros = jnp.zeros(self.features)
        if self.chrono_length is None:
            return jnp.concatenate([zeros, zeros + 1, zeros, zeros])
        forget = chrono_bias(key, self.features, self.chrono_length)
        return jnp.concatenate([-forget, forget, zeros, zeros])


class FastGRNNCell(_Cell):
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
    def __call__(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        normal, ones, constant = nn.initializers.normal(0.1), nn.initializers.ones, nn.initializers.constant
        params = {
            "W": self.param("W", normal, (x.shape[-1], self.features)),
            "U": self.param("U", normal, (self.features, self.features)),
            "bias_gate": self.param("bias_gate", ones, (self.features,)),
            "bias_update": self.param("bias_update", ones, (self.features,)),
            "zeta": self.param("zeta", constant(1.0), ()),
            "nu": self.param("nu", constant(-4.0), ()),
        }
        return fastgrnn_step(params, h, project_inputs(params, x, dtype=self.dtype), dtype=self.dtype)


class AntisymmetricRNNCell(_Cell):
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
    def __call__(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        check_number("epsilon", self.epsilon, low=0.0, open_low=True)
        check_number("gamma", self.gamma, low=0.0)
        width = self.features * (2 if self.gated else 1)
        params = {
            "W": self.param("W", nn.initializers.lecun_normal(), (x.shape[-1], width)),
            # U^T - U has twice the variance of U, and 1 / features is wanted of it.
            "U": self.param("U", nn.initializers.normal(1 / math.sqrt(2 * self.features)), (self.features,) * 2),
            "b": self.param("b", nn.initializers.zeros, (width,)),
        }
        projected = project_inputs(params, x, dtype=self.dtype)
        return antisymmetric_step(params, h, projected, epsilon=self.epsilon, gamma=self.gamma, dtype=self.dtype)


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
    def __call__(self, carry: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[Any, jax.Array]:
        check_number("dt", self.dt, low=0.0, open_low=True)
        check_number("gamma", self.gamma, low=0.0, open_low=True)
        check_number("epsilon", self.epsilon, low=0.0)
        init = _uniform(1 / math.sqrt(x.shape[-1] + 2 * self.features))
        params = {
            "W": self.param("W", init, (x.shape[-1], self.features)),
            "U": self.param("U", init, (2 * self.features, self.features)),
            "b": self.param("b", init, (self.features,)),
        }
        projected = project_inputs(params, x, dtype=self.dtype)
        constants = {"dt": self.dt, "gamma": self.gamma, "epsilon": self.epsilon}
        return cornn_step(params, carry, projected, **constants, dtype=self.dtype)


class _MinGRU(nn.Module):
    """What ``MinGRUCell`` and ``MinGRU`` share."""

    features: int
    dtype: DTypeLike | None = None
    chrono_length: int | None = None

    def _params(self, inputs: int) -> dict[str, jax.Array]:
        return {
            "W": self.param("W", nn.initializers.lecun_normal(), (inputs, 2 * self.features)),
            "b": self.param("b", self._bias),
        }

    @nn.nowrap
    def _bias(self, key: jax.Array) -> jax.Array:
        zeros = jnp.zeros(self.features)
        gate = zeros if self.chrono_length is None else -chrono_bias(key, self.features, self.chrono_length)
        return jnp.concatenate([gate, zeros])


class MinGRUCell(_MinGRU, _Cell):
    """minGRU cell for streams; on whole sequences ``MinGRU``, of the same parameters, is faster.

    Args:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.
      chrono_length: as in ``MinGRU``.

    Example:
      >>> rnn = nn.RNN(MinGRUCell(features=8))
      >>> states, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    @nn.compact
    def __call__(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = self._params(x.shape[-1])
        return min_gru_step(params, h, project_inputs(params, x, dtype=self.dtype))


class MinGRU(_MinGRU):
    """minGRU over whole sequences by parallel scan; the equations and the source are those of ``min_gru_step``.

    Args:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.
      chrono_length: start the gates' biases at the negative of ``chrono_bias``, to keep the state over such times.
        None starts them at 0.

    Returns:
      When called with x ``[batch, time, features_in]`` and, if wanted, a first state ``[batch, features]``: all states
      ``[batch, time, features]``.

    Example:
      >>> states, _ = jax.eval_shape(MinGRU(features=8).init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    @nn.compact
    def __call__(self, x: Float[Array, "batch time inputs"], h0: jax.Array | None = None) -> jax.Array:
        _, states = min_gru(self._params(x.shape[-1]), jnp.swapaxes(x, 0, 1), h0, dtype=self.dtype)
        return jnp.swapaxes(states, 0, 1)


class _LRU(nn.Module):
    """What ``LRUCell`` and ``LRU`` share."""

    features: int
    dtype: DTypeLike | None = None
    state: int | None = None
    r_min: float = 0.9
    r_max: float = 0.999
    max_phase: float = 2 * math.pi

    @property
    def _width(self) -> int:
        return self.features if self.state is None else self.state

    def _params(self, inputs: int) -> dict[str, jax.Array]:
        check_number("r_min", self.r_min, low=0.0, high=1.0, open_high=True)
        check_number("r_max", self.r_max, low=self.r_min, high=1.0, open_low=True, open_high=True)
        check_number("max_phase", self.max_phase, low=0.0, open_low=True)
        normal, width = nn.initializers.normal, self._width
        shapes = {"B_re": (inputs, width), "B_im": (inputs, width), "C_re": (width, self.features)}
        shapes |= {"C_im": (width, self.features), "D": (inputs, self.features)}
        scales = {"B": 1 / math.sqrt(2 * inputs), "C": 1 / math.sqrt(width), "D": 1 / math.sqrt(inputs)}
        return {
            "nu": self.param("nu", functools.partial(_ring, low=self.r_min, high=self.r_max), (width,)),
            "theta": self.param("theta", functools.partial(_phases, high=self.max_phase), (width,)),
            **{name: self.param(name, normal(scales[name[0]]), shape) for name, shape in shapes.items()},
        }


def _ring(key: jax.Array, shape: tuple[int, ...], *, low: float, high: float) -> jax.Array:
    """nu of |lambda| uniform over the area of a ring."""
    square = jax.random.uniform(key, shape, minval=low**2, maxval=high**2)
    return jnp.log(-0.5 * jnp.log(square))


def _phases(key: jax.Array, shape: tuple[int, ...], *, high: float) -> jax.Array:
    return jnp.log(jax.random.uniform(key, shape, minval=jnp.finfo(jnp.float32).tiny, maxval=high))


class LRUCell(_LRU, _Cell):
    """Linear recurrent unit for streams; on whole sequences ``LRU``, of the same parameters, is faster.

    Args:
      features: width of the output.
      dtype: as in ``LRU``.
      state: as in ``LRU``.
      r_min: as in ``LRU``.
      r_max: as in ``LRU``.
      max_phase: as in ``LRU``.

    Example:
      >>> rnn = nn.RNN(LRUCell(features=8))
      >>> outputs, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> outputs.shape
      (4, 20, 8)
    """

    @nn.compact
    def __call__(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = self._params(x.shape[-1])
        return lru_step(params, h, lru_project(params, x, dtype=self.dtype), dtype=self.dtype)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> jax.Array:
        del rng
        return jnp.zeros((*input_shape[:-1], self._width), complex)


class LRU(_LRU):
    """Linear recurrent unit over whole sequences by parallel scan; equations and source are those of ``lru_step``.

    Args:
      features: width of the output.
      dtype: of the matrix products' operands, by default their own.
      state: width of the complex state, ``features`` by default.
      r_min: least modulus of the eigenvalues at the start, in [0, 1).
      r_max: largest modulus, in (r_min, 1).
      max_phase: largest phase, in radians; pi / 10 helps on long sequences.

    Returns:
      When called with x ``[batch, time, features_in]`` and, if wanted, a first complex state ``[batch, state]``:
      outputs ``[batch, time, features]``.

    Raises:
      ValueError: a number out of range.

    Example:
      >>> layer = LRU(features=8, r_min=0.99, r_max=0.9999)
      >>> outputs, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> outputs.shape
      (4, 20, 8)
    """

    @nn.compact
    def __call__(self, x: Float[Array, "batch time inputs"], h0: jax.Array | None = None) -> jax.Array:
        _, outputs = lru(self._params(x.shape[-1]), jnp.swapaxes(x, 0, 1), h0, dtype=self.dtype)
        return jnp.swapaxes(outputs, 0, 1)
