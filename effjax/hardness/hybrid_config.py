"""What a hybrid is made of: its networks, settings and state, and what is known of rows."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import optax

from effjax.core.errors import Count, Limits, Natural, NotNegative, Positive, check_fields
from effjax.hardness.query_rules import QueryThreshold
from effjax.hardness.router import Router

__all__ = ["HybridBatch", "HybridConfig", "HybridExamples", "HybridModel", "HybridNetworks", "HybridState"]

Stage = Literal["router", "base", "expert"]
Open = Annotated[float, Limits(low=0, high=1, open_low=True, open_high=True)]


# Once, as a config is compared by what it holds.
_ROUTER_TX = optax.adamw(2e-3, weight_decay=1e-2)
_BASE_TX = optax.adam(1e-4)


class HybridNetworks(NamedTuple):
    """The functions of a hybrid; static and hashable.

    Attributes:
      base: ``(params, inputs, *, key=None) -> logits``, or ``-> (logits, features)`` with what the router reads too.
      expert: ``(params, inputs, *, key=None) -> logits``; None where only its answers are known.
      router: module called as ``router(logits, features, train=...)``; ``outputs=2`` for ``objective='gain'``.
    """

    base: Callable[..., Any]
    expert: Callable[..., Any] | None
    router: nn.Module = Router()


class HybridParts(NamedTuple):
    """One thing for each network."""

    base: Any
    expert: Any
    router: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """How a hybrid is trained."""

    coverage: Open = 0.7
    """Share of the inputs that the base model answers."""
    objective: Literal["query", "gain"] = "query"
    """What the router learns: whether to ask, or how probably either model is right (a router of two outputs)."""
    constraint: Literal["none", "penalty", "dual"] = "none"
    """How the router is held to the coverage in training; the threshold is fitted afterwards in any case."""
    strength: NotNegative = 1.0
    """Weight of the penalty."""
    dual_rate: Positive = 0.1
    """Step size of the dual variable."""
    epochs: Count = 20
    """Passes of a router stage over its examples."""
    model_epochs: Count = 1
    """Passes of a base or an expert stage over the training data."""
    batch_size: Count = 256
    """Rows of one step."""
    rounds: Natural = 0
    """How often base, expert and router are trained again, one after another."""
    router_tx: optax.GradientTransformation = _ROUTER_TX
    """Optimizer of the router; it starts anew in every stage."""
    base_tx: optax.GradientTransformation = _BASE_TX
    """Optimizer of the base model."""
    expert_tx: optax.GradientTransformation | None = None
    """Optimizer of the expert; None leaves the expert as it is."""

    def __post_init__(self):
        check_fields(self)
        if self.objective == "gain" and self.constraint != "none":
            raise ValueError(
                f"constraint={self.constraint!r} holds a probability of asking to the coverage, which objective='gain' "
                "does not give. Use 'none': the threshold sets the coverage."
            )

    def steps(self, stage: Stage, rows: int) -> int:
        """Steps of a stage that learns from so many rows."""
        passes = self.epochs if stage == "router" else self.model_epochs
        return passes * -(-rows // min(self.batch_size, rows))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of training in their order."""
        again: tuple[Stage, ...] = ("base", "router") if self.expert_tx is None else ("base", "expert", "router")
        return ("router", *(again * self.rounds))


class HybridState(NamedTuple):
    """What training changes.

    Attributes:
      key: raw, of dropout and of the order of the rows; another one in each stage.
      count: int32, steps taken in the stage.
      params: of base, expert and router; the router's with all its collections.
      opt: states of their optimizers; None for an expert that stays.
      dual: float32, the multiplier of the coverage constraint.
      threshold: float32, rows of larger need ask.
    """

    key: jax.Array
    count: jax.Array
    params: HybridParts
    opt: HybridParts
    dual: jax.Array
    threshold: jax.Array


class HybridExamples(NamedTuple):
    """What a router learns from: computed once, after which neither model is needed.

    Attributes:
      logits: the base model's, float32 [rows, classes].
      features: what else the base model gives, [rows, width]; None for nothing.
      base_correct: bool [rows], where the base model is right.
      expert_correct: bool [rows], where the expert is right.
      known: bool [rows], rows with a label; the others count nowhere.
      request: bool [rows], which rows ask by the router and threshold of the state.
    """

    logits: Any
    features: Any
    base_correct: Any
    expert_correct: Any
    known: Any
    request: Any

    @property
    def oracle(self) -> Any:
        """Rows that should ask: the base wrong, the expert right."""
        return ~self.base_correct & self.expert_correct & self.known


class HybridBatch(NamedTuple):
    """What base and expert stages learn from.

    Attributes:
      inputs: the batch axis leading.
      labels: int32 [rows]; -1 counts nowhere.
      request: bool [rows], of ``HybridExamples``.
    """

    inputs: Any
    labels: Any
    request: Any


class HybridModel(NamedTuple):
    """A trained hybrid.

    Attributes:
      state: parameters and threshold.
      threshold: what was fitted on the calibration rows.
      examples: those rows.
    """

    state: HybridState
    threshold: QueryThreshold
    examples: HybridExamples
