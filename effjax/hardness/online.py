"""Online selective classification with limited feedback: versioned experts (Gangrade, Kag, Cutkosky, Saligrama 2021).

NeurIPS, arXiv:2110.14243. Whether an answer was right is never told; the label is seen only where the learner abstains.
"""

import dataclasses
import functools
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from effjax.core.errors import Limits, Rate, check_fields, check_number, check_shape

__all__ = ["VueConfig", "threshold_experts", "vue", "vue_act", "vue_init", "vue_regret", "vue_update"]

Probability = Annotated[float, Limits(low=0, high=1, open_low=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VueConfig:
    """Settings of the online learner."""

    rate: Probability | None = None
    """Probability of abstaining just to see the label; None for min(1 / sqrt(t), 0.1) in round t = 1, 2, ..."""
    discount: Rate | None = None
    """Share of its weight that an expert loses where it abstains; None for the rate."""
    tolerance: Rate = 0.0
    """Rate of observed mistakes that an expert may make; at 0 the first one removes it."""
    feedback: Literal["coin", "abstention"] = "coin"
    """Whether only rounds that the coin ended tell of mistakes, or all in which the learner abstained."""
    answer: Literal["sample", "greedy"] = "sample"
    """What is answered: the prediction of an expert drawn by weight, which may be to abstain; or, whenever an expert
    that is left answers, the prediction of one of those that do."""

    def __post_init__(self):
        check_fields(self)


class VueState(NamedTuple):
    """State of the learner.

    Attributes:
      log_weights: of the experts, not normalised; weights themselves would underflow in some thousand rounds.
      alive: which experts are left.
      mistakes: int32, observed mistakes of each.
      feedbacks: int32, rounds whose label was used.
      count: int32, rounds played.
      key: of the draws; never changes, as the draws of a round come from the key and ``count``.
    """

    log_weights: Float[Array, "experts"]
    alive: Bool[Array, "experts"]
    mistakes: Int[Array, "experts"]
    feedbacks: Int[Array, ""]
    count: Int[Array, ""]
    key: Array


class VueAction(NamedTuple):
    """What the learner does in a round.

    Attributes:
      action: int32, a class, or -1 to abstain.
      coin: whether it abstains to see the label, whatever the experts say.
    """

    action: Int[Array, "*rounds"]
    coin: Bool[Array, "*rounds"]


class VueRegret(NamedTuple):
    """The learner beside the experts, in hindsight.

    Attributes:
      mistakes: of the learner.
      abstentions: of the learner.
      best_mistakes: the fewest of an expert.
      best_abstentions: the fewest of an expert with so few mistakes.
      excess_abstentions: the learner's abstentions less the fewest of an expert with at most its mistakes (MMEA).
      excess_mistakes: the learner's mistakes less the fewest of an expert with at most its abstentions. Both are NaN
        where there is no such expert.
    """

    mistakes: int
    abstentions: int
    best_mistakes: int
    best_abstentions: int
    excess_abstentions: float
    excess_mistakes: float


def vue(
    key: jax.Array,
    predictions: Integer[Array | np.ndarray, "rounds experts"],
    labels: Integer[Array | np.ndarray, "rounds"],
    config: VueConfig | None = None,
) -> tuple[VueState, VueAction]:
    r"""Play all rounds of a recorded stream: one scan of ``vue_act`` and ``vue_update``.

    In round t a coin of probability p is thrown. If it comes up the learner abstains, else it plays an expert drawn by
    weight. Then

    .. math::
        w_f \leftarrow (1 - \eta)\, w_f \text{ where } f \text{ abstains}, \qquad
        w_f \leftarrow 0 \text{ where } o_f > \theta R + \sqrt{2 \theta R}

    with the R rounds whose label was used and the :math:`o_f` mistakes of f seen in them. If an expert never errs and
    abstains :math:`A^*` times, then for tolerance 0 and :math:`p = \eta = \sqrt{\log N / T}`

    .. math:: E[M_T] + E[A_T - A^*] \le 3 \sqrt{T \log N}

    Vmap it over keys to average over the draws.

    Args:
      key: PRNG key.
      predictions: of every expert, -1 where it abstains; int8 will do.
      labels: of every round; read only where the learner abstains, -1 where it is not known even then.
      config: settings.

    Returns:
      The last state, and the actions of all rounds.

    Raises:
      ValueError: arrays of other shapes.

    Example:
      >>> predictions = jnp.array([[0, 1]] * 50)  # the first expert is right, the second wrong
      >>> state, played = vue(jax.random.key(0), predictions, jnp.zeros(50, int), VueConfig(rate=0.2))
      >>> state.alive.tolist(), played.action[-3:].tolist()
      ([True, False], [0, 0, 0])
    """
    config = config or VueConfig()
    shape = jnp.shape(predictions)
    if len(shape) != 2:
        raise ValueError(f"predictions have shape {shape}; expected [rounds, experts].")
    check_shape("labels", labels, shape[:1], "One for each round.")
    return _rounds(vue_init(key, shape[1]), jnp.asarray(predictions), jnp.asarray(labels), config)


@functools.partial(jax.jit, static_argnames="config")
def _rounds(
    state: VueState, predictions: jax.Array, labels: jax.Array, config: VueConfig
) -> tuple[VueState, VueAction]:
    def step(state: VueState, row: tuple[jax.Array, jax.Array]) -> tuple[VueState, VueAction]:
        acted = vue_act(state, row[0], config)
        return vue_update(state, row[0], acted, row[1], config), acted

    return jax.lax.scan(step, state, (predictions, labels))


def vue_init(key: jax.Array, experts: int) -> VueState:
    """The state before the first round: N experts of weight 1 / N.

    Args:
      key: PRNG key.
      experts: N.

    Returns:
      A ``VueState``.

    Raises:
      ValueError: ``experts`` below 1.

    Example:
      >>> vue_init(jax.random.key(0), 4).alive.tolist()
      [True, True, True, True]
    """
    check_number("experts", experts, low=1, integer=True)
    return VueState(
        log_weights=jnp.full(experts, -np.log(experts), float),
        alive=jnp.ones(experts, bool),
        mistakes=jnp.zeros(experts, jnp.int32),
        feedbacks=jnp.zeros((), jnp.int32),
        count=jnp.zeros((), jnp.int32),
        key=key,
    )


def vue_act(
    state: VueState,
    predictions: Integer[Array | np.ndarray, "experts"],
    config: VueConfig,
    *,
    coin: Bool[Array, ""] | bool | None = None,
    drawn: Int[Array, ""] | int | None = None,
) -> VueAction:
    """What to do with an example; traceable.

    Args:
      state: of the learner.
      predictions: of every expert, -1 where it abstains.
      config: settings.
      coin: in place of the coin; None throws it.
      drawn: an expert in place of the draw; None draws.

    Returns:
      A ``VueAction``.

    Raises:
      ValueError: predictions that are not ``[experts]``.

    Example:
      >>> state = vue_init(jax.random.key(0), 2)
      >>> vue_act(state, jnp.array([3, 3]), VueConfig(), coin=False).action.item()
      3
    """
    predictions = _predictions(state, predictions)
    to_coin, to_draw = jax.random.split(jax.random.fold_in(state.key, state.count))
    flipped = jax.random.bernoulli(to_coin, _rate(config, state.count)) if coin is None else jnp.asarray(coin, bool)
    answering = predictions >= 0 if config.answer == "greedy" else jnp.ones_like(state.alive)
    playing = state.alive & answering
    chosen = jax.random.categorical(to_draw, jnp.where(playing, state.log_weights, -jnp.inf))
    answer = predictions[chosen if drawn is None else drawn]
    return VueAction(action=jnp.where(flipped | ~playing.any(), -1, answer), coin=flipped)


def vue_update(
    state: VueState,
    predictions: Integer[Array | np.ndarray, "experts"],
    acted: VueAction,
    label: Integer[Array | np.ndarray, ""] | int,
    config: VueConfig,
) -> VueState:
    """The state after a round; traceable.

    Args:
      state: before it.
      predictions: of every expert, -1 where it abstains.
      acted: what ``vue_act`` returned.
      label: the class; -1 where it was not seen. In rounds without feedback it is not read.
      config: settings.

    Returns:
      The new state. Where no expert would be left, removals, counts and discounts of the round are taken back.

    Raises:
      ValueError: predictions that are not ``[experts]``.

    Example:
      >>> config = VueConfig(rate=0.5)
      >>> state = vue_init(jax.random.key(0), 2)
      >>> acted = vue_act(state, jnp.array([1, 0]), config, coin=True)
      >>> vue_update(state, jnp.array([1, 0]), acted, 1, config).alive.tolist()
      [True, False]
    """
    predictions, label = _predictions(state, predictions), jnp.asarray(label, jnp.int32)
    told = (acted.coin if config.feedback == "coin" else acted.action < 0) & (label >= 0)
    feedbacks = state.feedbacks + told.astype(jnp.int32)
    wrong = told & (predictions >= 0) & (predictions != label)
    mistakes = state.mistakes + wrong.astype(jnp.int32)
    allowed = config.tolerance * feedbacks.astype(state.log_weights.dtype)
    most = allowed + jnp.sqrt(2.0 * allowed)
    alive = state.alive & ~(wrong & (mistakes.astype(most.dtype) > most))
    eta = _rate(config, state.count) if config.discount is None else config.discount
    log_weights = state.log_weights + jnp.where(predictions < 0, jnp.log1p(-jnp.minimum(eta, 1.0 - 1e-7)), 0.0)
    left = alive.any()
    kept = lambda new, old: jnp.where(left, new, old)
    return VueState(
        log_weights=kept(log_weights, state.log_weights),
        alive=kept(alive, state.alive),
        mistakes=kept(mistakes, state.mistakes),
        feedbacks=kept(feedbacks, state.feedbacks),
        count=state.count + 1,
        key=state.key,
    )


def vue_regret(
    predictions: Integer[Array | np.ndarray, "rounds experts"],
    labels: Integer[Array | np.ndarray, "rounds"],
    actions: Integer[Array | np.ndarray, "rounds"],
) -> VueRegret:
    """How the learner did beside the experts, with all labels known; on the host.

    Args:
      predictions: of every expert, -1 where it abstains.
      labels: of every round; all known.
      actions: of the learner, -1 where it abstained.

    Returns:
      A ``VueRegret``.

    Raises:
      ValueError: arrays of other shapes, or unknown labels.

    Example:
      >>> found = vue_regret(np.array([[0, -1], [0, 1]]), np.array([0, 1]), np.array([0, -1]))
      >>> found.mistakes, found.abstentions, found.best_mistakes, found.best_abstentions
      (0, 1, 0, 1)
    """
    predictions, labels, actions = (np.asarray(x) for x in (predictions, labels, actions))
    if predictions.ndim != 2:
        raise ValueError(f"predictions have shape {predictions.shape}; expected [rounds, experts].")
    check_shape("labels", labels, predictions.shape[:1], "One for each round.")
    check_shape("actions", actions, predictions.shape[:1], "One for each round.")
    if (labels < 0).any():
        raise ValueError(f"labels are unknown in {(labels < 0).sum()} rounds, whose mistakes cannot be counted.")
    wrong = lambda made, right: ((made >= 0) & (made != right)).sum(0)
    mistakes, abstentions = int(wrong(actions, labels)), int((actions < 0).sum())
    of_experts, abstained = wrong(predictions, labels[:, None]), (predictions < 0).sum(0)
    best = of_experts.min()
    rivals, thrifty = abstained[of_experts <= mistakes], of_experts[abstained <= abstentions]
    return VueRegret(
        mistakes=mistakes,
        abstentions=abstentions,
        best_mistakes=int(best),
        best_abstentions=int(abstained[of_experts == best].min()),
        excess_abstentions=float(abstentions - rivals.min()) if rivals.size else float("nan"),
        excess_mistakes=float(mistakes - thrifty.min()) if thrifty.size else float("nan"),
    )


def threshold_experts(
    confidence: Float[Array | np.ndarray, "models rounds"],
    classes: Integer[Array | np.ndarray, "models rounds"],
    thresholds: Float[Array | np.ndarray, "thresholds"],
) -> Int[Array, "rounds experts"]:
    """Experts from networks and thresholds: a network's class where its confidence reaches the threshold, else -1.

    Args:
      confidence: of each network's predictions.
      classes: that they predict.
      thresholds: of the confidence, for all networks.

    Returns:
      int32 [rounds, models x thresholds], the thresholds of one network side by side.

    Raises:
      ValueError: arrays of other shapes.

    Example:
      >>> threshold_experts(jnp.array([[0.9, 0.5]]), jnp.array([[3, 4]]), jnp.array([0.4, 0.8])).tolist()
      [[3, 3], [4, -1]]
    """
    if len(jnp.shape(confidence)) != 2 or len(jnp.shape(thresholds)) != 1:
        shapes = f"{jnp.shape(confidence)} and {jnp.shape(thresholds)}"
        raise ValueError(
            f"confidence and thresholds have the shapes {shapes}; expected [models, rounds], [thresholds]."
        )
    check_shape("classes", classes, jnp.shape(confidence), "One for each confidence.")
    reached = jnp.asarray(confidence)[:, None, :] >= jnp.asarray(thresholds)[None, :, None]
    found = jnp.where(reached, jnp.asarray(classes, jnp.int32)[:, None, :], -1)
    return found.reshape(-1, found.shape[-1]).T


def _predictions(state: VueState, predictions: Any) -> jax.Array:
    check_shape("predictions", predictions, state.alive.shape, "One for each expert.")
    return jnp.asarray(predictions).astype(jnp.int32)


def _rate(config: VueConfig, count: jax.Array) -> jax.Array | float:
    if config.rate is not None:
        return config.rate
    return jnp.minimum(1 / jnp.sqrt((count + 1).astype(float)), 0.1)
