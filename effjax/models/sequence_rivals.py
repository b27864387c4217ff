"""Recurrent cells that the studies compare with: FastRNN, FastGRNN, AntisymmetricRNN, coRNN.

Conventions are those of ``effjax.models.sequence``.
"""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.core.cells import Params, PyTree, Table
from effjax.core.errors import check_number
from effjax.core.products import add_bias, dot
from effjax.core.tree import wide
from effjax.models.sequence import PlainCell, Projected


def _uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class FastRNNCell(PlainCell):
    r"""FastRNN cell, a plain RNN with a weighted residual connection.

    .. math:: h' = \sigma(\alpha) \tanh(x W + h U + b) + \sigma(\beta)\, h

    Args:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.
      length: give alpha and beta a value for every time step of sequences up to this long. The carry is then the state
        and the number of steps done, and beyond ``length`` the state is NaN. None shares them over time.

    Raises:
      ValueError: ``length`` below 1; in ``Recurrent``, a longer sequence; when called, a carry of another shape.

    Reference: Kusupati et al., "FastGRNN", NeurIPS 2018 (arXiv 1901.02358), full rank and dense.
    """

    length: int | None = None

    @nn.nowrap
    def table(self, inputs: int) -> Table:
        if self.length is not None:
            check_number("length", self.length, low=1, integer=True)
        normal, constant = nn.initializers.normal(0.1), nn.initializers.constant
        times = () if self.length is None else (self.length,)
        return {
            "W": (normal, (inputs, self.features)),
            "U": (normal, (self.features, self.features)),
            "b": (nn.initializers.ones, (self.features,)),
            "alpha": (constant(-3.0), times),
            "beta": (constant(3.0), times),
        }

    @nn.nowrap
    def advance(self, params: Params, carry: PyTree, projected: Projected) -> tuple[PyTree, jax.Array]:
        if self.length is None:
            return super().advance(params, carry, projected)
        h, time = carry
        now = {
            name: jnp.take(params[name], time, mode="fill", fill_value=jnp.nan)[..., None] for name in ("alpha", "beta")
        }
        h, y = super().advance({**params, **now}, h, projected)
        return (h, time + 1), y

    @nn.nowrap
    def step(self, params: Params, carry: jax.Array, projected: Projected) -> tuple[jax.Array, jax.Array]:
        new = jnp.tanh(projected + dot(carry, params["U"], self.dtype))
        h = nn.sigmoid(wide(params["alpha"])) * new + nn.sigmoid(wide(params["beta"])) * carry
        return h, h

    @nn.nowrap
    def check_steps(self, steps: int) -> None:
        if self.length is not None and steps > self.length:
            raise ValueError(
                f"length={self.length}, but the sequence has {steps} steps, and each needs an alpha and a beta of its "
                f"own. Make the cell with length={steps}, shorten the sequence, or share them with length=None."
            )

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> PyTree:
        h = super().initialize_carry(rng, input_shape)
        return h if self.length is None else (h, jnp.zeros(input_shape[:-1], jnp.int32))


class FastGRNNCell(PlainCell):
    r"""FastGRNN cell, whose gate and candidate share their kernels.

    .. math::
        p = x W + h U, \qquad z = \sigma(p + b_g), \qquad
        h' = z \odot h + (\sigma(\zeta) (1 - z) + \sigma(\nu)) \odot \tanh(p + b_h)

    Args:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.

    Raises:
      ValueError: when called, a carry of another shape.

    Reference: Kusupati et al., "FastGRNN", NeurIPS 2018 (arXiv 1901.02358), full rank and dense: without its low-rank
    kernels, sparsification and quantisation.
    """

    @nn.nowrap
    def table(self, inputs: int) -> Table:
        normal, ones, constant = nn.initializers.normal(0.1), nn.initializers.ones, nn.initializers.constant
        return {
            "W": (normal, (inputs, self.features)),
            "U": (normal, (self.features, self.features)),
            "bias_gate": (ones, (self.features,)),
            "bias_update": (ones, (self.features,)),
            "zeta": (constant(1.0), ()),
            "nu": (constant(-4.0), ()),
        }

    @nn.nowrap
    def step(self, params: Params, carry: jax.Array, projected: Projected) -> tuple[jax.Array, jax.Array]:
        p = projected + dot(carry, params["U"], self.dtype)
        z = nn.sigmoid(add_bias(p, params["bias_gate"]))
        write = nn.sigmoid(wide(params["zeta"])) * (1 - z) + nn.sigmoid(wide(params["nu"]))
        h = z * carry + write * jnp.tanh(add_bias(p, params["bias_update"]))
        return h, h


