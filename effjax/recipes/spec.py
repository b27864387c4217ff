"""The words of a study: config, group, arm, sweep and claim, all of them data."""

import collections
import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from effjax.core.errors import Limits, check_fields, near
from effjax.data.files import Modality, fitting_modality, read_data
from effjax.tasks.task import Metric
from effjax.train.options import Budget, TrainOptions
from effjax.train.program import Program

__all__ = ["Claim"]

Role = Literal["baseline", "method", "control", "alternative"]


class Arm(NamedTuple):
    """One way of doing a group's task.

    Attributes:
      name: unique in its group; claims and presets choose arms by it.
      role: 'baseline', 'method', 'control' or 'alternative'.
      build: from what ``Group.load`` returned to a Program.
      label: the words of tables and plots; the name where it is empty.
    """

    name: str
    role: Role
    build: Callable[[Any], Program]
    label: str = ""


class Sweep(NamedTuple):
    """Several arms that a user would launch to keep the best one by the group's metric: its cost is the sum of theirs.

    Attributes:
      members: shell pattern on the names of the group's arms.
      label: the words of tables and plots.
    """

    members: str
    label: str

    def matches(self, name: str) -> bool:
        """Whether an arm of this name is a member."""
        return fnmatch.fnmatchcase(name, self.members)


class CurveText(NamedTuple):
    """What a curve of ``Program.evaluate`` shows: the words of its panel in the picture and of the report.

    Attributes:
      title: of the panel.
      x: label of the axis.
      y: label of the axis.
    """

    title: str
    x: str
    y: str


class Group(NamedTuple):
    """Arms that are compared with each other: one table, one panel of the plot.

    Attributes:
      name: unique in the study.
      metric: what its arms are judged by.
      load: makes the task, or whatever the arms share; called once, so that data are read and evaluation is compiled
        once for all arms.
      arms: in the order of the report.
      sweeps: by name.
      curves: that arms may give, by name; one panel of the plot each.
      about: from what ``load`` returned to sentences for the report and the command line, such as an estimate that
        the measurements are to be compared with.
    """

    name: str
    metric: Metric
    load: Callable[[], Any]
    arms: Sequence[Arm]
    sweeps: Mapping[str, Sweep] = MappingProxyType({})
    curves: Mapping[str, CurveText] = MappingProxyType({})
    about: Callable[[Any], Sequence[str]] = lambda loaded: ()


class Claim(NamedTuple):
    """What a study says will come out, as data: decided from the results alone, its sentence is generated.

    ``value(arm) op times * value(than) + plus``. An arm is given by its name; ``'best PATTERN'`` is the best by the
    compared number of the arms that a shell pattern matches, ``'sum PATTERN'`` the sum over them; patterns may be
    joined by ``|``. A name with a stroke, ``'group/arm'``, is an arm of another group. A claim about arms that are not
    in the results is left out.

    Attributes:
      arm: the left-hand side.
      op: '<=' or '>='; or 'no worse': of the two the one that the group's metric asks for, ``plus`` in its direction.
      than: the right-hand side: an arm, or a number.
      of: what is compared: a metric, or a cost such as ``train_s``, ``step_ms``, ``peak_bytes``; None for the group's
        metric.
      times: factor of the right-hand side.
      plus: added to the right-hand side.
      standard_errors: if given, what is compared is the mean over seeds of the paired difference ``arm - than``, with
        so many of its own standard errors: ``mean(arm - than) op standard_errors * error``.
      than_of: metrics of the right-hand side, of which the best counts, where they are others than ``of``.
      as_ratio_of: if given, ``value(arm) / value(than)`` is compared with ``times`` the same ratio of this cost or
        metric.
      until: an arm. If given, the training seconds are compared after which the arms first reach the value of the
        group's metric that this arm ends with, seed by seed; needs evaluations during training.
      why: words that lead the sentence.
    """

    arm: str
    op: Literal["<=", ">=", "no worse"]
    than: str | float
    of: str | None = None
    times: float = 1.0
    plus: float = 0.0
    standard_errors: float | None = None
    than_of: tuple[str, ...] = ()
    as_ratio_of: str | None = None
    until: str | None = None
    why: str = ""


