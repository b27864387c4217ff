"""The FASTRAIN study: self-training that adapts depth, edges and pseudolabels, against self-training as it is."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.errors import check_choice, check_number
from effjax.graph.fastrain import (
    fastrain_graph,
    fastrain_init,
    fastrain_metrics,
    fastrain_next,
    fastrain_params,
    fastrain_step,
)
from effjax.graph.fastrain_config import Apply, FastrainConfig, FastrainSettings, FastrainState, Init
from effjax.graph.problems import NodeProblem
from effjax.graph.sparse.adjacency_matrices import loopless_adjacency
from effjax.graph.sparse.propagation import label_propagation
from effjax.graph.stages import adam_l2, evaluate_stages
from effjax.models.gnn import NodeClassifier, sized_networks
from effjax.recipes.spec import Arm, Claim, Group, Role, StudyConfig
from effjax.tasks.graph import NodeData, draw_labelled, node_data, node_task
from effjax.tasks.task import Metric, Task
from effjax.train.options import TrainOptions
from effjax.train.program import Loader, Phase, Program
from effjax.train.trainer import check_options

MODALITY, OWN = "graph", {"large": ()}
MAIN = ("st-shallow", "st-deep", "fastrain", "st-shallow-plateau", "st-deep-plateau", "fastrain-plateau", "appnp")
METRIC = Metric("accuracy", "max", "accuracy on unlabelled nodes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastrainStudy(StudyConfig, FastrainSettings):
    """Config of the FASTRAIN study. The budget is of all stages together, in epochs or in steps of several epochs."""

    tasks: tuple[str, ...] = ("cora",)
    """Graphs: cora, citeseer (built in), dblp, amazon_photo, ... (EFFJAX_DATA), or the path of an .npz file."""
    per_class: tuple[int, ...] = (8,)
    """Numbers of labelled nodes per class, with one group of arms for each; every seed draws another set."""
    large: tuple[str, ...] = ()
    """More graphs, which take long and get only those of the chosen arms that large_arms names."""
    large_arms: tuple[str, ...] = MAIN
    """Names of the arms that large graphs get."""
    layer: Literal["gcn", "sage", "gat", "released-gat"] = "gcn"
    """Layer of the networks; released-gat is what the authors' program calls GAT, which has no attention."""
    hidden: int = 64
    """Width of the hidden layers."""
    dropout: float = 0.5
    """Rate of the dropout on hidden layers."""
    learning_rate: float = 0.01
    """Learning rate of Adam."""
    weight_decay: float = 5e-4
    """Strength of the L2 penalty, whose gradient is added before Adam."""
    plateau: float = 0.3
    """Arms that stop at a plateau end a stage when the loss of a step fell by less than this share."""
    pool: int = 32
    """Number of graphs in the pool of the arm that draws no new one in every epoch."""
    guard_agreement: float = 0.8
    """The guard labels nothing unless the samples of this share of the confident nodes agree."""
    guard_growth: float = 5.0
    """The guard labels per class at most this many times the labelled nodes per class so far."""
    train: TrainOptions = dataclasses.field(default_factory=lambda: TrainOptions(log_steps=1))
    """How runs are executed."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("hidden", "pool", "samples"):
            check_number(name, getattr(self, name), low=1, integer=True)
        check_number("plateau", self.plateau, low=0, high=1)
        check_number("dropout", self.dropout, low=0, high=1, open_high=True)
        for name in ("tasks", "per_class"):
            if not getattr(self, name):
                raise ValueError(f"{name}=() leaves nothing to compare. Give at least one.")
        for count in self.per_class:
            check_number("per_class", count, low=1, integer=True)
        for name in self.large_arms:
            check_choice("large_arms", name, [arm.name for arm in _arms(self)])
        if twice := set(self.tasks) & set(self.large):
            raise ValueError(f"{sorted(twice)} stand in tasks and in large. Leave them out of one of the two.")
        check_choice("budget.unit", self.budget.unit, ("epochs", "steps", "device_seconds"))
        self.method()

    @property
    def stage_steps(self) -> int:
        """Steps per stage."""
        steps = self.budget.amount / (self.epochs_per_step if self.budget.unit == "epochs" else 1)
        return max(1, round(steps / self.stages))

    def method(self, **changes: Any) -> FastrainConfig:
        """The settings of an arm that differs from FASTRAIN by ``changes``."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(FastrainSettings)}
        fields |= {"epochs": self.stage_steps * self.epochs_per_step, "head_dropout": self.dropout}
        fields |= {"agreement": self.guard_agreement, "tx": adam_l2(self.learning_rate, self.weight_decay)}
        return FastrainConfig(**(fields | changes))


