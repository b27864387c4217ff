"""The AxFormer study: what a fine-tuned encoder can do without, by search, chance, weights and Fisher information."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np

from effjax.core.errors import Count, Limits, NotNegative, Positive, Rate
from effjax.data.ragged import Ragged, padded_columns
from effjax.data.sets import DataSet, load
from effjax.models.bert import BertClassifier
from effjax.models.pretrained import Pretrained, load_pretrained
from effjax.recipes.axformer_arms import Loaded, Prune, finetuned, pruned, trained_on
from effjax.recipes.axformer_choices import (
    at_random,
    by_fisher,
    by_magnitude,
    fewer_layers,
    loose,
    repaired,
    searched,
    to_target,
)
from effjax.recipes.spec import Arm, Claim, Group, Role
from effjax.recipes.texts import MODALITY, TextStudy, group_name, text_metric
from effjax.tasks.task import Task
from effjax.tasks.text import text_task
from effjax.transformers.prune_spec import prune_shape
from effjax.transformers.validation import prune_batches

__all__ = ["CLAIMS", "MODALITY", "OWN_PRESET", "AxformerStudy", "groups"]

OWN_PRESET = "own"

CLAIMS = {
    "*": (
        Claim("axformer", ">=", "finetuned", plus=-0.01),
        Claim("axformer-loose", ">=", "finetuned", plus=-0.01),
        Claim("axformer-loose", "<=", 0.8, of="kept_params", why="it removes a fifth of the layers"),
        Claim("axformer-loose", ">=", "random", why="it matters what goes"),
        Claim("axformer-loose", ">=", "magnitude", why="it matters what goes"),
        Claim("axformer-loose", ">=", "fisher-repair", why="the search is worth its time"),
        Claim("axformer-hard", ">=", "axformer-loose", why="hard attention is a knob of accuracy"),
        Claim("axformer-target", ">=", "finetuned", plus=-0.01, why="at the stated cost"),
        Claim("axformer-distilled", ">=", "axformer-tuned", why="the whole model teaches more than labels"),
        Claim("axformer-distilled", ">=", "small-distilled", why="beside a small model of as many operations"),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxformerStudy(TextStudy):
    """Config of the AxFormer study."""

    validation: Annotated[float, Limits(low=0, high=0.5, open_low=True)] = 0.15
    """Share of the training texts that the search reads, and training does not."""
    group_size: Count = 32
    """Neurons of a feed-forward block that go together; divides the block's width."""
    agreement: Rate = 0.5
    """The authors' rule: more than this share of the validation texts must not be hurt."""
    loose_agreement: Rate = 0.0
    """The same in the arm axformer-loose, whose sizes the rivals have."""
    tolerance: NotNegative = 0.02
    """Nats that a text's loss may rise and still count as not hurt, in the arm axformer-tolerant."""
    ridge: Positive = 1e-3
    """Strength of the pull towards the trained weights in the least-squares repair."""
    fine_tuned: bool | None = None
    """Whether the model is a folder with a classifier fine-tuned on the task, whose head is read and nothing is
    trained; None where the folder has a head for the task's classes."""
    search_batch: Count = 128
    """Texts of a batch of the search; the loss is the mean over such batches, as the authors take it."""
    hard_share: Annotated[float, Limits(low=0, high=1, open_low=True, open_high=True)] = 0.5
    """Share of its seen keys that a query keeps under hard attention, in the arm axformer-hard."""
    cost_target: Annotated[float, Limits(low=0, high=1, open_low=True, open_high=True)] = 0.7
    """Share of the layers' multiply-accumulates that the arm axformer-target may keep."""
    beam: Count = 1
    """Models that its search follows side by side."""
    tune_epochs: Count = 1
    """Epochs for which the arms axformer-tuned and axformer-distilled train the pruned model on."""
    distil_weight: Rate = 0.5
    """Weight of the whole model's answers beside the labels, in the arms that distil."""
    temperature: Positive = 2.0
    """Temperature of both softmaxes in distillation."""

    def __post_init__(self):
        super().__post_init__()
        if len(self.learning_rates) > 1:
            raise ValueError(f"learning_rates={self.learning_rates}: this study fine-tunes with one rate. Give one.")
        if self.scan_layers:
            raise ValueError("scan_layers=True: layers of a pruned model differ in shape. Leave it False.")


def groups(config: AxformerStudy) -> list[Group]:
    """Every arm on every task."""
    return [
        Group(
            group_name(task),
            config.metric(task, MODALITY, text_metric),
            functools.partial(_load, config, task),
            list(_arms(config)),
            about=_about,
        )
        for task in config.tasks
    ]


