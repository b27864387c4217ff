"""The selective study: losses that rank predictions, and thresholds that keep what they promise."""

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.errors import Count, Fraction, NoEffectWarning, NotNegative, Positive, Rate, Share
from effjax.core.shapes import pad_to
from effjax.core.tree import wide
from effjax.data.sets import DataSet, load
from effjax.data.splits import fixed_rows
from effjax.hardness.abstention_losses import gamblers_loss, sat_init, sat_loss, sat_update, selectivenet_loss
from effjax.hardness.confidence import confidence_score, prediction_errors
from effjax.hardness.osp import osp_loss, osp_terms
from effjax.hardness.osp_saddle import OspSaddle, OspSaddleConfig, osp_saddle_init, osp_saddle_step
from effjax.hardness.risk_coverage import (
    augrc,
    aurc,
    coverage_at_joint_error,
    excess_aurc,
    selective_risk_at_coverage,
)
from effjax.hardness.selective import selective
from effjax.hardness.thresholds import calibration_examples
from effjax.models.mlp import MLP
from effjax.models.resnet import pretrained_resnet
from effjax.recipes.images import named_image_task
from effjax.recipes.spec import Arm, Claim, CurveText, Group, Role, StudyConfig
from effjax.recipes.streams import STREAM_CURVES, check_rounds, stream_measures
from effjax.tasks.image import image_task, standardised, unit_images
from effjax.tasks.task import Metric, Task
from effjax.train.loaders import column_loader
from effjax.train.program import Curve, Loader, Phase, Program
from effjax.train.trainer import TrainState, check_options, supervised

PyTree = Any
MODALITY, OWN_PRESET = "image", "own"
METRIC = Metric("aurc", "min", "test AURC")
EVAL_BATCH = 256
_AXES = ("coverage (share that is answered)", "selective risk (wrong share of the answered)")
CURVES = {
    "risk_coverage": CurveText("Ranked by the largest probability", *_AXES),
    "own_risk_coverage": CurveText("Ranked by the arm's own selector", *_AXES),
}
PRETRAINED, LINEAR = "pretrained-", "linear"
COVERAGES = np.linspace(0.05, 1.0, 20)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveStudy(StudyConfig):
    """Config of the selective study."""

    tasks: tuple[str, ...] = ("fashion_mnist/mlp-64",)
    """Data set and model: fashion_mnist/mlp-64 (one hidden layer of 64), cifar10/resnet20, ...; pretrained-resnet20
    trains a linear layer on the features of that network, and holds out test images, as it has seen the others."""
    pool: Count = 2
    """Pixels along each side that are averaged to one."""
    train_rows: Count | None = None
    """Images trained on; all that are not held out when None."""
    calibration_rows: Count | None = 4000
    """Training images (with pretrained networks test images) held out for the thresholds; no arm trains on them. A
    fifth of them when None."""
    test_rows: Count | None = None
    """Test images used; all when None."""
    batch_size: Count = 128
    """Examples of one step."""
    learning_rate: Positive = 2e-3
    """Learning rate of AdamW."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How the learning rate goes on; cosine ends at 0."""
    weight_decay: NotNegative = 1e-4
    """Weight decay of AdamW; levels and multipliers have none."""
    prices: tuple[NotNegative, ...] = (0.0, 1.0, 10.0, 30.0)
    """Prices mu of false positives in one-sided prediction, one arm each; 0 is the control."""
    saddle_price: Positive = 1.0
    """Price mu of the saddle form."""
    saddle_rate: Positive = 1e-3
    """Learning rate of the multipliers."""
    reward: Positive = 2.2
    """Reward of Deep Gamblers."""
    momentum: Share = 0.9
    """Momentum of the targets of self-adaptive training."""
    entropy: NotNegative = 0.01
    """Weight of the mean entropy in SAT+EM."""
    first_share: Fraction = 0.5
    """Share of the run that Deep Gamblers and self-adaptive training begin with the cross-entropy."""
    coverage: Share = 0.8
    """Coverage that SelectiveNet is trained for."""
    smoothing: Share = 0.1
    """Label smoothing of the control."""
    joint_errors: tuple[Share, ...] = (0.005, 0.01, 0.02)
    """Joint errors at which coverages are reported."""
    delta: Share = 0.05
    """Most probability that a certified threshold exceeds its target."""
    stream_rounds: Count | None = None
    """Test images that the online learner plays, seeing labels only where it abstains; no stream when None."""
    tolerances: tuple[Rate, ...] = (0.0, 0.005, 0.01, 0.02, 0.05)
    """Rates of observed mistakes that the online learner tolerates in a threshold, ascending."""

    def __post_init__(self):
        super().__post_init__()
        if list(self.tolerances) != sorted(set(self.tolerances)) or len(self.tolerances) < 2:
            raise ValueError(f"tolerances={self.tolerances} must be two or more rates in ascending order.")
        if self.calibration_rows is not None:
            self.check_calibration(self.calibration_rows)

    def check_calibration(self, rows: int) -> None:
        """Refuse to hold out fewer rows than the least joint error needs."""
        needs = {error: self.needed(error) for error in self.joint_errors}
        least = min(self.joint_errors)
        if rows >= needs[least]:
            return
        within = [f"{error:g}" for error, needed in sorted(needs.items()) if needed <= rows]
        other = f"{' '.join(within)}" if within else f"{math.ceil(100 * (1 - self.delta ** (1 / rows))) / 100:g}"
        raise ValueError(
            f"calibration_rows={rows} cannot certify joint_errors of {least:g} with delta={self.delta:g}: "
            f"{needs[least]} are needed at least. Hold out more, or give joint_errors={other}."
        )

    def needed(self, error: float) -> int:
        """The least rows that a joint error needs."""
        return calibration_examples(error, delta=self.delta, measure="joint_error")


