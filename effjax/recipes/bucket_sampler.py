"""The BucketSampler study: six ways to batch texts of unequal length, the same model and the same epochs."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effjax.core.errors import check_choice, check_number
from effjax.data.bucket_sampler import BucketSampler, PlannedBatches
from effjax.data.length_grouping import PaddedBatches
from effjax.data.packing import PackedBatches
from effjax.optim.scale_by_batch_size import scale_by_batch_size
from effjax.recipes.spec import Arm, Axis, Claim, StudyConfig, Sweep
from effjax.tasks.text import TextTask, text_task
from effjax.train.program import BatchShape, Program

Plan = Callable[[int, int], PlannedBatches]
"""(seed, epochs) -> all batches of a run."""

OTHERS = ("grouped", "packing", "official", "growing", "unmerged")
# At least so many times BucketSampler's tokens are processed with static and with dynamic padding: a matter of the
# lengths, and of padding to 64.
_FEWER = {"sst2": (3.0, 2.0), "sms_spam": (2.0, 1.5)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextStudy(StudyConfig):
    """The fields of studies that train text classifiers on batches of unlike sizes."""

    tasks: tuple[str, ...] = ("sst2/encoder-2x64",)
    """data set and model: sms_spam/encoder-2x64, sst2/minilm, glue/rte/roberta-base, ...; what follows the last
    stroke is the model: from scratch, a folder in EFFJAX_MODELS, or an installed one"""
    max_length: int = 64
    """tokens of a sequence; longer texts are truncated"""
    train_rows: int | None = None
    """training texts used; all when None"""
    test_rows: int | None = None
    """test texts used; all when None"""
    batch_size: int = 32
    """texts of a step; where a step has another number, its update is scaled by sqrt(number / batch_size)"""
    learning_rates: tuple[float, ...] = (1e-3,)
    """of AdamW at the start, falling linearly to 0 over the run; several are a sweep for every arm"""
    weight_decay: float = 0.0
    """of AdamW"""
    dropout: float = 0.1
    """every dropout rate of the model"""
    scan_layers: bool = False
    """compile one layer instead of all of them"""
    max_shapes: int = 9
    """compile budget of BucketSampler"""
    tokens: int = 8192
    """padded tokens of one of BucketSampler's batches, at most"""

    def __post_init__(self):
        super().__post_init__()
        if self.budget.unit != "epochs" or self.budget.amount % 1:
            raise ValueError(
                f"budget={self.budget.amount:g} {self.budget.unit}: the arms cut the same texts into unlike numbers of "
                "steps, all planned ahead, so this study counts whole 'epochs'."
            )
        for name in ("max_shapes", "tokens"):
            check_number(name, getattr(self, name), low=1, integer=True)
        check_number("batch_size", self.batch_size, low=8, integer=True)
        if self.batch_size % 8:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of 8, as BucketSampler's batches are.")
        if self.train.accumulate != 1:
            raise ValueError(
                f"train.accumulate={self.train.accumulate}: micro-batches with unlike numbers of dummy rows would "
                "weigh texts unlike. Lower tokens and batch_size instead."
            )
        if not self.learning_rates:
            raise ValueError("learning_rates=() holds no rate. Give one or more.")
        for task in self.tasks:
            if not all(task.rpartition("/")):
                raise ValueError(f"tasks={task!r} must be DATA/MODEL, such as 'sst2/encoder-2x64'.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketSamplerStudy(TextStudy):
    """Config of the BucketSampler study."""

    growing_caps: tuple[int, ...] = (64, 256, 512)
    """largest batch by epoch, of the arm with the paper's growing batches; the last goes on"""
    growing_shapes: int = 24
    """compile budget of that arm"""
    official_width: int = 5
    """width of the paper's buckets"""
    others: tuple[str, ...] = OTHERS
    """arms besides static and dynamic padding and BucketSampler"""

    def __post_init__(self):
        super().__post_init__()
        for name in self.others:
            check_choice("others", name, OTHERS)


class Form(NamedTuple):
    """One arm of a text study on one task, but for the learning rate.

    Attributes:
      label: shown in the report.
      role: see ``Arm``.
      plan: ``(task, seed, epochs) -> batches``.
      dropout: of the model.
    """

    label: str
    role: Literal["baseline", "method", "control", "alternative"]
    plan: Callable[[TextTask, int, int], PlannedBatches]
    dropout: float


def arms(config: BucketSamplerStudy) -> dict[str, Arm]:
    """Every arm of every task, as ``task/arm``; with several learning rates ``task/arm-rate``."""
    return text_arms(config, _forms(config))


def sweeps(config: BucketSamplerStudy) -> dict[str, Sweep]:
    """The learning rates of each arm, where there are several."""
    return text_sweeps(config, _forms(config))


def axes(config: TextStudy) -> dict[str, Axis]:
    """What each group is judged by."""
    return {group(task): Axis(metric(task), "max", f"test {metric(task)}") for task in config.tasks}


def claims(config: BucketSamplerStudy) -> list[Claim]:
    """What is to be shown: fewer tokens, as much less time, the same accuracy."""
    return [claim for task in config.tasks for claim in _claims(config, task)]


def text_arms(config: TextStudy, forms: dict[str, Form]) -> dict[str, Arm]:
    """Arms of a text study; see ``arms``."""
    found = {}
    for task, (name, form), rate in itertools.product(config.tasks, forms.items(), config.learning_rates):
        several = len(config.learning_rates) > 1
        found[f"{group(task)}/{name}" + (f"-{rate:g}" if several else "")] = Arm(
            build=lambda task=task, form=form, rate=rate: _build(config, task, form, rate),
            group=group(task),
            label=form.label + (f", {rate:g}" if several else ""),
            role=form.role,
        )
    return found


def text_sweeps(config: TextStudy, forms: dict[str, Form]) -> dict[str, Sweep]:
    """Sweeps of a text study, under the names that its arms have without a sweep."""
    if len(config.learning_rates) == 1:
        return {}
    return {
        f"{group(task)}/{name}": Sweep(
            members=[f"{group(task)}/{name}-{rate:g}" for rate in config.learning_rates],
            metric=metric(task),
            goal="max",
            group=group(task),
            label=f"{form.label}, sweep of {len(config.learning_rates)}",
        )
        for task, (name, form) in itertools.product(config.tasks, forms.items())
    }


def group(task: str) -> str:
    """Name of a task's group of arms."""
    return task.replace("/", "-")


def metric(task: str) -> str:
    """What a task is judged by."""
    return "spearman" if task.startswith("glue/stsb/") else "accuracy"


def bucketed(config: TextStudy, columns: Any, task: TextTask, seed: int, epochs: int, **options: Any) -> BucketSampler:
    """BucketSampler with the study's settings."""
    settings = {"cap": config.batch_size, "max_shapes": config.max_shapes, "tokens": config.tokens}
    return BucketSampler(columns, seed=seed, epochs=epochs, pad_id=task.tokenizer.pad_id, **{**settings, **options})


def text_program(config: TextStudy, task: TextTask, plan: Plan, rate: float) -> Program:
    """Train a text classifier on planned batches: AdamW whose rate falls linearly over the exact number of steps.

    Args:
      config: of the study.
      task: data and model.
      plan: the batches.
      rate: learning rate at the start, for batches of ``config.batch_size`` texts.
    """
    steps, batches, shapes = planned_run(plan, config)
    tx = optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(config.weight_decay),
        scale_by_batch_size(base=config.batch_size),
        optax.scale_by_learning_rate(optax.linear_schedule(rate, 0.0, steps)),
    )

    def init(key):
        start, noise = jax.random.split(key)
        params = task.init(start)["params"]
        return {
            "params": params,
            "opt": tx.init(params),
            "key": jax.random.key_data(noise),
            "step": jnp.zeros((), jnp.int32),
        }

    def step(state, batch, aux):
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        loss = lambda params: task.loss({"params": params}, batch, key)
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        updates, opt = tx.update(grads, state["opt"], state["params"], batch_size=batch["weight"].sum())
        params = optax.apply_updates(state["params"], updates)
        metrics = {"loss": value, "tokens": float(batch["input_ids"].size), "real_tokens": batch["mask"].sum()}
        return {"params": params, "opt": opt, "key": state["key"], "step": state["step"] + 1}, metrics

    return Program(
        init=init,
        step=step,
        batches=batches,
        evaluate=lambda state: task.evaluate({"params": state["params"]}),
        infer=task.infer,
        params=lambda state: {"params": state["params"]},
        example_inputs=task.example_inputs,
        total_steps=steps,
        batch_size=config.batch_size,
        source=f"{task.name}: {task.source}",
        compiles=len(shapes),
        shapes=lambda: shapes,
        train_metrics=lambda means: {
            "processed_tokens": round(means["tokens"] * steps),
            "padding_ratio": means["tokens"] / means["real_tokens"],
        },
    )


