"""Settings of DiSK: what is distilled, what help costs, and in which order the two networks are trained."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import optax
from jaxtyping import Array, Int

from effjax.core.errors import Count, Limits, Natural, NotNegative, Positive, check_choice, check_fields, near
from effjax.core.tree import wide
from effjax.optim.dual_ascent import Constraint, DclConfig, cyclic_level

__all__ = ["DiskConfig", "disk_passes", "disk_preset"]

Pass = Literal["student", "guide", "pairs", "joint", "best"]
Level = float | tuple[float, float] | Callable[[Any], Any]


def _default_dual() -> optax.GradientTransformation:
    return optax.chain(optax.ema(0.9), optax.sgd(0.05))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DiskConfig:
    """Settings of ``disk``; ``disk_preset`` has those of the paper and of its two programs.

    Example:
      >>> DiskConfig(tx=optax.sgd(0.1), k=3).student_temperature
      4.0

    Source: Kag, Acar, Gangrade, Saligrama 2023, ICLR (OpenReview N4K5ck-BTT).
    """

    tx: optax.GradientTransformation
    """Optimizer of the student."""
    guide_tx: optax.GradientTransformation | None = None
    """Optimizer of the guide; None for one like the student's, with a state of its own."""
    epochs: Count = 12
    """Rounds of passes over the data."""
    order: Literal["pairs", "separate", "joint", "best"] = "pairs"
    """One step of the student and one of the guide per batch, on one forward pass of the student; separate passes for
    the two; one gradient for both; or the best guide of every batch in closed form, without a network."""
    student_passes: Count = 1
    """Passes over the data in a round that train the student, where they are separate."""
    guide_passes: Count = 1
    """Passes over the data in a round that train the guide, where they are separate."""
    first_guide_passes: Natural = 0
    """Passes over the data that train the guide alone, before the first round."""
    k: Count | None = 10
    """Size of the support, the teacher's best classes that the guide lifts; None for all classes."""
    student_temperature: Positive = 4.0
    """Temperature of the student's softmax."""
    teacher_temperature: Positive = 4.0
    """Temperature of the teacher's softmax."""
    distil_weight: NotNegative = 0.9
    """Weight of the distillation."""
    label_weight: NotNegative = 0.1
    """Weight of the labels' cross-entropy."""
    target: Literal["teacher", "label"] = "teacher"
    """Class whose cross-entropy is the price of help."""
    over: Literal["wrong", "all"] = "wrong"
    """Rows that the spent help is divided by: those that the student gets wrong, or all."""
    clamp: Annotated[float, Limits(low=0, open_low=True)] | None = 5.0
    """Largest price of help; None for no limit."""
    normaliser: Literal["none", "once", "scaled"] = "scaled"
    """Weight of the helped student's normaliser in the guide's loss: not at all, once as released, or times both
    temperatures as the loss that it belongs to."""
    budget: Level = (0.6, 0.3)
    """Help that may be spent: a number; two, from the first to the last round along half a cosine; or a schedule
    ``round -> number``."""
    price: Level | None = None
    """Weight of help beyond the budget: a number, two, or a schedule; None for a multiplier found by DCL."""
    dual: optax.GradientTransformation = dataclasses.field(default_factory=_default_dual)
    """Optimizer of DCL's multiplier, which moves in every step of the guide."""
    multiplier: NotNegative = 5.0
    """DCL's multiplier at the start."""
    limit: Positive = 50.0
    """Largest multiplier of DCL."""

    def __post_init__(self):
        check_fields(self)
        if not self.distil_weight:
            raise ValueError("distil_weight=0.0 leaves nothing to distil. Train the student on its labels alone.")

    @functools.cached_property
    def constraint(self) -> DclConfig:
        """Help minus its budget, at most 0."""
        limits = {"help": Constraint("<=", 0.0)}
        return DclConfig(limits, dual=self.dual, start=self.multiplier, limit=self.limit)

    def at(self, level: Level, epoch: Int[Array, ""] | int) -> Array:
        """A level in a round."""
        if isinstance(level, tuple):
            level = cyclic_level(*level, period=self.epochs)
        return wide(level(epoch) if callable(level) else level)


def disk_passes(config: DiskConfig, epoch: int) -> tuple[Pass, ...]:
    """The passes over the data in a round, each by what its steps train.

    Args:
      config: settings.
      epoch: number of the round.

    Returns:
      Values of ``step`` of ``disk_step``.

    Example:
      >>> disk_passes(DiskConfig(tx=optax.sgd(0.1), order="separate", guide_passes=2), 0)
      ('student', 'guide', 'guide')
    """
    first: tuple[Pass, ...] = ("guide",) * (config.first_guide_passes if epoch == 0 else 0)
    if config.order != "separate":
        return (*first, config.order)
    return (*first, *("student",) * config.student_passes, *("guide",) * config.guide_passes)


_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "order": "joint",
        "k": None,
        "target": "label",
        "over": "all",
        "clamp": None,
        "normaliser": "none",
        "budget": 0.3,
        "price": 1.0,
    },
    "release_cifar": {
        "order": "separate",
        "epochs": 200,
        "student_passes": 3,
        "guide_passes": 3,
        "first_guide_passes": 5,
        "student_temperature": 3.5,
        "normaliser": "once",
        "budget": cyclic_level(0.6, 0.4, 20, 0.9),
        "price": cyclic_level(1.0, 5.0, 50),
    },
    "release_imagenet": {
        "order": "joint",
        "epochs": 90,
        "k": 20,
        "student_temperature": 1.0,
        "teacher_temperature": 1.0,
        "distil_weight": 0.5,
        "label_weight": 0.5,
        "clamp": 2.0,
        "normaliser": "none",
        "budget": 0.2,
        "price": cyclic_level(0.1, 0.5, 30),
    },
}


def disk_preset(name: str, tx: optax.GradientTransformation, **fields: Any) -> DiskConfig:
    """The settings of the paper (as on its poster) or of one of its two programs.

    ``paper`` has one loss for both networks, all classes and a fixed budget, whose number and price we could not find.
    ``release_cifar`` trains in three separate passes each, with cosines that restart for the budget and its price.
    ``release_imagenet`` trains both at once, with a fixed budget.

    Args:
      name: ``"paper"``, ``"release_cifar"`` or ``"release_imagenet"``.
      tx: optimizer of the student.
      **fields: of ``DiskConfig``, in place of the preset's.

    Returns:
      A ``DiskConfig``.

    Raises:
      ValueError: an unknown name.
      TypeError: fields that ``DiskConfig`` does not have.

    Example:
      >>> disk_preset("release_imagenet", optax.sgd(0.05), k=5).clamp
      2.0

    Source: Kag, Acar, Gangrade, Saligrama 2023, ICLR (OpenReview N4K5ck-BTT).
    """
    check_choice("name", name, tuple(_PRESETS))
    known = [field.name for field in dataclasses.fields(DiskConfig)]
    for field in fields:
        if field not in known:
            raise TypeError(f"{field!r} is no field of DiskConfig.{near(field, known)}")
    chosen: dict[str, Any] = {"tx": tx, **_PRESETS[name], **fields}
    return DiskConfig(**chosen)
