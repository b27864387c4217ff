"""The study of hybrid models: which rows a small network should ask a large one about, by routers and by rules."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.errors import Count, Limits, NoEffectWarning, Positive
from effjax.core.macs import count_macs
from effjax.core.tree import wide
from effjax.data.sets import DataSet, load
from effjax.hardness.cascades import confidence_need
from effjax.hardness.dispatch import dispatch_capacity, expert_capacity
from effjax.hardness.hybrid import (
    HybridConfig,
    HybridExamples,
    HybridNetworks,
    HybridState,
    Stage,
    hybrid_batch,
    hybrid_data,
    hybrid_examples,
    hybrid_init,
    hybrid_next,
    hybrid_step,
)
from effjax.hardness.query_rules import HybridCost, hybrid_curve, hybrid_score, query_threshold
from effjax.hardness.router import Router, router_need
from effjax.models.resnet import SIZES, pretrained_resnet
from effjax.recipes.images import check_model, named_image_task
from effjax.recipes.spec import Arm, Claim, CurveText, Group, Role, StudyConfig
from effjax.tasks.image import standardised, unit_images
from effjax.tasks.task import Metric, Task
from effjax.train.loop import fit
from effjax.train.options import TrainOptions
from effjax.train.program import Curve, Loader, Phase, Program
from effjax.train.trainer import check_options, supervised

PyTree = Any
MODALITY, OWN_MODEL = "image", "mlp-64"
METRIC = Metric("accuracy", "max", "test accuracy at the coverage")
CURVES = {
    "accuracy_coverage": CurveText("Accuracy and coverage", "coverage (share that the base model answers)", "accuracy"),
    "accuracy_cost": CurveText(
        "Accuracy and cost", "mean multiply-adds per row, router included (expert alone = 1)", "accuracy"
    ),
}
GRID = np.linspace(0.0, 1.0, 21)
Open = Annotated[float, Limits(low=0, high=1, open_low=True, open_high=True)]
Need = Callable[[Any, HybridExamples], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridStudy(StudyConfig):
    """Config of the study of hybrid models. The budget is that of a router; the pair of networks is trained before."""

    tasks: tuple[str, ...] = ("fashion_mnist/mlp-4/mlp-256",)
    """Data set, base model and expert: mlp-4 has one hidden layer of 4; cnn, resnet20, ...; on cifar10 the ResNets are
    pretrained, and what the router learns from is taken off the test images."""
    expert: str = "cnn"
    """Name of the expert for data of one's own."""
    coverage: Open = 0.8
    """Share of the rows that the base model answers."""
    coverages: tuple[Open, ...] = (0.9, 0.8, 0.7, 0.5)
    """Coverages at which accuracies are reported."""
    router_share: Open = 0.35
    """Share of the training data, or of the test images under pretrained networks, that routers learn from."""
    calibration_share: Open = 0.1
    """Share of the same data that thresholds are fitted on."""
    pair_steps: Count = 1500
    """Steps in which base model and expert are trained."""
    pair_rate: Positive = 3e-3
    """Their initial learning rate, which falls linearly to 0."""
    pair_batch: Count = 64
    """Examples of one of these steps."""
    batch_size: Count = 256
    """Examples of one step of a router."""
    rounds: Count = 1
    """How often the alternating arm trains base model and router again."""
    train: TrainOptions = dataclasses.field(default_factory=lambda: TrainOptions(log_steps=1))
    """How runs are executed."""

    def __post_init__(self):
        super().__post_init__()
        if self.router_share + self.calibration_share >= 1:
            raise ValueError(
                f"router_share={self.router_share} and calibration_share={self.calibration_share} leave nothing of "
                "the data. Give smaller ones."
            )
        if self.own is not None:
            check_model("expert", self.expert)
        for task in self.tasks:
            if task.count("/") != (2 if self.own is None else 1):
                raise ValueError(f"tasks={task!r} must be DATA/BASE/EXPERT, such as 'fashion_mnist/mlp-4/mlp-256'.")

    def method(self, rows: int, **changes: Any) -> HybridConfig:
        """The settings of an arm whose router learns from so many rows."""
        size = min(self.batch_size, rows)
        passes = -(-rows // size)
        steps = self.budget.steps(size, lambda epoch: passes)
        fields: dict[str, Any] = {"coverage": self.coverage, "batch_size": self.batch_size}
        return HybridConfig(**fields, epochs=max(1, round(steps / passes)), **changes)


class Variant(NamedTuple):
    """One arm.

    Attributes:
      label: the words of the report.
      role: as in ``Arm``.
      rule: of its need, where nothing is learned.
      router: fields of ``Router``.
      options: of ``HybridConfig``.
      seen: whether the router learns from the rows that the pair was trained on.
      features: whether it reads the base model's features.
    """

    label: str
    role: Role
    rule: str | None = None
    router: Mapping[str, Any] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})
    seen: bool = False
    features: bool = True


