"""Gates as pure functions: from a number for each example to open or closed, with gradients through the decision."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.core.errors import check_choice, check_number
from effjax.core.tree import wide

__all__ = ["Gate", "gate_of", "gumbel_gate", "hard_concrete_gate", "relu1_gate", "ste_gate"]

Kind = Literal["relu1", "ste", "gumbel", "hard_concrete"]
Logits = Float[Array | np.ndarray, "*any"]
Noise = Float[Array | np.ndarray, "*any"]


class Gate(NamedTuple):
    """Decisions of a gate.

    Attributes:
      value: float, factor of what is gated; exactly 0 where it is closed.
      open: float, 1 or 0, what is counted as work; its gradient is that of a smooth stand-in.
    """

    value: Array
    open: Array


def relu1_gate(logits: Logits, *, threshold: float = 0.0) -> Gate:
    r"""Clipped salience: one number that both closes and scales.

    .. math:: s = \min(\max(z, 0), 1), \qquad s \leftarrow 0 \text{ where } s \le \mathrm{threshold}

    The gradient to z is exactly 0 where z is clipped: start inside (0, 1].

    Args:
      logits: z, of any shape.
      threshold: saliences up to it are 0, as tiny ones would count as open.

    Returns:
      A ``Gate`` in float32, or float64 where the logits are.

    Raises:
      ValueError: a threshold outside [0, 1).

    Example:
      >>> relu1_gate(jnp.array([-1.0, 0.25, 3.0])).value.tolist()
      [0.0, 0.25, 1.0]

    Xia, Yin, Dai, Jha 2020 (arXiv:2007.15151), by two public re-implementations: the paper's text could not be had.
    """
    check_number("threshold", threshold, low=0, high=1, open_high=True)
    logits = wide(logits)
    # Not jnp.clip, which has half of the slope at the edges. NaN stays NaN.
    value = jnp.where(logits <= threshold, 0.0, jnp.where(logits >= 1.0, 1.0, logits))
    return Gate(value, _straight(value > 0, value))


def ste_gate(logits: Logits) -> Gate:
    r"""Hard gate whose gradient is that of a sigmoid (straight-through).

    .. math:: g = 1[z > 0], \qquad dg/dz := \sigma'(z)

    Args:
      logits: z, of any shape.

    Returns:
      A ``Gate`` of zeros and ones.

    Example:
      >>> ste_gate(jnp.array([-1.0, 2.0])).open.tolist(), jax.grad(lambda z: ste_gate(z).open)(0.0).item()
      ([0.0, 1.0], 0.25)

    Bengio, Leonard, Courville 2013 (arXiv:1308.3432).
    """
    logits = wide(logits)
    gate = _straight(logits > 0, jax.nn.sigmoid(logits))
    return Gate(gate, gate)


def gumbel_gate(logits: Logits, noise: Noise | None = None, *, temperature: float = 1.0) -> Gate:
    r"""Binary Gumbel-softmax, straight-through.

    .. math:: g = 1[z + n > 0], \qquad dg/dz := \sigma'((z + n) / \tau) / \tau

    with n logistic noise, the difference of two Gumbels. Two logits are z = logit of open - logit of closed.

    Args:
      logits: z, of any shape.
      noise: n, of the same shape (``jax.random.logistic``); None at test time, where the likelier side is taken.
      temperature: tau.

    Returns:
      A ``Gate`` of zeros and ones.

    Raises:
      ValueError: a temperature that is not positive, or noise of another shape.

    Example:
      >>> gumbel_gate(jnp.array([0.5, 0.5]), jnp.array([0.0, -1.0])).open.tolist()
      [1.0, 0.0]

    Jang, Gu, Poole 2017 (arXiv:1611.01144). ConvNet-AIG's program draws noise at test time too and ignores the
    temperature that it is given; here a test is deterministic.
    """
    check_number("temperature", temperature, low=0, open_low=True)
    drawn = _with_noise(wide(logits), noise)
    gate = _straight(drawn > 0, jax.nn.sigmoid(drawn / temperature))
    return Gate(gate, gate)


def hard_concrete_gate(
    logits: Logits,
    noise: Noise | None = None,
    *,
    temperature: float = 2 / 3,
    stretch: tuple[float, float] = (-0.1, 1.1),
) -> Gate:
    r"""Stretched and clipped concrete variable: exact zeros and ones, and a gradient between.

    .. math::
       s = \sigma((z + n) / \beta), \qquad \text{value} = \mathrm{clip}(s (\zeta - \gamma) + \gamma, 0, 1), \qquad
       P(\text{open}) = \sigma(z - \beta \log(-\gamma / \zeta))

    ``open`` is 1 where the value is above 0, with the gradient of that probability. Without noise the temperature
    plays no part, as in the paper's test-time estimate.

    Args:
      logits: z, of any shape.
      noise: logistic n, of the same shape; None at test time.
      temperature: beta.
      stretch: (gamma, zeta), below 0 and above 1.

    Returns:
      A ``Gate``.

    Raises:
      ValueError: numbers out of range, or noise of another shape.

    Example:
      >>> hard_concrete_gate(jnp.array([-4.0, 0.0, 4.0])).value.tolist()
      [0.0, 0.5, 1.0]

    Louizos, Welling, Kingma 2018 (arXiv:1712.01312).
    """
    check_number("temperature", temperature, low=0, open_low=True)
    low = check_number("stretch[0]", stretch[0], high=0, open_high=True)
    high = check_number("stretch[1]", stretch[1], low=1, open_low=True)
    logits = wide(logits)
    drawn = logits if noise is None else _with_noise(logits, noise) / temperature
    stretched = jax.nn.sigmoid(drawn) * (high - low) + low
    value = jnp.clip(stretched, 0.0, 1.0)
    chance = jax.nn.sigmoid(logits - temperature * np.log(-low / high))
    return Gate(value, _straight(value > 0, chance))


def gate_of(kind: Kind, *, threshold: float = 0.0, temperature: float | None = None) -> Callable[..., Gate]:
    """The gate function of a name, called as ``gate(logits, noise)``.

    Args:
      kind: ``"relu1"``, ``"ste"``, ``"gumbel"`` or ``"hard_concrete"``; the first two take no noise.
      threshold: of relu1.
      temperature: of the two that take noise; None for the function's own.

    Returns:
      ``(logits, noise=None) -> Gate``.

    Raises:
      ValueError: an unknown kind, or a setting that it does not have.

    Example:
      >>> gate_of("ste")(jnp.array([0.5])).value.tolist()
      [1.0]
    """
    check_choice("kind", kind, ("relu1", "ste", "gumbel", "hard_concrete"))
    if threshold and kind != "relu1":
        raise ValueError(f"threshold={threshold} is of kind='relu1'; kind={kind!r} has none. Leave it at 0.")
    if temperature is not None and kind in ("relu1", "ste"):
        raise ValueError(f"temperature={temperature} is of 'gumbel' and 'hard_concrete'; kind={kind!r} has none.")
    if kind in ("relu1", "ste"):
        plain = functools.partial(relu1_gate, threshold=threshold) if kind == "relu1" else ste_gate
        return lambda logits, noise=None: plain(logits)
    drawn = gumbel_gate if kind == "gumbel" else hard_concrete_gate
    return drawn if temperature is None else functools.partial(drawn, temperature=temperature)


def takes_noise(kind: Kind) -> bool:
    """Whether a kind of gate draws noise in training."""
    return kind in ("gumbel", "hard_concrete")


def _straight(hard: Array, smooth: Array) -> Array:
    """The hard decision with the gradient of the smooth one, exact zeros and ones."""
    hard = hard.astype(smooth.dtype)
    return hard + (smooth - jax.lax.stop_gradient(smooth))


def _with_noise(logits: Array, noise: Noise | None) -> Array:
    if noise is None:
        return logits
    if jnp.shape(noise) != logits.shape:
        raise ValueError(f"noise has shape {jnp.shape(noise)}; expected {logits.shape}, one draw for each logit.")
    return logits + jnp.asarray(noise, logits.dtype)
