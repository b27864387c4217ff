"""Losses that train gates as policies: BlockDrop's, SkipNet's, and distillation into one that decides at once."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from effjax.core.errors import check_number, check_shape
from effjax.core.rows import row_mean
from effjax.core.tree import wide

__all__ = ["block_drop_curriculum", "block_drop_loss", "block_drop_reward", "distil_policy_loss", "skipnet_loss"]

Bits = Float[Array | np.ndarray, "rows blocks"]
Step = int | float | Num[Array | np.ndarray, ""]
Mask = Bool[Array | np.ndarray, "rows"]


def block_drop_reward(
    actions: Bits, correct: Bool[Array | np.ndarray, "rows"], *, penalty: float = 10.0
) -> Float[Array, "rows"]:
    r"""BlockDrop's reward: sparse policies that are right.

    .. math:: R(u) = 1 - (|u| / K)^2 \text{ if right}, \qquad -\gamma \text{ if wrong}

    Args:
      actions: u, one where a block is run.
      correct: whether the network with these blocks is right.
      penalty: gamma; 10 on CIFAR, 5 on ImageNet.

    Returns:
      float32 [rows].

    Raises:
      ValueError: ``penalty`` below 0, or not one bool for each row.

    Example:
      >>> block_drop_reward(jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([True, False])).tolist()
      [0.75, -10.0]
    """
    check_number("penalty", penalty, low=0)
    check_shape("correct", correct, (actions.shape[0],), "One bool for each row.")
    return jnp.where(jnp.asarray(correct), 1.0 - wide(actions).mean(-1) ** 2, -penalty)


def block_drop_curriculum(step: Step, steps: int, blocks: int) -> Bool[Array, "blocks"]:
    r"""Blocks about which BlockDrop's policy decides so far: the last one first, all of them after ``steps``.

    .. math:: \mathrm{free}_k = [\, K - k \le 1 + \lfloor K t / T \rfloor \,], \qquad k = 0, \dots, K - 1

    The others are run: an unskilled policy that decided about all blocks would leave no network to learn from.

    Args:
      step: t, steps taken.
      steps: T, of the curriculum.
      blocks: K.

    Returns:
      bool [blocks].

    Raises:
      ValueError: no block, or fewer than 0 steps.

    Example:
      >>> block_drop_curriculum(1, 2, 4).tolist()
      [False, True, True, True]

    Wu, Nagarajan, Kumar, Rennie, Davis, Grauman, Feris 2018 (arXiv:1711.08393), section 3.3.
    """
    check_number("steps", steps, low=0, integer=True)
    check_number("blocks", blocks, low=1, integer=True)
    share = jnp.asarray(step, jnp.float32) / steps if steps else jnp.float32(1)
    return jnp.arange(blocks, 0, -1, dtype=jnp.float32) <= 1 + jnp.floor(blocks * share)


def block_drop_loss(
    logits: Bits,
    actions: Bits,
    reward: Float[Array | np.ndarray, "rows"],
    baseline: Float[Array | np.ndarray, "rows"],
    *,
    free: Bool[Array | np.ndarray, "blocks"] | None = None,
    mask: Mask | None = None,
) -> Float[Array, ""]:
    r"""Policy gradient of a one-shot policy with a self-critical baseline.

    .. math:: -\mathrm{mean}_i\, (R(u_i) - R(\hat u_i)) \sum_{k \text{ free}} \log \pi(u_{ik} | x_i)

    with u drawn and \hat u the likeliest actions. Rewards are constants.

    Args:
      logits: of the policy.
      actions: u, zeros and ones drawn from it.
      reward: R of the drawn actions.
      baseline: R of the likeliest ones.
      free: blocks about which the policy decides, of ``block_drop_curriculum``; None for all.
      mask: rows that take part.

    Returns:
      A number whose gradient is the estimate.

    Raises:
      ValueError: shapes that do not fit the logits.

    Example:
      >>> loss = lambda z: block_drop_loss(z, jnp.array([[1.0]]), jnp.array([2.0]), jnp.array([1.0]))
      >>> jax.grad(loss)(jnp.zeros((1, 1))).item()
      -0.5

    Wu, Nagarajan, Kumar, Rennie, Davis, Grauman, Feris 2018 (arXiv:1711.08393).
    """
    check_shape("actions", actions, logits.shape, "One for each logit.")
    for name, one in (("reward", reward), ("baseline", baseline)):
        check_shape(name, one, (logits.shape[0],), "One number for each row.")
    logits, actions = wide(logits), jax.lax.stop_gradient(wide(actions))
    chance = actions * jax.nn.log_sigmoid(logits) + (1 - actions) * jax.nn.log_sigmoid(-logits)
    if free is not None:
        check_shape("free", free, logits.shape[1:], "One bool for each block.")
        chance = jnp.where(jnp.asarray(free)[None], chance, 0)
    gain = jax.lax.stop_gradient(wide(reward) - wide(baseline))
    return -row_mean(gain * chance.sum(-1), mask)


def skipnet_loss(
    logits: Bits,
    actions: Bits,
    losses: Float[Array | np.ndarray, "rows"],
    *,
    alpha: float = 0.1,
    mask: Mask | None = None,
) -> Float[Array, ""]:
    r"""SkipNet's second stage: REINFORCE on its gates, beside the cross-entropy.

    .. math::
       -\mathrm{mean}_i \sum_l R_{il} \log \pi(a_{il}), \qquad
       R_{il} = \sum_{k \ge l} \frac{\alpha}{L} (1 - a_{ik}) - \ell_i

    Args:
      logits: of every gate.
      actions: a, zeros and ones drawn from them.
      losses: the cross-entropy of every row, a constant here.
      alpha: price of running all blocks.
      mask: rows that take part.

    Returns:
      A number whose gradient is the estimate.

    Raises:
      ValueError: ``alpha`` below 0, or shapes that do not fit the logits.

    Example:
      >>> skipnet_loss(jnp.zeros((1, 2)), jnp.array([[0.0, 0.0]]), jnp.array([0.0])).item() > 0
      True

    Wang, Yu, Dou, Darrell, Gonzalez 2018 (arXiv:1711.09485), with its discount of 1.
    """
    check_number("alpha", alpha, low=0)
    check_shape("actions", actions, logits.shape, "One for each logit.")
    check_shape("losses", losses, (logits.shape[0],), "One number for each row.")
    logits, actions = wide(logits), jax.lax.stop_gradient(wide(actions))
    chance = actions * jax.nn.log_sigmoid(logits) + (1 - actions) * jax.nn.log_sigmoid(-logits)
    saved = alpha / logits.shape[1] * (1 - actions)
    later = jnp.flip(jnp.cumsum(jnp.flip(saved, 1), axis=1), 1)
    reward = jax.lax.stop_gradient(later - wide(losses)[:, None])
    return -row_mean((reward * chance).sum(-1), mask)


def distil_policy_loss(logits: Bits, gates: Bits, *, mask: Mask | None = None) -> Float[Array, ""]:
    r"""Teach a one-shot policy what gates inside a network decided: the cross-entropy of their bits.

    Args:
      logits: of the policy.
      gates: of the network's blocks, open above 0.
      mask: rows that take part.

    Returns:
      Nats for each row and block.

    Raises:
      ValueError: gates of another shape than the logits.

    Example:
      >>> round(distil_policy_loss(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]])).item(), 4)
      0.6931

    Beyond Xia, Yin, Dai, Jha 2021 (arXiv:2007.15151): gates that decide block after block cannot be sorted
    beforehand, their policy can.
    """
    check_shape("gates", gates, logits.shape, "One for each logit.")
    logits, hard = wide(logits), wide(jnp.asarray(gates) > 0)
    each = hard * jax.nn.log_sigmoid(logits) + (1 - hard) * jax.nn.log_sigmoid(-logits)
    return -row_mean(each.mean(-1), mask)