# Running statistics of the base model stay as they are.
_PARAMS_ALONE = optax.partition(
    {"params": optax.adam(1e-4), "rest": optax.set_to_zero()},
    lambda variables: {name: "params" if name == "params" else "rest" for name in variables},
)
VARIANTS: dict[str, Variant] = {
    "margin": Variant("margin", "baseline", "margin"),
    "max-probability": Variant("largest probability", "baseline", "max_probability"),
    "entropy": Variant("entropy, the paper's baseline", "baseline", "entropy"),
    "router": Variant("learned router", "method"),
    "router-gain": Variant(
        "learned router of who is right", "method", router={"outputs": 2}, options={"objective": "gain"}
    ),
    "alternating": Variant("base and router by turns", "method", options={"rounds": 1, "base_tx": _PARAMS_ALONE}),
    "router-logits": Variant("learned router, logits alone", "control", features=False),
    "router-seen": Variant("learned router, on the pair's own training data", "control", seen=True),
    "random": Variant("random rows", "control", "random"),
    "oracle": Variant("ORACLE, from test labels", "control", "oracle"),
}

_RULES = "best margin|max-probability|entropy"
CLAIMS = {
    "*": (
        *(Claim("router", ">=", _RULES, of=f"accuracy_{c}", plus=0.01) for c in (80, 70)),
        Claim("router-gain", ">=", _RULES, of="accuracy_80", plus=0.01),
        Claim("alternating", ">=", "router", of="accuracy_80"),
        Claim("router", ">=", "router-logits", of="accuracy_80", why="features tell more than logits"),
        Claim("router", ">=", "router-seen", of="accuracy_80", why="a router needs data that the pair has not seen"),
        Claim("margin", ">=", "entropy", of="accuracy_80", why="entropy is the weakest rule"),
        Claim(_RULES, ">=", "random", of="accuracy_80"),
        Claim("alternating", ">=", "router", of="base", plus=-0.005, why="accuracy at coverage 1 stays"),
    ),
    "cifar10-*": (
        *(
            Claim("router", ">=", "router", of="accuracy_70", than_of=("expert",), plus=-0.003, why=why)
            for why in ("30 % of the queries lose at most 0.3 points",)
        ),
    ),
}


def groups(config: HybridStudy) -> list[Group]:
    """One group per task."""
    found = []
    for task in config.tasks:
        data, base, expert = (*task.split("/"), config.expert)[:3]
        pretrained = _is_pretrained(config, data, base, expert)
        arms = [
            Arm(name, variant.role, functools.partial(program, config, variant), variant.label)
            for name, variant in VARIANTS.items()
            if not (variant.seen and pretrained)  # their training data are not all here
        ]
        name = task.replace("/", "-")
        found.append(Group(name, METRIC, functools.partial(_load, config, data, base, expert), arms, curves=CURVES))
    return found


# The pair


