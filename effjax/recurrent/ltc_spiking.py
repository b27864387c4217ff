"""Liquid time-constant spiking neurons, which FPTT trains with an update at every time step.

Pure steps multiply row vectors, ``h @ U``; the cells run in ``nn.RNN``. States are float32 at least, ``dtype`` is that
of the matrix products' operands alone.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.errors import check_choice
from effjax.core.products import dot
from effjax.core.tree import wide
from effjax.recurrent.cells import check_hidden

__all__ = [
    "LTCSpikingCell",
    "LeakyReadoutCell",
    "leaky_readout_step",
    "ltc_spiking_init",
    "ltc_spiking_step",
    "surrogate_spike",
]

Params = Mapping[str, jax.Array]
Neurons = Float[Array, "*batch hidden"]

_NORMS = ("batch", "layer")
_EPSILON = 1e-5
_THRESHOLD, _ADAPTATION = 0.1, 1.8
_XAVIER = nn.initializers.xavier_normal()


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
      >>> round(float(jax.grad(surrogate_spike)(0.0)), 3)
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


def ltc_spiking_step(
    params: Params,
    carry: tuple[Neurons, Neurons, Neurons],
    x: Float[Array, "*batch inputs"],
    *,
    norm: str = "batch",
    dtype: DTypeLike | None = None,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    r"""One step of a layer of spiking neurons whose time constants depend on input and state.

    .. math::
        d &= \mathrm{N}_x(x W + b) + \mathrm{N}_s(s U + c) \\
        \tau_m &= \sigma(k_m ([d, u] W_m + b_m)), \qquad \tau_a = \sigma(k_a ([d, a] W_a + b_a)) \\
        a' &= \tau_a \odot a + (1 - \tau_a) \odot s, \qquad u' = u + \tau_m \odot (d - u) \\
        s' &= H(u' - 0.1 - 1.8\, a'), \qquad u'' = (1 - s') \odot u'

    with u the membrane, s the spikes, a the adaptation that raises the threshold, N a normalisation and H
    ``surrogate_spike``, through which the reset is differentiated too.

    Args:
      params: ``W`` ``[inputs, hidden]``, ``U`` ``[hidden, hidden]``, ``b`` and ``c`` ``[hidden]``; ``scale_x``,
        ``shift_x``, ``scale_s`` and ``shift_s`` ``[hidden]`` of the normalisations; ``Wm`` and ``Wa``
        ``[2 * hidden, hidden]``, ``bm`` and ``ba`` ``[hidden]``, ``km`` and ``ka`` scalars.
      carry: (u, s, a), see ``ltc_spiking_init``.
      x: a time step.
      norm: ``"batch"``, by the statistics of this batch at this step, as published for training; ``"layer"``, by those
        of each example, which needs no batch.
      dtype: of the matrix products' operands.

    Returns:
      The new carry, and the spikes.

    Raises:
      ValueError: unknown ``norm``, ``norm="batch"`` of a single example, a carry of another shape.

    Yin, Corradi, Bohte 2023 (arXiv 2112.11231), by the authors' program. It keeps running statistics of every time step
    for evaluation, which are left out here: evaluate in batches, or choose ``"layer"``, which is ours.
    """
    u, s, a = carry
    for name, state in zip(("u", "s", "a"), carry, strict=True):
        check_hidden(f"carry {name}", state, (*x.shape[:-1], params["U"].shape[0]))
    u, s, a = map(wide, carry)
    drive = _normalise(dot(x, params["W"], dtype) + params["b"], params["scale_x"], params["shift_x"], norm)
    drive += _normalise(dot(s, params["U"], dtype) + params["c"], params["scale_s"], params["shift_s"], norm)
    tau_m = _gate(params, "m", drive, u, dtype)
    tau_a = _gate(params, "a", drive, a, dtype)
    a = tau_a * a + (1 - tau_a) * s
    u = u + tau_m * (drive - u)
    s = surrogate_spike(u - _THRESHOLD - _ADAPTATION * a)
    return ((1 - s) * u, s, a), s


def ltc_spiking_init(key: jax.Array, batch: tuple[int, ...], hidden: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first carry of ``ltc_spiking_step``: u from U(0, 1), no spikes, an adaptation of 0.1.

    Args:
      key: PRNG key.
      batch: shape of the batch.
      hidden: neurons.

    Returns:
      (u, s, a), each float32 ``[*batch, hidden]``.

    Example:
      >>> [state.shape for state in ltc_spiking_init(jax.random.key(0), (4,), 8)]
      [(4, 8), (4, 8), (4, 8)]
    """
    u = jax.random.uniform(key, (*batch, hidden))
    return u, jnp.zeros_like(u), jnp.full_like(u, 0.1)


