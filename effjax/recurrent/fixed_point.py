"""The incremental RNN at equilibrium: all time steps in parallel, implicit gradients.

Layout and dtypes are those of ``effjax.recurrent.cells``.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.cells import PyTree
from effjax.core.errors import check_number
from effjax.core.layers import OverTime, at_end, fitted_carry
from effjax.core.products import add_bias, dot
from effjax.core.time_scan import scan_time
from effjax.core.tree import wide
from effjax.recurrent.cells import (
    Activation,
    Hidden,
    Params,
    Sequence,
    check_finite,
    first_hidden,
    kernel_params,
)

__all__ = ["EquilibriumRNN", "irnn_equilibrium"]


def equilibrium(
    U: Float[Array, "hidden hidden"],
    alpha: Float[Array, ""] | float,
    pre: Float[Array, "*batch hidden"],
    *,
    iterations: int = 50,
    activation: Activation = nn.relu,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""The fixed point of :math:`\alpha y = \phi(y U + u)`, with the gradient of the fixed point itself.

    .. math::
        y &\leftarrow \phi(y U + u) / \alpha, \qquad
        w \leftarrow \left( \bar y + (\phi' \odot w) U^\top \right) / \alpha \\
        \bar u &= \phi' \odot w, \qquad \bar U = y^\top \bar u, \qquad \bar \alpha = -\langle w, y \rangle

    Both iterations contract by :math:`\|U\|_2 / \alpha` where :math:`\phi` is 1-Lipschitz: at 0.9, 50 of them leave
    0.5 %. Nothing is stored of them. Above 1 there may be no fixed point, or several.

    Args:
      U: recurrent kernel.
      alpha: decay, above 0.
      pre: u, the rest of the pre-activation. All its leading axes are batch.
      iterations: of each pass.
      activation: :math:`\phi`, elementwise.
      dtype: of the matrix products' operands.

    Returns:
      y, of the shape of ``pre``, float32 at least.

    Raises:
      ValueError: ``iterations`` below 1.

    Example:
      >>> y = equilibrium(0.5 * jnp.eye(2), 1.0, jnp.ones((3, 2)), iterations=40)
      >>> y[0].tolist()
      [2.0, 2.0]
    """
    check_number("iterations", iterations, low=1, integer=True)
    return _equilibrium((iterations, activation, dtype), wide(U), wide(alpha), wide(pre))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _equilibrium(settings: tuple[Any, ...], U: jax.Array, alpha: jax.Array, pre: jax.Array) -> jax.Array:
    iterations, activation, dtype = settings
    picard = lambda _, y: activation(dot(y, U, dtype) + pre) / alpha
    return jax.lax.fori_loop(0, iterations, picard, jnp.zeros_like(pre))