class Pair(NamedTuple):
    """What the arms of a group share: two trained networks, and rows that they have not seen.

    Attributes:
      task: of the base model.
      base: ``(variables, images) -> (logits, features)``.
      expert: ``(variables, images) -> logits``.
      params: their variables.
      train: rows that they were trained on; None where those are not here.
      held: rows for routers.
      calibration: rows for thresholds.
      test: rows to report on.
    """

    task: Task
    base: Callable[..., Any]
    expert: Callable[..., Any]
    params: tuple[PyTree, PyTree]
    train: tuple[np.ndarray, np.ndarray] | None
    held: tuple[np.ndarray, np.ndarray]
    calibration: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def _is_pretrained(config: HybridStudy, data: str, base: str, expert: str) -> bool:
    return config.own is None and data == "cifar10" and base in SIZES and expert in SIZES


def _load(config: HybridStudy, name: str, base: str, expert: str) -> Pair:
    given = config.data(name, MODALITY)
    data = load(given) if isinstance(given, str) else given
    if config.own is not None:
        base = config.model(base)
    pretrained = _is_pretrained(config, name, base, expert)
    split = "test" if pretrained else "train"
    parts = _parts(config, data, split)
    rest, held, calibration = parts
    known, least = (
        int((calibration["label"] >= 0).sum()),
        math.ceil(1 / min(config.coverage, 1 - config.coverage) - 1e-9),
    )
    if known < least:
        raise ValueError(
            f"calibration_share={config.calibration_share} leaves {known} rows for the threshold, and "
            f"coverage={config.coverage} needs {least}. Give a larger share, or more rows."
        )
    splits = {**data.splits, split: rest}
    parted = dataclasses.replace(data, splits=splits)
    small, large = (named_image_task(parted, model, config.train) for model in (base, expert))
    if pretrained:
        params = tuple(pretrained_resnet(model)[1] for model in (base, expert))
    else:
        params = tuple(_trained(config, task) for task in (small, large))
    applied, row = (_apply(small, True), _apply(large, False)), np.asarray(small.test["image"][:1])
    spent = [count_macs(apply, held, row).most or 0 for apply, held in zip(applied, params, strict=True)]
    if spent[1] <= spent[0]:
        warnings.warn(
            f"expert={expert!r} takes {spent[1]:,} multiply-adds and the base model {base!r} {spent[0]:,}: not asking "
            "it saves nothing. Give a larger expert, or a smaller base model.",
            NoEffectWarning,
            stacklevel=2,
        )
    pair = lambda columns: (np.asarray(columns["image"]), np.asarray(columns["label"], np.int32))
    source = f"{small.source} A router learns from {len(held['label'])} rows that the networks have not seen."
    return Pair(
        small._replace(name=f"{data.name}/{base}/{expert}", source=source),
        *applied,
        (params[0], params[1]),
        None if pretrained else pair(small.train),
        pair(held),
        pair(calibration),
        pair(small.test),
    )


def _parts(config: HybridStudy, data: DataSet, split: str) -> list[dict[str, np.ndarray]]:
    """The rows that are left, those of routers and those of thresholds, by one fixed draw."""
    columns = {name: np.asarray(data.splits[split][name]) for name in ("image", "label")}
    rows = len(columns["label"])
    order = np.random.default_rng(0).permutation(rows)
    held, calibrated = (max(1, round(rows * share)) for share in (config.router_share, config.calibration_share))
    cuts = np.split(order, [rows - held - calibrated, rows - calibrated])
    if not len(cuts[0]):
        raise ValueError(f"{data.name}: {rows} rows are too few to be split into three. Give more.")
    return [{name: column[np.sort(cut)] for name, column in columns.items()} for cut in cuts]


def _trained(config: HybridStudy, task: Task) -> PyTree:
    rate = optax.linear_schedule(config.pair_rate, 0.0, config.pair_steps)
    size = min(config.pair_batch, len(task.train["label"]))
    made = supervised(task, optax.adam(rate), steps=config.pair_steps, batch_size=size)
    return jax.tree.map(jnp.asarray, fit(made, seed=0).state.variables)


