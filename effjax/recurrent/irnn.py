"""iRNN: the hidden state is the increment of an ODE run at every input (Kag, Zhang, Saligrama, ICLR 2020).

Layout and dtypes are those of ``effjax.recurrent.cells``.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from effjax.core.cells import Cell, PyTree
from effjax.core.errors import check_choice, check_number
from effjax.core.layers import OverTime, at_end, fitted_carry
from effjax.core.products import add_bias, dot
from effjax.core.time_scan import scan_time
from effjax.core.tree import wide
from effjax.recurrent.cells import (
    UNROLLED_STEPS,
    Activation,
    Hidden,
    Params,
    Sequence,
    check_finite,
    check_hidden,
    check_length,
    eta_shape,
    first_hidden,
    kernel_params,
    steps_at,
    steps_done,
    steps_from,
    steps_over_time,
)

__all__ = ["IncrementalRNN", "IncrementalRNNCell", "irnn"]

_STARTS = ("prev", "zero")


def irnn(
    params: Params,
    xs: Sequence,
    h0: Hidden | None = None,
    *,
    start: str = "prev",
    activation: Activation = nn.relu,
    chunk: int | None = None,
    unroll: int = 1,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Incremental RNN: K Euler steps of an ODE at every input; the increment becomes the state.

    .. math::
        z_0 &= h_{t-1} \text{ ("prev") or } 0 \text{ ("zero")} \\
        z_{i+1} &= z_i + \eta_{t,i} \left[ \phi((z_i + h_{t-1}) U + x_t W + b) - \alpha (z_i + h_{t-1}) \right] \\
        h_t &= z_K

    All input products are one matrix product before the loop. The increments converge to ``irnn_equilibrium`` from
    both starts where :math:`\|U\|_2 < \alpha` and :math:`\phi` is 1-Lipschitz, at the rate
    :math:`1 - \eta (\alpha - \|U\|_2)` for :math:`\eta \le 1 / \alpha`. Nothing bounds U in training, and ReLU with
    large steps can diverge: keep :math:`\eta \le 1 / \alpha`.

    Args:
      params: ``W`` ``[features, hidden]``, ``U`` ``[hidden, hidden]``, ``b`` ``[hidden]``, ``alpha`` scalar, and
        ``eta`` ``[time, K]``, of which the first T rows count, or ``[K]``, shared by all time steps.
      xs: inputs.
      h0: first state, zeros by default.
      start: where the inner iteration begins. ``"prev"`` is a near-identity residual cell and what the authors' code
        family does; ``"zero"`` is the paper's form, which forgets unless the steps are large or many.
      activation: :math:`\phi`.
      chunk: as in ``scan_time``.
      unroll: as in ``scan_time``.
      dtype: of the matrix products' operands, by default their own; they accumulate in float32 at least.

    Returns:
      The last state ``[*batch, hidden]`` and all states ``[time, *batch, hidden]``, float32 at least.

    Raises:
      ValueError: per-time ``eta`` with fewer rows than steps, K < 1, an ``h0`` of another shape, NaN in inputs that are
        not traced, an unknown ``start``.

    Example:
      >>> key = jax.random.key(0)
      >>> params = {"W": jax.random.normal(key, (3, 4)), "U": jnp.eye(4) / 2, "b": jnp.zeros(4),
      ...           "alpha": 1.0, "eta": jnp.full((10, 2), 0.01)}
      >>> last, states = irnn(params, jax.random.normal(key, (10, 5, 3)))
      >>> last.shape, states.shape
      ((5, 4), (10, 5, 4))

    Reference: Kag, Zhang, Saligrama, "RNNs Incrementally Evolving on an Equilibrium Manifold: A Panacea for Vanishing
    and Exploding Gradients?", ICLR 2020. Not the identity-initialised ReLU network of Le, Jaitly, Hinton 2015. The
    step sizes for each time step come from the authors' code; they are positional parameters, so T is bound by them
    and the signal's position must not change. Most of the gain on noise-padded tasks is theirs.
    """
    check_choice("start", start, _STARTS)
    check_finite("xs", xs)
    eta = steps_over_time(params["eta"], len(xs))
    return _over(params, xs, h0, eta, start=start, activation=activation, chunk=chunk, unroll=unroll, dtype=dtype)


def _over(
    params: Params,
    xs: Sequence,
    h0: Hidden | None,
    eta: jax.Array,
    *,
    start: str,
    activation: Activation,
    chunk: int | None,
    unroll: int,
    dtype: DTypeLike | None,
) -> tuple[jax.Array, jax.Array]:
    """``irnn`` with step sizes ``[time, K]`` or ``[time, K, *batch, 1]``."""
    pre = _project(params, xs, dtype)
    step = functools.partial(_step, start=start, activation=activation, dtype=dtype)
    return scan_time(step, params, first_hidden(h0, pre), (pre, eta), chunk=chunk, unroll=unroll)


def _project(params: Params, xs: Sequence, dtype: DTypeLike | None) -> jax.Array:
    return add_bias(dot(xs, params["W"], dtype), params["b"])