def groups(config: FastrainStudy) -> list[Group]:
    """Every graph with every number of labels."""
    found = []
    for graph, count in itertools.product((*config.tasks, *config.large), config.per_class):
        arms = [arm for arm in _arms(config) if graph not in config.large or arm.name in config.large_arms]
        load = functools.partial(_load, config, graph, count)
        # How many labels one's own graph has depends on its split.
        name = graph if config.own is not None and len(config.per_class) == 1 else f"{Path(graph).stem}-{count}"
        found.append(Group(name, METRIC, load, arms))
    return found


def _arms(c: FastrainStudy) -> Iterator[Arm]:
    def arm(name: str, role: Role, label: str, *, layer: str | None = None, **changes: Any) -> Arm:
        return Arm(name, role, lambda loaded: _program(c, loaded, layer, c.method(**changes)), label)

    st = functools.partial(arm, keep_rate=0.9, samples=0, pruned=False)
    once = functools.partial(st, keep_rate=1.0, stages=1)
    shallow, deep = {"depth": "shallow"}, {"depth": "deep"}
    yield once("shallow", "baseline", "GCN, 2 layers", **shallow)
    yield once("deep", "baseline", "GCN, 3 layers", **deep)
    yield st("st-shallow", "baseline", "self-training, 2 layers", **shallow)
    yield st("st-deep", "baseline", "self-training, 3 layers", **deep)
    yield arm("fastrain", "method", "FASTRAIN")
    yield arm("no-spf", "control", "FASTRAIN without filtering", samples=0)
    yield arm("no-pgp", "control", "FASTRAIN without pruning", pruned=False)
    yield arm("no-dr", "control", "FASTRAIN without dynamic regularisation", keep_rate=0.9)
    yield arm("no-ds", "control", "FASTRAIN without dynamic sizing (deep)", **deep)
    yield st("st-shallow-plateau", "baseline", "self-training, 2 layers, plateau", **shallow, plateau=c.plateau)
    yield st("st-deep-plateau", "baseline", "self-training, 3 layers, plateau", **deep, plateau=c.plateau)
    yield arm("fastrain-plateau", "method", "FASTRAIN, plateau", plateau=c.plateau)
    yield arm("fastrain-pool", "method", "FASTRAIN, pool of graphs", pool=c.pool, exact_drop=False)
    yield arm("fastrain-2", "method", "FASTRAIN, two stages", stages=2)
    yield arm("fastrain-weighted", "method", "FASTRAIN, weighted pseudolabels", weighted=True)
    yield arm("fastrain-guard", "method", "FASTRAIN, guarded", growth=c.guard_growth)
    yield arm("fastrain-appnp", "method", "FASTRAIN around APPNP", **shallow, layer="appnp")
    yield st("top-k", "alternative", "top-k self-training", **shallow, keep_rate=1.0, stages=2, select="top-k")
    yield st("m3s", "alternative", "M3S", **shallow, keep_rate=1.0, select="m3s")
    yield Arm("lp", "alternative", functools.partial(_propagation, c), "label propagation")
    yield once("correct-and-smooth", "alternative", "GCN, Correct & Smooth", **shallow, smoothed=True)
    yield once("appnp", "alternative", "APPNP", **shallow, layer="appnp")
    yield st("st-appnp", "alternative", "self-training of APPNP", **shallow, layer="appnp")


