"""iRNN: the hidden state is the increment of an ODE run at every input (Kag, Zhang, Saligrama, ICLR 2020).

Pure functions are time-major, ``[time, *batch, features]``, and multiply row vectors, ``h @ U``. Modules are
batch-first, as ``nn.RNN`` is. States and step sizes are float32 at least: an increment of a hundredth of the state is
below bfloat16's resolution, so ``dtype`` is that of the matrix products' operands alone.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.errors import NoEffectWarning, check_choice, check_number
from effjax.core.tree import wide

PyTree = Any
Params = Mapping[str, jax.Array]
Activation = Callable[[jax.Array], jax.Array]
Sequence = Float[Array | np.ndarray, "time *batch features"]
Hidden = Float[Array | np.ndarray, "*batch hidden"]

# Inner Euler steps beyond this many become a loop.
_UNROLLED_STEPS = 8


def scan_time(
    step: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    *,
    chunk: int | None = None,
    unroll: int = 1,
) -> tuple[PyTree, PyTree]:
    r"""A cell over a sequence: ``lax.scan`` whose backward pass may store one carry a chunk.

    With chunks of c steps the backward pass stores T / c carries and recomputes inside one chunk at a time: memory
    :math:`O(T / c + c)` states, least at :math:`c = \sqrt T`, for one more forward pass. ``chunk=1`` stores the carries
    and none of what a step computes inside.

    Args:
      step: ``(params, carry, x) -> (carry, y)``.
      params: handed to every step.
      carry: pytree of arrays.
      xs: pytree of arrays ``[time, ...]``.
      chunk: steps between stored carries; the last chunk may be shorter. None stores every step.
      unroll: steps in one iteration of the compiled loop; 4 to 16 often help small cells.

    Returns:
      The last carry, and the pytree of the steps' outputs, ``[time, ...]``.

    Raises:
      ValueError: ``chunk`` or ``unroll`` below 1, or an empty sequence.

    Warns:
      NoEffectWarning: ``chunk`` is not below the number of steps.

    Example:
      >>> add = lambda scale, total, x: (total + scale * x, total)
      >>> total, before = scan_time(add, 2.0, jnp.float32(0.0), jnp.arange(5.0), chunk=2)
      >>> float(total), before.tolist()
      (20.0, [0.0, 0.0, 2.0, 6.0, 12.0])
    """
    check_number("unroll", unroll, low=1, integer=True)
    length = len(jax.tree.leaves(xs)[0])
    if not length:
        raise ValueError("xs holds 0 time steps, but at least 1 is needed. The leading axis is time.")

    def run(carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        return jax.lax.scan(functools.partial(step, params), carry, xs, unroll=unroll)

    if chunk is None:
        return run(carry, xs)
    check_number("chunk", chunk, low=1, integer=True)
    if chunk >= length:
        warnings.warn(
            f"chunk={chunk} is not below the {length} steps: the sequence would be one chunk and no memory saved. "
            f"Choose chunk in [1, {length - 1}], such as {max(1, round(length**0.5))}.",
            NoEffectWarning,
            stacklevel=2,
        )
        return run(carry, xs)
    run = jax.checkpoint(run, prevent_cse=False)
    whole = length // chunk * chunk
    chunks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, chunk, *leaf.shape[1:]), xs)
    carry, ys = jax.lax.scan(run, carry, chunks)
    ys = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), ys)
    if whole < length:
        carry, tail = run(carry, jax.tree.map(lambda leaf: leaf[whole:], xs))
        ys = jax.tree.map(lambda *parts: jnp.concatenate(parts), ys, tail)
    return carry, ys


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
    pre, eta = irnn_project(params, xs, dtype=dtype)
    step = functools.partial(irnn_step, start=start, activation=activation, dtype=dtype)
    return scan_time(step, params, first_hidden(h0, pre), (pre, eta), chunk=chunk, unroll=unroll)


_STARTS = ("prev", "zero")


def irnn_project(params: Params, xs: Sequence, *, dtype: DTypeLike | None = None) -> tuple[jax.Array, jax.Array]:
    """What ``irnn_step`` takes at every time step: ``xs @ W + b`` ``[time, *batch, hidden]`` and eta ``[time, K]``."""
    return dot(xs, params["W"], dtype) + wide(params["b"]), steps_over_time(params["eta"], len(xs))


def irnn_step(
    params: Params,
    h: Hidden,
    projected: tuple[jax.Array, jax.Array],
    *,
    start: str = "prev",
    activation: Activation = nn.relu,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One time step of ``irnn``.

    Args:
      params: as in ``irnn``.
      h: state.
      projected: one time step of ``irnn_project``: ``[*batch, hidden]``, and step sizes ``[K]`` or ``[K, *batch, 1]``.
      start: as in ``irnn``.
      activation: as in ``irnn``.
      dtype: as in ``irnn``.

    Returns:
      The new state, twice.

    Raises:
      ValueError: ``h`` has another shape than the projected input.

    Example:
      >>> params = {"U": jnp.eye(2), "alpha": 1.0}
      >>> h, _ = irnn_step(params, jnp.ones((1, 2)), (jnp.zeros((1, 2)), jnp.zeros(3)))
      >>> h.tolist()  # steps of size 0 keep the state
      [[1.0, 1.0]]
    """
    pre, eta = projected
    check_hidden("h", h, pre.shape)
    h, alpha = wide(h), wide(params["alpha"])

    def euler(z: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
        y = z + h
        return z + step * (activation(dot(y, params["U"], dtype) + pre) - alpha * y), None

    z = h if start == "prev" else jnp.zeros_like(h)
    z, _ = jax.lax.scan(euler, z, eta, unroll=min(len(eta), _UNROLLED_STEPS))
    return z, z


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
      params: as in ``irnn``, without ``eta``. The norm of ``U`` must be below ``alpha`` (``limit_norm``).
      xs: inputs.
      h0: first state, zeros by default.
      iterations: of the solver, as in ``equilibrium``.
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
    pre = dot(xs, params["W"], dtype) + wide(params["b"])
    h0 = first_hidden(h0, pre)
    solve = functools.partial(equilibrium, iterations=iterations, activation=activation, dtype=dtype)
    if not parallel:
        return scan_time(functools.partial(_equilibrium_step, solve), params, h0, pre)
    y = solve(params["U"], params["alpha"], pre)
    sign = jnp.where(jnp.arange(1, len(y) + 1) % 2, -1.0, 1.0).astype(y.dtype).reshape(-1, *[1] * (y.ndim - 1))
    states = sign * (h0 + jnp.cumsum(sign * y, axis=0))
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
    """
    check_finite("xs", xs)
    projected = dual_ode_project(params, xs, dtype=dtype)
    fast, slow = (None, None) if h0 is None else h0
    carry = (first_hidden(fast, projected[0]["fast"], "h0[0]"), first_hidden(slow, projected[0]["slow"], "h0[1]"))
    step = functools.partial(dual_ode_step, activation=activation, dtype=dtype)
    return scan_time(step, params, carry, projected, chunk=chunk, unroll=unroll)


def dual_ode_project(
    params: Params, xs: Sequence, *, dtype: DTypeLike | None = None
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """What ``dual_ode_step`` takes at every time step: the products with the inputs, and the step sizes."""
    return _dual_ode_inputs(params, xs, dtype), {
        name: steps_over_time(params[name], len(xs), argument=name) for name in _DUAL_STEPS
    }


_DUAL_STEPS = ("alpha1", "alpha2", "beta2")
_DUAL_INPUTS = {"fast": ("W1", "b1"), "slow": ("W3", "b2"), "gate": ("Wg", "bg")}


def _dual_ode_inputs(params: Params, xs: jax.Array, dtype: DTypeLike | None) -> dict[str, jax.Array]:
    used = {part: names for part, names in _DUAL_INPUTS.items() if names[0] in params}
    return fused_dot(xs, {part: (params[kernel], params[bias]) for part, (kernel, bias) in used.items()}, dtype)


def dual_ode_step(
    params: Params,
    carry: tuple[Hidden, Hidden],
    projected: tuple[dict[str, jax.Array], dict[str, jax.Array]],
    *,
    activation: Activation = nn.relu,
    dtype: DTypeLike | None = None,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """One time step of ``dual_ode``: (f, s) and a time step of ``dual_ode_project`` to (f', s'), and both joined."""
    pre, steps = projected
    for index, part in enumerate(("fast", "slow")):
        check_hidden(f"carry[{index}]", carry[index], pre[part].shape)
    fast, slow = map(wide, carry)
    new_slow = steps["beta2"][0] * slow + steps["alpha2"][0] * activation(dot(slow, params["U4"], dtype) + pre["slow"])
    fixed = dot(new_slow, params["U2"], dtype) + dot(fast, params["U1"], dtype) + pre["fast"]

    def euler(z: jax.Array, size: jax.Array) -> tuple[jax.Array, None]:
        return (1 - size) * z + size * (activation(dot(z, params["U1"], dtype) + fixed) - new_slow - fast), None

    z, _ = jax.lax.scan(euler, fast, steps["alpha1"], unroll=min(len(steps["alpha1"]), _UNROLLED_STEPS))
    if "gate" in pre:
        gate = nn.sigmoid(dot(slow, params["Ug"], dtype) + pre["gate"])
        z = (1 - gate) * fast + gate * z
    return (z, new_slow), jnp.concatenate([z, new_slow], -1)


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

    def _params(self, inputs: int) -> dict[str, jax.Array]:
        check_choice("start", self.start, _STARTS)
        check_number("alpha", self.alpha, low=0.0, open_low=True)
        steps = eta_shape(self.K, check_choice("eta_mode", self.eta_mode, ("per_time", "shared")), self.length)
        return {
            **kernel_params(self, {"W": (inputs, self.features), "U": (self.features, self.features)}),
            "b": self.param("b", nn.initializers.zeros, (self.features,)),
            "alpha": self.param("alpha", nn.initializers.constant(self.alpha), ()),
            "eta": self.param("eta", nn.initializers.constant(self.eta), steps),
        }


class IncrementalRNNCell(_Incremental, nn.RNNCellBase):
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
    """

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[Any, jax.Array]:
        h, time = carry
        params = self._params(x.shape[-1])
        pre = dot(x, params["W"], self.dtype) + params["b"]
        h, y = irnn_step(
            params,
            h,
            (pre, steps_at(params["eta"], time)),
            start=self.start,
            activation=self.activation,
            dtype=self.dtype,
        )
        return (h, time + 1), y

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        del rng
        return jnp.zeros((*input_shape[:-1], self.features)), jnp.zeros(input_shape[:-1], jnp.int32)

    @property
    def num_feature_axes(self) -> int:
        return 1


class IncrementalRNN(_Incremental):
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
      When called with x ``[batch, time, features_in]`` and, if wanted, a first state ``[batch, features]``: all states
      ``[batch, time, features]``, float32 at least.

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

    @nn.compact
    def __call__(self, x: Float[Array, "batch time inputs"], h0: jax.Array | None = None) -> jax.Array:
        _, states = irnn(
            self._params(x.shape[-1]),
            jnp.swapaxes(x, 0, 1),
            h0,
            start=self.start,
            activation=self.activation,
            chunk=self.chunk,
            unroll=self.unroll,
            dtype=self.dtype,
        )
        return jnp.swapaxes(states, 0, 1)


class EquilibriumRNN(nn.Module):
    """The incremental RNN at equilibrium over whole sequences, all time steps in parallel; see ``irnn_equilibrium``.

    Args:
      features: width D of the state.
      iterations: of the solver, as in ``equilibrium``.
      norm_limit: ``U`` counts scaled down to this fraction of ``alpha`` in spectral norm, below 1 so that there is one
        equilibrium. Ours, not the paper's. None leaves it unbounded.
      activation: elementwise and 1-Lipschitz.
      alpha: decay to start from; trained.
      dtype: of the matrix products' operands.

    Returns:
      When called with x ``[batch, time, features_in]`` and, if wanted, a first state ``[batch, features]``: all states
      ``[batch, time, features]``, float32 at least.

    Raises:
      ValueError: a number out of range, as ``irnn_equilibrium``.

    Example:
      >>> layer = EquilibriumRNN(features=8, iterations=20)
      >>> states, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    features: int
    iterations: int = 50
    norm_limit: float | None = 0.9
    activation: Activation = nn.relu
    alpha: float = 1.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch time inputs"], h0: jax.Array | None = None) -> jax.Array:
        check_number("alpha", self.alpha, low=0.0, open_low=True)
        params = {
            **kernel_params(self, {"W": (x.shape[-1], self.features), "U": (self.features, self.features)}),
            "b": self.param("b", nn.initializers.zeros, (self.features,)),
            "alpha": self.param("alpha", nn.initializers.constant(self.alpha), ()),
        }
        if self.norm_limit is not None:
            check_number("norm_limit", self.norm_limit, low=0.0, high=1.0, open_low=True, open_high=True)
            params["U"] = limit_norm(params["U"], self.norm_limit * params["alpha"])
        _, states = irnn_equilibrium(
            params,
            jnp.swapaxes(x, 0, 1),
            h0,
            iterations=self.iterations,
            activation=self.activation,
            dtype=self.dtype,
        )
        return jnp.swapaxes(states, 0, 1)


class DualODE(nn.Module):
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
      When called with x ``[batch, time, features_in]`` and, if wanted, first states: ``[batch, time, features]``.

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
    def __call__(
        self, x: Float[Array, "batch time inputs"], h0: tuple[jax.Array, jax.Array] | None = None
    ) -> jax.Array:
        _, states = dual_ode(
            self._params(x.shape[-1]),
            jnp.swapaxes(x, 0, 1),
            h0,
            activation=self.activation,
            chunk=self.chunk,
            unroll=self.unroll,
            dtype=self.dtype,
        )
        return jnp.swapaxes(states, 0, 1)

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


# What the cells of this family share.


def dot(x: jax.Array, kernel: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """``x @ kernel`` of operands in ``dtype`` (None: their own), accumulated in float32 at least."""
    if dtype is not None:
        x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    accumulator = jnp.promote_types(jnp.result_type(x, kernel), jnp.float32)
    return jnp.dot(x, kernel, preferred_element_type=accumulator)


def fused_dot(
    x: jax.Array, kernels: Mapping[str, tuple[jax.Array, jax.Array | None]], dtype: DTypeLike | None
) -> dict[str, jax.Array]:
    """``x @ kernel + bias`` for several (kernel, bias or None), as one matrix product."""
    widths = np.cumsum([kernel.shape[-1] for kernel, _ in kernels.values()])
    products = dot(x, jnp.concatenate([kernel for kernel, _ in kernels.values()], -1), dtype)
    parts = jnp.split(products, widths[:-1], -1)
    biases = [bias for _, bias in kernels.values()]
    return {
        name: part if bias is None else part + wide(bias)
        for name, part, bias in zip(kernels, parts, biases, strict=True)
    }


def kernel_params(module: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, jax.Array]:
    """Kernels of ``module`` from N(0, 0.1^2), as in the authors' code."""
    return {name: module.param(name, nn.initializers.normal(0.1), shape) for name, shape in shapes.items()}


def eta_shape(K: int, mode: str, length: int | None) -> tuple[int, ...]:
    """The shape of the step sizes: ``(length, K)`` or, shared by all time steps, ``(K,)``."""
    check_number("K", K, low=1, integer=True, hint="Each input needs at least one inner step.")
    if mode == "per_time":
        if length is None:
            raise ValueError(
                "length=None, but eta_mode='per_time' trains step sizes for every time step. Give the length of the "
                "longest sequence, or choose another eta_mode."
            )
        check_number("length", length, low=1, integer=True)
        return length, K
    if length is not None:
        raise ValueError(f"length={length} would do nothing with eta_mode={mode!r}. Leave it out.")
    return (K,)


def steps_over_time(eta: jax.Array, length: int, *, argument: str = "eta") -> jax.Array:
    """Step sizes ``[length, K]`` from ``[time, K]``, whose first rows count, or ``[K]``."""
    eta = wide(eta)
    if eta.ndim not in (1, 2) or not eta.shape[-1]:
        raise ValueError(f"{argument} has shape {eta.shape}, but must be (time, K) or (K,) with K of 1 or more.")
    if eta.ndim == 1:
        return jnp.broadcast_to(eta, (length, *eta.shape))
    if len(eta) < length:
        raise ValueError(
            f"{argument} has {len(eta)} rows, one a time step, but the sequence has {length} steps. Make the cell with "
            f"length={length}, shorten the sequence, or share the step sizes over time."
        )
    return eta[:length]


def steps_at(eta: jax.Array, time: jax.Array) -> jax.Array:
    """Step sizes ``[K, *batch, 1]`` at times ``[*batch]``; NaN beyond the last row, ``[K]`` if shared by all times."""
    eta = wide(eta)
    if eta.ndim == 1:
        return eta
    return jnp.moveaxis(jnp.take(eta, time, axis=0, mode="fill", fill_value=jnp.nan), -1, 0)[..., None]


def first_hidden(h0: Hidden | None, like: jax.Array, argument: str = "h0") -> jax.Array:
    """``h0``, or zeros of the shape, dtype and sharding of one time step of ``like``."""
    if h0 is None:
        return jnp.zeros_like(like[0])
    check_hidden(argument, h0, like.shape[1:])
    return jnp.asarray(h0, like.dtype)


def check_hidden(argument: str, h: Hidden, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless the state has the shape that inputs and parameters ask for."""
    if jnp.shape(h) != tuple(shape):
        raise ValueError(
            f"{argument} has shape {jnp.shape(h)}, but the inputs and parameters ask for a state of {tuple(shape)}. "
            "Was it carried over from another batch size or another width?"
        )


def check_finite(argument: str, x: jax.Array | np.ndarray) -> None:
    """Raise ``ValueError`` for NaN in an array whose values are known, that is, outside ``jit`` and ``grad``."""
    if isinstance(x, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        bad = int(jnp.isnan(x).sum())
    if bad:
        raise ValueError(
            f"{argument} holds {bad} NaN of {x.size} values; one spoils every later state. Replace or drop them."
        )