def _step(
    params: Params,
    h: Hidden,
    projected: tuple[jax.Array, jax.Array],
    *,
    start: str,
    activation: Activation,
    dtype: DTypeLike | None,
) -> tuple[jax.Array, jax.Array]:
    """One time step, from the projected input ``[*batch, hidden]`` and step sizes ``[K]`` or ``[K, *batch, 1]``."""
    pre, eta = projected
    h, alpha = wide(h), wide(params["alpha"])

    def euler(z: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
        y = z + h
        return z + step * (activation(dot(y, params["U"], dtype) + pre) - alpha * y), None

    z = h if start == "prev" else jnp.zeros_like(h)
    z, _ = jax.lax.scan(euler, z, eta, unroll=min(len(eta), UNROLLED_STEPS))
    return z, z


class _Incremental(nn.Module):
    """What ``IncrementalRNNCell`` and ``IncrementalRNN`` share."""

    features: int
    K: int = 1
    eta_mode: str = "per_time"
    length: int | None = None
    start: str = "prev"
    activation: Activation = nn.relu
    alpha: float = 1.0
    eta: float = 0.01
    dtype: DTypeLike | None = None

    @nn.compact
    def weights(self, inputs: int) -> dict[str, jax.Array]:
        check_choice("start", self.start, _STARTS)
        check_number("alpha", self.alpha, low=0.0, open_low=True)
        steps = eta_shape(self.K, check_choice("eta_mode", self.eta_mode, ("per_time", "shared")), self.length)
        return {
            **kernel_params(self, {"W": (inputs, self.features), "U": (self.features, self.features)}),
            "b": self.param("b", nn.initializers.zeros, (self.features,)),
            "alpha": self.param("alpha", nn.initializers.constant(self.alpha), ()),
            "eta": self.param("eta", nn.initializers.constant(self.eta), steps),
        }


class IncrementalRNNCell(_Incremental, Cell):
    r"""Incremental RNN cell for ``nn.RNN``; the equations are those of ``irnn``.

    The carry is the state and the number of steps done, which finds the row of ``eta``. Beyond ``length`` the state is
    NaN, as there are no step sizes for it.

    Args:
      features: width D of the state.
      K: Euler steps at every input.
      eta_mode: ``"per_time"``, one trained step size for each inner and each time step, or ``"shared"``, one for each
        inner step.
      length: longest sequence, for ``eta_mode="per_time"``.
      start: ``"prev"`` or ``"zero"``.
      activation: :math:`\phi`.
      alpha: decay to start from; trained.
      eta: step size to start from; trained.
      dtype: of the matrix products' operands, by default their own.

    Returns:
      When called as ``cell(carry, x)`` with x ``[*batch, features_in]``: the new carry and the state
      ``[*batch, features]``.

    Raises:
      ValueError: K < 1, an unknown choice, a ``length`` that is missing or would do nothing, a carry of another size.

    Example:
      >>> rnn = nn.RNN(IncrementalRNNCell(features=8, length=20))
      >>> states, variables = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape, variables["params"]["cell"]["eta"].shape
      ((4, 20, 8), (20, 1))

    Reference: as for ``irnn``. Weights start from N(0, 0.1^2) and steps from 0.01, as in the authors' code.

    Source: Kag, Zhang, Saligrama 2020, ICLR (OpenReview HylpqA4FwS).
    """

    @nn.nowrap
    def project(self, params: Params, xs: jax.Array | np.ndarray) -> jax.Array:
        return _project(params, xs, self.dtype)

    @nn.nowrap
    def advance(
        self, params: Params, carry: tuple[jax.Array, jax.Array], projected: jax.Array
    ) -> tuple[Any, jax.Array]:
        h, time = carry
        check_hidden("carry[0]", h, projected.shape)
        now = projected, steps_at(params["eta"], time)
        h, y = _step(params, h, now, start=self.start, activation=self.activation, dtype=self.dtype)
        return (h, time + 1), y

    @nn.nowrap
    def check_steps(self, steps: int) -> None:
        check_length(self.length, steps)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        del rng
        return jnp.zeros((*input_shape[:-1], self.features)), jnp.zeros(input_shape[:-1], jnp.int32)


class IncrementalRNN(_Incremental, OverTime):
    """Incremental RNN over whole sequences, the input products hoisted out of the loop.

    Equal to ``nn.RNN(IncrementalRNNCell(...))`` and faster; the parameters are those of the cell.

    Args:
      features: width D of the state.
      K: as in ``IncrementalRNNCell``.
      eta_mode: as in ``IncrementalRNNCell``.
      length: as in ``IncrementalRNNCell``.
      start: as in ``IncrementalRNNCell``.
      activation: as in ``IncrementalRNNCell``.
      alpha: as in ``IncrementalRNNCell``.
      eta: as in ``IncrementalRNNCell``.
      dtype: as in ``IncrementalRNNCell``.
      chunk: as in ``scan_time``.
      unroll: as in ``scan_time``.

    Returns:
      When called with x ``[batch, time, features_in]``: all states ``[batch, time, features]``, float32 at least. The
      call is that of ``Recurrent`` (``initial_carry``, ``seq_lengths``, ``return_carry``, ...), and the carry that of
      the cell; a state ``[batch, features]`` alone starts at the first step.

    Raises:
      ValueError: as ``IncrementalRNNCell``, and for sequences longer than ``length``.

    Example:
      >>> layer = IncrementalRNN(features=8, length=20, chunk=5)
      >>> states, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    chunk: int | None = None
    unroll: int = 1

    def run(
        self, xs: jax.Array, carry: PyTree, lengths: jax.Array | None, key: jax.Array | None
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        del key
        check_finite("x", xs)
        params, rows = self.weights(xs.shape[-1]), xs.shape[1]
        if carry is None or not isinstance(carry, tuple | list):
            h0, time = carry, None
        else:
            like = jnp.zeros((rows, self.features)), jnp.zeros(rows, jnp.int32)
            h0, time = fitted_carry(carry, like, "IncrementalRNN")
        eta = steps_from(params["eta"], len(xs), time, lengths)
        h0 = None if h0 is None else fitted_carry(h0, jnp.zeros((rows, self.features)), "IncrementalRNN")
        options = {"start": self.start, "activation": self.activation, "chunk": self.chunk, "unroll": self.unroll}
        _, states = _over(params, xs, h0, eta, dtype=self.dtype, **options)
        return (at_end(states, lengths, h0), steps_done(time, lengths, xs)), states