def planned_run(plan: Plan, config: StudyConfig) -> tuple[int, Callable[[int], PlannedBatches], list[BatchShape]]:
    """``total_steps``, ``batches`` and ``shapes`` of a Program, the same for all seeds of a study in epochs."""
    epochs = int(config.budget.amount)
    plans = [plan(seed, epochs) for seed in config.seeds]
    steps = max(planned.total_steps for planned in plans)

    def batches(seed):
        planned = plan(seed, epochs)
        # Packed texts may fill a row less than with another seed; such a run goes on into one more epoch.
        return planned if planned.total_steps >= steps else plan(seed, epochs + 1)

    return steps, batches, _batch_shapes(plans)


def _batch_shapes(plans: Sequence[PlannedBatches]) -> list[BatchShape]:
    """Every shape of every seed's plan; how often each comes, in the first."""
    found: dict[tuple[int, int], BatchShape] = {}
    for planned in plans:
        for (shape, (steps, examples)), batch in zip(
            planned.use_of_shapes.items(), planned.example_batches(), strict=True
        ):
            count = steps if planned is plans[0] else 0
            found.setdefault(shape, BatchShape(batch, count, examples / steps, shape[0] * shape[1]))
    return list(found.values())


def _build(config: TextStudy, task_name: str, form: Form, rate: float) -> Program:
    task = _task(
        task_name,
        config.max_length,
        config.train_rows,
        config.test_rows,
        config.train.dtype,
        config.train.remat,
        config.scan_layers,
        form.dropout,
    )
    return text_program(config, task, functools.partial(form.plan, task), rate)


