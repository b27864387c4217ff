"""The GEENI study: ensembles of graph networks, with and without isolated error nodes, beside what is cheaper."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.errors import check_number
from effjax.graph.geeni import geeni_init, geeni_next, geeni_step, geeni_views, served_members, with_measured_loop
from effjax.graph.geeni_config import GeeniConfig, GeeniSettings, GeeniState, Stage
from effjax.graph.geeni_measures import geeni_metrics
from effjax.graph.isolation import alike_edges
from effjax.graph.members import ensemble_logits, ensemble_probabilities, fold_members
from effjax.graph.problems import GeeniProblem
from effjax.recipes.spec import Arm, Claim, Group, Role, StudyConfig
from effjax.tasks.graph import NodeData, draw_split, node_data
from effjax.tasks.task import Metric, Task
from effjax.train.options import TrainOptions
from effjax.train.program import Loader, Phase, Program
from effjax.train.trainer import check_options

PyTree = Any
MODALITY, METRIC = "graph", Metric("accuracy", "max", "test accuracy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeeniStudy(StudyConfig, GeeniSettings):
    """Config of the GEENI study."""

    tasks: tuple[str, ...] = ("cora",)
    """Graphs of effjax.data.graph_data; a poisoned one as cora_attacked/meta_0.15, on the split it was poisoned for."""
    hidden: int = 64
    """Width of the single network, and of all narrow members together."""
    train_per_class: int = 20
    """Labelled nodes per class, drawn anew for every seed."""
    val_per_class: int = 30
    """Labelled nodes per class that no member is trained on; they fit the detector and choose the isolation."""
    raw_features: tuple[str, ...] = ("amazon_photo", "amazon_computers")
    """Graphs whose features are taken as they are; elsewhere those of a node are divided by their sum."""
    jaccard: float = 0.01
    """Edges between nodes whose features are less alike are dropped where an arm denoises."""
    train: TrainOptions = dataclasses.field(default_factory=lambda: TrainOptions(log_steps=1))
    """How runs are executed."""

    def __post_init__(self):
        StudyConfig.__post_init__(self)
        GeeniSettings.__post_init__(self)
        for name in ("hidden", "train_per_class", "val_per_class"):
            check_number(name, getattr(self, name), low=1, integer=True)
        check_number("jaccard", self.jaccard, low=0, high=1)
        if self.hidden % self.members:
            raise ValueError(f"hidden={self.hidden} does not divide among members={self.members} narrow ones.")
        for task in self.tasks:
            if task.count("/") > 1:
                raise ValueError(f"tasks={task!r} must be a graph, or GRAPH/ATTACK such as 'cora_attacked/meta_0.15'.")


class Variant(NamedTuple):
    """One arm.

    Attributes:
      label: the words of the report.
      role: as in ``Arm``.
      networks: one of width ``hidden``; one of the width of all; several of width ``hidden``; several that share it.
      students: who is trained on the ensemble's probabilities and served in its place.
      after: what is done with the probabilities that are served.
      options: of ``GeeniConfig``.
    """

    label: str
    role: Role
    networks: Literal["one", "one-wide", "wide", "narrow"] = "narrow"
    students: Literal["one", "narrow"] | None = None
    after: Literal["drop-edges", "correct-smooth"] | None = None
    options: Mapping[str, Any] = MappingProxyType({})


_LEARNED, _FOLDED = {"isolate": "learned"}, {"folded": True}
VARIANTS: dict[str, Variant] = {
    "single": Variant("one GCN", "baseline", "one"),
    "single-wide": Variant("one GCN, as wide as the ensemble", "alternative", "one-wide"),
    "single-drop-edges": Variant("one GCN, mean over edge subsets", "alternative", "one", after="drop-edges"),
    "correct-smooth": Variant("one GCN, Correct & Smooth", "alternative", "one", after="correct-smooth"),
    "ensemble": Variant("ensemble", "baseline", "wide"),
    "narrow": Variant("ensemble, narrow", "baseline"),
    "narrow-folded": Variant("ensemble, narrow, folded to one GCN", "baseline", options=_FOLDED),
    "narrow-correct-smooth": Variant("ensemble, narrow, Correct & Smooth", "alternative", after="correct-smooth"),
    "distilled": Variant("one GCN, distilled from the ensemble", "alternative", "wide", "one"),
    "narrow-distilled": Variant(
        "ensemble, narrow, distilled from the wide one, folded to one GCN", "method", "wide", "narrow", options=_FOLDED
    ),
    "geeni-score": Variant("GEENI, score", "method", options={"isolate": "score"}),
    "geeni-agreement": Variant("GEENI, score and agreement", "method", options={"isolate": "agreement"}),
    "geeni-mutual": Variant("GEENI, mutual information", "method", options={"isolate": "mutual"}),
    "geeni-learned": Variant("GEENI, learned detector", "method", options=_LEARNED),
    "geeni-folded": Variant("GEENI, learned detector, folded to one GCN", "method", options=_LEARNED | _FOLDED),
    "geeni-distilled": Variant(
        "GEENI, learned detector, distilled from the wide ensemble, folded to one GCN",
        "method",
        "wide",
        "narrow",
        options=_LEARNED | _FOLDED,
    ),
    "geeni-soft": Variant("GEENI, learned detector, soft", "method", options=_LEARNED | {"soft": True}),
    "geeni-correct-smooth": Variant(
        "GEENI, learned detector, then Correct & Smooth", "method", after="correct-smooth", options=_LEARNED
    ),
    "oracle": Variant("ORACLE detector (reads test labels)", "control", options={"isolate": "oracle"}),
    "jaccard": Variant("one GCN on denoised edges", "alternative", "one", options={"denoised": 1.0}),
    "geeni-denoised": Variant(
        "GEENI, learned detector, half of the members denoised", "method", options=_LEARNED | {"denoised": 0.5}
    ),
}

# An ensemble gains a point, isolation by an honest detector loses nothing, and neither do cheaper rivals beat it.
_CHEAPER = ("correct-smooth", "narrow-correct-smooth", "jaccard")
_LABEL_FREE = ("auc_score", "auc_agreement", "auc_mutual")
_CLAIMS = (
    Claim("narrow", ">=", "single", plus=0.01),
    Claim("narrow", ">=", "ensemble", plus=-0.005),
    Claim("narrow-folded", ">=", "narrow", plus=-0.005),
    Claim("geeni-distilled", ">=", "single"),
    Claim("geeni-distilled", ">=", "ensemble", plus=-0.005),
    *(Claim(arm, ">=", "narrow") for arm in ("geeni-learned", "geeni-soft")),
    Claim("geeni-distilled", ">=", "narrow-distilled"),
    *(Claim("geeni-learned", ">=", rival) for rival in ("geeni-score", *_CHEAPER)),
    Claim("geeni-distilled", ">=", "distilled"),
    Claim("geeni-learned", ">=", "geeni-learned", "auc_learned", than_of=_LABEL_FREE, plus=0.03),
)


def claims(config: GeeniStudy) -> dict[str, Sequence[Claim]]:
    """By group; isolation by the ORACLE must gain more where the graph is poisoned."""
    gain = lambda task: Claim("oracle", ">=", "narrow", plus=0.03 if "/" in task else 0.02)
    return {task.replace("/", "-"): (*_CLAIMS, gain(task)) for task in config.tasks}


def groups(config: GeeniStudy) -> list[Group]:
    """Every variant on every graph."""
    found = []
    for task in config.tasks:
        build = functools.partial(program, config, fixed="/" in task)
        arms = [
            Arm(name, variant.role, functools.partial(build, variant), variant.label)
            for name, variant in VARIANTS.items()
        ]
        found.append(Group(task.replace("/", "-"), METRIC, functools.partial(_load, config, task), arms))
    return found


def _load(config: GeeniStudy, task: str) -> NodeData:
    if config.own is not None:
        data = node_data(config.data(task, MODALITY))
        return _with_test(data) if data.data.train is not None else _large_enough(config, data)
    name, _, attack = task.partition("/")
    return node_data(name, row_normalize=name not in config.raw_features, attack=attack or None)


def _with_test(data: NodeData) -> NodeData:
    """The user's own split; all other nodes with a class are for the test where it says none."""
    graph = data.data
    if graph.train is None or graph.val is None:
        raise ValueError(
            f"{data.name}: has training nodes, but no validation nodes, on which isolation is chosen. Add val_mask (or "
            "'val' in --node-split); or leave the split out (--leave-out) to have one drawn."
        )
    if graph.test is not None:
        return data
    known = np.flatnonzero(graph.labels >= 0)
    test = np.setdiff1d(known, np.concatenate([graph.train, graph.val])).astype(np.int32)
    if not test.size:
        raise ValueError(f"{data.name}: every node with a class is for training or validation. Leave some for a test.")
    return data._replace(data=graph._replace(test=test))


