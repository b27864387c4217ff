"""TARNN: a recurrent ODE whose time constant depends on input and state (Kag, Saligrama, CVPR 2021).

Layout and dtypes are those of ``effjax.recurrent.cells``.
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
from jaxtyping import Array, Float

from effjax.core.cells import Cell, PyTree
from effjax.core.errors import check_choice, check_number
from effjax.core.layers import OverTime, at_end, fitted_carry
from effjax.core.products import dot
from effjax.core.time_scan import scan_time
from effjax.core.tree import wide
from effjax.recurrent.cells import (
    Activation,
    Hidden,
    Params,
    Sequence,
    check_finite,
    check_hidden,
    check_length,
    eta_shape,
    first_hidden,
    fused_dot,
    kernel_params,
    steps_at,
    steps_done,
    steps_from,
    steps_over_time,
)

__all__ = ["TARNN", "TARNNCell", "tarnn"]

_VARIANTS = ("euler", "convex")
_FIRST = ("repeat", "zero")
# Step sizes of the input stay below these, where a held state would start to oscillate and grow.
_LARGEST = {"euler": 1.0, "convex": 2 / 3}


def tarnn(
    params: Params,
    xs: Sequence,
    h0: Hidden | None = None,
    *,
    variant: str = "convex",
    K: int = 1,
    first_prev: str | Float[Array | np.ndarray, "*batch inputs"] = "repeat",
    activation: Activation = nn.relu,
    chunk: int | None = None,
    unroll: int = 1,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Time-adaptive RNN: K steps of an ODE at every input, gated by a learned time constant.

    With :math:`s = h_{t-1}`, :math:`z_0 = s` and

    .. math::
        g &= \sigma(s U_g + x_t W_g + b_g) \\
        F(z) &= \phi(z U_1 + s U_2 + x_t W_1 + x_{t-1} W_2 + b_1) - z - s + s B_2 + x_t B_1

    the gate scales every step ("euler"), or holds the state after them ("convex"):

    .. math::
        z_{i+1} &= z_i + \eta_{t,i}\, g \odot F(z_i), & h_t &= z_K \\
        z_{i+1} &= (1 - \eta_{t,i}) z_i + \eta_{t,i} F(z_i), & h_t &= (1 - g) \odot s + g \odot z_K

    The two have different fixed points, as "convex" subtracts z twice. Where g is 0 both keep the state exactly. All
    input products are two matrix products before the loop, and a time step with K = 1 is one product with a
    ``[hidden, 4 * hidden]`` kernel.

    Args:
      params: ``W1``, ``W2``, ``B1``, ``Wg`` ``[features, hidden]``; ``U1``, ``U2``, ``B2``, ``Ug``
        ``[hidden, hidden]``; ``b1``, ``bg`` ``[hidden]``; and the step sizes: ``eta`` ``[time, K]``, of which the first
        T rows count, or ``[K]``, shared by all time steps, or in place of ``eta`` the ``Ue`` ``[hidden, hidden]``,
        ``We`` ``[features, hidden]``, ``be`` ``[hidden]`` of
        :math:`\eta_t = \eta_{max}\, \sigma(s U_e + x_{t-1} W_e + b_e)`, one for every unit, with :math:`\eta_{max}` 1
        ("euler") or 2/3 ("convex"): beyond, the linear part of a step, :math:`1 - 2 \eta g` or
        :math:`1 - 3 \eta g`, grows without bound. A bounded activation is safer with these.
      xs: inputs.
      h0: first state, zeros by default.
      variant: ``"convex"`` (the default of the authors' PyTorch code, B-TARNN in their TensorFlow code) or ``"euler"``.
      K: inner steps, read where the step sizes depend on the input; else ``eta`` tells.
      first_prev: the input before the first one: ``"repeat"`` the first (PyTorch), ``"zero"`` (TensorFlow), or an array
        ``[*batch, features]``, to carry on with a sequence.
      activation: :math:`\phi`.
      chunk: as in ``scan_time``.
      unroll: as in ``scan_time``.
      dtype: of the matrix products' operands, by default their own; they accumulate in float32 at least.

    Returns:
      The last state ``[*batch, hidden]`` and all states ``[time, *batch, hidden]``, float32 at least.

    Raises:
      ValueError: per-time ``eta`` with fewer rows than steps, K < 1, an ``h0`` or ``first_prev`` of another shape, NaN
        in inputs that are not traced, an unknown choice.

    Example:
      >>> variables = jax.jit(TARNN(features=8, length=6).init)(jax.random.key(0), jnp.ones((2, 6, 3)))
      >>> last, states = tarnn(variables["params"], jnp.ones((6, 2, 3)))
      >>> last.shape, states.shape
      ((2, 8), (6, 2, 8))

    Reference: Kag, Saligrama, "Time Adaptive Recurrent Neural Network", CVPR 2021; the equations are those of the
    authors' code (anilkagak2/TARNN), without its unused parameter b2. Input-dependent step sizes are in the code's
    ``oldB_TARNN``. The trained step size of every time step is positional: the length is bound by it, and most of the
    gain on noise-padded tasks is lost without it.
    """
    check_choice("variant", variant, _VARIANTS)
    check_finite("xs", xs)
    eta = steps_over_time(params["eta"], len(xs)) if "eta" in params else None
    options = {"variant": variant, "K": K, "activation": activation, "chunk": chunk, "unroll": unroll}
    return _over(params, xs, h0, _before(xs, first_prev), eta, dtype=dtype, **options)