def claims(config: SelectiveStudy) -> dict[str, tuple[Claim, ...]]:
    """What the method file asks for, and what its critics do."""
    prices = sorted(price for price in config.prices if price > 0)
    if not prices:
        return {}
    best = f"osp-{prices[-1]:g}"
    certified = f"coverage_ltt_{config.joint_errors[-1]:g}"
    own = "the largest probability ranks better than the arm's own selector"
    direct = f"osp-{config.saddle_price:g}"
    found = [
        Claim(best, "<=", "ce", plus=-0.002),
        *(
            Claim(f"osp-{high:g}", "<=", f"osp-{low:g}", why="the ranking improves with mu")
            for low, high in itertools.pairwise(prices)
        ),
        Claim(best, ">=", "ce", of=certified, why="coverage at a certified joint error"),
        Claim(best, "<=", "best gamblers|sat|sat-em|selectivenet"),
        Claim(best, "<=", "smoothed", why="the price does what softer labels do not"),
        Claim(best, "<=", "ce", of="step_ms", times=1.1),
        Claim("osp-saddle", "<=", direct, times=1.02, why="the saddle form ends where the direct form does"),
        *(Claim(arm, "<=", arm, than_of=("aurc_own",), why=own) for arm in ("gamblers", "sat", "selectivenet")),
    ]
    if 0.0 in config.prices:
        found.append(Claim(best, "<=", "osp-0", why="it is the price, not the balance over classes"))
    return {"*": tuple(found)}


def groups(config: SelectiveStudy) -> list[Group]:
    """Every task."""
    return [
        Group(
            name.replace("/", "-"),
            METRIC,
            functools.partial(_load, config, name),
            list(_arms(config)),
            curves=CURVES if config.stream_rounds is None else CURVES | STREAM_CURVES,
        )
        for name in config.tasks
    ]


