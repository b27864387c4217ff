"""The words of a study: budget, arm, sweep, claim."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from effjax.core.errors import check_choice, check_number
from effjax.train.options import TrainOptions
from effjax.train.program import Program

Metrics = Mapping[str, Mapping[str, float]]
"""arm -> metric -> mean over seeds (NaN for an arm that diverged); ``"values"`` -> metric -> one number a seed."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every arm may spend on one run."""

    amount: float
    """how much"""
    unit: Literal["steps", "examples", "epochs", "device_seconds"] = "steps"
    """of what; device seconds are turned into steps by each arm's measured step time"""

    def __post_init__(self):
        check_number("budget.amount", self.amount, low=0, open_low=True)
        check_choice("budget.unit", self.unit, ("steps", "examples", "epochs", "device_seconds"))

    def steps(self, batch_size: int, epoch_steps: Callable[[int], int] | None = None) -> int:
        """Steps of one run; device seconds must have been resolved before.

        Args:
          batch_size: examples of one step, for a budget in examples.
          epoch_steps: the steps of epoch 0, 1, ..., for a budget in epochs; it may have a fraction.

        Example:
          >>> Budget(2.5, "epochs").steps(32, lambda epoch: (10, 6, 4)[epoch])
          18
        """
        if self.unit == "epochs":
            if epoch_steps is None:
                raise ValueError("a budget in epochs needs the data's rows, which this study does not use. Use steps.")
            whole, part = divmod(self.amount, 1)
            steps = sum(epoch_steps(epoch) for epoch in range(int(whole)))
            return max(1, steps + (round(part * epoch_steps(int(whole))) if part else 0))
        if self.unit == "device_seconds":
            raise ValueError("a budget in device seconds has no number of steps before the step time is measured.")
        return max(1, int(self.amount // batch_size if self.unit == "examples" else self.amount))


class Arm(NamedTuple):
    """One way of doing the study's task.

    Attributes:
      build: makes the Program, loading data only now.
      group: arms of one group are compared with each other (one table, one panel of the plot).
      label: the name shown in the report.
      role: 'baseline', 'method', 'control' or 'alternative'.
    """

    build: Callable[[], Program]
    group: str
    label: str
    role: Literal["baseline", "method", "control", "alternative"]


class Sweep(NamedTuple):
    """Several arms that a user would launch to keep the best one: its cost is the sum of theirs.

    Attributes:
      members: names of arms.
      metric: name of the metric the best is chosen by.
      goal: 'min' or 'max'.
      group: as for an arm.
      label: the name shown in the report.
    """

    members: Sequence[str]
    metric: str
    goal: Literal["min", "max"]
    group: str
    label: str


class Claim(NamedTuple):
    """A sentence with two numbers that decide whether it holds.

    Attributes:
      text: the sentence.
      left: number from the results.
      op: '<=' or '>='.
      right: number from the results.
      of: 'metrics' (decided by what was learned, reproducible) or 'cost' (decided by the clock; the
        numbers are the costs, the metrics and, for ``time_to``, the curve).
    """

    text: str
    left: Callable[[Metrics], float]
    op: Literal["<=", ">="]
    right: Callable[[Metrics], float]
    of: Literal["metrics", "cost"] = "metrics"


def paired(m: Metrics, arm: str, rival: str, metric: str) -> tuple[float, float]:
    """Mean over seeds of the difference between two arms, and its standard error (0 for one seed).

    Args:
      m: what a claim sees.
      arm: name of the arm.
      rival: of the arm that is subtracted.
      metric: of both.

    Example:
      >>> m = {"a": {"values": {"accuracy": [0.75, 1.0]}}, "b": {"values": {"accuracy": [0.5, 0.5]}}}
      >>> paired(m, "a", "b", "accuracy")
      (0.375, 0.125)
    """
    columns = [m[name]["values"].get(metric, []) for name in (arm, rival)]
    if not columns[0] or len(columns[0]) != len(columns[1]) or None in (*columns[0], *columns[1]):
        return math.nan, math.nan
    differences = [a - b for a, b in zip(*columns, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return statistics.fmean(differences), error


def time_to(arm: Mapping[str, Any], metric: str, target: float, goal: Literal["min", "max"] = "max") -> float:
    """Training seconds until an evaluation first reaches ``target``, mean over seeds; NaN if one never does.

    Args:
      arm: what a claim of costs sees of an arm that was evaluated during training (``train.evaluate_steps``).
      metric: of the evaluation.
      target: the value to reach.
      goal: whether it is reached from below ('max') or above ('min').

    Example:
      >>> curves = [{"train_s": [1.0, 2.0], "accuracy": [0.5, 0.9]}, {"train_s": [1.0, 4.0], "accuracy": [0.6, 0.8]}]
      >>> time_to({"curve": curves}, "accuracy", 0.8)
      3.0
    """
    sign = 1 if goal == "max" else -1
    first = []
    for curve in arm["curve"]:
        points = zip(curve["train_s"], curve[metric], strict=True) if curve else ()
        reached = (seconds for seconds, value in points if value is not None and sign * value >= sign * target)
        first.append(next(reached, math.nan))
    return sum(first) / len(first) if first else math.nan


class Axis(NamedTuple):
    """What one group's panel shows: the metric, whether less or more is better, and its name."""

    metric: str
    goal: Literal["min", "max"]
    label: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The fields that every study has."""

    budget: Budget
    """what one run of an arm may spend"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of parameters and data order"""
    train: TrainOptions = dataclasses.field(default_factory=TrainOptions)
    """how runs are executed"""

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={self.seeds} must be one or more different integers, e.g. 0 1 2.")
