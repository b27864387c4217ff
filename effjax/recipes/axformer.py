"""The AxFormer study: what a fine-tuned encoder can do without, by search, chance, weights and Fisher information."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.errors import Count, Limits, NotNegative, Positive, Rate
from effjax.data.ragged import Ragged, padded_columns
from effjax.models.bert import BertClassifier
from effjax.models.pretrained import load_pretrained, save_pretrained
from effjax.models.pruned import Gates
from effjax.optim.batch_size import adamw_by_batch_size
from effjax.recipes.spec import Arm, Claim, Group
from effjax.recipes.texts import MODALITY, TextStudy, bucketed, group_name, text_metric
from effjax.tasks.task import Task
from effjax.tasks.text import text_task
from effjax.train.loaders import planned_loader
from effjax.train.program import Phase, Program
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
    arms = {
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
    task = text_task(config.data(data, MODALITY), config.model(model), **made)
    module = task.module
    if task.classes < 2 or not isinstance(module, BertClassifier):
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
    return _Loaded(task._replace(train=rest, source=source), shape, batches, length)


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
    plan = functools.partial(bucketed(config), task)
    loader, steps = planned_loader(plan, config.seeds, int(config.budget.amount), config.batch_size)
    falling = optax.linear_schedule(config.learning_rates[0], 0.0, steps)
    trained = supervised(
        task._replace(init=lambda key: task.init(jax.random.split(key)[0])),
        adamw_by_batch_size(falling, weight_decay=config.weight_decay, reference=config.batch_size),
        steps=steps,
        loader=loader,
        options=config.train,
    )
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

    def evaluate(state: PrunedState) -> dict[str, Any]:
        spec = PruneSpec.of_gates(jax.device_get(state.gates), shape)
        layers = shape.layers * (shape.params_of("attention") + shape.params_of("mlp"))
        sizes = {"kept_params": 1 - spec.removed_params / layers, "kept_macs": spec.kept_macs(loaded.length)}
        return {**task.evaluate(params_of(state)), **sizes}

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


def _export(task: Task, shape: PruneShape, state: PrunedState, out: Path, *, merged: bool = False) -> None:
    """A Hugging Face folder of the small model, and its ``prune_spec.json``; ``merged`` changes nothing."""
    spec = PruneSpec.of_gates(jax.device_get(state.gates), shape)
    module: Any = task.module
    whole = load_pretrained(task.pretrained.folder, classes=module.classes)
    save_pretrained(out, slice_pretrained(whole, spec, state.train.params))
    spec.save(Path(out) / "prune_spec.json")


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
