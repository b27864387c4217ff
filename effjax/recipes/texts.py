"""What studies on texts share: their settings, batches that are planned ahead, and training on them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import optax

from effjax.core.errors import Count, Limits, NotNegative, Positive, Rate
from effjax.data.bucket_sampler import BucketSampler, PlannedBatches
from effjax.data.length_grouping import PaddedBatches
from effjax.optim.batch_size import adamw_by_batch_size
from effjax.recipes.shape_costs import study_costs
from effjax.recipes.spec import Arm, Group, Role, StudyConfig, Sweep
from effjax.tasks.task import Metric, Task
from effjax.tasks.text import text_task
from effjax.train.loaders import planned_loader, token_counts
from effjax.train.program import Program
from effjax.train.trainer import supervised

MODALITY = "text"
Plan = Callable[[Task, int, int], PlannedBatches]
"""(task, seed, epochs) -> all batches of a run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFields(StudyConfig):
    """The fields of every study on texts."""

    tasks: tuple[str, ...]
    """Data sets and models."""
    max_length: Count = 64
    """Tokens of a text; longer ones are truncated."""
    train_rows: Count | None = None
    """Most training texts used; all when None."""
    test_rows: Count | None = None
    """Most test texts used; all when None."""
    weight_decay: NotNegative = 0.0
    """Weight decay of AdamW."""
    scan_layers: bool = False
    """Whether one layer is compiled instead of all of them."""
    max_shapes: Count | Literal["auto"] = 9
    """Number of batch shapes that BucketSampler may use; auto for those whose predicted seconds in all are least."""
    tokens: Count = 8192
    """Most padded tokens of one of BucketSampler's batches."""

    def __post_init__(self):
        super().__post_init__()
        for task in self.tasks:
            if not all(task.rpartition("/")):
                raise ValueError(f"tasks={task!r} must be DATA/MODEL, such as 'sst2/encoder-2x64'.")

    @property
    def made(self) -> dict[str, Any]:
        """What a maker of tasks is told about data and network."""
        own = {name: getattr(self, name) for name in ("train_rows", "test_rows", "scan_layers")}
        options = self.train.mesh
        # Where parameters are split, a pretrained model is read in the parts that each process holds.
        split = {"mesh": options.built, "rules": options.rules} if options.rules != "data" and options.built else {}
        return own | {"dtype": self.train.dtype, "remat": self.train.remat} | split


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextStudy(TextFields):
    """The fields of studies that train text classifiers on batches of different sizes."""

    tasks: tuple[str, ...] = ("sst2/encoder-2x64",)
    """Data set and model: sms_spam/encoder-2x64, sst2/minilm, glue/rte/roberta-base, ...; the last part is the model:
    one trained from scratch, a folder in EFFJAX_MODELS, or an installed one."""
    batch_size: Annotated[int, Limits(low=8)] = 32
    """Texts of a step; where a step has another number, its update is scaled by sqrt(number / batch_size)."""
    learning_rates: tuple[Positive, ...] = (1e-3,)
    """Initial learning rates of AdamW, which fall linearly to 0 over the run; several are a sweep for every arm."""
    dropout: Rate = 0.1
    """Every dropout rate of the model."""

    def __post_init__(self):
        super().__post_init__()
        check_epochs(self)
        if self.batch_size % 8:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of 8, as BucketSampler's batches are.")
        if not self.learning_rates:
            raise ValueError("learning_rates=() holds no rate. Give one or more.")


class TextArm(NamedTuple):
    """One way to batch texts, without its learning rate.

    Attributes:
      role: see ``Arm``.
      label: the words of tables and plots.
      plan: the batches.
      dropout: of the model; None for the config's.
    """

    role: Role
    label: str
    plan: Plan
    dropout: float | None = None


