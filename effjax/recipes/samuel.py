"""The SAMUEL study: learning-rate experts against grids, schedules and tuning-free optimizers.

Two settings. *offline*: ordinary training. *shift*: the inputs (pixel permutation) or the labels
(label permutation) change three times without notice, and what counts is the mean loss over all
steps, each measured before its update.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax

from effjax.core.errors import Count, Positive, Rate, Share
from effjax.data.sets import DataSet, load
from effjax.data.shift import permute_labels, permute_pixels
from effjax.models.mlp import MLP
from effjax.optim.one_gradient import samuel_one_gradient
from effjax.optim.samuel import SamuelState, samuel, samuel_eval_params, samuel_init, samuel_sync, samuel_value_and_grad
from effjax.recipes.spec import Arm, Claim, Group, Role, StudyConfig, Sweep
from effjax.tasks.image import image_task
from effjax.tasks.task import Metric, Task
from effjax.train.grad import accumulated
from effjax.train.loaders import column_loader
from effjax.train.program import Phase, Program
from effjax.train.trainer import TrainState, check_options, supervised

MODALITY = "image"
Setting = Literal["offline", "shift"]
LOOPS = ("vmap", "map", "unroll", "auto")
OFFICIAL = {"eta_scale": 1.0, "normalize": False, "loss_clip": None, "prior_odds": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamuelStudy(StudyConfig):
    """Config of the SAMUEL study."""

    arms: tuple[str, ...] = ("*", "!loop-*", "!one-gradient-adam")
    """Names or shell patterns of the arms to run; a pattern that begins with ! leaves arms out."""
    tasks: tuple[str, ...] = ("digits/mlp-64",)
    """Data set and model: digits/mlp-64 (one hidden layer of 64), fashion_mnist/cnn, cifar10/resnet20, ..."""
    settings: tuple[Setting, ...] = ("offline", "shift")
    """Ordinary training, or data that shift."""
    batch_size: Count = 64
    """Examples of one step."""
    train_rows: Count | None = None
    """Number of training examples used; all when None."""
    test_rows: Count | None = None
    """Number of test examples used; all when None."""
    phases: Count = 4
    """Number of parts of a shifting run, each with a permutation of its own."""
    grid: tuple[Positive, ...] = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)
    """Fixed learning rates of SGD with momentum that a user would sweep."""
    cosine_grid: tuple[Positive, ...] = (0.3, 0.1, 0.03)
    """Initial learning rates of the cosine schedules."""
    momentum: Rate = 0.9
    """Momentum of every SGD."""
    experts: tuple[Positive, ...] = (1.0, 0.1, 0.01, 0.001, 0.0001)
    """Learning rates of SAMUEL's experts."""
    period_fraction: Share = 0.125
    """Steps between two re-initialisations of the experts, as a part of the run."""
    loop: Literal["vmap", "map", "unroll", "auto"] = "vmap"
    """Form of the loop over experts; auto measures, and a resumed run may then differ in the last bits."""
    one_gradient_rates: tuple[Positive, ...] = (0.3, 0.1, 0.03)
    """Candidate learning rates of the one-gradient variant; each must be one that could be used alone."""
    one_gradient_every: Count = 10
    """Steps between two scorings of the one-gradient variant."""

    def __post_init__(self):
        super().__post_init__()
        if self.budget.unit == "examples" and self.budget.amount < self.batch_size:
            raise ValueError(
                f"budget.amount={self.budget.amount} examples is less than one batch of {self.batch_size}."
            )
        steps = self.budget.amount if self.budget.unit == "steps" else math.inf
        if "shift" in self.settings and self.phases > steps:
            raise ValueError(
                f"phases={self.phases} of a run of {steps:g} steps. Give {steps:g} or fewer, or more steps."
            )
        if self.period_fraction * steps < 0.1:
            raise ValueError(
                f"period_fraction={self.period_fraction} of {steps:g} steps is no step. Give {1 / steps:.2g} or more, "
                "where the experts begin anew after every step."
            )
        if len(self.experts) < 2:
            raise ValueError(
                f"experts={self.experts} is one expert, which has nothing to choose from. Give two or more."
            )
        for task in self.tasks:
            if task.count("/") != 1:
                raise ValueError(f"tasks={task!r} must be DATA/MODEL, such as 'digits/mlp'.")