def _arms(config: SelectiveStudy) -> Iterator[Arm]:
    def arm(name: str, role: Role, label: str, build: Callable[..., Program], **options: Any) -> Arm:
        return Arm(name, role, functools.partial(build, config, **options), label)

    yield arm("ce", "baseline", "cross-entropy", _trained, loss=_cross_entropy)
    for price in config.prices:
        role: Role = "method" if price else "control"
        loss = functools.partial(_osp, price)
        yield arm(f"osp-{price:g}", role, f"one-sided prediction, mu = {price:g}", _trained, loss=loss, whole=True)
    yield arm("osp-saddle", "method", f"one-sided prediction, saddle form, mu = {config.saddle_price:g}", _saddle)
    yield arm("gamblers", "alternative", f"Deep Gamblers, reward {config.reward:g}", _gamblers)
    yield arm("sat", "alternative", "self-adaptive training", _sat, entropy=0.0)
    yield arm(
        "sat-em", "alternative", f"self-adaptive training, entropy {config.entropy:g}", _sat, entropy=config.entropy
    )
    yield arm("selectivenet", "alternative", f"SelectiveNet, coverage {config.coverage:g}", _selectivenet)
    smoothed = functools.partial(_cross_entropy, smoothing=config.smoothing)
    yield arm("smoothed", "control", f"cross-entropy, label smoothing {config.smoothing:g}", _trained, loss=smoothed)


# The task


class _Shared(NamedTuple):
    """What the arms of a group share.

    Attributes:
      task: with as many outputs as classes.
      wider: ``n -> task`` with n more outputs.
      calibration: the columns that are held out.
    """

    task: Task
    wider: Callable[[int], Task]
    calibration: Mapping[str, np.ndarray]


def _load(config: SelectiveStudy, name: str) -> _Shared:
    data, _, model = name.partition("/")
    network = model.removeprefix(PRETRAINED) if config.own is None and model.startswith(PRETRAINED) else None
    # The training images are what pretrained networks have seen: thresholds need others.
    split = "test" if network else "train"
    data, model = config.data(data, MODALITY), config.model(model)
    data = load(data) if isinstance(data, str) else data
    if network and (config.pool > 1 or data.name != "cifar10"):
        raise ValueError(
            f"tasks={name!r} with pool={config.pool}: the pretrained networks take the images of cifar10 with pool=1."
        )
    parts = {part: _pooled(data.splits[part], config.pool) for part in ("train", "test")}
    rows = len(parts[split]["label"])
    count = max(1, round(rows / 5)) if config.calibration_rows is None else config.calibration_rows
    if count >= rows:
        of = "training images to train on" if split == "train" else "test images to report on"
        raise ValueError(f"calibration_rows={count} leaves none of the {rows} {of}. Hold out fewer.")
    config.check_calibration(count)
    held = fixed_rows("calibration_rows", count, rows)
    parts["held"] = _rows(parts[split], held)
    parts[split] = _rows(parts[split], np.setdiff1d(np.arange(rows), held))
    parts["train"] = _rows(parts["train"], fixed_rows("train_rows", config.train_rows, len(parts["train"]["label"])))
    if network:
        features = _features(data, network)
        parts = {part: {**columns, "image": features(columns["image"])} for part, columns in parts.items()}
        data, model = dataclasses.replace(data, name=f"{data.name} by {network}"), LINEAR
    calibration = parts.pop("held")
    data = dataclasses.replace(data, splits={**data.splits, **parts})
    wider = functools.cache(functools.partial(_task, config, data, model))
    check_rounds(config.stream_rounds or 0, wider(0).test["label"])
    return _Shared(wider(0), wider, calibration)


def _rows(columns: Mapping[str, Any], chosen: np.ndarray) -> dict[str, np.ndarray]:
    return {column: np.asarray(values)[chosen] for column, values in columns.items()}


def _features(data: DataSet, network: str) -> Callable[[np.ndarray], np.ndarray]:
    """``images -> [rows, 1, 1, features]``, as a pretrained network's last layer has them."""
    module, variables = pretrained_resnet(network)
    details = image_task(data, network, test_rows=1, train_rows=1).details

    @jax.jit
    def last(images: jax.Array) -> jax.Array:
        x = standardised(unit_images(images), details)
        return list(module.apply(variables, x, train=False, capture=True)[1].values())[-1]

    return lambda images: _in_batches(last, images)[:, None, None, :]


