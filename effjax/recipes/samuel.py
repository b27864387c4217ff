"""The SAMUEL study: learning-rate experts against grids, schedules and tuning-free optimizers.

Two settings. *offline*: ordinary training. *shift*: the inputs (pixel permutation) or the labels
(label permutation) change three times without notice, and what counts is the mean loss over all
steps, each measured before its update.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effjax.core.errors import check_choice, check_number
from effjax.data.pipeline import batches
from effjax.data.sets import DataSet, load
from effjax.data.shift import permute_labels, permute_pixels
from effjax.models.mlp import MLP
from effjax.optim.samuel import (
    samuel,
    samuel_eval_params,
    samuel_init,
    samuel_sync,
    samuel_value_and_grad,
)
from effjax.optim.samuel_one_gradient import samuel_one_gradient
from effjax.recipes.spec import Arm, Axis, Claim, Metrics, StudyConfig, Sweep
from effjax.tasks.image import Task, image_task
from effjax.train.grad import accumulated
from effjax.train.mesh import make_mesh
from effjax.train.program import Program

PyTree = Any
Setting = Literal["offline", "shift"]


ALTERNATIVES = ("adam", "schedule-free", "prodigy", "d-adaptation", "mechanic", "dog", "dowg", "plateau")
VARIANTS = ("samuel-official", "samuel-equal", "samuel-short", "samuel-argmax", "samuel-copy")
OTHERS = ALTERNATIVES + VARIANTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamuelStudy(StudyConfig):
    """Config of the SAMUEL study."""

    tasks: tuple[str, ...] = ("digits/mlp-64",)
    """data set and model: digits/mlp-64 (one hidden layer of 64), fashion_mnist/cnn, cifar10/resnet20, ..."""
    settings: tuple[Setting, ...] = ("offline", "shift")
    """ordinary training, or data that shift"""
    compare: Literal["quality", "overhead"] = "quality"
    """the arms: rivals in quality, or the forms of the experts' loop (for --cost-only)"""
    batch_size: int = 64
    """examples of one step"""
    train_rows: int | None = None
    """training examples used; all when None"""
    test_rows: int | None = None
    """test examples used; all when None"""
    phases: int = 4
    """parts of a shifting run with a permutation of their own"""
    grid: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)
    """fixed learning rates of SGD with momentum that a user would sweep"""
    cosine_grid: tuple[float, ...] = (0.3, 0.1, 0.03)
    """initial rates of the cosine schedules"""
    momentum: float = 0.9
    """of every SGD"""
    experts: tuple[float, ...] = (1.0, 0.1, 0.01, 0.001, 0.0001)
    """learning rates of SAMUEL's experts"""
    period_fraction: float = 0.125
    """steps between two re-initialisations of the experts, as a part of the run"""
    loop: Literal["vmap", "map", "unroll", "auto"] = "vmap"
    """form of the loop over experts; auto measures, and a resumed run may then differ in the last bits"""
    others: tuple[str, ...] = OTHERS
    """arms besides the grids, SAMUEL, its control and the one-gradient variant"""
    one_gradient_rates: tuple[float, ...] = (0.3, 0.1, 0.03)
    """candidate rates of the one-gradient variant, which wants rates that could all be left on"""
    one_gradient_every: int = 10
    """steps between two scorings of the one-gradient variant"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "phases", "one_gradient_every"):
            check_number(name, getattr(self, name), low=1, integer=True)
        check_number("period_fraction", self.period_fraction, low=0, high=1, open_low=True)
        if self.budget.unit == "examples" and self.budget.amount < self.batch_size:
            raise ValueError(
                f"budget.amount={self.budget.amount} examples is less than one batch of {self.batch_size}."
            )
        if len(self.experts) < 2:
            raise ValueError(
                f"experts={self.experts} is one expert, which has nothing to choose from. Give two or more."
            )
        for name in self.others:
            check_choice("others", name, OTHERS)
        for task in self.tasks:
            if task.count("/") != 1:
                raise ValueError(f"tasks={task!r} must be DATA/MODEL, such as 'digits/mlp'.")


class _Rival(NamedTuple):
    """An optimizer of one parameter set, and where its evaluation weights are."""

    label: str
    role: str
    optimizer: Callable[[int], optax.GradientTransformation]
    evaluation: Callable[[PyTree, PyTree], PyTree] = lambda state, params: params
    scoring_period: int = 1


class _Experts(NamedTuple):
    """A form of SAMUEL: what its experts are and how they are chosen."""

    label: str
    role: str
    options: Mapping[str, Any]
    loop: str | None = None


class _Parts(NamedTuple):
    """What the two kinds of arms differ in; see ``Program``."""

    init: Callable
    step: Callable
    params: Callable
    step_period: int = 1
    sharding: tuple = ()


def arms(config: SamuelStudy) -> dict[str, Arm]:
    """Every arm of every task and setting, as ``task-setting/arm``."""
    forms = _overhead_arms(config) if config.compare == "overhead" else _quality_arms(config)
    found = {}
    for task in config.tasks:
        for setting in config.settings:
            for name, form in forms.items():
                found[f"{_group(task, setting)}/{name}"] = Arm(
                    build=lambda task=task, setting=setting, form=form: _program(config, task, setting, form),
                    group=_group(task, setting),
                    label=form.label,
                    role=form.role,
                )
    return found


def sweeps(config: SamuelStudy) -> dict[str, Sweep]:
    """The grids that SAMUEL replaces, at the price of all their runs."""
    if config.compare == "overhead":
        return {}
    found = {}
    for task in config.tasks:
        for setting in config.settings:
            group, axis = _group(task, setting), _axis(setting)
            for name, rates in (("sgd", config.grid), ("cosine", config.cosine_grid)):
                found[f"{group}/{name}-sweep"] = Sweep(
                    members=[f"{group}/{name}-{rate:g}" for rate in rates],
                    metric=axis.metric,
                    goal=axis.goal,
                    group=group,
                    label=f"{'SGD-m' if name == 'sgd' else 'cosine'} sweep of {len(rates)}",
                )
    return found


def axes(config: SamuelStudy) -> dict[str, Axis]:
    """What each group is judged by."""
    return {_group(task, setting): _axis(setting) for task in config.tasks for setting in config.settings}


def claims(config: SamuelStudy) -> list[Claim]:
    """What the paper promises and the method file asks to show."""
    if config.compare == "overhead":
        return [claim for task in config.tasks for claim in _overhead_claims(_group(task, config.settings[0]))]
    found: list[Claim] = []
    for task in config.tasks:
        for setting in config.settings:
            make = _shift_claims if setting == "shift" else _offline_claims
            found += make(
                _group(task, setting), _grid_names(config, task, setting), _cosine_names(config, task, setting)
            )
    return found


def _quality_arms(config: SamuelStudy) -> dict[str, _Rival | _Experts]:
    sgd = lambda rate: optax.sgd(rate, momentum=config.momentum)
    period = lambda steps: max(1, round(config.period_fraction * steps))
    found: dict[str, _Rival | _Experts] = {}
    for rate in config.grid:
        found[f"sgd-{rate:g}"] = _Rival(f"SGD-m {rate:g}", "baseline", lambda steps, rate=rate: sgd(rate))
    for rate in config.cosine_grid:
        found[f"cosine-{rate:g}"] = _Rival(
            f"cosine {rate:g}", "baseline", lambda steps, rate=rate: sgd(optax.cosine_decay_schedule(rate, steps))
        )
    contrib = optax.contrib
    others: dict[str, _Rival | _Experts] = {
        "adam": _Rival("Adam 1e-3", "alternative", lambda steps: optax.adam(1e-3)),
        "schedule-free": _Rival(
            "schedule-free SGD",
            "alternative",
            lambda steps: contrib.schedule_free_sgd(1.0),
            contrib.schedule_free_eval_params,
        ),
        "prodigy": _Rival("Prodigy", "alternative", lambda steps: contrib.prodigy(1.0)),
        "d-adaptation": _Rival("D-Adapt AdamW", "alternative", lambda steps: contrib.dadapt_adamw(1.0)),
        "mechanic": _Rival("Mechanic (SGD-m)", "alternative", lambda steps: contrib.mechanize(sgd(1.0))),
        "dog": _Rival("DoG", "alternative", lambda steps: contrib.dog(1.0)),
        "dowg": _Rival("DoWG", "alternative", lambda steps: contrib.dowg(1.0)),
        "plateau": _Rival("SGD-m 0.3, plateau", "alternative", lambda steps: _plateau(sgd(0.3))),
        "samuel-official": _Experts(
            "SAMUEL (as published)",
            "method",
            {"eta_scale": 1.0, "normalize": False, "loss_clip": None, "prior_odds": 1.0},
        ),
        "samuel-equal": _Experts("SAMUEL, equal weights after a sync", "method", {"prior_odds": 1.0}),
        "samuel-short": _Experts("SAMUEL, K/3", "method", {"period": lambda steps: max(1, period(steps) // 3)}),
        "samuel-argmax": _Experts("SAMUEL, argmax", "method", {"select": "argmax"}),
        "samuel-copy": _Experts("SAMUEL, keep momentum", "method", {"inner_state": "copy"}),
    }
    found |= {name: others[name] for name in config.others}
    found |= {
        "samuel": _Experts("SAMUEL", "method", {}),
        "uniform": _Experts("random expert", "control", {"eta_scale": 0.0}),
        "one-gradient": _Rival(
            f"one-gradient SGD-m, every {config.one_gradient_every}",
            "method",
            lambda steps: samuel_one_gradient(sgd, config.one_gradient_rates, every=config.one_gradient_every),
            scoring_period=config.one_gradient_every,
        ),
    }
    return found


def _overhead_arms(config: SamuelStudy) -> dict[str, _Rival | _Experts]:
    found: dict[str, _Rival | _Experts] = {
        "sgd": _Rival("one SGD-m run", "baseline", lambda steps: optax.sgd(0.1, momentum=config.momentum)),
        "adam": _Rival("one Adam run", "baseline", lambda steps: optax.adam(1e-3)),
        "one-gradient": _Rival(
            f"one-gradient Adam, every {config.one_gradient_every}",
            "method",
            lambda steps: samuel_one_gradient(
                optax.adam, tuple(0.1 * rate for rate in config.experts), every=config.one_gradient_every
            ),
            scoring_period=config.one_gradient_every,
        ),
    }
    for loop in ("vmap", "map", "unroll", "auto"):
        found[f"samuel-{loop}"] = _Experts(f"SAMUEL, {loop}", "method", {}, loop)
    return found


def _plateau(base: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(base, optax.contrib.reduce_on_plateau(patience=10, accumulation_size=20))


def _program(config: SamuelStudy, task_name: str, setting: Setting, form: _Rival | _Experts) -> Program:
    task, phases = _task(config, task_name, setting)
    steps = config.budget.steps(config.batch_size, lambda epoch: len(task.train["label"]) // config.batch_size)
    parts = (_expert_parts if isinstance(form, _Experts) else _rival_parts)(config, task, form, steps)

    def shift(batch, index, rng):
        return phases[min(len(phases) - 1, index * len(phases) // steps)](batch)

    return Program(
        init=parts.init,
        step=parts.step,
        batches=lambda seed: batches(
            task.train, config.batch_size, seed=seed, transform=shift if len(phases) > 1 else None
        ),
        evaluate=lambda state: task.evaluate(parts.params(state)),
        infer=task.infer,
        params=parts.params,
        example_inputs=task.test["image"][: config.batch_size],
        total_steps=steps,
        batch_size=config.batch_size,
        source=f"{task.name}: {task.source}",
        step_period=parts.step_period,
        sharding=parts.sharding,
        train_metrics=lambda means: {"online_loss": means["loss"]},
    )


def _phases(config: SamuelStudy, data: DataSet, model: str) -> list[Callable]:
    """One map of batches a phase, the first the identity. It permutes pixels for a fully connected network, and labels
    for convolutions, whose pixels must keep their place."""
    if model.startswith("mlp"):
        shape = data.splits["train"]["image"].shape[1:]
        return [dict, *(permute_pixels(seed, shape) for seed in range(1, config.phases))]
    return [dict, *(permute_labels(seed, len(data.classes)) for seed in range(1, config.phases))]


@functools.lru_cache(maxsize=8)
def _task(config: SamuelStudy, task_name: str, setting: Setting) -> tuple[Task, list[Callable]]:
    """The task and its phases; shared by the arms, so that evaluation compiles once. Tested on the last phase."""
    data_name, model = task_name.split("/")
    data = load(data_name)
    phases = _phases(config, data, model) if setting == "shift" else [dict]
    data = dataclasses.replace(data, splits=data.splits | {"test": phases[-1](data.splits["test"])})
    dtype, remat = config.train.dtype, config.train.remat
    width = re.fullmatch(r"mlp-(\d+)", model)
    if width:
        model = MLP((int(width[1]),), classes=len(data.classes), dtype=jnp.dtype(dtype), remat=remat)
        dtype, remat = "float32", False  # the module has them
    rows = {"train_rows": config.train_rows, "test_rows": config.test_rows}
    return image_task(data, model, dtype=dtype, remat=remat, **rows), phases


def _rival_parts(config: SamuelStudy, task: Task, form: _Rival, steps: int) -> _Parts:
    """Ordinary training of one parameter set."""
    tx = optax.with_extra_args_support(form.optimizer(steps))
    loss = _loss(task)
    value_and_grad = accumulated(loss, config.train.accumulate)

    def init(key):
        variables = dict(task.init(key))
        params = variables.pop("params")
        return {"params": params, "model": variables, "opt": tx.init(params)}

    def step(state, batch, aux):
        params = state["params"]
        (value, model), grads = value_and_grad(params, batch, state["model"])
        score = lambda candidate: loss(candidate, batch, state["model"])[0]
        updates, opt = tx.update(grads, state["opt"], params, value=value, grad=grads, value_fn=score)
        return {"params": optax.apply_updates(params, updates), "model": model, "opt": opt}, {"loss": value}

    def params(state):
        return {"params": form.evaluation(state["opt"], state["params"]), **state["model"]}

    return _Parts(init, step, params, step_period=form.scoring_period)


def _expert_parts(config: SamuelStudy, task: Task, form: _Experts, steps: int) -> _Parts:
    """One parameter set for each expert, on one device or along the mesh's expert axis."""
    options = dict(form.options)
    period = options.pop("period", lambda steps: max(1, round(config.period_fraction * steps)))(steps)
    base = lambda rate: optax.sgd(rate, momentum=config.momentum)
    tx = samuel(base, config.experts, period=period, total_steps=steps, **options)
    size = len(config.experts)
    mesh = make_mesh(config.train.mesh)
    spread = mesh is not None and mesh.shape["expert"] > 1
    loss = _loss(task)
    stacked_value_and_grad = samuel_value_and_grad(
        lambda params, model, batch: loss(params, batch, model),
        has_aux=True,
        in_axes=(0, 0, None),
        loop=form.loop or config.loop,
        mesh=mesh if spread else None,
    )

    def init(key):
        stacked = samuel_init(dict(task.init(key)), size)
        params = stacked.pop("params")
        return {"params": params, "model": stacked, "opt": tx.init(params)}

    def step(state, batch, aux):
        (losses, model), grads = stacked_value_and_grad(state["params"], state["model"], batch)
        updates, opt = tx.update(grads, state["opt"], state["params"], value=losses)
        params, model = samuel_sync(optax.apply_updates(state["params"], updates), opt, model)
        return {"params": params, "model": model, "opt": opt}, {"loss": losses[opt.current_expert]}

    def params(state):
        return samuel_eval_params(state["opt"], {"params": state["params"], **state["model"]})

    return _Parts(init, step, params, sharding=(("^(params|model|opt/inner)/", ("expert",)),) if spread else ())