def _over(
    params: Params,
    xs: Sequence,
    h0: Hidden | None,
    before: jax.Array,
    eta: jax.Array | None,
    *,
    variant: str,
    K: int,
    activation: Activation,
    chunk: int | None,
    unroll: int,
    dtype: DTypeLike | None,
) -> tuple[jax.Array, jax.Array]:
    """``tarnn`` with the inputs one step earlier, and step sizes ``[time, K]`` or ``[time, K, *batch, 1]``."""
    projected = _add_products_before(params, _products_now(params, xs, dtype), before, dtype)
    if eta is not None:
        projected["eta"] = eta
    h0 = first_hidden(h0, projected["gate"])
    step = functools.partial(_step, variant=variant, K=K, activation=activation, dtype=dtype)
    return scan_time(step, _fuse(params), h0, projected, chunk=chunk, unroll=unroll)


def _before(xs: jax.Array | np.ndarray, first: str | jax.Array | np.ndarray) -> jax.Array:
    if isinstance(first, str):
        check_choice("first_prev", first, _FIRST)
        first = xs[0] if first == "repeat" else jnp.zeros_like(xs[0])
    elif jnp.shape(first) != xs.shape[1:]:
        raise ValueError(
            f"first_prev has shape {jnp.shape(first)}, but one time step of the inputs has {xs.shape[1:]}."
        )
    return jnp.concatenate([jnp.asarray(first, xs.dtype)[None], xs[:-1]])


def _products_now(params: Params, xs: jax.Array | np.ndarray, dtype: DTypeLike | None) -> dict[str, jax.Array]:
    """The products with the inputs of the same time step."""
    kernels = {"pre": (params["W1"], params["b1"]), "drive": (params["B1"], None), "gate": (params["Wg"], params["bg"])}
    return fused_dot(xs, kernels, dtype)


def _add_products_before(
    params: Params, now: Mapping[str, jax.Array], before: jax.Array, dtype: DTypeLike | None
) -> dict[str, jax.Array]:
    """What ``_products_now`` gave, completed by the products with the inputs one time step earlier."""
    kernels: dict[str, tuple[jax.Array, jax.Array | None]] = {"pre": (params["W2"], None)}
    if "eta" not in params:
        kernels["step"] = (params["We"], params["be"])
    then = fused_dot(before, kernels, dtype)
    return {**now, **then, "pre": now["pre"] + then["pre"]}


def _fuse(params: Params) -> tuple[jax.Array, jax.Array]:
    """All that multiplies the old state, and U1, which multiplies it in the first inner step."""
    names = ("Ug", "U2", "B2", "U1") + (() if "eta" in params else ("Ue",))
    return jnp.concatenate([params[name] for name in names], -1), params["U1"]