def _task(config: SelectiveStudy, data: DataSet, model: str, more: int) -> Task:
    wide_data = dataclasses.replace(data, classes=(*data.classes, *(f"output {i}" for i in range(more))))
    options = {"test_rows": config.test_rows, "eval_batch": EVAL_BATCH}
    if model == LINEAR:
        module = MLP((), classes=len(wide_data.classes), dtype=jnp.dtype(config.train.dtype))
        task = image_task(wide_data, module, **options)
    else:
        task = named_image_task(wide_data, model, config.train, **options)
    train = {**task.train, "index": np.arange(len(task.train["label"]), dtype=np.int32)}
    return task._replace(metric=METRIC, train=train, classes=len(data.classes))


def _pooled(columns: Mapping[str, Any], pool: int) -> dict[str, Any]:
    images = np.asarray(columns["image"])
    if pool == 1:
        return dict(columns)
    n, height, width, channels = images.shape
    if height % pool or width % pool:
        raise ValueError(f"pool={pool} does not divide images of {height} x {width}. Use 1, or a divisor of both.")
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    blocks = images.reshape(n, height // pool, pool, width // pool, pool, channels)
    return {**columns, "image": blocks.mean((2, 4), np.float32) / np.float32(scale)}


def _outputs(
    task: Task, variables: PyTree, batch: PyTree, key: jax.Array | None, train: bool
) -> tuple[jax.Array, PyTree]:
    """The network's outputs on a batch, and its collections afterwards."""
    images, held = batch["image"], {name: leaf for name, leaf in variables.items() if name != "selective"}
    inputs = standardised(unit_images(images), task.details)
    rngs = None if key is None else {"dropout": key}
    mutable = [name for name in held if name != "params"]
    logits, changed = task.module.apply(held, inputs, train=train, rngs=rngs, mutable=mutable)
    return wide(logits), changed


# Training


def _trained(
    config: SelectiveStudy,
    shared: _Shared,
    *,
    loss: Callable[..., Any],
    more: int = 0,
    state: Callable[[Task], PyTree] | None = None,
    whole: bool = False,
    own: Callable[[jax.Array], jax.Array] | None = None,
) -> Program:
    """Ordinary training.

    Args:
      config: of the study.
      shared: by the arms.
      loss: ``(outputs, batch, selective) -> (loss, selective)``, the last being what ``state`` made.
      more: outputs beyond the classes.
      state: ``task -> tree`` that is trained along.
      whole: whether the loss is no mean over rows.
      own: ``outputs -> [rows]``, the arm's own selector.
    """
    task = shared.wider(more)
    check_options(config.train, task, accumulate=not whole)
    steps, loader = _batches(config, task)

    def init(key: jax.Array) -> PyTree:
        variables = dict(task.init(key))
        return variables if state is None else {**variables, "selective": state(task)}

    def of_batch(variables: PyTree, batch: PyTree, key: jax.Array | None = None, *, train: bool = True) -> Any:
        outputs, changed = _outputs(task, variables, batch, key, train)
        value, held = loss(outputs, batch, variables.get("selective"))
        return value, (changed if held is None else {**changed, "selective": held}, {"loss": value})

    program = supervised(
        task._replace(init=init, loss=of_batch), _adamw(config, steps), steps=steps, loader=loader, options=config.train
    )
    return _judged(config, shared, task, program, own)


def _saddle(config: SelectiveStudy, shared: _Shared) -> Program:
    """One-sided prediction by ``osp_saddle_step``."""
    task = shared.task
    check_options(config.train, task, accumulate=False)
    steps, loader = _batches(config, task)
    saddle = OspSaddleConfig(mu=config.saddle_price, classes=_classes(task), dual=optax.adam(config.saddle_rate))
    tx = optax.partition(
        {"network": _adamw(config, steps), "levels": optax.adam(config.learning_rate)}, ("network", "levels")
    )

    def init(key: jax.Array) -> TrainState:
        return TrainState.start(task.init(key), lambda params: osp_saddle_init(params, tx=tx, config=saddle)[1:], key)

    def step(state: TrainState, batch: Any, aux: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        outputs = lambda params: _outputs(task, {"params": params, **state.model}, batch, state.step_key, True)
        terms = lambda params: osp_terms(outputs(params)[0], batch["label"])
        after, value = osp_saddle_step(OspSaddle(state.params, *state.opt), terms, tx=tx, config=saddle)
        # The same forward pass as the step's first, which the compiler computes once.
        return state.after(after.params, outputs(state.params)[1], after[1:]), {"loss": value}

    program = Program(task, init, (Phase(step, steps),), lambda state: state.variables, loader)
    return _judged(config, shared, task, program)


def _gamblers(config: SelectiveStudy, shared: _Shared) -> Program:
    def loss(outputs: jax.Array, batch: PyTree, held: PyTree) -> tuple[jax.Array, PyTree]:
        first, _ = _cross_entropy(outputs[:, :-1], batch, None)
        value = gamblers_loss(outputs, batch["label"], config.reward)
        return jnp.where(held["step"] < held["first"], first, value), {**held, "step": held["step"] + 1}

    own = lambda outputs: confidence_score(outputs, "abstain_logit")
    return _trained(config, shared, loss=loss, more=1, state=functools.partial(_counted, config), own=own)


def _sat(config: SelectiveStudy, shared: _Shared, *, entropy: float) -> Program:
    def loss(outputs: jax.Array, batch: PyTree, held: PyTree) -> tuple[jax.Array, PyTree]:
        early = held["step"] < held["first"]
        table = jnp.where(
            early, held["table"], sat_update(held["table"], batch["index"], outputs, momentum=config.momentum)
        )
        first, _ = _cross_entropy(outputs[:, :-1], batch, None)
        value = jnp.where(early, first, sat_loss(table, batch["index"], outputs, batch["label"]))
        value = value - entropy * jnp.mean(confidence_score(outputs[:, :-1], "negative_entropy"))
        return value, {**held, "step": held["step"] + 1, "table": table}

    def state(task: Task) -> PyTree:
        return {**_counted(config, task), "table": sat_init(task.train["label"], _classes(task))}

    own = lambda outputs: confidence_score(outputs, "abstain_logit")
    return _trained(config, shared, loss=loss, more=1, state=state, whole=True, own=own)


def _selectivenet(config: SelectiveStudy, shared: _Shared) -> Program:
    """Its three heads are parts of one linear layer."""
    classes = _classes(shared.task)

    def loss(outputs: jax.Array, batch: PyTree, held: PyTree) -> tuple[jax.Array, PyTree]:
        heads = outputs[:, :classes], outputs[:, classes:-1], outputs[:, -1]
        return selectivenet_loss(*heads, batch["label"], coverage=config.coverage), held

    return _trained(config, shared, loss=loss, more=classes + 1, whole=True, own=lambda outputs: outputs[:, -1])


def _cross_entropy(outputs: jax.Array, batch: PyTree, held: PyTree, smoothing: float = 0.0) -> tuple[jax.Array, PyTree]:
    targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], outputs.shape[1]), smoothing)
    return optax.softmax_cross_entropy(outputs, targets).mean(), held


