"""The "dual ODE" form of the incremental RNN.

Layout and dtypes are those of ``effjax.recurrent.cells``.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.core.cells import PyTree
from effjax.core.errors import check_choice
from effjax.core.layers import OverTime, at_end, fitted_carry
from effjax.core.products import dot
from effjax.core.time_scan import scan_time
from effjax.core.tree import wide
from effjax.recurrent.cells import (
    UNROLLED_STEPS,
    Activation,
    Hidden,
    Params,
    Sequence,
    check_finite,
    eta_shape,
    first_hidden,
    fused_dot,
    kernel_params,
    steps_done,
    steps_from,
    steps_over_time,
)

__all__ = ["DualODE", "dual_ode"]

_STEPS = ("alpha1", "alpha2", "beta2")
_INPUTS = {"fast": ("W1", "b1"), "slow": ("W3", "b2"), "gate": ("Wg", "bg")}


def dual_ode(
    params: Params,
    xs: Sequence,
    h0: tuple[Hidden, Hidden] | None = None,
    *,
    activation: Activation = nn.relu,
    chunk: int | None = None,
    unroll: int = 1,
    dtype: DTypeLike | None = None,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    r"""The "dual ODE" form of the incremental RNN: a slow state drives a fast one.

    .. math::
        s' &= \beta_{2,t}\, s + \alpha_{2,t}\, \phi(s U_4 + x_t W_3 + b_2) \\
        z_0 &= f, \qquad z_{i+1} = (1 - \alpha_{1,t,i}) z_i
            + \alpha_{1,t,i} \left[ \phi(z_i U_1 + s' U_2 + f U_1 + x_t W_1 + b_1) - s' - f \right] \\
        f' &= (1 - g) f + g z_K, \qquad g = \sigma(s U_g + x_t W_g + b_g)

    Without ``Wg``, ``Ug`` and ``bg`` among the parameters there is no gate: :math:`f' = z_K`.

    Args:
      params: ``W1``, ``W3``, ``Wg`` ``[features, hidden]``; ``U1``, ``U2``, ``U4``, ``Ug`` ``[hidden, hidden]``;
        ``b1``, ``b2``, ``bg`` ``[hidden]``; ``alpha1`` ``[time, K]``; ``alpha2`` and ``beta2`` ``[time, 1]``. Sizes
        ``[K]`` and ``[1]`` are shared by all time steps.
      xs: inputs.
      h0: first fast state f and slow state s, ``[*batch, hidden]`` each, zeros by default.
      activation: :math:`\phi`.
      chunk: as in ``scan_time``.
      unroll: as in ``scan_time``.
      dtype: of the matrix products' operands.

    Returns:
      The last (f, s), and the states of all times, f and s side by side, ``[time, *batch, 2 * hidden]``.

    Raises:
      ValueError: as ``irnn``.

    Example:
      >>> layer = DualODE(features=8, length=6)
      >>> variables = jax.jit(layer.init)(jax.random.key(0), jnp.ones((2, 6, 3)))
      >>> (fast, slow), states = dual_ode(variables["params"], jnp.ones((6, 2, 3)))
      >>> fast.shape, states.shape
      ((2, 4), (6, 2, 8))

    Reference: class ``iRNN_DualODECell`` of the authors' code (anilkagak2/TARNN, ``tensorflow/tarnn.py``). Its W2 and
    W4, which are computed and not used, are left out.

    Source: Kag, Zhang, Saligrama 2020, ICLR (OpenReview HylpqA4FwS).
    """
    check_finite("xs", xs)
    steps = {name: steps_over_time(params[name], len(xs), argument=name) for name in _STEPS}
    return _over(params, xs, h0, steps, activation=activation, chunk=chunk, unroll=unroll, dtype=dtype)


def _over(
    params: Params,
    xs: Sequence,
    h0: tuple[Hidden, Hidden] | None,
    steps: dict[str, jax.Array],
    *,
    activation: Activation,
    chunk: int | None,
    unroll: int,
    dtype: DTypeLike | None,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """``dual_ode`` with step sizes ``[time, K]`` or ``[time, K, *batch, 1]``."""
    used = {part: names for part, names in _INPUTS.items() if names[0] in params}
    pre = fused_dot(xs, {part: (params[kernel], params[bias]) for part, (kernel, bias) in used.items()}, dtype)
    fast, slow = (None, None) if h0 is None else h0
    carry = (first_hidden(fast, pre["fast"], "h0[0]"), first_hidden(slow, pre["slow"], "h0[1]"))
    step = functools.partial(_step, activation=activation, dtype=dtype)
    return scan_time(step, params, carry, (pre, steps), chunk=chunk, unroll=unroll)


def _step(
    params: Params,
    carry: tuple[Hidden, Hidden],
    projected: tuple[dict[str, jax.Array], dict[str, jax.Array]],
    *,
    activation: Activation,
    dtype: DTypeLike | None,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """(f, s), the products with the inputs and the step sizes of a time step to (f', s'), and both joined."""
    pre, steps = projected
    fast, slow = map(wide, carry)
    new_slow = steps["beta2"][0] * slow + steps["alpha2"][0] * activation(dot(slow, params["U4"], dtype) + pre["slow"])
    fixed = dot(new_slow, params["U2"], dtype) + dot(fast, params["U1"], dtype) + pre["fast"]

    def euler(z: jax.Array, size: jax.Array) -> tuple[jax.Array, None]:
        return (1 - size) * z + size * (activation(dot(z, params["U1"], dtype) + fixed) - new_slow - fast), None

    z, _ = jax.lax.scan(euler, fast, steps["alpha1"], unroll=min(len(steps["alpha1"]), UNROLLED_STEPS))
    if "gate" in pre:
        gate = nn.sigmoid(dot(slow, params["Ug"], dtype) + pre["gate"])
        z = (1 - gate) * fast + gate * z
    return (z, new_slow), jnp.concatenate([z, new_slow], -1)


class DualODE(OverTime):
    """The "dual ODE" incremental RNN over whole sequences; the equations are those of ``dual_ode``.

    Args:
      features: width of the state, fast and slow half together.
      K: inner steps of the fast half.
      eta_mode: ``"per_time"`` or ``"shared"`` step sizes, all trained.
      length: longest sequence, for ``eta_mode="per_time"``.
      gating: gate the fast half.
      activation: as in ``dual_ode``.
      eta: step size to start from.
      dtype: of the matrix products' operands.
      chunk: as in ``scan_time``.
      unroll: as in ``scan_time``.

    Returns:
      When called with x ``[batch, time, features_in]``: ``[batch, time, features]``. The call is that of
      ``effjax.models.Recurrent`` (``initial_carry``, ``seq_lengths``, ``return_carry``, ...), and the carry the fast
      state, the slow state and the number of steps done; the states alone start at the first step.

    Raises:
      ValueError: an odd number of features, or as ``IncrementalRNN``.

    Example:
      >>> layer = DualODE(features=8, length=6)
      >>> states, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((2, 6, 3)))
      >>> states.shape
      (2, 6, 8)
    """

    features: int
    K: int = 2
    eta_mode: str = "per_time"
    length: int | None = None
    gating: bool = True
    activation: Activation = nn.relu
    eta: float = 0.01
    dtype: DTypeLike | None = None
    chunk: int | None = None
    unroll: int = 1

    @nn.compact
    def run(
        self, xs: jax.Array, carry: PyTree, lengths: jax.Array | None, key: jax.Array | None
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
        del key
        check_finite("x", xs)
        params, rows = self._params(xs.shape[-1]), xs.shape[1]
        half, time = jnp.zeros((rows, self.features // 2)), None
        if carry is not None:
            alone = isinstance(carry, tuple | list) and len(carry) == 2
            like = (half, half) if alone else (half, half, jnp.zeros(rows, jnp.int32))
            fitted = fitted_carry(carry, like, "DualODE")
            carry, time = fitted[:2], None if alone else fitted[2]
        steps = {name: steps_from(params[name], len(xs), time, lengths, argument=name) for name in _STEPS}
        options = {"activation": self.activation, "chunk": self.chunk, "unroll": self.unroll, "dtype": self.dtype}
        _, states = _over(params, xs, carry, steps, **options)
        fast, slow = jnp.split(at_end(states, lengths, None if carry is None else jnp.concatenate(carry, -1)), 2, -1)
        return (fast, slow, steps_done(time, lengths, xs)), states

    def _params(self, inputs: int) -> dict[str, jax.Array]:
        if self.features % 2:
            raise ValueError(f"features={self.features} must be even: half of it is the fast state, half the slow one.")
        half = self.features // 2
        mode = check_choice("eta_mode", self.eta_mode, ("per_time", "shared"))
        zeros, constant = nn.initializers.zeros, nn.initializers.constant
        shapes = dict.fromkeys(("W1", "W3"), (inputs, half)) | dict.fromkeys(("U1", "U2", "U4"), (half, half))
        params = {
            "b1": self.param("b1", zeros, (half,)),
            "b2": self.param("b2", zeros, (half,)),
            "alpha1": self.param("alpha1", constant(self.eta), eta_shape(self.K, mode, self.length)),
            "alpha2": self.param("alpha2", constant(self.eta), eta_shape(1, mode, self.length)),
            "beta2": self.param("beta2", constant(1.0), eta_shape(1, mode, self.length)),
        }
        if self.gating:
            shapes |= {"Wg": (inputs, half), "Ug": (half, half)}
            params["bg"] = self.param("bg", constant(-3.0), (half,))
        return params | kernel_params(self, shapes)