CLAIMS = {
    "*-shift": (
        Claim("samuel", "<=", "best sgd-*", times=1.05),
        Claim("samuel", "<=", "best cosine-*", times=0.8),
        Claim("samuel", "<=", "uniform", why="the weights matter more than the number of experts"),
        Claim("one-gradient", "<=", "best sgd-*", times=1.05),
    ),
    "*-offline": (Claim("samuel", ">=", "best sgd-*", plus=-0.02),),
    "*": (
        Claim("samuel", "<=", "sum sgd-*", of="train_s"),
        Claim("loop-auto", "<=", "best loop-vmap|loop-map|loop-unroll", of="step_ms", times=1.1),
        Claim("one-gradient-adam", "<=", "adam", of="step_ms", times=1.25),
    ),
    # Convolutions are left out: on CPUs their experts cost five runs and more, whatever the loop.
    "*-mlp*": (Claim("loop-auto", "<=", "sgd-0.1", of="step_ms", times=4.5),),
}


def groups(config: SamuelStudy) -> list[Group]:
    """Every task in every setting."""
    return [
        Group(
            f"{name.replace('/', '-')}-{setting}",
            _METRICS[setting],
            functools.partial(_load, config, name, setting),
            list(_arms(config, setting)),
            {
                "sgd-sweep": Sweep("sgd-*", f"SGD-m sweep of {len(config.grid)}"),
                "cosine-sweep": Sweep("cosine-*", f"cosine sweep of {len(config.cosine_grid)}"),
            },
        )
        for name, setting in itertools.product(config.tasks, config.settings)
    ]


_METRICS = {
    "shift": Metric("online_loss", "min", "mean online loss"),
    "offline": Metric("accuracy", "max", "test accuracy"),
}


def _load(config: SamuelStudy, name: str, setting: Setting) -> Task:
    """The task, tested on the last part of a run; its ``details`` hold one map of batches per part."""
    data_name, model = name.split("/")
    data, model = config.data(data_name, MODALITY), config.model(model)
    data = load(data) if isinstance(data, str) else data
    phases = _phases(config, data, model) if setting == "shift" else [dict]
    data = dataclasses.replace(data, splits={**data.splits, "test": phases[-1](data.splits["test"])})
    options = {"train_rows": config.train_rows, "test_rows": config.test_rows}
    made: dict[str, Any] = {"dtype": config.train.dtype, "remat": config.train.remat}
    if width := re.fullmatch(r"mlp-(\d+)", model):
        dtype = jnp.dtype(config.train.dtype)
        model, made = MLP((int(width[1]),), classes=len(data.classes), dtype=dtype, remat=config.train.remat), {}
    task = image_task(data, model, **made, **options)
    return task._replace(metric=_METRICS[setting], details={**task.details, "phases": phases})


def _phases(config: SamuelStudy, data: DataSet, model: str) -> list[Callable]:
    """One map of batches per part of a run, the first the identity.

    It permutes pixels for a fully connected network,
    and labels for convolutions, whose pixels must keep their place.
    """
    if model.startswith("mlp"):
        shape = data.splits["train"]["image"].shape[1:]
        return [dict, *(permute_pixels(seed, shape) for seed in range(1, config.phases))]
    return [dict, *(permute_labels(seed, len(data.classes)) for seed in range(1, config.phases))]