def text_groups(config: TextStudy, arms: Mapping[str, TextArm]) -> list[Group]:
    """Every arm on every task; with several learning rates ``arm-rate``, and a sweep under the arm's name."""
    count = len(config.learning_rates)
    several = count > 1
    arms = {
        name: arm._replace(dropout=config.dropout if arm.dropout is None else arm.dropout) for name, arm in arms.items()
    }
    found = [
        Arm(
            name + (f"-{rate:g}" if several else ""),
            arm.role,
            functools.partial(_build, config, arm, rate),
            arm.label + (f", {rate:g}" if several else ""),
        )
        for name, arm in arms.items()
        for rate in config.learning_rates
    ]
    sweeps = {name: Sweep(f"{name}-[0-9]*", f"{arm.label}, sweep of {count}") for name, arm in arms.items()}
    dropouts = {arm.dropout for arm in arms.values() if arm.dropout is not None}
    return [
        Group(
            group_name(task),
            config.metric(task, MODALITY, text_metric),
            functools.partial(_load, config, task, dropouts),
            found,
            sweeps if several else {},
        )
        for task in config.tasks
    ]


def group_name(task: str) -> str:
    """The group of a task DATA/MODEL."""
    return task.replace("/", "-")


def text_metric(task: str) -> Metric:
    """What a task DATA/MODEL is judged by, known before its data are read."""
    name = "spearman" if task.startswith("glue/stsb/") else "accuracy"
    return Metric(name, "max", f"test {name}")


def padded(config: Any, **options: Any) -> Plan:
    """Batches of ``config.batch_size`` texts, padded."""

    def plan(task: Task, seed: int, epochs: int) -> PaddedBatches:
        fixed = {"batch_size": config.batch_size, "pad_id": task.tokenizer.pad_id}
        return PaddedBatches(task.train, seed=seed, epochs=epochs, **fixed, **options)

    return plan


def bucketed(config: Any, columns: Callable[[Task, int], Any] = lambda task, seed: task.train, **options: Any) -> Plan:
    """BucketSampler with the study's settings, on ``columns(task, seed)``."""
    options = {"cap": config.batch_size, "max_shapes": config.max_shapes, "tokens": config.tokens} | options

    def plan(task: Task, seed: int, epochs: int) -> BucketSampler:
        costs = study_costs(config, task) if options["max_shapes"] == "auto" else None
        fixed = {"pad_id": task.tokenizer.pad_id, "costs": costs}
        return BucketSampler(columns(task, seed), seed=seed, epochs=epochs, **fixed, **options)

    return plan


def check_epochs(config: StudyConfig) -> None:
    """Refuse a budget that batches planned ahead cannot have."""
    if config.budget.unit != "epochs" or config.budget.amount % 1:
        raise ValueError(
            f"budget={config.budget.amount:g} {config.budget.unit}: the arms cut the same texts into different numbers "
            "of steps, all planned ahead, so this study counts whole 'epochs'."
        )


def _load(config: TextStudy, name: str, dropouts: set[float]) -> dict[float | None, Task]:
    """The task with each dropout rate that its arms have."""
    data, _, model = name.rpartition("/")
    data, model = config.data(data, MODALITY), config.model(model)
    made: dict[str, Any] = {"max_length": config.max_length, **config.made}
    return {rate: text_task(data, model, dropout=rate, **made) for rate in sorted(dropouts)}


def _build(config: TextStudy, arm: TextArm, rate: float, loaded: Mapping[float | None, Task]) -> Program:
    """AdamW on planned batches; its rate falls linearly over the exact number of steps."""
    task = loaded[arm.dropout]
    plan = functools.partial(arm.plan, task)
    loader, steps = planned_loader(plan, config.seeds, int(config.budget.amount), config.batch_size)
    falling = optax.linear_schedule(rate, 0.0, steps)
    return supervised(
        # Half of the key starts the network, the other half is dropout's.
        task._replace(init=lambda key: task.init(jax.random.split(key)[0])),
        adamw_by_batch_size(falling, weight_decay=config.weight_decay, reference=config.batch_size),
        steps=steps,
        loader=loader,
        options=config.train,
        counts=token_counts,
        train_metrics=lambda means: {
            "processed_tokens": round(means["tokens"] * steps),
            "padding_ratio": means["tokens"] / means["real_tokens"],
        },
    )
