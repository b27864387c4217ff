"""Liquid time-constant spiking neurons, which FPTT trains with an update at every time step.

The cells run in ``nn.RNN`` and ``Recurrent``. Row vectors multiply kernels from the left, ``h @ U``. States are float32
at least, ``dtype`` is that of the matrix products' operands alone.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.cells import Cell, Params, Table
from effjax.core.errors import check_choice
from effjax.core.products import add_bias, aligned, dot
from effjax.core.tree import wide
from effjax.recurrent.cells import check_hidden

__all__ = ["LTCSpikingCell", "LeakyReadoutCell"]

Neurons = Float[Array, "*batch hidden"]

_NORMS = ("batch", "layer")
_EPSILON = 1e-5
_THRESHOLD, _ADAPTATION = 0.1, 1.8


@jax.custom_jvp
def surrogate_spike(v: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""1 above 0, else 0; differentiated as if it were smooth.

    .. math::
        \frac{\partial s}{\partial v} = \tfrac{1}{2} \left( 1.15\, N(v; 0, 0.3) - 0.15\, N(v; 0.3, 1.8)
        - 0.15\, N(v; -0.3, 1.8) \right)

    with N the Gaussian densities of that mean and standard deviation.

    Args:
      v: how far the membrane is above its threshold.

    Returns:
      0 or 1, of the same dtype.

    Example:
      >>> surrogate_spike(jnp.asarray([-0.1, 0.1])).tolist()
      [0.0, 1.0]
      >>> round(float(jax.grad(surrogate_spike)(jnp.zeros(()))), 3)
      0.732
    """
    v = jnp.asarray(v)
    return (v > 0).astype(v.dtype)