def _osp(price: float, outputs: jax.Array, batch: PyTree, held: PyTree) -> tuple[jax.Array, PyTree]:
    return osp_loss(outputs, batch["label"], price), held


def _counted(config: SelectiveStudy, task: Task) -> PyTree:
    """The step, and the first one that is not of the cross-entropy."""
    steps, _ = _batches(config, task)
    return {"step": jnp.int32(0), "first": jnp.int32(config.first_share * steps)}


def _batches(config: SelectiveStudy, task: Task) -> tuple[int, Loader]:
    loader = column_loader(task.train, config.batch_size)
    return config.budget.steps(config.batch_size, loader.epoch_steps), loader


def _adamw(config: SelectiveStudy, steps: int) -> optax.GradientTransformation:
    rate = config.learning_rate
    falling = optax.cosine_decay_schedule(rate, steps) if config.schedule == "cosine" else rate
    return optax.adamw(falling, weight_decay=config.weight_decay)


def _classes(task: Task) -> int:
    assert task.classes is not None
    return task.classes


# Judging


def _judged(
    config: SelectiveStudy,
    shared: _Shared,
    task: Task,
    program: Program,
    own: Callable[[jax.Array], jax.Array] | None = None,
) -> Program:
    """The program with the study's measures; the rule of all arms is the largest probability over the classes."""
    classes = _classes(task)
    outputs = jax.jit(lambda variables, images: task.infer(_network(variables), images))

    def evaluate(state: PyTree) -> dict[str, Any]:
        variables = program.params(state)
        of = functools.partial(outputs, variables)
        test, held = _in_batches(of, task.test["image"]), _in_batches(of, shared.calibration["image"])
        found = _measures(config, test[:, :classes], task.test["label"])
        found |= _certified(
            config, (held[:, :classes], shared.calibration["label"]), (test[:, :classes], task.test["label"])
        )
        if config.stream_rounds is not None:
            found |= stream_measures(test[:, :classes], task.test["label"], config.stream_rounds, config.tolerances)
        if own is not None:
            errors, where = prediction_errors(test[:, :classes], task.test["label"])
            selector = own(jnp.asarray(test))
            found |= {"aurc_own": _ranking(selector, errors, where, targets=())["aurc"]}
            found |= {"own_risk_coverage": _risk_coverage(selector, errors, where)}
        return found

    plain = shared.task._replace(infer=lambda variables, images: task.infer(_network(variables), images)[:, :classes])
    return program._replace(task=plain, evaluate=evaluate)


