"""Linear recurrences: LRU and minGRU. Conventions are those of ``effjax.models.sequence``."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Inexact

from effjax.core.cells import Cell, Params, PyTree
from effjax.core.errors import check_number
from effjax.core.layers import OverTime, at_end, fitted_carry
from effjax.core.products import aligned, dot
from effjax.core.time_scan import scan_time
from effjax.core.tree import wide
from effjax.models.sequence import Hidden, PlainCell, Projected, check_carry, chrono_bias, project_inputs

__all__ = ["LRU", "LRUCell", "MinGRU", "MinGRUCell", "linear_scan"]


def linear_scan(
    a: Inexact[Array | np.ndarray, "time ..."],
    u: Inexact[Array | np.ndarray, "time ..."],
    h0: Inexact[Array, "..."] | None = None,
) -> jax.Array:
    r"""All states of :math:`h_t = a_t \odot h_{t-1} + u_t`, on accelerators in :math:`O(\log T)` dependent steps.

    .. math:: (a_1, u_1) \circ (a_2, u_2) = (a_1 a_2,\; a_2 u_1 + u_2)

    is associative. The products of many :math:`|a| < 1` underflow to 0, which is what they mean. Where the default
    backend is a CPU the states are computed one after the other: with few cores and little memory bandwidth the
    associative scan's extra work loses.

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
        u = jnp.asarray(u).at[0].add(a[0] * h0)
    return (_sequential if jax.default_backend() == "cpu" else _associative)(a, u)


