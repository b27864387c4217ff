"""The DCL study: stated levels against penalties of tuned weights, under label noise, few labels and a long tail.

Three settings. *noise*: a share of the training labels is drawn anew. *few*: a handful of clean training images.
*tail*: class k of K keeps a falling share of its images, and the test set stays balanced.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.errors import Count, Fraction, NotNegative, Positive, Share
from effjax.data.sets import DataSet, load
from effjax.data.splits import fixed_rows
from effjax.optim.constraints import (
    class_counts,
    class_risk,
    consistency_kl,
    guided_risk,
    marginal_kl,
    optimal_guide,
    prediction_entropy,
)
from effjax.optim.dcl import DclState, dcl, dcl_lagrangian, dcl_metrics
from effjax.optim.dual_ascent import Constraint, DclConfig, cyclic_level
from effjax.recipes.images import class_measures, cross_entropies, logits_of, named_image_task
from effjax.recipes.spec import Arm, Claim, Group, Role, StudyConfig
from effjax.tasks.image import unit_images
from effjax.tasks.task import Metric, Task
from effjax.train.grad import all_finite
from effjax.train.loaders import column_loader
from effjax.train.program import Phase, Program
from effjax.train.trainer import TrainState, check_options

MODALITY = "image"
Setting = Literal["noise", "few", "tail"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DclStudy(StudyConfig):
    """Config of the DCL study."""

    tasks: tuple[str, ...] = ("digits/mlp-128-128",)
    """Data set and model: digits/mlp-128-128, fashion_mnist/mlp-256, cifar10/resnet20, ..."""
    settings: tuple[Setting, ...] = ("noise", "few", "tail")
    """Noisy labels, few labels, or a long tail of classes."""
    batch_size: Count = 128
    """Examples of one step."""
    noise: Fraction = 0.3
    """Share of the training labels that are drawn anew, in the setting noise."""
    noise_rows: Count | None = 700
    """Number of training images, in the setting noise; all when None."""
    few_rows: Count = 200
    """Number of training images, in the setting few."""
    tail: Share = 0.05
    """Share of the last class's images that is kept, in the setting tail."""
    tail_rows: Count | None = None
    """Number of training images before the tail is cut, in the setting tail; all when None."""
    test_rows: Count | None = None
    """Number of test images; all when None."""
    learning_rate: Positive = 2e-3
    """Learning rate of Adam."""
    view: NotNegative = 0.25
    """Standard deviation of the Gaussian noise that makes the second view, in units of the brightest pixel."""
    levels: tuple[Positive, ...] = (0.3, 0.1, 0.03)
    """Levels of the consistency, in nats, one arm each."""
    weights: tuple[Positive, ...] = (0.3, 1.0, 3.0, 10.0)
    """Fixed weights of the consistency that a user would sweep."""
    entropy: Positive = 1.0
    """Least mean entropy of the predictions, in nats."""
    marginal: Positive = 0.01
    """Largest divergence of the predictions' marginal from the uniform one, in nats."""
    risk: Positive = 0.02
    """Largest mean loss of a class, in nats."""
    trimmed: tuple[Share, Share] = (0.5, 0.3)
    """Share of the batch with the largest losses that is left out, at the start and at the end of the run."""
    dual_rate: Positive = 0.05
    """Step size of the multipliers."""
    dual_decay: Share = 0.9
    """Forgetting factor of the violations' running mean."""

    def __post_init__(self):
        super().__post_init__()
        for task in self.tasks:
            if task.count("/") != 1:
                raise ValueError(f"tasks={task!r} must be DATA/MODEL, such as 'digits/mlp-128-128'.")
        if not self.view and set(self.settings) & {"noise", "few"}:
            raise ValueError("view=0.0 makes two equal views, and consistency means nothing. Give a positive number.")


_METRICS = {
    "noise": Metric("accuracy", "max", "test accuracy"),
    "few": Metric("accuracy", "max", "test accuracy"),
    "tail": Metric("worst_class", "max", "test accuracy of the worst class"),
}

