"""The theory behind SAMUEL: experts on geometric covering intervals, for online convex optimisation.

The intervals of scale k are :math:`[i 2^k, (i+1) 2^k - 1]`, i >= 1; exactly ``floor(log2 t) + 1`` of them contain a
round t. On every interval the regret is near that of the best preconditioner there.

Lu, Xia, Arora, Hazan 2022 (arXiv 2203.01400); the intervals and the sleeping experts are those of Daniely, Gonen,
Shalev-Shwartz, ICML 2015. For networks use ``effjax.samuel``.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.core.errors import check_number

__all__ = [
    "strongly_adaptive_init",
    "strongly_adaptive_run",
    "strongly_adaptive_step",
]

PyTree = Any


class StronglyAdaptiveState(NamedTuple):
    """One slot per scale k, which holds the learner of the interval of length 2^k that contains the round.

    Attributes:
      round: int32, the round to come, from 1.
      points: the learners' points.
      squares: their sums of squared gradients since each began.
      log_weights: of the learners, one per meta rate; -inf before it begins.
    """

    round: Int[Array, ""]
    points: Float[Array, "scales dim"]
    squares: Float[Array, "scales dim"]
    log_weights: Float[Array, "scales rates"]


class Round(NamedTuple):
    """What ``strongly_adaptive_run`` reports of every round, along a leading axis T.

    Attributes:
      point: the point played.
      loss: the loss suffered there.
      expert_losses: loss of each scale's learner, 0 where it is not born yet.
      weights: the learners' weights when the point was played, up to a factor common to the round.
    """

    point: Float[Array, "*rounds dim"]
    loss: Float[Array, "*rounds"]
    expert_losses: Float[Array, "*rounds scales"]
    weights: Float[Array, "*rounds scales rates"]


def strongly_adaptive_init(dim: int, horizon: int, *, rates: int = 4) -> StronglyAdaptiveState:
    """The state before round 1.

    Args:
      dim: dimension d of the points.
      horizon: largest number of rounds T; ``floor(log2 T) + 1`` learners are kept.
      rates: number Q of meta rates.

    Returns:
      A ``StronglyAdaptiveState``.

    Raises:
      ValueError: an argument below 1.

    Example:
      >>> strongly_adaptive_init(2, horizon=100).points.shape
      (7, 2)
    """
    for name, value in (("dim", dim), ("horizon", horizon), ("rates", rates)):
        check_number(name, value, low=1, integer=True)
    scales = horizon.bit_length()
    return StronglyAdaptiveState(
        round=jnp.ones((), jnp.int32),
        points=jnp.zeros((scales, dim)),
        squares=jnp.zeros((scales, dim)),
        log_weights=jnp.full((scales, rates), -jnp.inf),
    )


def strongly_adaptive_step(
    loss_fn: Callable[[Float[Array, "dim"]], Float[Array, ""]],
    state: StronglyAdaptiveState,
    *,
    diameter: float,
    lipschitz: float,
) -> tuple[Round, StronglyAdaptiveState]:
    r"""Play one round: average the awake learners' points, suffer, reweigh, let every learner take its own step.

    .. math::
        x_t = \frac{\sum_{I,q} w_{Iq}\, x_t(I)}{\sum_{I,q} w_{Iq}}, \qquad
        w_{Iq} \leftarrow w_{Iq} \bigl(1 + \eta_q (\ell_t(x_t) - \ell_t(x_t(I)))\bigr), \qquad
        \eta_q = \frac{1}{2 G D 2^q}

    A learner is born at 0 with weight :math:`\min(1/2, \eta_q)` when its interval begins; it is diagonal Adagrad with
    step :math:`D / \sqrt 2`, projected onto the ball.

    Args:
      loss_fn: convex loss of the round, of a point ``[d]``.
      state: the learners.
      diameter: D, of the ball around 0 in which all points lie.
      lipschitz: G, a bound of the gradients' norms. Where it is too small, :math:`\eta r` is cut to [-1/2, 1/2].

    Returns:
      The ``Round`` (without leading axis) and the next state.

    Raises:
      ValueError: ``diameter`` or ``lipschitz`` not positive.

    Example:
      >>> state = strongly_adaptive_init(2, horizon=8)
      >>> played, state = strongly_adaptive_step(lambda x: ((x - 1) ** 2).sum(), state, diameter=4, lipschitz=8)
      >>> played.point.tolist(), played.loss.item(), state.round.item()
      ([0.0, 0.0], 2.0, 2)
    """
    check_number("diameter", diameter, low=0.0, open_low=True)
    check_number("lipschitz", lipschitz, low=0.0, open_low=True)
    scales, rates = state.log_weights.shape
    etas = 1.0 / (2.0 * lipschitz * diameter * 2.0 ** jnp.arange(1.0, rates + 1))
    lengths = 2 ** jnp.arange(scales, dtype=state.round.dtype)
    awake = lengths <= state.round
    born = awake & (state.round % lengths == 0)
    points = jnp.where(born[:, None], 0.0, state.points)
    squares = jnp.where(born[:, None], 0.0, state.squares)
    log_weights = jnp.where(born[:, None], jnp.log(jnp.minimum(0.5, etas))[None], state.log_weights)

    shares = jax.nn.softmax(jax.nn.logsumexp(log_weights, axis=1))
    point = shares @ points
    loss = loss_fn(point)
    expert_losses, grads = jax.vmap(jax.value_and_grad(loss_fn))(points)
    moved = jnp.log1p(jnp.clip(etas[None] * (loss - expert_losses)[:, None], -0.5, 0.5))
    grown = jnp.where(awake[:, None], squares + grads**2, squares)
    stepped = points - diameter / math.sqrt(2.0) * grads / (jnp.sqrt(grown) + 1e-12)
    played = Round(point, loss, jnp.where(awake, expert_losses, 0.0), jnp.exp(log_weights - log_weights.max()))
    return played, StronglyAdaptiveState(
        round=state.round + 1,
        points=jnp.where(awake[:, None], _project(stepped, diameter / 2), points),
        squares=grown,
        log_weights=log_weights + moved,
    )


def strongly_adaptive_run(
    loss_fn: Callable[[Float[Array, "dim"], PyTree], Float[Array, ""]],
    rounds: PyTree,
    dim: int,
    *,
    diameter: float,
    lipschitz: float,
    rates: int = 4,
) -> Round:
    """Play all rounds in one ``lax.scan``; regret on every interval adapts to the best preconditioner there.

    Args:
      loss_fn: ``(point [d], round's data) -> loss``, convex in the point.
      rounds: pytree of arrays ``[T, ...]``: the rounds' data.
      dim: dimension d.
      diameter: D, as in ``strongly_adaptive_step``.
      lipschitz: G, as in ``strongly_adaptive_step``.
      rates: number Q of meta rates.

    Returns:
      A ``Round`` with leading axis T.

    Raises:
      ValueError: as ``strongly_adaptive_init`` and ``strongly_adaptive_step``.

    Example:
      >>> targets = jnp.array([1.0] * 20 + [-1.0] * 20)
      >>> played = strongly_adaptive_run(lambda x, y: ((x - y) ** 2).sum(), targets, 1, diameter=4.0, lipschitz=8.0)
      >>> played.loss[20].item() > 1 > played.loss[-1].item()
      True
    """
    horizon = len(jax.tree.leaves(rounds)[0])

    def step(state: StronglyAdaptiveState, data: PyTree) -> tuple[StronglyAdaptiveState, Round]:
        played, state = strongly_adaptive_step(
            lambda point: loss_fn(point, data), state, diameter=diameter, lipschitz=lipschitz
        )
        return state, played

    return jax.lax.scan(step, strongly_adaptive_init(dim, horizon, rates=rates), rounds)[1]


def _project(points: Float[Array, "scales dim"], radius: float) -> Float[Array, "scales dim"]:
    norms = jnp.linalg.norm(points, axis=1, keepdims=True)
    return points * jnp.minimum(1.0, radius / jnp.maximum(norms, jnp.finfo(points.dtype).tiny))