def _arms(config: SamuelStudy, setting: Setting) -> Iterator[Arm]:
    sgd = lambda rate: optax.sgd(rate, momentum=config.momentum)
    cosine = lambda rate, steps: sgd(optax.cosine_decay_schedule(rate, steps))
    plateau = lambda: optax.chain(sgd(0.3), optax.contrib.reduce_on_plateau(patience=10, accumulation_size=20))
    contrib = optax.contrib

    def trained(name: str, role: Role, label: str, tx: Callable[..., Any], **options: Any) -> Arm:
        return Arm(name, role, functools.partial(_trained, config, tx, **options), label)

    def experts(name: str, label: str, role: Role = "method", **options: Any) -> Arm:
        return Arm(name, role, functools.partial(_experts, config, **options), label)

    for rate in config.grid:
        yield trained(f"sgd-{rate:g}", "baseline", f"SGD-m {rate:g}", lambda steps, rate=rate: sgd(rate))
    for rate in config.cosine_grid:
        tx = functools.partial(cosine, rate)
        yield trained(f"cosine-{rate:g}", "baseline", f"cosine {rate:g}", tx)
    alternatives = {
        "adam": ("Adam 1e-3", lambda steps: optax.adam(1e-3)),
        "prodigy": ("Prodigy", lambda steps: contrib.prodigy(1.0)),
        "d-adaptation": ("D-Adapt AdamW", lambda steps: contrib.dadapt_adamw(1.0)),
        "mechanic": ("Mechanic (SGD-m)", lambda steps: contrib.mechanize(sgd(1.0))),
        "dog": ("DoG", lambda steps: contrib.dog(1.0)),
        "dowg": ("DoWG", lambda steps: contrib.dowg(1.0)),
        "plateau": ("SGD-m 0.3, plateau", lambda steps: plateau()),
    }
    for name, (label, tx) in alternatives.items():
        yield trained(name, "alternative", label, tx)
    free = lambda steps: contrib.schedule_free_sgd(1.0)
    averaged = contrib.schedule_free_eval_params
    yield trained("schedule-free", "alternative", "schedule-free SGD", free, eval_params=averaged)
    yield experts("samuel-official", "SAMUEL (as published)", **OFFICIAL)
    yield experts("samuel-equal", "SAMUEL, equal weights after a sync", prior_odds=1.0)
    yield experts("samuel-short", "SAMUEL, K/3", shorter=3)
    yield experts("samuel-argmax", "SAMUEL, argmax", select="argmax")
    yield experts("samuel-copy", "SAMUEL, keep momentum", inner_state="copy")
    yield experts("samuel", "SAMUEL")
    yield experts("uniform", "random expert", "control", eta_scale=0.0)
    for loop in LOOPS:
        yield experts(f"loop-{loop}", f"SAMUEL, {loop}", loop=loop)
    every = config.one_gradient_every
    scored = {
        "one-gradient": ("SGD-m", sgd, config.one_gradient_rates),
        "one-gradient-adam": ("Adam", optax.adam, tuple(0.1 * rate for rate in config.experts)),
    }
    for name, (label, base, rates) in scored.items():
        tx = lambda steps, base=base, rates=rates: samuel_one_gradient(base, rates, every=every)
        yield trained(name, "method", f"one-gradient {label}, every {every}", tx, period=every)


def _trained(config: SamuelStudy, tx: Callable[[int], Any], task: Task, **options: Any) -> Program:
    """Ordinary training of one parameter set."""
    loader, steps = _batches(config, task)
    options |= {"options": config.train, "train_metrics": _online}
    return supervised(task, tx(steps), steps=steps, loader=loader, **options)


def _experts(config: SamuelStudy, task: Task, *, shorter: int = 1, loop: str | None = None, **options: Any) -> Program:
    """One parameter set per expert, on one device or along the mesh's expert axis."""
    check_options(config.train, task)
    loader, steps = _batches(config, task)
    period = max(1, max(1, round(config.period_fraction * steps)) // shorter)
    base = lambda rate: optax.sgd(rate, momentum=config.momentum)
    tx = samuel(base, config.experts, period=period, total_steps=steps, **options)
    mesh = config.train.mesh.built
    spread = mesh is not None and mesh.shape["expert"] > 1

    def loss(params, model, batch, key):
        value, (model, _) = task.loss({"params": params, **model}, batch, key)
        return value, model

    losses_and_grads = samuel_value_and_grad(
        loss,
        has_aux=True,
        in_axes=(0, 0, None, None),
        loop=loop or config.loop,
        mesh=mesh if spread else None,
    )
    losses_and_grads = accumulated(losses_and_grads, config.train.accumulate, argument=2, weight=task.weight)

    def init(key):
        return TrainState.start(samuel_init(dict(task.init(key)), len(config.experts)), tx.init, key)

    def step(state: TrainState, batch: Any, aux: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        (losses, model), grads = losses_and_grads(state.params, state.model, batch, state.step_key)
        updates, opt = tx.update(grads, state.opt, state.params, value=losses)
        params, model = samuel_sync(opt, optax.apply_updates(state.params, updates), model)
        return state.after(params, model, opt), {"loss": losses[cast(SamuelState, opt).current_expert]}

    return Program(
        task=task,
        init=init,
        phases=(Phase(step, steps),),
        params=lambda state: samuel_eval_params(state.opt, {"params": state.params, **state.model}),
        loader=loader,
        sharding=(("^(params|model|opt/inner)/", ("expert",)),) if spread else (),
        train_metrics=_online,
    )


def _batches(config: SamuelStudy, task: Task):
    """The loader, and the steps of a run."""
    phases = task.details["phases"]
    steps = config.budget.steps(config.batch_size, lambda epoch: len(task.train["label"]) // config.batch_size)

    def shift(batch, index, rng):
        return phases[min(len(phases) - 1, index * len(phases) // steps)](batch)

    return column_loader(task.train, config.batch_size, transform=shift if len(phases) > 1 else None), steps


def _online(means):
    return {"online_loss": means["loss"]}