class _Loaded(NamedTuple):
    """What the arms of a group share."""

    problem: NodeProblem
    per_class: int
    labelled: int
    networks: dict[str | None, tuple[Task, Init, Apply]]
    own: jax.Array | None = None

    def drawn(self, key: jax.Array) -> jax.Array:
        """The labelled nodes of a seed, the same for all arms; those of the user's own split in every seed."""
        if self.own is not None:
            return self.own
        return draw_labelled(jax.random.split(key, 3)[0], self.problem.labels, self.problem.classes, self.per_class)


def _load(c: FastrainStudy, graph: str, per_class: int) -> _Loaded:
    data = node_data(c.data(graph, MODALITY))
    labels, own = data.labels, None
    if c.own is not None and data.data.train is not None:
        labels, own = _own_split(c, data)
    elif c.own is not None:
        data = data._replace(source=f"{data.source} Per seed, {per_class} nodes per class were drawn to be labelled.")
    known = np.asarray(labels)
    sizes = np.bincount(known[known >= 0], minlength=data.classes)
    if not sizes.all():
        raise ValueError(f"{data.name}: class {sizes.argmin()} has no node, so none of it can be labelled.")
    if own is None and (sizes <= per_class).all():
        raise ValueError(
            f"per_class={per_class}: no class of {data.name} has more nodes ({sizes.max()} at most), so that none is "
            "left to test on. Give a smaller --per-class."
        )
    labelled = int(np.minimum(sizes, per_class).sum() if own is None else own.sum())
    module = functools.partial(
        NodeClassifier,
        classes=data.classes,
        hidden=c.hidden,
        dropout=c.dropout,
        dtype=None if c.train.dtype == "float32" else jnp.dtype(c.train.dtype),
    )
    plain = functools.partial(module, layer=c.layer, initializer="released")
    networks = {
        None: _network(plain, data, per_class),
        "appnp": _network(functools.partial(module, layer="appnp"), data, per_class),
    }
    nobody = jnp.zeros(len(known), bool)  # the labelled nodes are drawn per seed
    problem = NodeProblem(data.features, data.adjacency, labels, nobody, data.classes)
    return _Loaded(problem, per_class, labelled, networks, own)


def _own_split(c: FastrainStudy, data: NodeData) -> tuple[jax.Array, jax.Array]:
    """The labels of the training and test nodes of the user's own split, and the mask of its training nodes."""
    if len(c.per_class) > 1:
        raise ValueError(
            f"per_class={c.per_class}, but {data.name} has training nodes of its own, which are taken instead. Give "
            "one number; or leave the split out (--leave-out, with the names of its arrays) to have nodes drawn."
        )
    known, mask = np.asarray(data.labels), np.zeros(data.data.nodes, bool)
    mask[data.data.train] = True
    if not (sizes := np.bincount(known[mask], minlength=data.classes)).all():
        raise ValueError(f"{data.name}: its training nodes hold none of class {sizes.argmin()}. Add some.")
    judged = known >= 0
    if data.data.test is not None:
        judged[:] = mask
        judged[data.data.test] = True
    elif data.data.val is not None:
        judged[data.data.val] = False
    if not (judged & ~mask).any():
        raise ValueError(f"{data.name}: every node with a class is a training node, so that none is left to test on.")
    return jnp.asarray(np.where(judged, known, -1)), jnp.asarray(mask)


def _network(module: Any, data: NodeData, per_class: int) -> tuple[Task, Init, Apply]:
    """A network of two depths, which its parameters tell."""
    init, apply = sized_networks(module, data.features, data.adjacency)

    def infer(variables: Any, inputs: Any) -> jax.Array:
        nodes, features, adjacency = inputs
        return apply(variables["params"], features, adjacency)[nodes]

    task = node_task(data, module(), per_class=per_class)
    return task._replace(name=data.name, infer=infer), init, apply