def _loss(task: Task) -> Callable[[PyTree, PyTree, PyTree], tuple[jax.Array, PyTree]]:
    def loss(params: PyTree, batch: PyTree, model: PyTree) -> tuple[jax.Array, PyTree]:
        value, (model, _) = task.loss({"params": params, **model}, batch)
        return value, model

    return loss


def _group(task: str, setting: str) -> str:
    return f"{task.replace('/', '-')}-{setting}"


def _axis(setting: Setting) -> Axis:
    if setting == "shift":
        return Axis("online_loss", "min", "mean online loss")
    return Axis("accuracy", "max", "test accuracy")


def _grid_names(config: SamuelStudy, task: str, setting: Setting) -> list[str]:
    return [f"{_group(task, setting)}/sgd-{rate:g}" for rate in config.grid]


def _cosine_names(config: SamuelStudy, task: str, setting: Setting) -> list[str]:
    return [f"{_group(task, setting)}/cosine-{rate:g}" for rate in config.cosine_grid]


def _least(metrics: Metrics, names: list[str], metric: str) -> float:
    return min((metrics[name].get(metric, jnp.inf) for name in names), key=lambda x: (x != x, x))


def _shift_claims(group: str, grid: list[str], cosine: list[str]) -> list[Claim]:
    loss = lambda metrics, arm: metrics[f"{group}/{arm}"]["online_loss"]
    return [
        Claim(
            f"{group}: SAMUEL's mean online loss is at most 1.05 x the best fixed rate of the grid",
            lambda m: loss(m, "samuel"),
            "<=",
            lambda m: 1.05 * _least(m, grid, "online_loss"),
        ),
        Claim(
            f"{group}: ... and at most 0.8 x the best cosine schedule",
            lambda m: loss(m, "samuel"),
            "<=",
            lambda m: 0.8 * _least(m, cosine, "online_loss"),
        ),
        Claim(
            f"{group}: the weights matter: SAMUEL is below the control that draws experts at random",
            lambda m: loss(m, "samuel"),
            "<=",
            lambda m: loss(m, "uniform"),
        ),
        Claim(
            f"{group}: the one-gradient variant's mean online loss is at most 1.05 x the best fixed rate",
            lambda m: loss(m, "one-gradient"),
            "<=",
            lambda m: 1.05 * _least(m, grid, "online_loss"),
        ),
        *_time_claims(group),
    ]