def _apply(task: Task, features: bool) -> Callable[..., Any]:
    def apply(variables: PyTree, images: Any, *, key: Any = None) -> Any:
        x = standardised(unit_images(images), task.details)
        found, layers = task.module.apply(variables, x, train=False, capture=True)
        # The last layer before the logits, whatever it is called.
        return (wide(found), wide(list(layers.values())[-1])) if features else wide(found)

    return apply


# The arms


def program(study: HybridStudy, variant: Variant, pair: Pair) -> Program:
    """``effjax.hybrid`` in phases; an arm without a router has one step that does nothing, and its threshold."""
    base = pair.base if variant.features else (lambda variables, x, *, key=None: pair.base(variables, x)[0])
    router = Router(**variant.router)
    networks = HybridNetworks(base, pair.expert, router)
    changes = dict(variant.options)
    if "rounds" in changes:
        changes["rounds"] = study.rounds
    held = pair.train if variant.seen and pair.train is not None else pair.held
    config = study.method(len(held[1]), **changes)
    need = _learned(router) if variant.rule is None else _RULE_OF[variant.rule]
    look = functools.partial(hybrid_examples, networks=networks)
    known: dict[str, HybridExamples] = {}

    def seen(state: HybridState, name: str) -> HybridExamples:
        """The examples of a set; computed once where the networks stay as they are."""
        rows = getattr(pair, name)
        if config.rounds:
            return look(state, *rows)
        if name not in known:
            known[name] = look(state, *rows)
        return known[name]

    def phase(stage: Stage) -> Phase:
        data = held if stage == "router" or pair.train is None else pair.train
        return Phase(
            step=lambda state, batch, aux: hybrid_step(
                state, hybrid_batch(state, aux, config=config), networks, config=config, stage=stage
            ),
            steps=config.steps(stage, len(data[1])),
            leave=lambda state: hybrid_next(state, seen(state, "calibration"), networks, config=config, stage=stage),
            aux=lambda state: hybrid_data(state, networks, held, pair.train or held, config=config, stage=stage),
        )

    def fit_rule(state: HybridState) -> HybridState:
        examples = seen(state, "calibration")
        found = query_threshold(np.asarray(need(state, examples)), config.coverage, known=examples.known)
        return state._replace(threshold=jnp.asarray(found.value, jnp.float32))

    idle = Phase(step=lambda state, batch, aux: (state, {"loss": jnp.float32(0)}), steps=1, leave=fit_rule)

    def evaluate(state: HybridState) -> dict[str, Any]:
        examples = seen(state, "test")
        needs = need(state, examples)
        cost = _macs(pair, networks, state, learned=variant.rule is None)
        return _metrics(study, needs, state.threshold, examples) | _curves(needs, examples, cost)

    def infer(variables: PyTree, images: Any) -> jax.Array:
        state = variables["params"]
        logits, features = _with_features(base(state["base"], images))
        scores = need(_State(_Parts(state["router"]), None), _examples(logits, features))
        rows = images.shape[0]
        capacity = expert_capacity(rows, 1 - config.coverage, deviations=0.0, multiple=1)
        request = ~(scores <= state["threshold"])
        return dispatch_capacity(pair.expert, state["expert"], images, logits, request, capacity=capacity).outputs

    check_options(study.train, pair.task, accumulate=False, remat=False, dtype=False)
    return Program(
        task=pair.task._replace(infer=infer, example_inputs=pair.test[0][:256]),
        init=lambda key: hybrid_init(key, networks, pair.params, pair.test[0], config=config),
        phases=(idle,) if variant.rule else tuple(phase(stage) for stage in config.stages),
        params=lambda state: {
            "params": {**state.params._asdict(), "threshold": state.threshold},
        },
        loader=Loader(None, 1 if variant.rule else min(config.batch_size, len(held[1]))),
        evaluate=evaluate,
        trained=lambda state: {} if variant.rule else state.params.router,
        train_metrics=lambda means: {"train_loss": means["loss"]},
    )