class AntisymmetricRNNCell(PlainCell):
    r"""AntisymmetricRNN cell, a forward Euler step of a stable ODE.

    .. math::
        m = h (U^\top - U) - \gamma h, \qquad h' = h + \epsilon\, \tanh(m + x W + b)

    With gate, where ``W`` and ``b`` are twice as wide, the candidate's half first:
    :math:`h' = h + \epsilon\, \sigma(m + x W_z + b_z) \odot \tanh(m + x W + b)`.

    Args:
      features: width of the state.
      dtype: of the matrix products' operands, by default their own.
      epsilon: step size, above 0.
      gamma: diffusion, 0 or more.
      gated: gate the step.

    Raises:
      ValueError: a constant out of range; when called, a carry of another shape.

    Reference: Chang, Chen, Haber, Chi, "AntisymmetricRNN", ICLR 2019, equations 12 and 13.
    """

    epsilon: float = 0.05
    gamma: float = 0.01
    gated: bool = False

    @nn.nowrap
    def table(self, inputs: int) -> Table:
        check_number("epsilon", self.epsilon, low=0.0, open_low=True)
        check_number("gamma", self.gamma, low=0.0)
        width = self.features * (2 if self.gated else 1)
        return {
            "W": (nn.initializers.lecun_normal(), (inputs, width)),
            # U^T - U has twice the variance of U, and 1 / features is wanted of it.
            "U": (nn.initializers.normal(1 / math.sqrt(2 * self.features)), (self.features,) * 2),
            "b": (nn.initializers.zeros, (width,)),
        }

    @nn.nowrap
    def step(self, params: Params, carry: jax.Array, projected: Projected) -> tuple[jax.Array, jax.Array]:
        U = params["U"]
        m = dot(carry, U.T - U, self.dtype) - self.gamma * carry
        candidate, *gate = jnp.split(projected, 2 if self.gated else 1, -1)
        change = jnp.tanh(m + candidate)
        h = carry + self.epsilon * (nn.sigmoid(m + gate[0]) * change if gate else change)
        return h, h


class CoRNNCell(PlainCell):
    r"""coRNN cell, a network of coupled, damped, driven oscillators; the carry is (y, v), positions and velocities.

    .. math::
        v' = v + \Delta t \left( \tanh([v, y] U + x W + b) - \gamma y - \epsilon v \right), \qquad
        y' = y + \Delta t\, v'

    Args:
      features: oscillators.
      dtype: of the matrix products' operands, by default their own.
      dt: step size, above 0.
      gamma: stiffness, above 0.
      epsilon: damping, 0 or more.

    Raises:
      ValueError: a constant out of range; when called, a carry of another shape.

    Reference: Rusch, Mishra, "Coupled Oscillatory Recurrent Neural Network", ICLR 2021. The default constants are its
    code's for noise-padded CIFAR-10.
    """

    dt: float = 0.034
    gamma: float = 1.3
    epsilon: float = 12.7

    states: ClassVar[int] = 2

    @nn.nowrap
    def table(self, inputs: int) -> Table:
        check_number("dt", self.dt, low=0.0, open_low=True)
        check_number("gamma", self.gamma, low=0.0, open_low=True)
        check_number("epsilon", self.epsilon, low=0.0)
        init = _uniform(1 / math.sqrt(inputs + 2 * self.features))
        return {
            "W": (init, (inputs, self.features)),
            "U": (init, (2 * self.features, self.features)),
            "b": (init, (self.features,)),
        }

    @nn.nowrap
    def step(
        self, params: Params, carry: tuple[jax.Array, jax.Array], projected: Projected
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        y, v = carry
        drive = jnp.tanh(dot(jnp.concatenate([v, y], -1), params["U"], self.dtype) + projected)
        v = v + self.dt * (drive - self.gamma * y - self.epsilon * v)
        y = y + self.dt * v
        return (y, v), y