def leaky_readout_step(
    params: Params,
    o: Float[Array, "*batch outputs"],
    spikes: Float[Array, "*batch hidden"],
    *,
    norm: str = "batch",
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""One step of a read-out that integrates spikes and does not spike itself.

    .. math::
        e = \mathrm{N}(s W + b), \qquad \tau = \sigma(k_o ([e, o] W_o + b_o)), \qquad
        o' = (1 - \tau) \odot o + \tau \odot e

    Args:
      params: ``W`` ``[hidden, outputs]``, ``b``, ``scale`` and ``shift`` ``[outputs]``; ``Wo``
        ``[2 * outputs, outputs]``, ``bo`` ``[outputs]``, ``ko`` scalar.
      o: state, zeros at first.
      spikes: of the layer below.
      norm: as in ``ltc_spiking_step``.
      dtype: as in ``ltc_spiking_step``.

    Returns:
      o', twice: the logits.

    Raises:
      ValueError: as in ``ltc_spiking_step``.

    Source: see ``ltc_spiking_step``.
    """
    check_hidden("o", o, (*spikes.shape[:-1], params["W"].shape[1]))
    o = wide(o)
    e = _normalise(dot(spikes, params["W"], dtype) + params["b"], params["scale"], params["shift"], norm)
    tau = _gate(params, "o", e, o, dtype)
    o = (1 - tau) * o + tau * e
    return o, o


def _gate(params: Params, name: str, drive: jax.Array, state: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    product = dot(jnp.concatenate([drive, state], -1), params[f"W{name}"], dtype) + params[f"b{name}"]
    return nn.sigmoid(params[f"k{name}"] * product)


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
    return centred * jax.lax.rsqrt((centred**2).mean(axes, keepdims=True) + _EPSILON) * scale + shift


class _Spiking(nn.RNNCellBase):
    features: int
    norm: str = "batch"
    dtype: DTypeLike | None = None

    def _dense(self, names: tuple[str, str], inputs: int, init: nn.initializers.Initializer = _XAVIER) -> Params:
        kernel, bias = names
        return {
            kernel: self.param(kernel, init, (inputs, self.features)),
            bias: self.param(bias, nn.initializers.zeros, (self.features,)),
        }

    def _norm(self, suffix: str = "") -> Params:
        scale, shift = f"scale{suffix}", f"shift{suffix}"
        return {
            scale: self.param(scale, nn.initializers.constant(0.1), (self.features,)),
            shift: self.param(shift, nn.initializers.zeros, (self.features,)),
        }

    def _time_constant(self, name: str) -> Params:
        slope = self.param(f"k{name}", nn.initializers.ones, ())
        return self._dense((f"W{name}", f"b{name}"), 2 * self.features) | {f"k{name}": slope}

    @property
    def num_feature_axes(self) -> int:
        return 1


class LTCSpikingCell(_Spiking):
    """A layer of liquid time-constant spiking neurons; the equations and the source are those of ``ltc_spiking_step``.

    Args:
      features: neurons.
      norm: as in ``ltc_spiking_step``.
      dtype: of the matrix products' operands, by default their own.

    Returns:
      When called as ``cell(carry, x)`` with x ``[*batch, features_in]``: the new carry and the spikes
      ``[*batch, features]``.

    Raises:
      ValueError: as ``ltc_spiking_step``.

    Example:
      >>> rnn = nn.RNN(LTCSpikingCell(features=8))
      >>> spikes, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 3)))
      >>> spikes.shape
      (4, 20, 8)
    """

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, jax.Array, jax.Array], x: jax.Array) -> tuple[Any, jax.Array]:
        params = {
            **self._dense(("W", "b"), x.shape[-1]),
            **self._dense(("U", "c"), self.features, nn.initializers.orthogonal()),
            **self._norm("_x"),
            **self._norm("_s"),
            **self._time_constant("m"),
            **self._time_constant("a"),
        }
        return ltc_spiking_step(params, carry, x, norm=self.norm, dtype=self.dtype)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        return ltc_spiking_init(rng, input_shape[:-1], self.features)


class LeakyReadoutCell(_Spiking):
    """A read-out that integrates spikes; the equations and the source are those of ``leaky_readout_step``.

    Args:
      features: outputs.
      norm: as in ``ltc_spiking_step``.
      dtype: of the matrix products' operands, by default their own.

    Returns:
      When called as ``cell(o, spikes)``: the new state ``[*batch, features]``, twice.

    Raises:
      ValueError: as ``leaky_readout_step``.

    Example:
      >>> rnn = nn.RNN(LeakyReadoutCell(features=5))
      >>> logits, _ = jax.eval_shape(rnn.init_with_output, jax.random.key(0), jnp.ones((4, 20, 8)))
      >>> logits.shape
      (4, 20, 5)
    """

    @nn.compact
    def __call__(self, o: jax.Array, spikes: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = {**self._dense(("W", "b"), spikes.shape[-1]), **self._norm(), **self._time_constant("o")}
        return leaky_readout_step(params, o, spikes, norm=self.norm, dtype=self.dtype)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> jax.Array:
        del rng
        return jnp.zeros((*input_shape[:-1], self.features))
