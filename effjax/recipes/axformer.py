"""The AxFormer study: what a fine-tuned encoder can do without, by search, chance, weights and Fisher information."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.errors import Count, Limits, NotNegative, Positive, Rate
from effjax.core.timing import time_interleaved
from effjax.data.ragged import Ragged, padded_columns
from effjax.data.sets import DataSet, load
from effjax.models.bert import BertClassifier
from effjax.models.pretrained import Pretrained, load_pretrained, save_pretrained
from effjax.models.pruned import Gates
from effjax.optim.batch_size import adamw_by_batch_size
from effjax.recipes.spec import Arm, Claim, Group, Role
from effjax.recipes.texts import MODALITY, TextStudy, bucketed, group_name, text_metric
from effjax.tasks.task import Task
from effjax.tasks.text import text_task
from effjax.train.loaders import planned_loader
from effjax.train.logging import write_json
from effjax.train.program import Loader, Phase, Program
from effjax.train.trainer import TrainState, supervised
from effjax.transformers.axformer import axformer
from effjax.transformers.axformer_rules import AxformerConfig
from effjax.transformers.evaluator import GatedEvaluator
from effjax.transformers.fisher import fisher_spec, gate_fisher
from effjax.transformers.gated import gated_apply
from effjax.transformers.prune_rivals import magnitude_scores, random_spec, ranked_spec
from effjax.transformers.prune_spec import PruneShape, PruneSpec, all_gates, prune_shape
from effjax.transformers.repair import repair_outputs
from effjax.transformers.slicing import mask_params, slice_pretrained
from effjax.transformers.validation import PruneBatch, prune_batches

__all__ = ["CLAIMS", "MODALITY", "AxformerStudy", "groups"]

CLAIMS = {
    "*": (
        Claim("axformer", ">=", "finetuned", plus=-0.01),
        Claim("axformer-loose", ">=", "finetuned", plus=-0.01),
        Claim("axformer-loose", "<=", 0.8, of="kept_params", why="it removes a fifth of the layers"),
        Claim("axformer-loose", ">=", "random", why="it matters what goes"),
        Claim("axformer-loose", ">=", "magnitude", why="it matters what goes"),
        Claim("axformer-loose", ">=", "fisher-repair", why="the search is worth its time"),
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

    def __post_init__(self):
        super().__post_init__()
        if len(self.learning_rates) > 1:
            raise ValueError(f"learning_rates={self.learning_rates}: this study fine-tunes with one rate. Give one.")
        if self.scan_layers:
            raise ValueError("scan_layers=True: layers of a pruned model differ in shape. Leave it False.")


def groups(config: AxformerStudy) -> list[Group]:
    """Every arm on every task."""
    arms: dict[str, tuple[Role, str, Any]] = {
        "finetuned": ("baseline", "fine-tuned, whole", None),
        "axformer": ("method", f"AxFormer, agreement {config.agreement:g}", _searched(agreement=config.agreement)),
        "axformer-tolerant": (
            "method",
            f"AxFormer, tolerance {config.tolerance:g}",
            _searched(agreement=config.agreement, tolerance=config.tolerance),
        ),
        "axformer-loose": ("method", f"AxFormer, agreement {config.loose_agreement:g}", _loose),
        "random": ("control", "as many elements at random", _random),
        "magnitude": ("alternative", "as many of the smallest weights", _magnitude),
        "fisher": ("alternative", "Fisher information, as many operations", _fisher),
        "fisher-repair": ("alternative", "Fisher information and least-squares repair", _repaired),
    }
    return [
        Group(
            group_name(task),
            config.metric(task, MODALITY, text_metric),
            functools.partial(_load, config, task),
            [
                Arm(name, role, functools.partial(_build, config, prune), label)
                for name, (role, label, prune) in arms.items()
            ],
        )
        for task in config.tasks
    ]


class PrunedState(NamedTuple):
    """The state of a run.

    Attributes:
      train: of the fine-tuning.
      gates: all on until it is over.
    """

    train: TrainState
    gates: Gates


class _Loaded(NamedTuple):
    """What the arms of a group share."""

    task: Task
    shape: PruneShape
    held: list[PruneBatch]
    length: int
    tuned: bool


class _Fitted(NamedTuple):
    """A fine-tuned model and what it is pruned on."""

    config: AxformerStudy
    loaded: _Loaded
    module: BertClassifier
    params: Any
    key: jax.Array


def _load(config: AxformerStudy, name: str) -> _Loaded:
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
    return _Loaded(task._replace(train=rest, source=source), shape, batches, length, tuned is not None)


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


def _build(config: AxformerStudy, prune: Any, loaded: _Loaded) -> Program:
    """AdamW as in all studies on texts; once it is over, the gates are chosen and the weights masked."""
    task, shape = loaded.task, loaded.shape
    module: Any = task.module
    trained = _untrained(task) if loaded.tuned else _trained(config, task)
    (phase,) = trained.phases

    def init(key: jax.Array) -> PrunedState:
        return PrunedState(trained.init(key), jax.tree.map(jnp.asarray, all_gates(shape)))

    def step(state: PrunedState, batch: Any, aux: Any) -> tuple[PrunedState, Mapping[str, jax.Array]]:
        train, metrics = phase.step(state.train, batch, aux)
        return state._replace(train=train), metrics

    def leave(state: PrunedState) -> PrunedState:
        spec, params = prune(_Fitted(config, loaded, module, state.train.params, state.train.key))
        gates = jax.tree.map(jnp.asarray, spec.gates())
        return PrunedState(state.train._replace(params=params), gates)

    def params_of(state: PrunedState) -> dict[str, Any]:
        return {"params": mask_params(module, state.train.params, state.gates)}

    # What a model scores that collapsed to one class.
    majority = float(np.bincount(np.asarray(task.test["label"])).max() / len(task.test["label"]))

    def evaluate(state: PrunedState) -> dict[str, Any]:
        spec = PruneSpec.of_gates(jax.device_get(state.gates), shape)
        layers = shape.layers * (shape.params_of("attention") + shape.params_of("mlp"))
        sizes = {"kept_params": 1 - spec.removed_params / layers, "kept_macs": spec.kept_macs(loaded.length)}
        return {**task.evaluate(params_of(state)), **sizes, "majority": majority}

    return Program(
        task,
        init,
        (Phase(step, phase.steps, leave=None if prune is None else leave),),
        params_of,
        trained.loader,
        evaluate,
        trained=lambda state: state.train.params,
        export=None if task.pretrained is None else functools.partial(_export, task, shape),
        train_metrics=lambda means: {},
    )


def _trained(config: AxformerStudy, task: Task) -> Program:
    """AdamW on planned batches, as in all studies on texts."""
    plan = functools.partial(bucketed(config), task)
    loader, steps = planned_loader(plan, config.seeds, int(config.budget.amount), config.batch_size)
    falling = optax.linear_schedule(config.learning_rates[0], 0.0, steps)
    return supervised(
        task._replace(init=lambda key: task.init(jax.random.split(key)[0])),
        adamw_by_batch_size(falling, weight_decay=config.weight_decay, reference=config.batch_size),
        steps=steps,
        loader=loader,
        options=config.train,
    )


def _untrained(task: Task) -> Program:
    """A step that does nothing: the model was fine-tuned before."""

    def init(key: jax.Array) -> TrainState:
        return TrainState.start(task.init(key), lambda params: (), key)

    def step(state: TrainState, batch: Any, aux: Any) -> tuple[TrainState, Mapping[str, jax.Array]]:
        return state._replace(step=state.step + 1), {"loss": jnp.float32(0)}

    return Program(task, init, (Phase(step, 1),), lambda state: state.variables, Loader(None, 1))


def _export(task: Task, shape: PruneShape, state: PrunedState, out: Path, *, merged: bool = False) -> None:
    """A Hugging Face folder of the small model, ``prune_spec.json``, and ``latency.json``: milliseconds of a batch."""
    spec = PruneSpec.of_gates(jax.device_get(state.gates), shape)
    module: Any = task.module
    whole = load_pretrained(task.pretrained.folder, classes=module.classes, pool=module.pool)
    small = slice_pretrained(whole, spec, state.train.params)
    save_pretrained(out, small)
    spec.save(Path(out) / "prune_spec.json")
    models = {"whole": (whole.module, state.train.params), "small": (small.module, small.params)}
    ids = np.ones((32, task.example_inputs["input_ids"].shape[1]), np.int32)
    calls = {}
    for name, (own, params) in models.items():
        run = jax.jit(own.apply)
        for rows in (1, 32):
            calls[name, rows] = functools.partial(run, {"params": params}, ids[:rows])
    found = {f"{name}, batch {rows}": timing.median_ms for (name, rows), timing in time_interleaved(calls).items()}
    write_json(Path(out) / "latency.json", {"tokens": ids.shape[1], "median_ms": found})


def _search(fitted: _Fitted, **rules: Any) -> PruneSpec:
    # Hard attention is not in the weights and saves nothing.
    config = AxformerConfig(hard=False, loss_batch=fitted.config.search_batch, **rules)
    evaluator = GatedEvaluator(fitted.module, fitted.params, fitted.loaded.held, top_k=config.top_k)
    return axformer(evaluator, fitted.loaded.shape, config=config).spec


def _searched(**rules: Any) -> Any:
    return lambda fitted: (_search(fitted, **rules), fitted.params)


def _found(fitted: _Fitted) -> PruneSpec:
    return _search(fitted, agreement=fitted.config.loose_agreement)


def _loose(fitted: _Fitted) -> tuple[PruneSpec, Any]:
    return _found(fitted), fitted.params


def _random(fitted: _Fitted) -> tuple[PruneSpec, Any]:
    return random_spec(fitted.key, _found(fitted)), fitted.params


def _magnitude(fitted: _Fitted) -> tuple[PruneSpec, Any]:
    scores = magnitude_scores(fitted.module, fitted.params, group_size=fitted.config.group_size)
    return ranked_spec(scores, _found(fitted)), fitted.params


def _fisher(fitted: _Fitted) -> tuple[PruneSpec, Any]:
    loaded, found = fitted.loaded, _found(fitted)
    share = found.kept_macs(loaded.length)
    if share >= 1 or share <= 0:
        return PruneSpec(loaded.shape) if share >= 1 else found, fitted.params
    fisher = gate_fisher(gated_apply(fitted.module), fitted.params, loaded.shape, loaded.held)
    return fisher_spec(fisher, loaded.shape, macs=share, length=loaded.length), fitted.params


def _repaired(fitted: _Fitted) -> tuple[PruneSpec, Any]:
    spec, params = _fisher(fitted)
    held = fitted.loaded.held
    return spec, repair_outputs(fitted.module, params, spec, held, ridge=fitted.config.ridge)