def _large_enough(config: GeeniStudy, data: NodeData) -> NodeData:
    """The graph, if a split that is drawn leaves every class a validation node and some a test node."""
    labels = np.asarray(data.labels)
    sizes = np.bincount(labels[labels >= 0], minlength=data.classes)
    if sizes.min() <= config.train_per_class or (sizes <= config.train_per_class + config.val_per_class).all():
        raise ValueError(
            f"{data.name}: its classes have {sizes.min()} to {sizes.max()} nodes, too few for "
            f"train_per_class={config.train_per_class} and val_per_class={config.val_per_class} with others left to "
            "test on. Give smaller --train-per-class and --val-per-class."
        )
    drawn = f"{config.train_per_class} and {config.val_per_class} nodes per class"
    return data._replace(source=f"{data.source} Per seed, {drawn} were drawn to train and to validate on.")


def method_config(study: GeeniStudy, variant: Variant) -> GeeniConfig:
    """What ``geeni`` is given for an arm."""
    count, hidden = study.members, study.hidden
    sizes = {None: (0, 1), "one": (1, hidden), "one-wide": (1, hidden * count)}
    sizes |= {"wide": (count, hidden), "narrow": (count, hidden // count)}
    (members, width), (students, student_width) = sizes[variant.networks], sizes[variant.students]
    amount = study.budget.steps(1, lambda epoch: 1)
    own: dict[str, Any] = {
        "members": members,
        "width": width,
        "students": students,
        "student_width": student_width,
        "epochs": amount * (1 if study.budget.unit == "epochs" else study.epochs_per_step),
        "isolate": None,
        "precompute": False,  # the product with X is part of what the arms cost
    }
    shared: dict[str, Any] = {field.name: getattr(study, field.name) for field in dataclasses.fields(GeeniSettings)}
    return GeeniConfig(**{**shared, **own, **variant.options})


def program(study: GeeniStudy, variant: Variant, data: NodeData, *, fixed: bool) -> Program:
    """``effjax.geeni`` in phases.

    Args:
      study: the config.
      variant: the arm.
      data: the graph.
      fixed: take the graph's own split for every seed; otherwise it is drawn from the seed.
    """
    config = method_config(study, variant)
    fixed = fixed or (study.own is not None and data.data.train is not None)
    alike = alike_edges(data.features, data.adjacency.pattern, threshold=study.jaccard) if config.denoised else None

    def masks(key: jax.Array) -> list[jax.Array]:
        if fixed:
            parts = (data.data.train, data.data.val, data.data.test)
            return [jnp.zeros(data.data.nodes, bool).at[np.asarray(part)].set(True) for part in parts]
        per_class = (study.train_per_class, study.val_per_class)
        return list(draw_split(jax.random.fold_in(key, 0), data.labels, data.classes, *per_class))

    def problem(key: jax.Array) -> GeeniProblem:
        train, val, _ = masks(key)
        return GeeniProblem(data.features, data.adjacency, data.labels, train, val, data.classes, alike=alike)

    config = with_measured_loop(problem(jax.random.key(0)), config)

    def phase(stage: Stage) -> Phase:
        def aux(state: GeeniState) -> PyTree:
            seen = problem(state.key)
            return seen, geeni_views(state, seen, config=config)

        return Phase(
            step=lambda state, batch, aux: geeni_step(state, *aux, config=config, stage=stage),
            steps=config.steps(stage),
            leave=lambda state: geeni_next(state, problem(state.key), config=config, stage=stage),
            aux=aux,
        )

    def infer(members: PyTree, inputs: PyTree) -> jax.Array:
        nodes, features, matrix = inputs
        members = fold_members(members) if config.folded else members
        return ensemble_probabilities(ensemble_logits(members, features, matrix))[nodes]

    def members(key: jax.Array) -> Any:
        return geeni_init(key, problem(key), config=config).members

    def measured(state: GeeniState) -> dict[str, Any]:
        test = masks(state.key)[2]
        return geeni_metrics(state, problem(state.key), test, config=config, after=variant.after)

    none: Any = None
    task = Task(
        name=f"{data.name}/gcn",
        source=data.source,
        metric=METRIC,
        init=members,
        loss=none,  # the method's own
        infer=infer,
        evaluate=none,  # of the state: what is served is more than parameters
        train=None,
        example_inputs=(np.arange(data.data.nodes, dtype=np.int32), data.features, data.adjacency),
        classes=data.classes,
        full_batch=True,
    )
    check_options(study.train, task, accumulate=False, remat=False, dtype=False)
    networks = "members|opt/1/0/(mu|nu)" + "|students|students_opt/1/0/(mu|nu)" * (config.students > 1)
    return Program(
        task=task,
        init=lambda key: geeni_init(key, problem(key), config=config),
        phases=tuple(phase(stage) for stage in config.stages),
        params=functools.partial(served_members, config=config),
        loader=Loader(None, data.data.nodes),
        evaluate=measured,
        sharding=((f"^({networks})/", ("expert",)),) if config.members > 1 else (),
    )