def _arms(config: AxformerStudy) -> Iterator[Arm]:
    def arm(name: str, role: Role, label: str, prune: Prune, **options: Any) -> Arm:
        return Arm(name, role, functools.partial(pruned, config, prune, **options), label)

    def on(name: str, role: Role, label: str, prune: Prune, weight: float, epochs: int) -> Arm:
        return Arm(name, role, functools.partial(trained_on, config, prune, weight, epochs), label)

    rules = lambda **rules: functools.partial(searched, **rules)
    own, free, share = config.agreement, config.loose_agreement, config.hard_share
    yield Arm("finetuned", "baseline", functools.partial(finetuned, config), "fine-tuned, whole")
    yield arm("axformer", "method", f"AxFormer, agreement {own:g}", rules(agreement=own))
    tolerant = rules(agreement=own, tolerance=config.tolerance)
    yield arm("axformer-tolerant", "method", f"AxFormer, tolerance {config.tolerance:g}", tolerant)
    yield arm("axformer-loose", "method", f"AxFormer, agreement {free:g}", loose)
    hard = rules(agreement=free, hard=True, top_k=share)
    yield arm("axformer-hard", "method", f"+ hard attention, {share:g} of the keys", hard, hard=True)
    epochs, weight = config.tune_epochs, config.distil_weight
    yield on("axformer-tuned", "method", f"+ fine-tuned again, epochs: {epochs}", loose, 0.0, epochs)
    yield on("axformer-distilled", "method", f"+ distilled, epochs: {epochs}", loose, weight, epochs)
    yield arm("axformer-target", "method", f"search to {config.cost_target:g} of the operations", to_target)
    yield arm("random", "control", "as many elements at random", at_random)
    yield arm("magnitude", "alternative", "as many of the smallest weights", by_magnitude)
    yield arm("fisher", "alternative", "Fisher information, as many operations", by_fisher)
    yield arm("fisher-repair", "alternative", "Fisher information and least-squares repair", repaired)
    small = "fewer layers, as many operations, distilled"
    yield on("small-distilled", "alternative", small, fewer_layers, weight, int(config.budget.amount))


def _about(loaded: Loaded) -> list[str]:
    """Where the time went, and how the small model is had."""
    once = "The model came fine-tuned" if loaded.tuned else "Each seed is fine-tuned once, in the arm finetuned"
    found = [
        f"{once}: the training seconds of the other arms are those of pruning and of what they train on. The gated "
        "model that the arms are measured with is as large as the whole one; the sliced one is small."
    ]
    if loaded.task.pretrained is not None:
        found.append(
            "`effjax train` with the words of this comparison and --arm axformer-loose, then `effjax export FOLDER "
            "--out SMALL`, writes the small model as a Hugging Face folder, with its latency beside the whole one's."
        )
    return found


def _load(config: AxformerStudy, name: str) -> Loaded:
    data, _, model = name.rpartition("/")
    made: dict[str, Any] = {"max_length": config.max_length, "dropout": config.dropout, **config.made}
    dataset = config.data(data, MODALITY)
    dataset = load(dataset) if isinstance(dataset, str) else dataset
    task = text_task(dataset, config.model(model), **made)
    tuned = None if config.fine_tuned is False else _tuned(config, dataset, task)
    if tuned is not None:
        rows = {name: made[name] for name in ("max_length", "train_rows", "test_rows")}
        task = text_task(dataset, tuned.module, tokenizer=task.tokenizer, **rows)._replace(pretrained=tuned)
        source = f"{task.source} The classifier of {tuned.folder} is pruned as it is: nothing is trained."
        task = task._replace(source=source, init=lambda key: {"params": tuned.params})
    module = task.module
    if (task.classes or 0) < 2 or not isinstance(module, BertClassifier):
        raise ValueError(
            f"{name} has {task.classes} outputs; the search reads cross-entropies of a classifier's classes."
        )
    rest, held = held_out(task.train, config.validation)
    length = int(held["input_ids"].lengths.max())
    columns = padded_columns(held, length, task.tokenizer.pad_id)
    inputs = {part: column for part, column in columns.items() if part != "label"}
    shape = prune_shape(module, group_size=config.group_size)
    batches = prune_batches(inputs, held["label"], batch_size=min(config.search_batch, len(held["label"])))
    source = f"{task.source} {len(held['label'])} training texts were held out for the search."
    return Loaded(config, task._replace(train=rest, source=source), shape, batches, length, tuned is not None)


def _tuned(config: AxformerStudy, dataset: DataSet, task: Task) -> Pretrained | None:
    """The classifier of a folder that was fine-tuned; None where there is none and none is asked for."""
    encoder: Any = task.pretrained
    folder = None if encoder is None else encoder.folder
    if folder is not None and (task.classes or 0) > 1:
        pool = "mean" if encoder.config.get("pool") == "mean" else "cls"
        found = load_pretrained(folder, classes=task.classes, pool=pool, **_computing(config))
        if not found.initialised:
            _check_labels(folder, encoder.config, dataset.classes)
            return found
    if config.fine_tuned:
        raise ValueError(
            f"fine_tuned=True: {folder or 'a model from scratch'} has no head for {task.classes} classes. Give the "
            "folder of a fine-tuned classifier, or --fine-tuned False to have it fine-tuned first."
        )
    return None


def _computing(config: AxformerStudy) -> dict[str, Any]:
    return {"dtype": jnp.dtype(config.train.dtype), "remat": config.train.remat}


def _check_labels(folder: Path, config: Mapping[str, Any], classes: Sequence[Any]) -> None:
    """Refuse a head whose classes are the data's in another order."""
    named = config.get("id2label") or {}
    theirs = [str(named.get(str(i), "")).lower() for i in range(len(classes))]
    ours = [str(name).lower() for name in classes]
    if sorted(theirs) == sorted(ours) and theirs != ours:
        raise ValueError(
            f"{folder}: its classes are {theirs}, the data's {ours}: the same in another order. Number the data's "
            "labels as the folder does."
        )


def held_out(columns: Mapping[str, Any], share: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows to train on, and a share of them, at least one, drawn once, to search on."""
    rows = len(columns["label"])
    order = np.random.default_rng(0).permutation(rows)
    count = max(1, round(share * rows))
    take = lambda chosen: {
        name: column.take(chosen) if isinstance(column, Ragged) else column[chosen] for name, column in columns.items()
    }
    return take(np.sort(order[count:])), take(np.sort(order[:count]))
