"""The rules of AxFormer's search: what is tested in which order, and what is accepted."""

import dataclasses
import itertools
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from effjax.core.errors import Count, Limits, Natural, NotNegative, Rate, check_fields, check_number
from effjax.models.pruned import check_top_k
from effjax.transformers.gated import Scores
from effjax.transformers.prune_spec import Element, Kind, PruneShape, PruneSpec
from effjax.transformers.significance import bootstrap_gain, halves, paired_gain

__all__ = ["AxformerConfig", "AxformerState", "Trial", "axformer_init", "axformer_next"]

FINE: dict[str, Kind] = {"mlp": "group", "attention": "head"}
_Level = Annotated[float, Limits(low=0, high=1, open_low=True, open_high=True)]


@dataclasses.dataclass(frozen=True)
class AxformerConfig:
    """Rules of the search; the defaults are those of the authors' code.

    Attributes:
      agreement: more than this share of the samples must not be hurt. At 0.5 accurate models lose almost nothing;
        see ``tolerance`` and ``counted_above``.
      tolerance: nats that a sample's loss may rise above the unpruned model's and still count as not hurt.
      counted_above: only samples whose unpruned loss is above it are counted; None counts all.
      descend: heads or groups of a rejected block are tested where its loss is below this times the best.
      loss_batch: the loss is the mean of the means of batches of that many samples in their order, so that a short last
        batch counts as a full one; None for the mean over samples.
      hard: test hard attention, layer after layer, before anything is removed.
      top_k: of hard attention, see ``keep_largest``.
      loss_budget: removals are accepted while the loss is at most (1 + this) times the unpruned model's, in place of
        a falling loss: for speed and size. None for the authors' rule.
      significance: besides, the loss must fall by more than chance: ``"paired"`` and ``"bootstrap"`` tests against the
        model so far, or ``"halves"``, where both random halves of the samples must accept.
      level: of one significance test.
      collapse: reject where the entropy of the predicted classes falls below this share of the unpruned model's.
      seed: of the bootstrap and the halves.

    Source: Nagarajan, Sen, Stevens, Raghunathan 2022, arXiv:2010.03688.
    """

    agreement: Rate = 0.5
    tolerance: NotNegative = 0.0
    counted_above: float | None = None
    descend: Annotated[float, Limits(low=1)] = 1.1
    loss_batch: Count | None = 128
    hard: bool = True
    top_k: int | float = 30
    loss_budget: NotNegative | None = None
    significance: Literal["none", "paired", "bootstrap", "halves"] = "none"
    level: _Level = 0.05
    collapse: Rate = 0.0
    seed: Natural = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_top_k(self.top_k)
        if self.loss_budget is not None and self.significance in ("paired", "bootstrap"):
            raise ValueError(
                f"significance={self.significance!r} asks for a falling loss, but loss_budget={self.loss_budget} lets "
                "it rise. Leave one out, or take significance='halves'."
            )


class Trial(NamedTuple):
    """One test of the search.

    Attributes:
      element: what was tested.
      loss: of the tested model; where the evaluation ended early, of what it had computed.
      count: counted samples that are not hurt.
      accepted: whether it stays.
      best: what the loss was compared with.
      descends: whether the loss is below ``descend`` times that.
      failed: the rules that reject it: ``"loss"``, ``"agreement"``, ``"significance"``, ``"collapse"``.
      complete: False where the evaluation ended early; then only ``"loss"`` is judged.
    """

    element: Element
    loss: float
    count: int
    accepted: bool
    best: float
    descends: bool
    failed: tuple[str, ...] = ()
    complete: bool = True


@dataclasses.dataclass(frozen=True)
class AxformerState:
    """A search between two tests.

    Attributes:
      config: its rules.
      spec: what is accepted so far.
      pending: what is left to test, in order; a rejected block puts its heads or groups in front.
      base: scores of the unpruned model; None before they are known.
      losses: [rows] of the model so far.
      best: its loss.
      trace: the tests so far.
    """

    config: AxformerConfig
    spec: PruneSpec
    pending: tuple[Element, ...]
    base: Any = None
    losses: Any = None
    best: float = np.inf
    trace: tuple[Trial, ...] = ()

    @property
    def done(self) -> bool:
        """Whether nothing is left to test."""
        return self.base is not None and not self.pending

    @property
    def candidate(self) -> PruneSpec:
        """What must be scored next: the unpruned model at first."""
        return self.spec if self.base is None or self.done else self.spec.adding(self.pending[0])

    def upcoming(self, count: int) -> tuple[PruneSpec, ...]:
        """The next candidates, if each is rejected: up to ``count``, as far as they are known."""
        if self.base is None or not self.pending:
            return (self.candidate,)
        # What follows a block depends on its loss.
        known = list(itertools.takewhile(lambda element: element.kind not in FINE, self.pending[:count]))
        return tuple(self.spec.adding(element) for element in known or self.pending[:1])