def _equilibrium_forward(
    settings: tuple[Any, ...], U: jax.Array, alpha: jax.Array, pre: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y = _equilibrium(settings, U, alpha, pre)
    return y, (U, alpha, pre, y)


def _equilibrium_backward(
    settings: tuple[Any, ...], saved: tuple[jax.Array, ...], y_bar: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    iterations, activation, dtype = settings
    U, alpha, pre, y = saved
    _, pull = jax.vjp(activation, dot(y, U, dtype) + pre)
    neumann = lambda _, w: (y_bar + dot(pull(w)[0], U.T, dtype)) / alpha
    w = jax.lax.fori_loop(0, iterations, neumann, jnp.zeros_like(y_bar))
    (u_bar,) = pull(w)
    _, pull_kernel = jax.vjp(lambda U: dot(y, U, dtype), U)
    return *pull_kernel(u_bar), -jnp.sum(w * y), u_bar


_equilibrium.defvjp(_equilibrium_forward, _equilibrium_backward)


def irnn_equilibrium(
    params: Params,
    xs: Sequence,
    h0: Hidden | None = None,
    *,
    iterations: int = 50,
    activation: Activation = nn.relu,
    parallel: bool = True,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""The incremental RNN at equilibrium, where its time steps are independent of one another.

    .. math::
        \alpha y_t = \phi(y_t U + x_t W + b), \qquad h_t = y_t - h_{t-1}
            = (-1)^t h_0 + \sum_{j \le t} (-1)^{t-j} y_j

    :math:`y_t` depends on :math:`x_t` alone, so all fixed points are solved at once and the states are an alternating
    cumulative sum: depth :math:`O(\text{iterations} + \log T)`. :math:`\partial h_t / \partial h_{t-1} = -I` for any
    parameters. The model is additive over time: it cannot tell the order of inputs of equal parity. ``irnn`` with few
    steps can.

    Args:
      params: as in ``irnn``, without ``eta``. The spectral norm of ``U`` must be below ``alpha``; ``EquilibriumRNN``
        scales it down.
      xs: inputs.
      h0: first state, zeros by default.
      iterations: of the solver and of its gradient. Both contract by :math:`\|U\|_2 / \alpha`: at 0.9, 50 of them
        leave 0.5 %.
      activation: :math:`\phi`.
      parallel: solve all time steps at once; False goes step by step and needs the memory of one.
      dtype: of the matrix products' operands.

    Returns:
      The last state ``[*batch, hidden]`` and all states ``[time, *batch, hidden]``.

    Raises:
      ValueError: an ``h0`` of another shape, NaN in inputs that are not traced, ``iterations`` below 1.

    Example:
      >>> params = {"W": jnp.eye(2), "U": 0.5 * jnp.eye(2), "b": jnp.zeros(2), "alpha": 1.0}
      >>> last, states = irnn_equilibrium(params, jnp.ones((3, 1, 2)))
      >>> states[:, 0, 0].tolist()  # y = 2 at every step
      [2.0, 0.0, 2.0]

    Reference: as for ``irnn``. That the equilibria can be solved in parallel over time is ours.
    """
    check_finite("xs", xs)
    pre = add_bias(dot(xs, params["W"], dtype), params["b"])
    h0 = first_hidden(h0, pre)
    solve = functools.partial(equilibrium, iterations=iterations, activation=activation, dtype=dtype)
    if not parallel:
        return scan_time(functools.partial(_equilibrium_step, solve), params, h0, pre)
    y = solve(params["U"], params["alpha"], pre)
    sign = jnp.where(jnp.arange(1, len(y) + 1) % 2, -1.0, 1.0).astype(y.dtype).reshape(-1, *[1] * (y.ndim - 1))
    states = sign * (h0[None] + jnp.cumsum(sign * y, axis=0))
    return states[-1], states


def _equilibrium_step(
    solve: Callable[..., jax.Array], params: Params, h: jax.Array, pre: jax.Array
) -> tuple[jax.Array, jax.Array]:
    h = solve(params["U"], params["alpha"], pre) - h
    return h, h


def limit_norm(U: Float[Array, "hidden hidden"], bound: Float[Array, ""] | float) -> jax.Array:
    r"""``U`` scaled down to a spectral norm of at most ``bound``: :math:`U \min(1, \mathrm{bound} / \|U\|_2)`.

    Not in the paper, which trains without a bound.

    Example:
      >>> limit_norm(2.0 * jnp.eye(2), 0.5).tolist()
      [[0.5, 0.0], [0.0, 0.5]]
    """
    norm = jnp.linalg.norm(wide(U), 2)
    return U * jnp.where(norm > bound, bound / norm, 1.0)


class EquilibriumRNN(OverTime):
    """The incremental RNN at equilibrium over whole sequences, all time steps in parallel; see ``irnn_equilibrium``.

    Args:
      features: width D of the state.
      iterations: as in ``irnn_equilibrium``.
      norm_limit: ``U`` counts scaled down to this fraction of ``alpha`` in spectral norm, below 1 so that there is one
        equilibrium. Ours, not the paper's. None leaves it unbounded.
      activation: elementwise and 1-Lipschitz.
      alpha: decay to start from; trained.
      dtype: of the matrix products' operands.

    Returns:
      When called with x ``[batch, time, features_in]``: all states ``[batch, time, features]``, float32 at least. The
      call is that of ``effjax.models.Recurrent`` (``initial_carry``, ``seq_lengths``, ``return_carry``, ...), and the
      carry a state ``[batch, features]``.

    Raises:
      ValueError: a number out of range, as ``irnn_equilibrium``.

    Example:
      >>> layer = EquilibriumRNN(features=8, iterations=20)
      >>> states, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)

    Source: Kag, Zhang, Saligrama 2020, ICLR (OpenReview HylpqA4FwS).
    """

    features: int
    iterations: int = 50
    norm_limit: float | None = 0.9
    activation: Activation = nn.relu
    alpha: float = 1.0
    dtype: DTypeLike | None = None

    @nn.compact
    def run(
        self, xs: jax.Array, carry: PyTree, lengths: jax.Array | None, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        del key
        check_number("alpha", self.alpha, low=0.0, open_low=True)
        params = {
            **kernel_params(self, {"W": (xs.shape[-1], self.features), "U": (self.features, self.features)}),
            "b": self.param("b", nn.initializers.zeros, (self.features,)),
            "alpha": self.param("alpha", nn.initializers.constant(self.alpha), ()),
        }
        if self.norm_limit is not None:
            check_number("norm_limit", self.norm_limit, low=0.0, high=1.0, open_low=True, open_high=True)
            params["U"] = limit_norm(params["U"], self.norm_limit * params["alpha"])
        if carry is not None:
            carry = fitted_carry(carry, jnp.zeros((xs.shape[1], self.features)), "EquilibriumRNN")
        options = {"iterations": self.iterations, "activation": self.activation, "dtype": self.dtype}
        _, states = irnn_equilibrium(params, xs, carry, **options)
        return at_end(states, lengths, carry), states