def _network(variables: PyTree) -> PyTree:
    return {name: leaf for name, leaf in variables.items() if name != "selective"}


def _in_batches(function: Callable[[Any], jax.Array], images: np.ndarray) -> np.ndarray:
    starts = range(0, len(images), EVAL_BATCH)
    parts = [function(pad_to(images[at : at + EVAL_BATCH], EVAL_BATCH)) for at in starts]
    return np.concatenate(jax.device_get(parts))[: len(images)]


def _measures(config: SelectiveStudy, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What the ranking of the test images is worth."""
    errors, where = prediction_errors(logits, labels)
    confidence = confidence_score(logits)
    found = _ranking(confidence, errors, where, targets=tuple(map(float, config.joint_errors)))
    accuracy = 1 - (errors & where).sum() / where.sum()  # of known labels
    return {"accuracy": accuracy, **found, "risk_coverage": _risk_coverage(confidence, errors, where)}


@functools.partial(jax.jit, static_argnames="targets")
def _ranking(
    confidence: jax.Array, errors: jax.Array, where: jax.Array, *, targets: tuple[float, ...]
) -> dict[str, jax.Array]:
    measures = {"aurc": aurc, "eaurc": excess_aurc, "augrc": augrc}
    found = {name: measure(confidence, errors, where=where) for name, measure in measures.items()}
    at = lambda target: coverage_at_joint_error(confidence, errors, target, where=where)
    return found | {f"coverage_{target:g}": at(target) for target in targets}


@jax.jit
def _risks(confidence: jax.Array, errors: jax.Array, where: jax.Array) -> jax.Array:
    risk = lambda coverage: selective_risk_at_coverage(confidence, errors, coverage, where=where)
    return jax.vmap(risk)(jnp.asarray(COVERAGES, jnp.float32))


def _risk_coverage(confidence: jax.Array, errors: jax.Array, where: jax.Array) -> Curve:
    return Curve(COVERAGES, jax.device_get(_risks(confidence, errors, where)))


def _certified(config: SelectiveStudy, held: tuple[Any, Any], test: tuple[Any, Any]) -> dict[str, Any]:
    """What thresholds from the held-out images do on the test images."""
    found = {}
    for target in config.joint_errors:
        for method in ("ltt", "search"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NoEffectWarning)  # a rule that never predicts has coverage 0
                delta = float(config.delta) if method == "ltt" else None
                rule = selective(*held, joint_error=float(target), method=method, delta=delta)
            measured = rule.measure(*test)
            found[f"coverage_{method}_{target:g}"] = measured.coverage
            found[f"joint_error_{method}_{target:g}"] = measured.joint_error
    return found