_REACHED = "the constraint is met"
CLAIMS = {
    "*-noise": (
        Claim("dcl-0.1", ">=", "erm", plus=0.10),
        Claim("dcl-0.1", ">=", "augmented", plus=0.04),
        Claim("dcl-0.1", "<=", 0.05, of="violation", why=_REACHED),
        Claim("dcl-0.1", ">=", "best fixed-*", plus=-0.003, why="a level needs no tuning"),
        Claim("dcl-0.1", ">=", "smoothed"),
    ),
    "*-few": (Claim("dcl-0.03", ">=", "erm", plus=0.01), Claim("dcl-0.03", "<=", "erm", of="nll")),
    "*-tail": (
        Claim("marginal", ">=", "erm", plus=0.04),
        Claim("marginal", "<=", "erm", of="nll"),
        Claim("marginal", "<=", 0.05, of="violation", why=_REACHED),
        Claim("marginal", ">=", "adjusted"),
        Claim("risk", ">=", "erm"),
    ),
    "*": (
        Claim("dcl-0.1", "<=", "fixed-1", of="step_ms", times=1.1, why="what the multipliers cost"),
        Claim("marginal", "<=", "erm", of="step_ms", times=1.1, why="what a constraint on logits costs"),
    ),
}


def groups(config: DclStudy) -> list[Group]:
    """Every task in every setting."""
    return [
        Group(
            f"{name.replace('/', '-')}-{setting}",
            _METRICS[setting],
            functools.partial(_load, config, name, setting),
            list(_arms(config, setting)),
        )
        for name, setting in itertools.product(config.tasks, config.settings)
    ]


# The data


def _load(config: DclStudy, name: str, setting: str) -> Task:
    data_name, model = name.split("/")
    data, model = config.data(data_name, MODALITY), config.model(model)
    data = load(data) if isinstance(data, str) else data
    data = dataclasses.replace(data, splits={**data.splits, "train": _columns(config, data, setting)})
    task = named_image_task(data, model, config.train, test_rows=config.test_rows)
    # Compiled once for all arms.
    return task._replace(metric=_METRICS[setting], evaluate=class_measures(task))


def _columns(config: DclStudy, data: DataSet, setting: str) -> dict[str, np.ndarray]:
    columns = {name: np.asarray(data.splits["train"][name]) for name in ("image", "label")}
    wanted = {"noise": config.noise_rows, "few": config.few_rows, "tail": config.tail_rows}[setting]
    chosen = fixed_rows(f"{setting}_rows", wanted, len(columns["label"]))
    columns = {name: column[chosen] for name, column in columns.items()}
    if setting == "noise":
        columns["label"] = noisy_labels(columns["label"], len(data.classes), config.noise)
    if setting == "tail":
        kept = tail_rows(columns["label"], len(data.classes), config.tail)
        columns = {name: column[kept] for name, column in columns.items()}
    return columns


def noisy_labels(labels: np.ndarray, classes: int, share: float) -> np.ndarray:
    """Labels of which a share is drawn anew from the other classes, the same in every run."""
    draw = np.random.default_rng(0)
    hit = draw.permutation(len(labels))[: round(share * len(labels))]
    labels = labels.copy()
    labels[hit] = (labels[hit] + draw.integers(1, classes, len(hit))) % classes
    return labels


def tail_rows(labels: np.ndarray, classes: int, last: float) -> np.ndarray:
    """Rows of which class k keeps the share ``last ** (k / (K - 1))``, at least one each; the same in every run."""
    draw, kept = np.random.default_rng(0), []
    for label in range(classes):
        rows = draw.permutation(np.flatnonzero(labels == label))
        kept.append(rows[: max(1, round(len(rows) * last ** (label / max(1, classes - 1))))])
    return np.sort(np.concatenate(kept))


# The arms