@functools.lru_cache(maxsize=8)
def _task(name: str, max_length, train_rows, test_rows, dtype, remat, scan_layers, dropout) -> TextTask:
    """Shared by the arms, so that texts are tokenised and the evaluation is compiled once."""
    data, _, model = name.rpartition("/")
    return text_task(
        data,
        model,
        max_length=max_length,
        train_rows=train_rows,
        test_rows=test_rows,
        dtype=dtype,
        remat=remat,
        scan_layers=scan_layers,
        dropout=dropout,
    )


def _forms(config: BucketSamplerStudy) -> dict[str, Form]:
    size = config.batch_size

    def padded(**options):
        return lambda task, seed, epochs: PaddedBatches(
            task.train, seed=seed, epochs=epochs, batch_size=size, pad_id=task.tokenizer.pad_id, **options
        )

    def buckets(**options):
        return lambda task, seed, epochs: bucketed(config, task.train, task, seed, epochs, **options)

    def official(task, seed, epochs):
        longest = int(task.train["input_ids"].lengths.max())
        width = config.official_width
        edges = (*range(width, longest, width), longest)
        return bucketed(config, task.train, task, seed, epochs, boundaries=edges, max_shapes=len(edges))

    rates = {"dropout": config.dropout}
    found = {
        "static": Form(f"static padding to {config.max_length}", "baseline", padded(length=config.max_length), **rates),
        "dynamic": Form("dynamic padding (longest row, multiple of 8)", "baseline", padded(), **rates),
        "buckets": Form(f"BucketSampler, {config.max_shapes} shapes", "method", buckets(), **rates),
    }
    others = {
        "grouped": Form("group_by_length", "alternative", padded(group_by_length=True), **rates),
        "packing": Form("packing", "alternative", functools.partial(_packed, config), **rates),
        "official": Form(f"BucketSampler, width {config.official_width}", "method", official, **rates),
        "growing": Form(
            f"BucketSampler, caps {'/'.join(map(str, config.growing_caps))}",
            "method",
            buckets(cap=config.growing_caps, max_shapes=config.growing_shapes),
            **rates,
        ),
        "unmerged": Form("buckets, residues not merged", "control", buckets(merge=False), **rates),
    }
    return found | {name: others[name] for name in config.others}


def _packed(config: BucketSamplerStudy, task: TextTask, seed: int, epochs: int) -> PackedBatches:
    """Packed rows, of which a batch holds about as many texts as the other arms' batches do."""
    lengths = task.train["input_ids"].lengths
    rows = max(1, round(config.batch_size * float(lengths.mean()) / config.max_length))
    return PackedBatches(
        task.train,
        seed=seed,
        epochs=epochs,
        length=config.max_length,
        batch_size=rows,
        max_segments=config.max_length // int(lengths.min()),
        pad_id=task.tokenizer.pad_id,
    )


def _claims(config: BucketSamplerStudy, task: str) -> list[Claim]:
    name, quality = group(task), metric(task)
    tokens = lambda m, arm: m[f"{name}/{arm}"].get("processed_tokens", float("nan"))
    score = lambda m, arm: m[f"{name}/{arm}"].get(quality, float("nan"))
    seconds = lambda c, arm: c[f"{name}/{arm}"]["train_s"]
    padding = ("static padding", "static"), ("dynamic padding", "dynamic")
    found = [
        Claim(
            f"{name}: {label} processes at least {least:g} x the tokens of BucketSampler",
            lambda m, arm=arm: tokens(m, arm) / tokens(m, "buckets"),
            ">=",
            lambda m, least=least: least,
        )
        for (label, arm), least in zip(padding, _FEWER.get(task.rpartition("/")[0], (1.0, 1.0)), strict=True)
    ]
    found += [
        Claim(
            f"{name}: BucketSampler's {quality} is within 0.01 of static padding's",
            lambda m: score(m, "buckets"),
            ">=",
            lambda m: score(m, "static") - 0.01,
        ),
    ]
    if "unmerged" in config.others:
        found.append(
            Claim(
                f"{name}: merging does it: without, the same buckets process more tokens",
                lambda m: tokens(m, "buckets"),
                "<=",
                lambda m: tokens(m, "unmerged"),
            )
        )
    found += [
        Claim(
            f"{name}: {label} takes at least 0.7 x as many times BucketSampler's training seconds as its tokens",
            lambda c, arm=arm: seconds(c, arm) / seconds(c, "buckets"),
            ">=",
            lambda c, arm=arm: 0.7 * tokens(c, arm) / tokens(c, "buckets"),
            of="cost",
        )
        for label, arm in padding
    ]
    return [
        *found,
        Claim(
            f"{name}: BucketSampler compiles at most max_shapes executables",
            lambda c: c[f"{name}/buckets"]["compiles"],
            "<=",
            lambda c: config.max_shapes,
            of="cost",
        ),
    ]