@jax.jit
def _sequential(a: jax.Array, u: jax.Array) -> jax.Array:
    def step(_: None, h: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h = now[0] * h + now[1]
        return h, h

    return scan_time(step, None, jnp.zeros_like(a[0] * u[0]), (a, u))[1]


@jax.jit  # called eagerly, it would compile every slice by itself
def _associative(a: jax.Array, u: jax.Array) -> jax.Array:
    return jax.lax.associative_scan(lambda one, two: (one[0] * two[0], two[0] * one[1] + two[1]), (a, u))[1]


def min_gru(
    params: Params,
    xs: Float[Array | np.ndarray, "time *batch inputs"],
    h0: Hidden | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""minGRU over a sequence by ``linear_scan``.

    .. math:: z = \sigma(x_t W_z + b_z), \qquad h_t = (1 - z) \odot h_{t-1} + z \odot (x_t W_c + b_c)

    Args:
      params: ``W`` ``[features, 2 * hidden]`` and ``b`` ``[2 * hidden]``, the gate's half before the candidate's.
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

    Reference: Feng et al., "Were RNNs All We Needed?", 2024 (arXiv 2410.01201).
    """
    z, candidate = jnp.split(project_inputs(params, xs, dtype=dtype), 2, -1)
    if h0 is not None:
        h0 = check_carry(h0, z.shape[1:-1], z.shape[-1])
    z = nn.sigmoid(z)
    states = linear_scan(1 - z, z * candidate, h0)
    return states[-1], states


def lru_project(
    params: Params, xs: Float[Array | np.ndarray, "*batch inputs"], *, dtype: DTypeLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """What ``lru_step`` takes: the complex drive of the state, and the real skip to the output."""
    parts = jnp.concatenate([params["B_re"], params["B_im"], params["D"]], -1)
    state = params["nu"].shape[-1]
    real, imaginary, skip = jnp.split(dot(xs, parts, dtype), (state, 2 * state), -1)
    decay = jnp.exp(-2 * jnp.exp(wide(params["nu"])))
    return jax.lax.complex(real, imaginary) * aligned(jnp.sqrt(1 - decay), real), skip


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
    h = aligned(_eigenvalues(params), drive) * check_carry(h, drive.shape[:-1], drive.shape[-1]) + drive
    return h, _lru_read(params, h, skip, dtype)


def _eigenvalues(params: Params) -> jax.Array:
    return jnp.exp(jax.lax.complex(-jnp.exp(wide(params["nu"])), jnp.exp(wide(params["theta"]))))


def _lru_read(params: Params, h: jax.Array, skip: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    kernel = jnp.concatenate([params["C_re"], -params["C_im"]], 0)
    return dot(jnp.concatenate([h.real, h.imag], -1), kernel, dtype) + skip


def lru(
    params: Params,
    xs: Float[Array | np.ndarray, "time *batch inputs"],
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
        h0 = check_carry(h0, drive.shape[1:-1], drive.shape[-1])
    states, outputs = _lru_over(params, drive, skip, h0, dtype)
    return states[-1], outputs


def _lru_over(
    params: Params, drive: jax.Array, skip: jax.Array, h0: jax.Array | None, dtype: DTypeLike | None
) -> tuple[jax.Array, jax.Array]:
    """All states and outputs."""
    decay = _eigenvalues(params)
    decay = jnp.broadcast_to(decay, (len(drive), *[1] * (drive.ndim - 2), len(decay)))
    states = linear_scan(decay, drive, h0)
    return states, _lru_read(params, states, skip, dtype)


class _MinGRU(nn.Module):
    """What ``MinGRUCell`` and ``MinGRU`` share."""

    features: int
    dtype: DTypeLike | None = None
    chrono_length: int | None = None

    @nn.compact
    def weights(self, inputs: int) -> Params:
        return {
            "W": self.param("W", nn.initializers.lecun_normal(), (inputs, 2 * self.features)),
            "b": self.param("b", self._bias),
        }

    @nn.nowrap
    def _bias(self, key: jax.Array) -> jax.Array:
        zeros = jnp.zeros(self.features)
        gate = zeros if self.chrono_length is None else -chrono_bias(key, self.features, self.chrono_length)
        return jnp.concatenate([gate, zeros])


class MinGRUCell(_MinGRU, PlainCell):
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

    @nn.nowrap
    def step(self, params: Params, carry: jax.Array, projected: Projected) -> tuple[jax.Array, jax.Array]:
        z, candidate = jnp.split(projected, 2, -1)
        z = nn.sigmoid(z)
        h = (1 - z) * carry + z * candidate
        return h, h


class MinGRU(_MinGRU, OverTime):
    """minGRU over whole sequences by ``linear_scan``; the equations and the source are those of ``min_gru``.

    Args:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.
      chrono_length: start the gates' biases at the negative of ``chrono_bias``, to keep the state over such times.
        None starts them at 0.

    Returns:
      When called with x ``[batch, time, features_in]``: all states ``[batch, time, features]``; the call is that of
      ``Recurrent``, and the carry a state ``[batch, features]``.

    Example:
      >>> states, _ = jax.eval_shape(MinGRU(features=8).init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    def run(
        self, xs: jax.Array, carry: PyTree, lengths: jax.Array | None, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        del key
        if carry is not None:
            carry = fitted_carry(carry, jnp.zeros((xs.shape[1], self.features)), "MinGRU")
        _, states = min_gru(self.weights(xs.shape[-1]), xs, carry, dtype=self.dtype)
        return at_end(states, lengths, carry), states


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

    @nn.compact
    def weights(self, inputs: int) -> Params:
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


class LRUCell(_LRU, Cell):
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

    @nn.nowrap
    def project(self, params: Params, xs: jax.Array | np.ndarray) -> PyTree:
        return lru_project(params, xs, dtype=self.dtype)

    @nn.nowrap
    def advance(self, params: Params, carry: PyTree, projected: PyTree) -> tuple[PyTree, jax.Array]:
        return lru_step(params, carry, projected, dtype=self.dtype)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> jax.Array:
        del rng
        return jnp.zeros((*input_shape[:-1], self._width), complex)


class LRU(_LRU, OverTime):
    """Linear recurrent unit over whole sequences by ``linear_scan``; equations and source are those of ``lru_step``.

    Args:
      features: width of the output.
      dtype: of the matrix products' operands, by default their own.
      state: width of the complex state, ``features`` by default.
      r_min: least modulus of the eigenvalues at the start, in [0, 1).
      r_max: largest modulus, in (r_min, 1).
      max_phase: largest phase, in radians; pi / 10 helps on long sequences.

    Returns:
      When called with x ``[batch, time, features_in]``: outputs ``[batch, time, features]``; the call is that of
      ``Recurrent``, and the carry a complex state ``[batch, state]``.

    Raises:
      ValueError: a number out of range.

    Example:
      >>> layer = LRU(features=8, r_min=0.99, r_max=0.9999)
      >>> outputs, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> outputs.shape
      (4, 20, 8)
    """

    def run(
        self, xs: jax.Array, carry: PyTree, lengths: jax.Array | None, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        del key
        if carry is not None:
            carry = fitted_carry(carry, jnp.zeros((xs.shape[1], self._width), complex), "LRU")
        params = self.weights(xs.shape[-1])
        states, outputs = _lru_over(params, *lru_project(params, xs, dtype=self.dtype), carry, self.dtype)
        return at_end(states, lengths, carry), outputs


class LRUStack(OverTime):
    r"""LRU layers as they are used in practice, each normalised before and gated and added after.

    .. math:: x \leftarrow x + \mathrm{GLU}(\mathrm{gelu}(\mathrm{LRU}(\mathrm{norm}(x))))

    Args:
      features: width of all layers.
      layers: how many.
      r_min: as in ``LRU``.
      r_max: as in ``LRU``.
      max_phase: as in ``LRU``.
      dtype: of the operands of the LRU's matrix products, by default their own.

    Returns:
      When called with x ``[batch, time, features_in]``: ``[batch, time, features]``; the call is that of ``Recurrent``,
      and the carry a tuple of each layer's complex state.

    Example:
      >>> stack = LRUStack(8, layers=2, r_min=0.9, r_max=0.999, max_phase=3.0)
      >>> states, _ = jax.eval_shape(stack.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    features: int
    layers: int
    r_min: float
    r_max: float
    max_phase: float
    dtype: DTypeLike | None = None

    @nn.compact
    def run(
        self, xs: jax.Array, carry: PyTree, lengths: jax.Array | None, key: jax.Array | None
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        del key
        if carry is not None and (not isinstance(carry, tuple | list) or len(carry) != self.layers):
            raise ValueError(f"initial_carry must hold one state for each of the {self.layers} layers, in a tuple.")
        ring = {"r_min": self.r_min, "r_max": self.r_max, "max_phase": self.max_phase}
        x, last = nn.Dense(self.features)(jnp.swapaxes(xs, 0, 1)), []
        for index in range(self.layers):
            layer, first = LRU(self.features, dtype=self.dtype, **ring), None if carry is None else carry[index]
            state, y = layer(nn.LayerNorm()(x), first, seq_lengths=lengths, return_carry=True)
            x = x + nn.glu(nn.Dense(2 * self.features)(nn.gelu(y)))
            last.append(state)
        return tuple(last), jnp.swapaxes(x, 0, 1)