class _Way(NamedTuple):
    """How an arm trains.

    Attributes:
      view: the images of the loss: ``clean``, or ``noisy`` for augmentation.
      limits: constraints of DCL, by the statistic's name.
      weights: fixed weights of statistics.
      smoothing: of the labels.
      adjust: add the logarithm of the class frequencies to the logits in training (Menon et al. 2021, ICLR).
      trimmed: leave the largest losses out.
    """

    view: str = "clean"
    limits: Mapping[str, Constraint] | None = None
    weights: Mapping[str, float] | None = None
    smoothing: float = 0.0
    adjust: bool = False
    trimmed: tuple[float, float] | None = None

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of what is measured."""
        return tuple({**(self.limits or {}), **(self.weights or {})})


def _arms(config: DclStudy, setting: str) -> Iterator[Arm]:
    def arm(name: str, role: Role, label: str, **way: Any) -> Arm:
        return Arm(name, role, functools.partial(_program, config, _Way(**way)), label)

    yield arm("erm", "baseline", "cross-entropy")
    if setting == "tail":
        yield arm("adjusted", "alternative", "logit adjustment", adjust=True)
        marginal = {"marginal": Constraint("<=", config.marginal)}
        yield arm("marginal", "method", f"DCL, marginal KL <= {config.marginal:g}", limits=marginal)
        fixed = f"marginal KL, weight {config.weights[0]:g}"
        yield arm("fixed-marginal", "control", fixed, weights={"marginal": config.weights[0]})
        yield arm("risk", "method", f"DCL, risk of every class <= {config.risk:g}", limits={"risk": _risk(config)})
        return
    yield arm("augmented", "alternative", f"noise {config.view:g} on the images", view="noisy")
    yield arm("smoothed", "alternative", "label smoothing 0.1", smoothing=0.1)
    for weight in config.weights:
        yield arm(
            f"fixed-{weight:g}", "alternative", f"consistency, weight {weight:g}", weights={"consistency": weight}
        )
    for level in config.levels:
        limits = {"consistency": Constraint("<=", level)}
        yield arm(f"dcl-{level:g}", "method", f"DCL, consistency <= {level:g}", limits=limits)
    entropy = {"entropy": Constraint(">=", config.entropy)}
    yield arm("entropy", "method", f"DCL, entropy >= {config.entropy:g}", limits=entropy)
    both = {"consistency": Constraint("<=", config.levels[-2 if len(config.levels) > 1 else -1])}
    both["marginal"] = Constraint("<=", config.marginal)
    yield arm("dcl-marginal", "method", "DCL, consistency and marginal", limits=both)
    if setting == "noise":
        most, least = config.trimmed
        yield arm("trimmed", "control", f"largest losses left out, {most:g} to {least:g}", trimmed=config.trimmed)


def _risk(config: DclStudy) -> Constraint:
    """One constraint for every class; their number is known when the data are."""
    return Constraint("<=", config.risk, (0,))


def _config(config: DclStudy, way: _Way, classes: int) -> DclConfig | None:
    if way.limits is None:
        return None
    sized = {
        name: dataclasses.replace(limit, shape=(classes,)) if limit.shape else limit
        for name, limit in way.limits.items()
    }
    return DclConfig(sized, dual=optax.chain(optax.ema(config.dual_decay), optax.sgd(config.dual_rate)))


def _program(config: DclStudy, way: _Way, task: Task) -> Program:
    # Statistics of a whole batch are no means over its parts.
    check_options(config.train, task, accumulate=False)
    classes = int(task.classes or 0)
    loader = column_loader(task.train, config.batch_size)
    steps = config.budget.steps(config.batch_size, loader.epoch_steps)
    limits, base = _config(config, way, classes), optax.adam(config.learning_rate)
    tx = optax.with_extra_args_support(base if limits is None else optax.chain(dcl(limits), base))
    network = logits_of(task)
    counts = np.bincount(task.train["label"], minlength=classes)
    shares = jnp.log(jnp.asarray((counts + 1) / (counts + 1).sum(), jnp.float32))
    schedule = cyclic_level(*way.trimmed, period=steps) if way.trimmed else None

    def forward(variables: Any, images: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        """Logits of the loss's view, and of another where consistency is asked for, in one pass."""
        draw, dropout = jax.random.split(key)
        noisy = lambda: images + config.view * jax.random.normal(draw, images.shape)
        if "consistency" not in way.statistics:
            logits, model = network(variables, noisy() if way.view == "noisy" else images, True, dropout)
            return logits, logits, model
        logits, model = network(variables, jnp.concatenate([images, noisy()]), True, dropout)
        return logits[: len(images)], logits[len(images) :], model

    def measure(logits: jax.Array, other: jax.Array, losses: jax.Array, labels: jax.Array) -> dict[str, Any]:
        uniform = jnp.full(classes, 1 / classes)
        found = {
            "entropy": lambda: prediction_entropy(logits),
            "marginal": lambda: marginal_kl(logits, uniform),
            "risk": lambda: class_risk(losses, labels, classes),
            "consistency": lambda: consistency_kl(logits, other),
        }
        return {name: found[name]() for name in way.statistics}

    def objective(params: Any, state: TrainState, batch: Any) -> tuple[jax.Array, Any]:
        variables = {**state.variables, "params": params}
        logits, other, model = forward(variables, unit_images(batch["image"]), state.step_key)
        labels = batch["label"]
        losses = cross_entropies(logits + shares[None, :] if way.adjust else logits, labels, way.smoothing)
        loss = losses.mean()
        if schedule is not None:
            loss = guided_risk(losses, optimal_guide(losses, schedule(state.step)))
        values = measure(logits, other, losses, labels)
        present = {"risk": class_counts(labels, classes) > 0} if "risk" in values else None
        total = loss
        for name, weight in (way.weights or {}).items():
            total += weight * values[name]
        if limits is not None:
            total = dcl_lagrangian(state.opt, total, values, limits, present=present)
        return total, (loss, model, values, present)

    def step(state: TrainState, batch: Any, aux: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        (_, found), grads = jax.value_and_grad(objective, has_aux=True)(state.params, state, batch)
        loss, model, values, present = found
        metrics = {"loss": loss}
        if limits is not None:
            metrics |= dcl_metrics(state.opt, values, limits)
        extra = {"values": values, "present": present} if limits is not None else {}
        updates, opt = tx.update(grads, state.opt, state.params, **extra)
        if config.train.nonfinite == "skip":
            metrics["sound"] = all_finite(grads)
        return state.after(optax.apply_updates(state.params, updates), model, opt), metrics

    def evaluate(state: TrainState) -> dict[str, float]:
        found = dict(task.evaluate(state.variables))
        return found if limits is None else {**found, **reached(state.opt, limits)}

    return Program(
        task=task,
        init=lambda key: TrainState.start(task.init(key), tx.init, key),
        phases=(Phase(step, steps),),
        params=lambda state: state.variables,
        loader=loader,
        evaluate=evaluate,
        train_metrics=lambda means: {"train_loss": means["loss"]},
    )


def reached(opt: Any, limits: DclConfig) -> dict[str, float]:
    """The largest running mean of a violation, and the largest multiplier, at the end of a run."""
    is_dual = lambda node: isinstance(node, DclState)
    (state,) = (node for node in jax.tree.leaves(opt, is_leaf=is_dual) if is_dual(node))
    # The multipliers' optimizer is given minus the violations.
    means = [-np.asarray(optax.tree.get(state.dual[name], "ema")) for name in limits.constraints]
    multipliers = [np.asarray(state.multipliers[name]).reshape(-1) for name in limits.constraints]
    return {
        "violation": float(np.max(np.concatenate(means))),
        "multiplier": float(np.max(np.concatenate(multipliers))),
    }