def _step(
    kernels: tuple[jax.Array, jax.Array],
    h: jax.Array,
    projected: Mapping[str, jax.Array],
    *,
    variant: str,
    K: int,
    activation: Activation,
    dtype: DTypeLike | None,
) -> tuple[jax.Array, jax.Array]:
    h = wide(h)
    recurrent, U1 = kernels
    gate, state, drive, inner, *step = jnp.split(dot(h, recurrent, dtype), recurrent.shape[-1] // U1.shape[-1], -1)
    gate = nn.sigmoid(gate + projected["gate"])
    fixed, rest = state + projected["pre"], drive + projected["drive"] - h
    if step:
        check_number("K", K, low=1, integer=True, hint="Each input needs at least one inner step.")
        eta = [_LARGEST[variant] * nn.sigmoid(step[0] + projected["step"])] * K
    else:
        eta = list(projected["eta"])
    z = h
    for index, size in enumerate(eta):
        field = activation((dot(z, U1, dtype) if index else inner) + fixed) - z + rest
        z = z + size * gate * field if variant == "euler" else (1 - size) * z + size * field
    if variant == "convex":
        z = (1 - gate) * h + gate * z
    return z, z


class _TimeAdaptive(nn.Module):
    """What ``TARNNCell`` and ``TARNN`` share."""

    features: int
    K: int = 1
    variant: str = "convex"
    eta_mode: str = "per_time"
    length: int | None = None
    first_prev: str = "repeat"
    activation: Activation = nn.relu
    eta: float = 0.01
    dtype: DTypeLike | None = None

    @nn.compact
    def weights(self, inputs: int) -> dict[str, jax.Array]:
        check_choice("variant", self.variant, _VARIANTS)
        check_choice("first_prev", self.first_prev, _FIRST)
        check_choice("eta_mode", self.eta_mode, ("per_time", "shared", "input"))
        constant = nn.initializers.constant
        steps = eta_shape(self.K, self.eta_mode, self.length)
        shapes = dict.fromkeys(("W1", "W2", "B1", "Wg"), (inputs, self.features))
        shapes |= dict.fromkeys(("U1", "U2", "B2", "Ug"), (self.features, self.features))
        hold = -3.0 if self.variant == "convex" else 0.0
        params = {
            "b1": self.param("b1", constant(0.0), (self.features,)),
            "bg": self.param("bg", constant(hold), (self.features,)),
        }
        if self.eta_mode == "input":
            largest = _LARGEST[self.variant]
            check_number("eta", self.eta, low=0.0, high=largest, open_low=True, open_high=True)
            shapes |= {"We": (inputs, self.features), "Ue": (self.features, self.features)}
            params["be"] = self.param("be", constant(math.log(self.eta / (largest - self.eta))), (self.features,))
        else:
            params["eta"] = self.param("eta", constant(self.eta), steps)
        return params | kernel_params(self, shapes)


class TARNNCell(_TimeAdaptive, Cell):
    r"""Time-adaptive RNN cell for ``nn.RNN``; the equations are those of ``tarnn``.

    The carry is the state, the input before, and the number of steps done, which finds the row of ``eta``. Beyond
    ``length`` the state is NaN, as there are no step sizes for it.

    Args:
      features: width D of the state.
      K: inner steps at every input.
      variant: ``"convex"`` (gate after the inner steps, its bias from -3: hold) or ``"euler"`` (gate inside, bias 0).
      eta_mode: ``"per_time"``, one trained step size for each inner and each time step; ``"shared"``, one for each
        inner step; or ``"input"``, a function of state and input for every unit, which needs no length and no fixed
        position of the signal.
      length: longest sequence, for ``eta_mode="per_time"``.
      first_prev: the input before the first one: ``"repeat"`` it or ``"zero"``.
      activation: :math:`\phi`.
      eta: step size to start from; trained.
      dtype: of the matrix products' operands, by default their own.

    Returns:
      When called as ``cell(carry, x)`` with x ``[*batch, features_in]``: the new carry and the state
      ``[*batch, features]``.

    Raises:
      ValueError: K < 1, an unknown choice, a ``length`` that is missing or would do nothing, a carry of another size.

    Example:
      >>> rnn = nn.RNN(TARNNCell(features=8, eta_mode="input"))
      >>> states, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)

    Reference: as for ``tarnn``. Weights start from N(0, 0.1^2) and steps from 0.01, as in the authors' code.

    Source: Kag, Saligrama 2021, CVPR (pp. 15149-15158).
    """

    @nn.nowrap
    def project(self, params: Params, xs: jax.Array | np.ndarray) -> dict[str, jax.Array]:
        return {"x": jnp.asarray(xs), **_products_now(params, xs, self.dtype)}

    @nn.nowrap
    def advance(
        self, params: Params, carry: tuple[jax.Array, jax.Array, jax.Array], projected: Mapping[str, jax.Array]
    ) -> tuple[Any, jax.Array]:
        h, before, time = carry
        x = projected["x"]
        check_hidden("carry[0]", h, projected["gate"].shape)
        check_hidden("carry[1]", before, x.shape)
        first = jnp.where(time[..., None] == 0, x, before) if self.first_prev == "repeat" else before
        projected = _add_products_before(params, projected, first, self.dtype)
        if "eta" in params:
            projected["eta"] = steps_at(params["eta"], time)
        options = {"variant": self.variant, "K": self.K, "activation": self.activation, "dtype": self.dtype}
        h, y = _step(_fuse(params), h, projected, **options)
        return (h, jnp.asarray(x, before.dtype), time + 1), y

    @nn.nowrap
    def check_steps(self, steps: int) -> None:
        check_length(self.length, steps)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        del rng
        batch = input_shape[:-1]
        return jnp.zeros((*batch, self.features)), jnp.zeros(input_shape), jnp.zeros(batch, jnp.int32)


class TARNN(_TimeAdaptive, OverTime):
    """Time-adaptive RNN over whole sequences, the input products hoisted out of the loop.

    Equal to ``nn.RNN(TARNNCell(...))`` and faster; the parameters are those of the cell.

    Args:
      features: width D of the state.
      K: as in ``TARNNCell``.
      variant: as in ``TARNNCell``.
      eta_mode: as in ``TARNNCell``.
      length: as in ``TARNNCell``.
      first_prev: as in ``TARNNCell``.
      activation: as in ``TARNNCell``.
      eta: as in ``TARNNCell``.
      dtype: as in ``TARNNCell``.
      chunk: as in ``scan_time``.
      unroll: as in ``scan_time``.

    Returns:
      When called with x ``[batch, time, features_in]``: all states ``[batch, time, features]``, float32 at least. The
      call is that of ``Recurrent`` (``initial_carry``, ``seq_lengths``, ``return_carry``, ...), and the carry that of
      the cell; a state ``[batch, features]`` alone starts at the first step.

    Raises:
      ValueError: as ``TARNNCell``, and for sequences longer than ``length``.

    Example:
      >>> layer = TARNN(features=8, length=20, variant="euler", chunk=5)
      >>> states, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> states.shape
      (4, 20, 8)
    """

    chunk: int | None = None
    unroll: int = 1

    def run(
        self, xs: jax.Array, carry: PyTree, lengths: jax.Array | None, key: jax.Array | None
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
        del key
        check_finite("x", xs)
        params, rows = self.weights(xs.shape[-1]), xs.shape[1]
        one = jnp.zeros((rows, self.features))
        h0, before, time = carry, jnp.zeros(xs.shape[1:]), None
        first: Any = self.first_prev
        if isinstance(carry, tuple | list):
            h0, before, time = fitted_carry(carry, (one, before, jnp.zeros(rows, jnp.int32)), "TARNN")
            first = jnp.where(time[:, None] == 0, xs[0], before) if self.first_prev == "repeat" else before
        elif carry is not None:
            h0 = fitted_carry(carry, one, "TARNN")
        eta = steps_from(params["eta"], len(xs), time, lengths) if "eta" in params else None
        options = {"variant": self.variant, "K": self.K, "activation": self.activation, "dtype": self.dtype}
        loop = {"chunk": self.chunk, "unroll": self.unroll}
        _, states = _over(params, xs, h0, _before(xs, first), eta, **options, **loop)
        inputs = at_end(xs, lengths, before).astype(before.dtype)
        return (at_end(states, lengths, h0), inputs, steps_done(time, lengths, xs)), states
