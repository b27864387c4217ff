"""The DiSK study: a scaffolded student against plain training and other distillation, in equal steps of the student.

The teacher is trained, or loaded, once for all arms; what they read of it are columns of the training data.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.errors import Count, NotNegative, Positive, Share
from effjax.core.shapes import pad_to
from effjax.data.sets import DataSet, load
from effjax.hardness.disk import DiskProblem, DiskState, disk_init, disk_next, disk_step
from effjax.hardness.disk_config import DiskConfig, disk_passes
from effjax.hardness.disk_losses import TopLogits, disk_loss, top_logits
from effjax.hardness.distillation import dist_loss, dkd_loss, kd_loss
from effjax.hardness.guides import FeatureGuide
from effjax.models.resnet import SIZES, pretrained_resnet
from effjax.recipes.images import class_measures, cross_entropies, logits_of, named_image_task, smaller_images
from effjax.recipes.spec import Arm, Claim, Group, Role, StudyConfig
from effjax.tasks.image import standardised, unit_images
from effjax.tasks.task import Metric, Task
from effjax.train.grad import all_finite
from effjax.train.loaders import column_loader
from effjax.train.loop import fit
from effjax.train.program import Loader, Phase, Program
from effjax.train.trainer import TrainState, check_options, supervised

MODALITY = "image"
Loss = Callable[[jax.Array, Mapping[str, jax.Array], jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiskStudy(StudyConfig):
    """Config of the DiSK study."""

    tasks: tuple[str, ...] = ("fashion_mnist/mlp-3", "fashion_mnist/mlp-6")
    """Data set and student: fashion_mnist/mlp-3 (one layer of 3), cifar10/resnet-8-16-32-64 (a block per stage), ..."""
    teacher: str = "mlp-256"
    """The teacher: a model that is trained first, as mlp-256; or resnet20 to resnet56, whose published weights for
    CIFAR-10 are loaded."""
    teacher_epochs: Count = 12
    """Passes over the data that train the teacher."""
    teacher_rate: Positive = 1e-3
    """Initial learning rate of the teacher's Adam, which falls linearly to 0."""
    shrink: Count = 1
    """Factor by which the images' height and width are reduced, by means of blocks."""
    batch_size: Count = 100
    """Examples of one step."""
    train_rows: Count | None = None
    """Number of training images; all when None."""
    test_rows: Count | None = None
    """Number of test images; all when None."""
    rounds: Count = 12
    """Rounds of a run, after which the guide's schedules move on."""
    learning_rate: Positive = 3e-3
    """Learning rate of the student's Adam, and of the guide's."""
    k: Count = 3
    """Classes that the guide lifts."""
    temperature: Positive = 2.0
    """Temperature of teacher and student."""
    distil_weight: Share = 0.9
    """Weight of the distillation of KD and DiSK; the labels have the rest."""
    help: tuple[Positive, Positive] = (0.6, 0.3)
    """Help that may be spent, at the start and at the end of a run."""
    price: tuple[NotNegative, NotNegative] = (1.0, 10.0)
    """Price of help beyond the budget, at the start and at the end of a run, in the arms without a multiplier."""
    dkd_beta: Positive = 8.0
    """Weight of decoupled distillation's second term."""

    def __post_init__(self):
        super().__post_init__()
        for task in self.tasks:
            if task.count("/") != 1:
                raise ValueError(f"tasks={task!r} must be DATA/STUDENT, such as 'fashion_mnist/mlp-3'.")


_METRIC = Metric("accuracy", "max", "test accuracy")

CLAIMS = {
    "*": (
        Claim("disk", ">=", "kd", plus=0.005),
        Claim("disk-cosine", ">=", "kd", plus=0.005, why="by the price of the release"),
        Claim("disk", ">=", "support", why="the guide does it, not the support"),
        Claim("disk", ">=", "ce"),
        Claim("disk-best", ">=", "disk", plus=-0.005, why="a guide in closed form will do"),
        Claim("disk-best", "<=", "disk", of="step_ms", why="and it costs no network"),
        Claim("disk-cached", "<=", "disk", of="step_ms", why="what the teacher's cache saves"),
    ),
}


def groups(config: DiskStudy) -> list[Group]:
    """One for each student."""
    return [
        Group(name.replace("/", "-"), _METRIC, functools.partial(_load, config, name), list(_arms(config)))
        for name in config.tasks
    ]


# The data and the teacher


def _load(config: DiskStudy, name: str) -> Task:
    data_name, student = name.split("/")
    data, student = config.data(data_name, MODALITY), config.model(student)
    data = load(data) if isinstance(data, str) else data
    if config.shrink > 1:
        data = smaller_images(data, config.shrink)
    make = functools.partial(
        named_image_task, data, train=config.train, train_rows=config.train_rows, test_rows=config.test_rows
    )
    task = make(student)
    teacher, variables = _teacher(config, data, make)
    columns, infer = _taught(teacher, variables, task.train["image"])
    return task._replace(
        train={**task.train, **columns},
        evaluate=class_measures(task),
        details={**task.details, "teacher": infer},
    )