_ACCURACY = Metric("accuracy", "max", "test accuracy")
_OWN_METRICS = {
    "text": Metric("spearman", "max", "test spearman"),
    "sequence": Metric("mse", "min", "test squared error"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnData:
    """A user's own data, in place of a study's."""

    path: str
    """File, folder, or hf:owner/name."""
    model: str | None = None
    """A model by name, or a folder with a checkpoint; None for the study's."""
    columns: tuple[tuple[str, Any], ...] = ()
    """Keywords of effjax.data.files.read_data and their values."""

    def __post_init__(self):
        # As JSON brings them back.
        columns = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in self.columns)
        object.__setattr__(self, "columns", columns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The fields that every study has."""

    budget: Budget
    """What one run of an arm may spend."""
    seeds: tuple[Annotated[int, Limits(low=0, high=2**32 - 1)], ...] = (0, 1, 2)
    """Seeds of parameters and data order."""
    arms: tuple[str, ...] = ("*",)
    """Names or shell patterns of the arms to run; a pattern that begins with ! leaves arms out."""
    train: TrainOptions = dataclasses.field(default_factory=TrainOptions)
    """How runs are executed."""
    own: OwnData | None = None
    """Your own data in place of the study's; set by --data."""

    def data(self, name: str, modality: Modality | Sequence[Modality]) -> Any:
        """What a maker of tasks takes as its data: the name of a set, or the user's own data."""
        if self.own is None:
            return name
        columns = dict(self.own.columns)
        return read_data(fitting_modality(modality, columns), self.own.path, **columns)

    def model(self, name: str) -> str:
        """What a maker of tasks takes as its model."""
        return name if self.own is None or self.own.model is None else self.own.model

    def metric(self, name: str, modality: str, of_name: Callable[[str], Metric]) -> Metric:
        """What a task is judged by, known before its data are read."""
        if self.own is None:
            return of_name(name)
        return _OWN_METRICS.get(modality, _ACCURACY) if "score" in dict(self.own.columns) else _ACCURACY

    def __post_init__(self):
        check_fields(self)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={self.seeds} must be one or more different integers, e.g. 0 1 2.")
        if not self.arms:
            raise ValueError("arms=() leaves nothing to compare. Give names or patterns; '*' takes all.")


def chosen(name: str, patterns: Sequence[str]) -> bool:
    """Whether ``StudyConfig.arms`` chooses an arm of this name.

    Example:
      >>> chosen("adam", ("!sgd-*",)), chosen("sgd-2", ("sgd-*", "!sgd-2"))
      (True, False)
    """
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    hit = lambda some: any(fnmatch.fnmatchcase(name, pattern) for pattern in some)
    return hit(wanted) and not hit(unwanted)


def choose_arms(groups: Sequence[Group], patterns: Sequence[str]) -> list[Group]:
    """The groups with the arms that ``StudyConfig.arms`` chooses.

    Those are the arms that a pattern matches, less those that a ``!pattern`` matches.
    Sweeps without members and groups without arms are left out.

    Raises:
      ValueError: no group, a name that comes twice, a pattern that matches no arm of any group, or no arm left.

    Example:
      >>> arms = [Arm(name, "baseline", lambda task: None) for name in ("sgd-1", "sgd-2", "adam")]
      >>> group = Group("g", Metric("loss", "min", "loss"), lambda: None, arms)
      >>> [arm.name for arm in choose_arms([group], ("sgd-*", "!sgd-2"))[0].arms]
      ['sgd-1']
    """
    _check_once(groups)
    names = sorted({arm.name for group in groups for arm in group.arms})
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        if not fnmatch.filter(names, bare):
            raise ValueError(f"arms: {pattern!r} matches none of {', '.join(names)}.{near(bare, names)}")
    found = []
    for group in groups:
        arms = [arm for arm in group.arms if chosen(arm.name, patterns)]
        sweeps = {name: sweep for name, sweep in group.sweeps.items() if any(sweep.matches(arm.name) for arm in arms)}
        if arms:
            found.append(group._replace(arms=arms, sweeps=sweeps))
    if not found:
        raise ValueError(f"arms={tuple(patterns)} leaves nothing to compare.")
    return found


def _check_once(groups: Sequence[Group]) -> None:
    """Refuse what would overwrite another's results, before anything is trained."""
    if not groups:
        raise ValueError("the config leaves no task to compare arms on. Give at least one of each kind of setting.")
    lists = {"group": [group.name for group in groups]}
    lists |= {f"arm of {group.name}": [*(arm.name for arm in group.arms), *group.sweeps] for group in groups}
    for what, names in lists.items():
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"the {what} {twice[0]!r} would come twice. Give every task, rate or number once.")