def axformer_init(shape: PruneShape, config: AxformerConfig | None = None) -> AxformerState:
    """The search before the unpruned model is scored.

    Hard attention from the first layer to the last; then from the last layer to the first the feed-forward block and
    the attention block.

    Args:
      shape: the model's elements.
      config: rules; the defaults where None.

    Returns:
      An ``AxformerState``.

    Example:
      >>> [tuple(element[:2]) for element in axformer_init(PruneShape(2, 2, 2)).pending]
      [('hard', 0), ('hard', 1), ('mlp', 1), ('attention', 1), ('mlp', 0), ('attention', 0)]
    """
    config = AxformerConfig() if config is None else config
    layers = range(shape.layers)
    hard = [Element("hard", layer) for layer in layers] if config.hard else []
    kinds: tuple[Kind, Kind] = ("mlp", "attention")
    blocks = [Element(kind, layer) for layer in reversed(layers) for kind in kinds]
    return AxformerState(config, PruneSpec(shape, top_k=config.top_k), (*hard, *blocks))


def axformer_next(state: AxformerState, scores: Scores) -> AxformerState:
    r"""Judge the candidate and go on to the next one.

    A candidate with losses :math:`\ell_i` and loss :math:`\ell` is accepted where

    .. math:: \ell < \ell^*, \qquad \#\{i : \ell_i \le \ell_i^0 + \tau\} > \lfloor a M \rfloor

    with the best loss so far, the unpruned model's losses :math:`\ell_i^0`, ``agreement`` a and ``tolerance``
    :math:`\tau`. Of a rejected block with :math:`\ell < 1.1\, \ell^*` the heads or groups are tested next.

    Args:
      state: from ``axformer_init`` or the call before.
      scores: of ``state.candidate``.

    Returns:
      The state with one test more in its trace.

    Raises:
      ValueError: another number of losses, losses of the unpruned model that are negative or not finite, or a search
        that is done.

    Example:
      >>> state = axformer_init(PruneShape(1, 1, 1), AxformerConfig(hard=False))
      >>> state = axformer_next(state, Scores(np.array([0.2, 0.4])))
      >>> state = axformer_next(state, Scores(np.array([0.1, 0.3])))
      >>> state.spec.mlp, state.trace[0].accepted, round(state.best, 6)
      ((0,), True, 0.2)
    """
    if state.done:
        raise ValueError("state is done: its spec is found, nothing is left to test.")
    losses = np.asarray(scores.losses, np.float64)
    if state.base is None:
        return _begun(state, scores, losses)
    if losses.shape != state.losses.shape:
        raise ValueError(f"scores hold {losses.shape} losses, but the unpruned model's {state.losses.shape}.")
    trial = _judged(state, scores, losses)
    element, rest = state.pending[0], state.pending[1:]
    if trial.accepted:
        accepted = {"spec": state.candidate, "losses": losses, "best": trial.loss}
        return dataclasses.replace(state, pending=rest, trace=(*state.trace, trial), **accepted)
    if trial.descends and element.kind in FINE:
        kind = FINE[element.kind]
        count = state.spec.shape.groups if kind == "group" else state.spec.shape.heads
        rest = (*(Element(kind, element.layer, index) for index in range(count)), *rest)
    return dataclasses.replace(state, pending=rest, trace=(*state.trace, trial))


def loss_weights(rows: int, batch: int | None) -> Float[np.ndarray, "rows"]:
    """What each sample counts in the loss: the mean of the means of batches.

    Example:
      >>> loss_weights(3, 2).tolist(), loss_weights(2, None).tolist()
      ([0.25, 0.25, 0.5], [0.5, 0.5])
    """
    check_number("rows", rows, low=1, integer=True)
    batch = rows if batch is None else batch
    sizes = np.diff([*range(0, rows, batch), rows])
    return np.repeat(1 / (sizes * len(sizes)), sizes)