def _offline_claims(group: str, grid: list[str], cosine: list[str]) -> list[Claim]:
    most = lambda metrics, names: -_least({n: {"a": -metrics[n].get("accuracy", 0.0)} for n in names}, names, "a")
    return [
        Claim(
            f"{group}: SAMUEL's test accuracy is within 0.02 of the best fixed rate of the grid",
            lambda m: m[f"{group}/samuel"]["accuracy"],
            ">=",
            lambda m: most(m, grid) - 0.02,
        ),
        *_time_claims(group),
    ]


def _time_claims(group: str) -> list[Claim]:
    return [
        Claim(
            f"{group}: one SAMUEL run takes less training time than the sweep of fixed rates",
            lambda c: c[f"{group}/samuel"]["train_s"],
            "<=",
            lambda c: c[f"{group}/sgd-sweep"]["train_s"],
            of="cost",
        )
    ]


def _overhead_claims(group: str) -> list[Claim]:
    step = lambda costs, arm: costs[f"{group}/{arm}"]["step_ms"]
    forms = ("samuel-vmap", "samuel-map", "samuel-unroll")
    found = [
        Claim(
            f"{group}: 'auto' is within 10 % of the fastest of vmap, map and unroll (step ms)",
            lambda c: step(c, "samuel-auto"),
            "<=",
            lambda c: 1.1 * min(step(c, form) for form in forms),
            of="cost",
        ),
        Claim(
            f"{group}: the one-gradient variant adds at most 25 % to plain Adam (step ms)",
            lambda c: step(c, "one-gradient"),
            "<=",
            lambda c: 1.25 * step(c, "adam"),
            of="cost",
        ),
        Claim(
            f"{group}: five experts cost at most {_allowed_ratio():g} x one run (step ms)",
            lambda c: step(c, "samuel-auto"),
            "<=",
            lambda c: _allowed_ratio() * step(c, "sgd"),
            of="cost",
        ),
    ]
    return found if "mlp" in group or jax.default_backend() != "cpu" else found[:2]


def _allowed_ratio() -> float:
    return 4.5 if jax.default_backend() == "cpu" else 3.0
