"""The study of hybrid models: which rows a small network should ask a large one about, by routers and by rules."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.errors import Count, Limits, Positive
from effjax.core.macs import count_macs
from effjax.data.files import fitting_modality
from effjax.hardness.cascades import confidence_need
from effjax.hardness.dispatch import dispatch_capacity, expert_capacity
from effjax.hardness.hybrid import hybrid_batch, hybrid_data, hybrid_examples, hybrid_init, hybrid_next, hybrid_step
from effjax.hardness.hybrid_config import HybridConfig, HybridExamples, HybridNetworks, HybridState, Stage
from effjax.hardness.query_rules import HybridCost, hybrid_curve, hybrid_score, query_threshold
from effjax.hardness.router import Router, router_need
from effjax.recipes.image_checkpoints import is_checkpoint
from effjax.recipes.pairs import Pair, is_pretrained, load_pair, seen_by
from effjax.recipes.spec import Arm, Claim, CurveText, Group, Role, StudyConfig
from effjax.tasks.task import Metric
from effjax.train.options import TrainOptions
from effjax.train.program import Curve, Loader, Phase, Program
from effjax.train.trainer import check_options

PyTree = Any
MODALITY = ("image", "text")
OWN_MODEL = {"image": "mlp-64", "text": "encoder-1x32"}
_OWN_EXPERT = {"image": "cnn", "text": "minilm"}
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
    """Data set, base model and expert. Images: mlp-4 has one hidden layer of 4; cnn, resnet20, ...; on cifar10 the
    ResNets are pretrained, and what the router learns from is taken off the test images. Texts: encoder-1x32 has one
    layer of width 32; minilm, ... are pretrained and fine-tuned."""
    expert: str | None = None
    """The expert for your own data, by name; None for cnn on images and minilm on texts. Both models may be given
    by their weights: of images a file called after its architecture, as resnet20.safetensors, or
    mobilenet_v2_10_224; of texts the folder of a checkpoint."""
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
    tune_steps: Count = 100
    """Steps in which a pretrained encoder of texts is fine-tuned."""
    tune_rate: Positive = 2e-4
    """Their initial learning rate, which falls linearly to 0."""
    max_length: Annotated[int, Limits(low=3)] = 64
    """Tokens of a text; longer ones are truncated."""
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
        for task in self.tasks:
            if len(list(filter(None, task.split("/")))) < (3 if self.own is None else 2):
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
        data, base, expert = _named(config, task)
        if config.own is None:
            pretrained = is_pretrained(data, base, str(expert))
        else:
            images = fitting_modality(MODALITY, dict(config.own.columns)) == "image"
            pretrained = images and is_checkpoint(config.model(base)) and is_checkpoint(str(expert))
        arms = [
            Arm(name, variant.role, functools.partial(program, config, variant), variant.label)
            for name, variant in VARIANTS.items()
            if not (variant.seen and pretrained)  # their training data are not all here
        ]
        name = task.replace("/", "-")
        found.append(Group(name, METRIC, functools.partial(_load, config, data, base, expert), arms, curves=CURVES))
    return found


def _named(config: HybridStudy, task: str) -> tuple[str, str, str | None]:
    if config.own is None:
        data, base, expert = task.rsplit("/", 2)
        return data, base, expert
    data, base = task.rsplit("/", 1)
    return data, base, config.expert


class Loaded(NamedTuple):
    """What the arms of a group share.

    Attributes:
      pair: the networks and the rows.
      seen: what the networks, as they were given, say of the rows of a set; computed once for all arms and seeds.
    """

    pair: Pair
    seen: Callable[[str], HybridExamples]


def _load(config: HybridStudy, name: str, base: str, expert: str | None) -> Loaded:
    given = config.data(name, MODALITY)
    if config.own is not None:
        base = config.model(base)
        expert = expert or _OWN_EXPERT[given.modality]
    pair = load_pair(config, given, base, str(expert))
    return Loaded(pair, seen_by(pair))


# The arms


def program(study: HybridStudy, variant: Variant, loaded: Loaded) -> Program:
    """``effjax.hybrid`` in phases; an arm without a router has one step that does nothing, and its threshold."""
    pair = loaded.pair
    base = pair.base if variant.features else (lambda variables, x, *, key=None: pair.base(variables, x)[0])
    router = Router(**variant.router)
    networks = HybridNetworks(base, pair.expert, router)
    changes = dict(variant.options)
    if "rounds" in changes:
        changes["rounds"] = study.rounds
    learned = "train" if variant.seen else "held"
    held = pair.rows(learned)
    config = study.method(len(held[1]), **changes)
    need = _learned(router) if variant.rule is None else _RULE_OF[variant.rule]

    def seen(state: HybridState, name: str, stages: tuple[Stage, ...] = config.stages) -> HybridExamples:
        """The examples of a set after some stages: the base model runs again where one of them trained it."""
        found = loaded.seen(name)
        if "base" in stages:
            right = found.expert_correct
            return hybrid_examples(state, *pair.rows(name), networks, expert_correct=right)
        return found if variant.features else found._replace(features=None)

    def phase(place: int) -> Phase:
        stage, before = config.stages[place], config.stages[:place]
        data = held if stage == "router" else pair.rows("train")

        def aux(state: HybridState) -> Any:
            if stage == "router":
                return jax.tree.map(jnp.asarray, seen(state, learned, before))
            return hybrid_data(state, networks, held, data, config=config, stage=stage)

        return Phase(
            step=lambda state, batch, aux: hybrid_step(
                state, hybrid_batch(state, aux, config=config), networks, config=config, stage=stage
            ),
            steps=config.steps(stage, len(data[1])),
            leave=lambda state: hybrid_next(
                state, seen(state, "calibration", (*before, stage)), networks, config=config, stage=stage
            ),
            aux=aux,
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

    def infer(variables: PyTree, inputs: PyTree) -> jax.Array:
        state = variables["params"]
        logits, features = _with_features(base(state["base"], inputs))
        scores = need(_State(_Parts(state["router"]), None), _examples(logits, features))
        capacity = expert_capacity(len(logits), 1 - config.coverage, deviations=0.0, multiple=1)
        request = ~(scores <= state["threshold"])
        return dispatch_capacity(pair.expert, state["expert"], inputs, logits, request, capacity=capacity).outputs

    check_options(study.train, pair.task, accumulate=False, remat=False, dtype=False)
    return Program(
        task=pair.task._replace(infer=infer, example_inputs=jax.tree.map(lambda leaf: leaf[:64], pair.test[0])),
        init=lambda key: hybrid_init(key, networks, pair.params, pair.test[0], config=config),
        phases=(idle,) if variant.rule else tuple(map(phase, range(len(config.stages)))),
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
    row, params = jax.tree.map(lambda leaf: leaf[:1], pair.test[0]), state.params
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