def _teacher(config: DiskStudy, data: DataSet, make: Callable[[str], Task]) -> tuple[Task, Mapping[str, Any]]:
    """The teacher's task and variables."""
    if config.teacher in SIZES:
        module, variables = pretrained_resnet(config.teacher, dtype=jnp.dtype(config.train.dtype))
        return make(config.teacher)._replace(module=module), variables
    task = make(config.teacher)
    loader = column_loader(task.train, config.batch_size)
    steps = config.teacher_epochs * len(task.train["label"]) // config.batch_size
    tx = optax.adam(optax.linear_schedule(config.teacher_rate, 0.0, steps))
    fitted: Any = fit(supervised(task, tx, steps=steps, loader=loader), seed=0)
    return task, fitted.state.variables


def _taught(
    task: Task, variables: Mapping[str, Any], images: np.ndarray, size: int = 256
) -> tuple[dict[str, np.ndarray], Callable[[jax.Array], tuple[jax.Array, jax.Array]]]:
    """The teacher's logits and features of every training image, and the function that gives them of a batch."""
    variables = jax.tree.map(jnp.asarray, dict(variables))

    def infer(batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, layers = task.module.apply(variables, standardised(unit_images(batch), task.details), capture=True)
        *_, features = layers.values()
        return logits, features.reshape(features.shape[0], -1)

    run, parts = jax.jit(infer), []
    for start in range(0, len(images), size):
        parts.append(jax.device_get(run(pad_to(images[start : start + size], size))))
    logits, features = (np.concatenate(column)[: len(images)].astype(np.float32) for column in zip(*parts, strict=True))
    return {"teacher_logits": logits, "teacher_features": features}, infer


# The arms


def _arms(config: DiskStudy) -> Iterator[Arm]:
    weight, temperature = config.distil_weight, config.temperature

    def arm(name: str, role: Role, label: str, loss: Loss) -> Arm:
        return Arm(name, role, functools.partial(_trained, config, loss), label)

    def mixed(distil: Callable[..., jax.Array]) -> Loss:
        return lambda logits, batch, warm: (1 - weight) * _ce(logits, batch) + weight * distil(logits, batch)

    def support(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        none = jnp.full(logits.shape[:1], -jnp.inf)
        temperatures = {"student_temperature": temperature, "teacher_temperature": temperature}
        return disk_loss(logits, batch["teacher_logits"], batch["label"], none, k=config.k, **temperatures)

    def dkd(logits: jax.Array, batch: Mapping[str, jax.Array], warm: jax.Array) -> jax.Array:
        loss = dkd_loss(logits, batch["teacher_logits"], batch["label"], beta=config.dkd_beta, temperature=temperature)
        return _ce(logits, batch) + warm * loss

    def dist(logits: jax.Array, batch: Mapping[str, jax.Array], warm: jax.Array) -> jax.Array:
        loss = dist_loss(
            logits, batch["teacher_logits"], temperature=temperature, between_classes=2.0, within_classes=2.0
        )
        return _ce(logits, batch) + loss

    yield arm("ce", "baseline", "labels alone", lambda logits, batch, warm: _ce(logits, batch))
    plain = mixed(lambda logits, batch: kd_loss(logits, batch["teacher_logits"], temperature=temperature))
    yield arm("kd", "baseline", "knowledge distillation", plain)
    yield arm("dkd", "alternative", "decoupled distillation", dkd)
    yield arm("dist", "alternative", "DIST", dist)
    yield arm("support", "control", "DiSK without help", mixed(support))

    def scaffolded(name: str, role: Role, label: str, cached: bool = False, **fields: Any) -> Arm:
        return Arm(name, role, functools.partial(_scaffolded, config, cached, fields), label)

    yield scaffolded("disk", "method", "DiSK, multiplier by DCL")
    yield scaffolded("disk-cached", "method", "DiSK, teacher's outputs kept", cached=True)
    yield scaffolded("disk-cosine", "method", "DiSK, price by a cosine", price=config.price, normaliser="none")
    yield scaffolded("disk-separate", "method", "DiSK, separate passes", order="separate")
    paper = {"order": "joint", "target": "label", "over": "all", "clamp": None, "price": config.price}
    yield scaffolded("disk-paper", "method", "DiSK, one loss (as in the paper)", normaliser="none", **paper)
    yield scaffolded("disk-best", "method", "DiSK, best guide of every batch", cached=True, order="best")


def _ce(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    return cross_entropies(logits, batch["label"]).mean()


def _batches(config: DiskStudy, task: Task, *unused: str) -> tuple[Loader, int]:
    """The loader, without columns that the arm does not read, and the student's steps."""
    columns = {name: column for name, column in task.train.items() if name not in unused}
    loader = column_loader(columns, config.batch_size)
    return loader, config.budget.steps(config.batch_size, loader.epoch_steps)


def _trained(config: DiskStudy, loss: Loss, task: Task) -> Program:
    """One network by one loss, from the teacher's kept logits."""
    check_options(config.train, task, accumulate=False)
    loader, steps = _batches(config, task, "teacher_features")
    network, tx = logits_of(task), optax.adam(config.learning_rate)

    def objective(params: Any, state: TrainState, batch: Any) -> tuple[jax.Array, Any]:
        images = unit_images(batch["image"])
        logits, model = network({**state.variables, "params": params}, images, True, state.step_key)
        # Decoupled distillation warms up over the first eighth of a run.
        warm = jnp.minimum(1.0, (state.step + 1) / max(1, steps // 8))
        return loss(logits, batch, warm), model

    def step(state: TrainState, batch: Any, aux: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        (value, model), grads = jax.value_and_grad(objective, has_aux=True)(state.params, state, batch)
        updates, opt = tx.update(grads, state.opt, state.params)
        metrics = {"loss": value}
        if config.train.nonfinite == "skip":
            metrics["sound"] = all_finite(grads)
        return state.after(optax.apply_updates(state.params, updates), model, opt), metrics

    return Program(
        task=task,
        init=lambda key: TrainState.start(task.init(key), tx.init, key),
        phases=(Phase(step, steps),),
        params=lambda state: state.variables,
        loader=loader,
        train_metrics=lambda means: {"train_loss": means["loss"]},
    )


def _scaffolded(config: DiskStudy, cached: bool, fields: Mapping[str, Any], task: Task) -> Program:
    """DiSK by its public functions: a round is one phase, or one for each of its passes."""
    check_options(config.train, task, accumulate=False)
    kept = ("teacher_features",) if cached else ()
    train = _with_cache(config, task) if cached else task
    loader, steps = _batches(config, train, *({"teacher_logits", "teacher_features"} - set(kept)))
    rounds = min(config.rounds, steps)
    chosen: dict[str, Any] = {
        "tx": optax.adam(config.learning_rate),
        "epochs": rounds,
        "k": config.k,
        "student_temperature": config.temperature,
        "teacher_temperature": config.temperature,
        "distil_weight": config.distil_weight,
        "label_weight": 1.0 - config.distil_weight,
        "budget": config.help,
        **fields,
    }
    settings, guide = DiskConfig(**chosen), FeatureGuide()
    network, features = logits_of(task), task.train["teacher_features"].shape[1]

    def taught(batch: Mapping[str, jax.Array]) -> tuple[Any, jax.Array]:
        if not cached:
            return task.details["teacher"](batch["image"])
        return TopLogits(*(batch[f"teacher_{name}"] for name in TopLogits._fields)), batch["teacher_features"]

    def scaffold(variables: Mapping[str, Any], features: jax.Array, train: bool) -> tuple[jax.Array, dict[str, Any]]:
        return jnp.asarray(guide.apply(variables, features)), {}

    problem = DiskProblem(
        student=lambda v, batch, train, key: network(v, unit_images(batch["image"]), train, key),
        teacher=taught,
        guide=scaffold,
    )

    def init(key: jax.Array) -> DiskState:
        rest, draw = jax.random.split(key)
        return disk_init(rest, task.init(key), guide.init(draw, jnp.zeros((1, features))), settings)

    def stepper(name: Any) -> Callable[..., Any]:
        def step(state: DiskState, batch: Any, aux: Any) -> tuple[DiskState, dict[str, jax.Array]]:
            return disk_step(state, batch, problem, settings, step=name)

        return step

    steppers = {name: stepper(name) for name in sorted(set(disk_passes(settings, 0)))}
    phases: list[Phase] = []
    edges = [round(steps * index / rounds) for index in range(rounds + 1)]
    for number, (first, last) in enumerate(itertools.pairwise(edges)):
        passes = [Phase(steppers[name], last - first) for name in disk_passes(settings, number)]
        phases += [*passes[:-1], passes[-1]._replace(leave=disk_next)]

    def evaluate(state: DiskState) -> dict[str, float]:
        return {**task.evaluate(state.variables), "multiplier": float(state.dual.multipliers["help"])}

    return Program(
        task=task,
        init=init,
        phases=tuple(phases),
        params=lambda state: state.variables,
        loader=loader,
        evaluate=evaluate,
        trained=lambda state: (state.params, state.guide["params"]),
        train_metrics=lambda means: {"mean_guide": means["guide"], "mean_help": means["help"]},
    )


def _with_cache(config: DiskStudy, task: Task) -> Task:
    """The task whose columns hold what DiSK reads of the teacher, in place of a forward pass in every step."""
    top = top_logits(task.train["teacher_logits"], task.train["label"], config.k)
    columns = {f"teacher_{name}": np.asarray(column) for name, column in top._asdict().items()}
    return task._replace(train={**task.train, **columns})