def _program(c: FastrainStudy, loaded: _Loaded, layer: str | None, config: FastrainConfig) -> Program:
    """One arm: every stage is a phase; a step is ``epochs_per_step`` epochs."""
    problem = loaded.problem
    task, init, apply = loaded.networks[layer]
    check_options(c.train, task, accumulate=False, remat=False)

    def begin(key: jax.Array) -> FastrainState:
        return fastrain_init(key, init, problem._replace(mask=loaded.drawn(key)), config, labelled=loaded.labelled)

    phase = Phase(
        step=lambda state, batch, graph: fastrain_step(state, graph, apply, config),
        steps=c.stage_steps,
        over=None if config.plateau is None else lambda state: state.over,
        leave=lambda state: fastrain_next(state, init, apply, problem, config),
        aux=lambda state: fastrain_graph(state, problem, config),
    )
    return Program(
        task,
        begin,
        (phase,) * config.stages,
        lambda state: {"params": fastrain_params(state)},
        Loader(None, len(problem.labels) * c.epochs_per_step),
        lambda state: fastrain_metrics(state, apply, problem, config),
        train_metrics=lambda means: {"train_loss": means["loss"]},
    )


def _propagation(c: FastrainStudy, loaded: _Loaded) -> Program:
    """Label propagation: one step, nothing trained."""
    problem = loaded.problem
    task = loaded.networks[None][0]._replace(
        infer=lambda variables, nodes: variables["params"]["scores"][nodes],
        example_inputs=np.arange(len(problem.labels), dtype=np.int32),
        dtype="float32",
    )
    check_options(c.train, task, accumulate=False, remat=False, dtype=False)

    def init(key: jax.Array) -> dict[str, jax.Array]:
        mask = loaded.drawn(key)
        scores = jnp.zeros((len(problem.labels), problem.classes))
        return {"scores": scores, "labels": jnp.where(mask, problem.labels, 0), "mask": mask}

    def step(state: Any, batch: Any, matrix: Any) -> tuple[Any, dict[str, jax.Array]]:
        scores = label_propagation(matrix, state["labels"], state["mask"], problem.classes)
        return {**state, "scores": scores}, {"loss": jnp.float32(0)}

    def evaluate(state: Any) -> dict[str, float]:
        added = jnp.where(state["mask"], 0, -1)
        return evaluate_stages(problem.labels, state["labels"], added, state["scores"].argmax(-1)[None])

    return Program(
        task,
        init,
        (Phase(step, 1, aux=lambda state: loopless_adjacency(problem.adjacency)),),
        lambda state: {"params": {"scores": state["scores"]}},
        Loader(None, len(problem.labels)),
        evaluate,
        train_metrics=lambda means: {},
    )


_above = functools.partial(Claim, op=">=", standard_errors=1.0)
_no_worse = functools.partial(Claim, op=">=", standard_errors=-1.0)
_slower = functools.partial(Claim, op=">=", of="train_s")

CLAIMS = {
    "*": (
        *(_above("fastrain", than=rival) for rival in ("st-deep", "st-shallow")),
        _slower("st-deep", than="fastrain", times=1.3),
        Claim("fastrain", ">=", "best lp|correct-and-smooth|appnp|st-appnp|top-k|m3s|shallow"),
        _above("st-appnp", than="appnp"),
        _no_worse("fastrain-appnp", than="st-appnp"),
        *(_no_worse("fastrain", than=part) for part in ("no-spf", "no-pgp", "no-dr", "no-ds")),
        _above("fastrain", than="no-spf", of="precision_1"),
        _slower("no-ds", than="fastrain", times=1.1),
        *(_no_worse("fastrain-plateau", than=f"{rival}-plateau") for rival in ("st-deep", "st-shallow")),
        _slower("st-deep-plateau", than="fastrain-plateau", times=2.0),
        _no_worse("fastrain-plateau", than="st-deep"),
        _slower("st-deep", than="fastrain-plateau", times=2.0),
        *(_no_worse(f"fastrain-{part}", than="fastrain") for part in ("2", "pool", "weighted", "guard")),
        _slower("fastrain", than="fastrain-pool"),
    )
}
"""What the method promises against deep and shallow self-training, and what its parts contribute. All arms of a seed
start from the same labelled nodes, so that differences are paired."""
