"""The GEENI study: ensembles of graph networks, with and without isolated error nodes, beside what is cheaper."""

import dataclasses
from typing import Literal

from effjax.core.errors import check_choice, check_number
from effjax.graph.geeni import Form
from effjax.graph.isolation import MODES, Mode
from effjax.recipes.geeni_arms import FORMS, program
from effjax.recipes.spec import Arm, Axis, Claim, Metrics, StudyConfig, Sweep
from effjax.train.options import TrainOptions

ARMS = tuple(FORMS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeeniStudy(StudyConfig):
    """Config of the GEENI study."""

    tasks: tuple[str, ...] = ("cora",)
    """graphs of effjax.graph_data; a poisoned one as cora_attacked/meta_0.15, on the split it was poisoned for"""
    forms: tuple[str, ...] = ARMS
    """arms, by the names of effjax.recipes.geeni_arms.FORMS"""
    hidden: int = 64
    """width of the single network, and of all narrow members together"""
    members: int = 4
    """networks of an ensemble"""
    train_per_class: int = 20
    """labelled nodes of a class, drawn anew for every seed"""
    val_per_class: int = 30
    """labelled nodes of a class that no member is trained on: they fit the detector and choose the isolation"""
    edge_keep: float = 0.8
    """share of the edges that members after the first see in training"""
    feature_keep: float = 0.8
    """share of the features that members after the first see"""
    dropout: float = 0.5
    """on the hidden layer, in training"""
    student_dropout: float = 0.2
    """likewise, of networks that are trained on an ensemble's probabilities"""
    student_share: float = 1.0
    """steps of these networks, as a multiple of the ensemble's"""
    learning_rate: float = 0.01
    """of Adam"""
    weight_decay: float = 5e-4
    """L2 of the first layer, added to its gradient"""
    epochs_per_step: int = 10
    """full-batch epochs in one step of the program"""
    raw_features: tuple[str, ...] = ("amazon_photo", "amazon_computers")
    """graphs whose features are taken as they are; elsewhere those of a node are divided by their sum"""
    fractions: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
    """shares of the nodes that may be isolated; none at all is always a candidate"""
    modes: tuple[Mode, ...] = MODES
    """normalisations of the isolated graph"""
    powers: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """soft isolation multiplies a node's messages by a power of its probability of being right"""
    folds: int = 5
    """parts of the validation nodes, each judged by a detector that has not seen it"""
    ridge: float = 5.0
    """regularisation of the learned detector"""
    jaccard: float = 0.01
    """edges between nodes whose features are less alike are dropped where an arm denoises"""
    train: TrainOptions = dataclasses.field(default_factory=lambda: TrainOptions(log_steps=1))
    """how runs are executed"""
    form: Form | Literal["auto"] = "columns"
    """how the members are run; auto measures, and a resumed run may then differ in the last bits"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("hidden", "members", "train_per_class", "val_per_class", "epochs_per_step"):
            check_number(name, getattr(self, name), low=1, integer=True)
        if self.hidden % self.members:
            raise ValueError(f"hidden={self.hidden} does not divide among members={self.members} narrow ones.")
        check_number("folds", self.folds, low=3, integer=True)
        for name in ("edge_keep", "feature_keep"):
            check_number(name, getattr(self, name), low=0, high=1, open_low=True)
        for name in ("dropout", "student_dropout"):
            check_number(name, getattr(self, name), low=0, high=1, open_high=True)
        for name in ("learning_rate", "ridge"):
            check_number(name, getattr(self, name), low=0, open_low=True)
        check_number("weight_decay", self.weight_decay, low=0)
        check_number("student_share", self.student_share, low=0, open_low=True)
        check_number("jaccard", self.jaccard, low=0, high=1)
        for fraction in self.fractions:
            check_number("fractions", fraction, low=0, high=1, open_low=True, hint="Zero is always a candidate.")
        for name in self.forms:
            check_choice("forms", name, ARMS)
        for name in self.modes:
            check_choice("modes", name, MODES)
        for task in self.tasks:
            if task.count("/") > 1:
                raise ValueError(f"tasks={task!r} must be a graph, or GRAPH/ATTACK such as 'cora_attacked/meta_0.15'.")


def group(task: str) -> str:
    """The group of a task's arms."""
    return task.replace("/", "-")


def arms(config: GeeniStudy) -> dict[str, Arm]:
    """Every form on every graph, as ``graph/form``."""
    return {
        f"{group(task)}/{name}": Arm(
            build=lambda task=task, name=name: program(config, task, name),
            group=group(task),
            label=FORMS[name].label,
            role=FORMS[name].role,
        )
        for task in config.tasks
        for name in config.forms
    }


def sweeps(config: GeeniStudy) -> dict[str, Sweep]:
    """None: every arm has the same learning rate."""
    return {}


def axes(config: GeeniStudy) -> dict[str, Axis]:
    """Accuracy on the test nodes."""
    return {group(task): Axis("accuracy", "max", "test accuracy") for task in config.tasks}


def claims(config: GeeniStudy) -> list[Claim]:
    """What an ensemble gains, what a perfect detector would, what an honest one does, and its rivals."""
    return [claim for task in config.tasks for claim in _claims(task, set(config.forms))]


def _claims(task: str, forms: set[str]) -> list[Claim]:
    where, attacked = group(task), "/" in task
    found: list[tuple[set[str], Claim]] = []

    def say(text: str, left: str, right: str, margin: float, metric: str = "accuracy") -> None:
        values = lambda arm, of: lambda m: m[f"{where}/{arm}"][of]
        claim = Claim(
            f"{where}: {text}", values(left, metric), ">=", lambda m: values(right, metric)(m) + margin, of="metrics"
        )
        found.append(({left, right}, claim))

    say("an ensemble of narrow members is a point above one wide network", "narrow", "single", 0.01)
    say("an ensemble of narrow members is no worse than one of wide members", "narrow", "ensemble", -0.005)
    say("folding narrow members to one network costs at most half a point", "narrow-folded", "narrow", -0.005)
    say("GEENI, distilled and folded, is no worse than one network", "geeni-distilled", "single", 0.0)
    text = "GEENI, distilled and folded, is at most half a point below the ensemble of wide members"
    say(text, "geeni-distilled", "ensemble", -0.005)
    oracle = 0.03 if attacked else 0.02
    say(f"isolating the ORACLE's error nodes gains {100 * oracle:.0f} points", "oracle", "narrow", oracle)
    ensembles = {"geeni-learned": "narrow", "geeni-soft": "narrow", "geeni-distilled": "narrow-distilled"}
    for name, ensemble in ensembles.items():
        say(f"{FORMS[name].label} is no worse than its ensemble", name, ensemble, 0.0)
    say("the learned detector does no worse than the score", "geeni-learned", "geeni-score", 0.0)
    for rival in ("correct-smooth", "narrow-correct-smooth", "jaccard"):
        say(f"GEENI, learned, is no worse than {FORMS[rival].label}", "geeni-learned", rival, 0.0)
    say("GEENI, distilled and folded, is no worse than one network so distilled", "geeni-distilled", "distilled", 0.0)
    kept = [claim for needs, claim in found if needs <= forms]
    if "geeni-learned" in forms:
        kept.append(_auc(where))
    return kept


def _auc(where: str) -> Claim:
    def metric(name: str):
        def value(m: Metrics) -> float:
            return m[f"{where}/geeni-learned"][name]

        return value

    best = lambda m: max(metric("auc_score")(m), metric("auc_agreement")(m), metric("auc_mutual")(m))
    text = f"{where}: the learned detector's AUC is 0.03 above every score that needs no labels"
    return Claim(text, metric("auc_learned"), ">=", lambda m: best(m) + 0.03)