class _Parts(NamedTuple):
    router: PyTree


class _State(NamedTuple):
    """As much of a ``HybridState`` as a need reads."""

    params: _Parts
    key: Any


def _with_features(found: Any) -> tuple[Any, Any]:
    return found if isinstance(found, tuple) else (found, None)


def _examples(logits: jax.Array, features: Any) -> HybridExamples:
    """Examples of which only what a model gives is known."""
    nobody = jnp.zeros(logits.shape[0], bool)
    return HybridExamples(logits, features, nobody, nobody, nobody, nobody)


def _learned(router: Router) -> Need:
    need = jax.jit(router_need(router))
    return lambda state, examples: need(state.params.router, examples.logits, examples.features)


def _confidence(rule: Any) -> Need:
    return lambda state, examples: confidence_need(examples.logits, rule)


def _random(state: Any, examples: HybridExamples) -> jax.Array:
    key = jax.random.key(0) if state.key is None else jax.random.wrap_key_data(state.key)
    return jax.random.uniform(key, (examples.logits.shape[0],))


def _oracle(state: Any, examples: HybridExamples) -> jax.Array:
    return examples.oracle + 1e-3 * _random(state, examples)  # which of equals, by chance


_RULE_OF: dict[str, Need] = {
    **{rule: _confidence(rule) for rule in ("margin", "max_probability", "entropy")},
    "random": _random,
    "oracle": _oracle,
}


def _metrics(study: HybridStudy, need: Any, threshold: Any, examples: HybridExamples) -> dict[str, Any]:
    """Accuracies at exact coverages, and what the fitted threshold does."""
    right = np.asarray(examples.base_correct), np.asarray(examples.expert_correct)
    known = np.asarray(examples.known)
    need = jnp.asarray(need)
    curve = hybrid_curve(need, *right, (study.coverage, *study.coverages), known=known)
    fitted = hybrid_score(np.asarray(need <= threshold), *right, known)
    names = ("accuracy", *(f"accuracy_{round(100 * c)}" for c in study.coverages))
    return {
        **dict(zip(names, map(float, curve.accuracy), strict=True)),
        "fitted_coverage": float(fitted.coverage),
        "fitted_accuracy": float(fitted.accuracy),
        "base": float(right[0][known].mean()),
        "expert": float(right[1][known].mean()),
        "oracle_share": float(np.asarray(examples.oracle)[known].mean()),
    }


def _macs(pair: Pair, networks: HybridNetworks, state: HybridState, *, learned: bool) -> HybridCost | None:
    """Multiply-adds of one row in units of the expert's; a rule counts as none. None where they cannot be counted."""
    row, params = pair.test[0][:1], state.params
    logits, features = _with_features(jax.eval_shape(networks.base, params.base, row))
    base = count_macs(networks.base, params.base, row).most
    expert = count_macs(pair.expert, params.expert, row).most
    router = count_macs(router_need(networks.router), params.router, logits, features).most if learned else 0
    if not expert or base is None or router is None:
        return None
    return HybridCost(base / expert, 1.0, router / expert)


def _curves(need: Any, examples: HybridExamples, cost: HybridCost | None) -> dict[str, Curve]:
    """Accuracy against coverage and against cost; the models alone, without a router, are points."""
    known = np.asarray(examples.known)
    right = np.asarray(examples.base_correct), np.asarray(examples.expert_correct)
    accuracy = np.asarray(hybrid_curve(jnp.asarray(need), *right, GRID.tolist(), known=known).accuracy)
    base, expert = (float(some[known].mean()) for some in right)
    ends = {"base alone": (1.0, base), "expert alone": (0.0, expert)}
    found = {"accuracy_coverage": Curve(GRID, accuracy, ends)}
    if cost is not None:
        ends = {"base alone": (cost.base, base), "expert alone": (1.0, expert)}
        found["accuracy_cost"] = Curve(cost.average(GRID)[::-1], accuracy[::-1], ends)
    return found