@surrogate_spike.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (v,), (tangent,) = primals, tangents
    normal = lambda mean, std: jnp.exp(-0.5 * ((v - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    slope = 0.5 * (1.15 * normal(0.0, 0.3) - 0.15 * normal(0.3, 1.8) - 0.15 * normal(-0.3, 1.8))
    return surrogate_spike(v), slope * tangent


class _Spiking(Cell):
    features: int
    norm: str = "batch"
    dtype: DTypeLike | None = None

    @nn.nowrap
    def project(self, params: Params, xs: jax.Array | np.ndarray) -> jax.Array:
        # Not yet normalised: a batch's statistics are those of one time step.
        return add_bias(dot(xs, params["W"], self.dtype), params["b"])

    @nn.nowrap
    def check_padding(self) -> None:
        if self.norm == "batch":
            raise ValueError(
                "norm='batch' with seq_lengths: the statistics of a step would take in the padding. Choose "
                "norm='layer' or batches of sequences of one length."
            )

    @nn.nowrap
    def _dense(self, kernel: str, bias: str, inputs: int, init: nn.initializers.Initializer | None = None) -> Table:
        init = init or nn.initializers.xavier_normal()
        return {kernel: (init, (inputs, self.features)), bias: (nn.initializers.zeros, (self.features,))}

    @nn.nowrap
    def _norm(self, suffix: str = "") -> Table:
        shape = (self.features,)
        return {
            f"scale{suffix}": (nn.initializers.constant(0.1), shape),
            f"shift{suffix}": (nn.initializers.zeros, shape),
        }

    @nn.nowrap
    def _time_constant(self, name: str) -> Table:
        return {f"k{name}": (nn.initializers.ones, ()), **self._dense(f"W{name}", f"b{name}", 2 * self.features)}


class LTCSpikingCell(_Spiking):
    r"""A layer of spiking neurons whose time constants depend on input and state.

    .. math::
        d &= \mathrm{N}_x(x W + b) + \mathrm{N}_s(s U + c) \\
        \tau_m &= \sigma(k_m ([d, u] W_m + b_m)), \qquad \tau_a = \sigma(k_a ([d, a] W_a + b_a)) \\
        a' &= \tau_a \odot a + (1 - \tau_a) \odot s, \qquad u' = u + \tau_m \odot (d - u) \\
        s' &= H(u' - 0.1 - 1.8\, a'), \qquad u'' = (1 - s') \odot u'

    with u the membrane, s the spikes, a the adaptation that raises the threshold, N a normalisation and H 1 above 0,
    through whose smooth surrogate the reset is differentiated too. The carry is (u, s, a). It starts from u drawn from
    U(0, 1), no spikes and an adaptation of 0.1.

    Args:
      features: neurons.
      norm: ``"batch"``, by the statistics of this batch at this step, as published for training; ``"layer"``, by those
        of each example, which needs no batch.
      dtype: of the matrix products' operands, by default their own.

    Returns:
      When called as ``cell(carry, x)`` with x ``[*batch, features_in]``: the new carry and the spikes
      ``[*batch, features]``.

    Raises:
      ValueError: unknown ``norm``, ``norm="batch"`` of a single example, a carry of another shape.

    Example:
      >>> rnn = nn.RNN(LTCSpikingCell(features=8))
      >>> spikes, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> spikes.shape
      (4, 20, 8)

    Yin, Corradi, Bohte 2023 (arXiv 2112.11231), by the authors' program. It keeps running statistics of every time step
    for evaluation, which are left out here: evaluate in batches, or choose ``"layer"``, which is ours.
    """

    @nn.nowrap
    def table(self, inputs: int) -> Table:
        return {
            **self._dense("W", "b", inputs),
            **self._dense("U", "c", self.features, nn.initializers.orthogonal()),
            **self._norm("_x"),
            **self._norm("_s"),
            **self._time_constant("m"),
            **self._time_constant("a"),
        }

    @nn.nowrap
    def advance(
        self, params: Params, carry: tuple[Neurons, Neurons, Neurons], projected: Neurons
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
        for name, state in zip(("u", "s", "a"), carry, strict=True):
            check_hidden(f"carry {name}", state, projected.shape)
        u, s, a = map(wide, carry)
        drive = _normalise(projected, params["scale_x"], params["shift_x"], self.norm)
        product = add_bias(dot(s, params["U"], self.dtype), params["c"])
        drive += _normalise(product, params["scale_s"], params["shift_s"], self.norm)
        tau_m = _gate(params, "m", drive, u, self.dtype)
        tau_a = _gate(params, "a", drive, a, self.dtype)
        a = tau_a * a + (1 - tau_a) * s
        u = u + tau_m * (drive - u)
        s = surrogate_spike(u - _THRESHOLD - _ADAPTATION * a)
        return ((1 - s) * u, s, a), s

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        u = jax.random.uniform(rng, (*input_shape[:-1], self.features))
        return u, jnp.zeros_like(u), jnp.full_like(u, 0.1)


class LeakyReadoutCell(_Spiking):
    r"""A read-out that integrates spikes and does not spike itself.

    .. math::
        e = \mathrm{N}(s W + b), \qquad \tau = \sigma(k_o ([e, o] W_o + b_o)), \qquad
        o' = (1 - \tau) \odot o + \tau \odot e

    Args:
      features: outputs.
      norm: as in ``LTCSpikingCell``.
      dtype: of the matrix products' operands, by default their own.

    Returns:
      When called as ``cell(o, spikes)``: the new state ``[*batch, features]``, twice: the logits.

    Raises:
      ValueError: as ``LTCSpikingCell``.

    Example:
      >>> rnn = nn.RNN(LeakyReadoutCell(features=5))
      >>> logits, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 8)))
      >>> logits.shape
      (4, 20, 5)

    Source: as ``LTCSpikingCell``.
    """

    @nn.nowrap
    def table(self, inputs: int) -> Table:
        return {**self._dense("W", "b", inputs), **self._norm(), **self._time_constant("o")}

    @nn.nowrap
    def advance(self, params: Params, carry: jax.Array, projected: jax.Array) -> tuple[jax.Array, jax.Array]:
        check_hidden("carry o", carry, projected.shape)
        o = wide(carry)
        e = _normalise(projected, params["scale"], params["shift"], self.norm)
        tau = _gate(params, "o", e, o, self.dtype)
        o = (1 - tau) * o + tau * e
        return o, o

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> jax.Array:
        del rng
        return jnp.zeros((*input_shape[:-1], self.features))


def _gate(params: Params, name: str, drive: jax.Array, state: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    product = dot(jnp.concatenate([drive, state], -1), params[f"W{name}"], dtype)
    return nn.sigmoid(params[f"k{name}"] * add_bias(product, params[f"b{name}"]))


def _normalise(x: jax.Array, scale: jax.Array, shift: jax.Array, norm: str) -> jax.Array:
    check_choice("norm", norm, _NORMS)
    examples = math.prod(x.shape[:-1])
    if norm == "batch" and examples < 2:
        raise ValueError(
            f"norm='batch' with {examples} example has no statistics to go by. Give a batch of two or more, or train "
            "and use the layer with norm='layer'."
        )
    axes = tuple(range(x.ndim - 1)) if norm == "batch" else -1
    centred = x - x.mean(axes, keepdims=True)
    normal = centred * jax.lax.rsqrt((centred**2).mean(axes, keepdims=True) + _EPSILON)
    return normal * aligned(scale, x) + aligned(shift, x)
