"""A study of a user's own task and arms."""

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from effjax.recipes.spec import Arm, Claim, Group, StudyConfig
from effjax.study.resolve import Study
from effjax.tasks.task import Task
from effjax.train.options import Budget, TrainOptions
from effjax.train.program import Program
from effjax.train.trainer import supervised


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnStudy(StudyConfig):
    """What identifies a comparison of a user's own: a folder continues only with the same."""

    task: str
    """Name and source of the task."""
    data_number: int
    """Number of all bits of the training and test data."""
    names: tuple[str, ...]
    """Names of the arms."""
    batch_size: int = 64
    """Rows of one step, for arms that are optimizers."""


class _Recipe:
    """The groups and claims of one task."""

    def __init__(self, task: Task, arms: Mapping[str, Any], claims: Sequence[Claim]):
        self.task, self.arms, self.CLAIMS = task, arms, {"*": tuple(claims)}

    def groups(self, config: OwnStudy) -> list[Group]:
        arms = [
            Arm(name, "alternative" if index else "baseline", functools.partial(_build, name, made, config))
            for index, (name, made) in enumerate(self.arms.items())
        ]
        return [Group(self.task.name.replace("/", "-"), self.task.metric, lambda: self.task, arms)]


def own_study(
    task: Task | None,
    arms: Mapping[str, Any] | None,
    budget: Budget | float | None,
    seeds: tuple[int, ...],
    claims: Sequence[Claim],
    batch_size: int,
    options: TrainOptions,
) -> Study:
    """The study of ``effjax.compare(task=..., arms=...)``.

    Raises:
      ValueError: a part that is missing, no arm, or an arm's name that cannot be a folder's.
      TypeError: an arm that is nothing that can be trained.
    """
    missing = [name for name, given in (("task", task), ("arms", arms), ("budget", budget)) if given is None]
    if arms is None or budget is None or missing:
        raise ValueError(
            f"compare needs a study such as 'samuel:smoke', or task, arms and budget; {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing."
        )
    if not isinstance(task, Task):
        raise TypeError(f"task is a {type(task).__name__}; make one by effjax.task(module, data, loss=...).")
    if not arms:
        raise ValueError("arms={} leaves nothing to compare. Give at least one.")
    for name in arms:
        if not name or set(name) & set("/\\*?[]|!") or name.startswith("."):
            raise ValueError(f"arms: {name!r} cannot be a name; leave out / \\ * ? [ ] | ! and a leading dot.")
    config = OwnStudy(
        budget=budget if isinstance(budget, Budget) else Budget(float(budget)),
        seeds=seeds,
        train=options,
        task=f"{task.name}: {task.source}",
        data_number=_data_number(task),
        names=tuple(arms),
        batch_size=batch_size,
    )
    stem = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in task.name)
    return Study(stem, "own", config, False, _Recipe(task, dict(arms), claims))


def _build(name: str, made: Any, config: OwnStudy, task: Task) -> Program:
    if callable(made) and not isinstance(made, tuple):
        rows = 1 if task.full_batch else len(jax.tree.leaves(task.train)[0])
        steps = config.budget.steps(config.batch_size, lambda epoch: max(1, rows // config.batch_size))
        made = made(steps)
    if isinstance(made, Program):
        if config.train.accumulate != 1:
            raise ValueError(
                f"options.accumulate={config.train.accumulate}, but the arm {name!r} is a Program, which has its own. "
                "Give options to the trainer that makes it."
            )
        return made
    if isinstance(made, optax.GradientTransformation):
        return supervised(task, made, batch_size=config.batch_size, options=config.train)
    raise TypeError(
        f"arms[{name!r}] is a {type(made).__name__}. Give an Optax optimizer, a Program such as "
        "effjax.train.supervised(task, tx), or a function of the number of steps that returns one."
    )


def _data_number(task: Task) -> int:
    """A number of all bits of the data, so that a run is not continued on others."""
    number = 0
    for leaf in jax.tree.leaves((task.train, task.test)):
        if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
            number = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).reshape(-1).data, number)
        else:
            number = zlib.crc32(repr(leaf).encode(), number)
    return number
