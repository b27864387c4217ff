"""When to tie a knot: as soon as the link's loss stops falling fast."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import check_number

__all__ = ["SlopeKnot"]


class SlopeState(NamedTuple):
    """State of ``SlopeKnot`` within one link.

    Attributes:
      step: int32, losses seen.
      mean: running mean of the loss.
      fall: running mean of its decrease per step.
      steepest: the largest ``fall`` of this link.
      tie: whether the link is over; stays true until the next ``init``.
    """

    step: Int[Array, ""]
    mean: Float[Array, ""]
    fall: Float[Array, ""]
    steepest: Float[Array, ""]
    tie: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class SlopeKnot:
    r"""Data-driven knots: tie when the loss falls at less than a fraction of the link's steepest fall.

    With the rate :math:`1/w`, the losses' running mean m and its running decrease f,

    .. math::
        m_t &= m_{t-1} + (L_t - m_{t-1}) / \min(t, w), \qquad
        f_t = f_{t-1} + (m_{t-1} - m_t - f_{t-1}) / \min(t, w) \\
        \text{tie} &\iff t \ge t_{\min} \wedge f_t \le \theta \max_{2w \le i \le t} f_i \quad\text{or}\quad
        t \ge t_{\max}

    Pure functions of float32 scalars: keep the state beside the trainer's, feed it every loss, read ``tie`` on the host
    between steps, and ``init`` again after the knot. A loss that is not finite is left out.

    Attributes:
      min_steps: a link's least length; at least 2 w, and long enough for ``a`` to move (``b`` starts at zero).
      max_steps: its greatest length; None for no limit.
      window: w, steps.
      fraction: theta, in (0, 1).

    Raises:
      ValueError: arguments out of range.

    Example:
      >>> rule = SlopeKnot(min_steps=10, window=5)
      >>> state = rule.init()
      >>> for step in range(200):
      ...     state = rule.update(state, 0.9**step)
      ...     if state.tie:
      ...         break
      >>> step < 100
      True

    Not in the paper, which ties at fixed epochs.

    Source: Xia, Qin, Hazan 2024, arXiv:2401.04151.
    """

    min_steps: int
    max_steps: int | None = None
    window: int = 50
    fraction: float = 0.1

    def __post_init__(self) -> None:
        check_number("window", self.window, low=1, integer=True)
        low = 2 * self.window
        check_number("min_steps", self.min_steps, low=low, integer=True, hint="Two windows are needed for a slope.")
        if self.max_steps is not None:
            check_number("max_steps", self.max_steps, low=self.min_steps, integer=True)
        check_number("fraction", self.fraction, low=0.0, high=1.0, open_low=True, open_high=True)

    def init(self) -> SlopeState:
        """The state at the start of a link."""
        zero = jnp.zeros((), jnp.float32)
        return SlopeState(jnp.zeros((), jnp.int32), zero, zero, zero, jnp.zeros((), bool))

    def update(self, state: SlopeState, loss: Any) -> SlopeState:
        """Take in one step's loss, a scalar; traceable."""
        loss = jnp.asarray(loss, jnp.float32)
        seen = jnp.isfinite(loss)
        step = state.step + 1
        rate = 1.0 / jnp.minimum(step, self.window).astype(jnp.float32)
        mean = jnp.where(seen, state.mean + (loss - state.mean) * rate, state.mean)
        # The first loss has no forerunner.
        drop = jnp.where(step == 1, 0.0, state.mean - mean)
        fall = state.fall + (drop - state.fall) * rate
        steepest = jnp.where(step >= 2 * self.window, jnp.maximum(state.steepest, fall), state.steepest)
        tie = (step >= self.min_steps) & (fall <= self.fraction * steepest)
        if self.max_steps is not None:
            tie |= step >= self.max_steps
        return SlopeState(step, mean, fall, steepest, state.tie | tie)
