"""The FASTRAIN study: self-training that adapts depth, edges and pseudolabels, against self-training as it is."""

import dataclasses
import itertools
from pathlib import Path
from typing import Literal

from effjax.core.errors import check_choice, check_number
from effjax.recipes.fastrain_arms import Group, program
from effjax.recipes.fastrain_claims import group_claims
from effjax.recipes.fastrain_forms import FORMS
from effjax.recipes.spec import Arm, Axis, Claim, StudyConfig, Sweep
from effjax.train.options import TrainOptions

ARMS = tuple(FORMS)
MAIN = ("st-shallow", "st-deep", "fastrain", "st-shallow-plateau", "st-deep-plateau", "fastrain-plateau", "appnp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastrainStudy(StudyConfig):
    """Config of the FASTRAIN study. The budget is of all stages together, in epochs or in steps of several epochs."""

    tasks: tuple[str, ...] = ("cora",)
    """graphs: cora, citeseer (built in), dblp, amazon_photo, ... (EFFJAX_DATA), or the path of an .npz"""
    per_class: tuple[int, ...] = (8,)
    """labelled nodes of a class, one group of arms each; every seed draws another set"""
    arms: tuple[str, ...] = ARMS
    """which arms, by the names of effjax.recipes.fastrain.ARMS"""
    large: tuple[str, ...] = ()
    """more graphs, which take long and get the arms of large_arms only"""
    large_arms: tuple[str, ...] = MAIN
    """arms of the large graphs"""
    layer: Literal["gcn", "sage", "gat", "released-gat"] = "gcn"
    """of the networks; released-gat is what the authors' program calls GAT, which has no attention"""
    hidden: int = 64
    """width of the hidden layers"""
    dropout: float = 0.5
    """on the hidden layers"""
    learning_rate: float = 0.01
    """of Adam"""
    weight_decay: float = 5e-4
    """L2, added to the gradient"""
    stages: int = 4
    """of self-training; the budget is divided among them"""
    epochs_per_step: int = 50
    """epochs in one compiled step; a plateau is looked for after each"""
    plateau: float = 0.3
    """arms that stop at a plateau end a stage when the loss of a step fell by less than this share"""
    start: Literal["same", "fresh", "warm"] = "same"
    """parameters at the start of a stage: the same draw every time (the authors'), a new one, or those of the last"""
    exact_drop: bool = False
    """drop an exact number of edges in every epoch, as the authors do, by a sort; else each with a probability"""
    pool: int = 32
    """graphs in the pool of the arms that draw no new one in every epoch"""
    threshold: float = 0.8
    """confidence above which a prediction may become a label"""
    deep_below: float = 0.025
    """share of the nodes with a label below which the network is deep"""
    samples: int = 10
    """of predictions on graphs with dropped edges that must agree"""
    samples_keep: float = 0.9
    """share of the edges that such a graph keeps"""
    calibration_epochs: int = 200
    """of the calibration head"""
    calibration_dropout: bool = False
    """leave the frozen network's dropout on while its head is trained, as the authors' program does: it then runs in
    every epoch of the head"""
    top_k: int = 70
    """nodes of a class that top-k self-training labels in its only round, M3S in each"""
    clusters: int = 200
    """of M3S"""
    guard_agreement: float = 0.8
    """the guard: share of the confident nodes whose samples must agree, or none becomes a label"""
    train: TrainOptions = dataclasses.field(default_factory=lambda: TrainOptions(log_steps=1))
    """how runs are executed"""
    guard_growth: float = 5.0
    """the guard: at most so many new nodes of a class, as a multiple of the labelled nodes of a class so far"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("hidden", "stages", "epochs_per_step", "pool", "samples", "calibration_epochs", "top_k"):
            check_number(name, getattr(self, name), low=1, integer=True)
        for name in ("threshold", "deep_below", "plateau", "guard_agreement"):
            check_number(name, getattr(self, name), low=0, high=1)
        check_number("dropout", self.dropout, low=0, high=1, open_high=True)
        check_number("samples_keep", self.samples_keep, low=0, high=1, open_low=True)
        for name in ("tasks", "per_class", "arms"):
            if not getattr(self, name):
                raise ValueError(f"{name}=() leaves nothing to compare. Give at least one.")
        for count in self.per_class:
            check_number("per_class", count, low=1, integer=True)
        for field in ("arms", "large_arms"):
            for name in getattr(self, field):
                check_choice(field, name, ARMS)
        if twice := set(self.tasks) & set(self.large):
            raise ValueError(f"{sorted(twice)} stand in tasks and in large. Leave them out of one of the two.")
        check_choice("budget.unit", self.budget.unit, ("epochs", "steps", "device_seconds"))
        if self.train.accumulate != 1 or self.train.remat:
            raise ValueError(
                f"train.accumulate={self.train.accumulate} and train.remat={self.train.remat}: an epoch is one step on "
                "the whole graph. Leave both alone."
            )


def arms(config: FastrainStudy) -> dict[str, Arm]:
    """Every arm of every graph and number of labels, as ``graph-labels/arm``."""
    return {
        f"{name}/{arm}": Arm(
            build=lambda group=group, arm=arm: program(config, group, FORMS[arm]),
            group=name,
            label=FORMS[arm].label,
            role=FORMS[arm].role,
        )
        for name, group in _groups(config).items()
        for arm in _arms_of(config, group)
    }


def sweeps(config: FastrainStudy) -> dict[str, Sweep]:
    """None: all arms have the authors' settings."""
    return {}


def axes(config: FastrainStudy) -> dict[str, Axis]:
    """All are judged by their accuracy on the nodes that had no label at the start."""
    return {name: Axis("accuracy", "max", "accuracy on unlabelled nodes") for name in _groups(config)}


def claims(config: FastrainStudy) -> list[Claim]:
    """What the method promises against deep and shallow self-training, and what its parts contribute."""
    return [claim for name, group in _groups(config).items() for claim in group_claims(name, _arms_of(config, group))]


def _groups(config: FastrainStudy) -> dict[str, Group]:
    return {
        f"{Path(task).stem}-{count}": Group(task, count)
        for task, count in itertools.product((*config.tasks, *config.large), config.per_class)
    }


def _arms_of(config: FastrainStudy, group: Group) -> tuple[str, ...]:
    return config.large_arms if group.task in config.large else config.arms