def _begun(state: AxformerState, scores: Scores, losses: np.ndarray) -> AxformerState:
    if losses.ndim != 1 or not losses.size:
        raise ValueError(f"scores.losses have shape {losses.shape}; expected one for each of 1 or more samples.")
    wrong = ~np.isfinite(losses) | (losses < 0)
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} of {losses.size} losses of the unpruned model are negative or not finite, the first "
            f"{losses[wrong][0]}. Losses are 0 or more, such as a cross-entropy."
        )
    config = state.config
    if config.significance == "halves":
        halves(losses.size, seed=config.seed)
    if config.collapse and scores.predicted is None:
        raise ValueError(f"collapse={config.collapse} reads predicted classes, which the scores lack. Leave it at 0.")
    if not _counted(config, losses).any():
        raise ValueError(
            f"counted_above={config.counted_above}: no loss of the unpruned model is above it; the largest is "
            f"{losses.max():.3g}."
        )
    best = float(loss_weights(losses.size, config.loss_batch) @ losses)
    return dataclasses.replace(state, base=scores._replace(losses=losses), losses=losses, best=best)


def _judged(state: AxformerState, scores: Scores, losses: np.ndarray) -> Trial:
    config, base = state.config, state.base
    weights = loss_weights(losses.size, config.loss_batch)
    loss, bound = float(weights @ losses), loss_bound(state)
    counted = _counted(config, base.losses)
    unhurt = (losses <= base.losses + config.tolerance) & counted
    failed = []
    if not _low_enough(state, loss):
        failed.append("loss")
    if scores.complete:
        if unhurt.sum() <= np.floor(config.agreement * counted.sum()):
            failed.append("agreement")
        if not failed and not _significant(state, losses, weights, unhurt, counted):
            failed.append("significance")
        if config.collapse and _entropy(scores.predicted) < config.collapse * _entropy(base.predicted):
            failed.append("collapse")
    return Trial(
        state.pending[0],
        loss,
        int(unhurt.sum()),
        not failed and scores.complete,
        bound,
        scores.complete and loss < config.descend * bound,
        tuple(failed),
        scores.complete,
    )


def loss_bound(state: AxformerState) -> float:
    """What the candidate's loss is compared with."""
    budget = state.config.loss_budget
    if budget is None or not state.pending or state.pending[0].kind == "hard":
        return state.best
    weights = loss_weights(state.losses.size, state.config.loss_batch)
    return float(weights @ state.base.losses) * (1 + budget)


def _low_enough(state: AxformerState, loss: float) -> bool:
    bound = loss_bound(state)
    # Hard attention saves nothing, so that it must lower the loss whatever the budget.
    within = state.config.loss_budget is not None and state.pending[0].kind != "hard"
    return loss <= bound if within else loss < bound


def _counted(config: AxformerConfig, base: np.ndarray) -> np.ndarray:
    return np.ones(base.shape, bool) if config.counted_above is None else base > config.counted_above


def _significant(
    state: AxformerState, losses: np.ndarray, weights: np.ndarray, unhurt: np.ndarray, counted: np.ndarray
) -> bool:
    config = state.config
    if config.significance == "none":
        return True
    if config.significance == "paired":
        return paired_gain(state.losses, losses, weights, level=config.level)
    if config.significance == "bootstrap":
        return bootstrap_gain(
            state.losses,
            losses,
            weights,
            level=config.level,
            samples=max(2000, int(np.ceil(2 / config.level))),
            seed=config.seed + len(state.trace),
        )
    factor = 1 + (config.loss_budget or 0)
    against = state.losses if config.loss_budget is None else state.base.losses * factor
    for half in halves(losses.size, seed=config.seed):
        own = half > 0
        falls = half @ losses < half @ against
        if not falls or (unhurt & own).sum() <= np.floor(config.agreement * (counted & own).sum()):
            return False
    return True


def _entropy(predicted: Any) -> float:
    """Of the shares of the predicted classes, in nats."""
    shares = np.unique(np.asarray(predicted), return_counts=True)[1] / len(predicted)
    return float(-(shares * np.log(shares)).sum())
