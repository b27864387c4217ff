"""What an ensemble of graph networks is made of: settings, state and views."""

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

import jax

from effjax.core.errors import (
    Count,
    Fraction,
    Limits,
    Natural,
    NotNegative,
    Positive,
    Rate,
    Share,
    check_fields,
)
from effjax.graph.isolation import MODES, Mode
from effjax.graph.members import (
    GcnMembers,
    Loop,
)
from effjax.graph.sparse.matrix import SparseMatrix

__all__ = ["GeeniConfig"]

PyTree = Any
Stage = Literal["members", "students"]
Detector = Literal["score", "agreement", "mutual", "learned", "oracle"]
DECAYED = GcnMembers._make((True, False, False, False))  # what the weight decay is for


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeeniSettings:
    """How members are trained and what isolation may choose from: what the arms of a study share."""

    members: Count = 4
    """Networks of an ensemble."""
    epochs_per_step: Count = 10
    """Full-batch epochs of one training step."""
    learning_rate: Positive = 0.01
    """Learning rate of Adam."""
    weight_decay: NotNegative = 5e-4
    """L2 penalty of the first layer, added to its gradient."""
    edge_keep_rate: Share = 0.8
    """Probability with which members after the first see an edge in training."""
    feature_keep_rate: Share = 0.8
    """Probability with which members after the first see a feature."""
    dropout: Rate = 0.5
    """Dropout rate on the hidden layer, in training."""
    student_dropout: Rate = 0.2
    """Dropout rate on the hidden layer of networks that are trained on an ensemble's probabilities."""
    student_share: Positive = 1.0
    """Steps of the networks that are trained on an ensemble's probabilities, as a multiple of the ensemble's steps."""
    fractions: tuple[
        Annotated[float, Limits(low=0, high=1, open_low=True, hint="Zero is always a candidate.")], ...
    ] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
    """Shares of the nodes that may be isolated; none at all is always a candidate."""
    modes: tuple[Mode, ...] = MODES
    """Normalisations of the isolated graph, among which validation nodes choose."""
    powers: tuple[Positive, ...] = (0.5, 1.0, 2.0, 4.0)
    """Soft isolation multiplies a node's messages by one of these powers of its probability of being right."""
    folds: Annotated[int, Limits(low=3)] = 5
    """Parts of the validation nodes, each judged by a detector that has not seen it."""
    ridge: Positive = 5.0
    """Regularisation of the learned detector."""
    loop: Loop | Literal["auto"] = "columns"
    """How the members are looped over; auto measures, and two runs may then differ in the last bits."""

    def __post_init__(self):
        for name in ("fractions", "modes", "powers"):  # a list would not be a static argument of `jit`
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name):
                raise ValueError(f"{name}=() leaves no candidate to choose from. Give one or more.")
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeeniConfig(GeeniSettings):
    """Settings of GEENI."""

    width: Count = 16
    """Hidden units of each member."""
    epochs: Count = 200
    """Full-batch epochs of the members."""
    denoised: Fraction = 0.0
    """Share of the members that see only edges between alike nodes, in training and when served."""
    students: Natural = 0
    """Networks that are trained on the ensemble's probabilities and served in its place; 0 for none."""
    student_width: Count = 16
    """Hidden units of each student."""
    isolate: Detector | None = "learned"
    """Detector of error nodes, None to isolate none; score, agreement and mutual need no labels, learned is fitted on
    validation nodes, oracle reads ALL labels and is an upper bound, never a result."""
    soft: bool = False
    """Multiply messages by a power of the probability that the node is right, and stop none."""
    folded: bool = False
    """Serve the mean of the members' logits, as one network at the cost of one."""
    precompute: bool | Literal["auto"] = "auto"
    """Store S X where features are dense, which spares the first aggregation of what is served."""

    def __post_init__(self):
        super().__post_init__()
        if self.soft and self.isolate not in ("learned", "oracle"):
            raise ValueError(
                f"soft=True needs probabilities of being right, which isolate={self.isolate!r} does not give. Use "
                "isolate='learned'."
            )
        if self.denoised_members and self.members > 1 and (self.folded or self.students):
            raise ValueError(
                f"denoised={self.denoised} gives members graphs of their own, which folded=True and students cannot "
                "have. Use denoised=0, or folded=False and students=0."
            )

    @property
    def denoised_members(self) -> int:
        """How many members see only edges between alike nodes."""
        return round(self.denoised * self.members)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What is trained, in order."""
        return ("members", "students") if self.students else ("members",)

    def steps(self, stage: Stage) -> int:
        """Calls of ``geeni_step`` in a stage.

        Example:
          >>> GeeniConfig(epochs=200, epochs_per_step=10, students=1, student_share=1.5).steps("students")
          30
        """
        steps = max(1, self.epochs // self.epochs_per_step)
        return steps if stage == "members" else max(1, round(steps * self.student_share))


class Isolation(NamedTuple):
    """Which nodes send, of ``choose_isolation``.

    Attributes:
      correctness: [N], of the detector; low where the ensemble is probably wrong.
      active: [N] in [0, 1], by what the messages of every node are multiplied; ones where no isolation is better.
      mode: int32, place in ``GeeniConfig.modes``.
    """

    correctness: jax.Array
    active: jax.Array
    mode: jax.Array


class GeeniState(NamedTuple):
    """State of a GEENI run; its structure and shapes stay the same from the first stage to the last.

    Attributes:
      key: of the run.
      epoch: int32, epochs done, over all stages.
      members: of the ensemble.
      opt: their optimizer's state.
      students: networks that imitate the ensemble; None without.
      students_opt: their optimizer's state; None without.
      targets: [N, C], what they imitate; None without. Zeros before ``geeni_next``.
      isolation: None where nothing is isolated; before ``geeni_next`` everything sends.
    """

    key: jax.Array
    epoch: jax.Array
    members: GcnMembers
    opt: PyTree
    students: GcnMembers | None
    students_opt: PyTree
    targets: jax.Array | None
    isolation: Isolation | None


class GeeniViews(NamedTuple):
    """What each member sees in training.

    Attributes:
      matrix: S; values [nnz], or [K, nnz] where members see subsets of the edges.
      features: bool [K, F].
    """

    matrix: SparseMatrix
    features: jax.Array
