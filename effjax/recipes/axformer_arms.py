"""Programs of the AxFormer study: a fine-tuned encoder, pruned as an arm chooses, measured, trained on, exported."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.timing import time_interleaved
from effjax.core.tree import copied, wide
from effjax.data.ragged import padded_columns
from effjax.hardness.distillation import kd_loss
from effjax.models.bert import BertClassifier
from effjax.models.pretrained import load_pretrained, save_pretrained
from effjax.models.pruned import Gates
from effjax.optim.batch_size import adamw_by_batch_size
from effjax.recipes.texts import TextStudy, bucketed
from effjax.tasks.task import Task
from effjax.tasks.text import row_weights
from effjax.train.grad import all_finite
from effjax.train.loaders import planned_loader
from effjax.train.logging import write_json
from effjax.train.loop import fit
from effjax.train.program import Loader, Phase, Program
from effjax.train.trainer import TrainState, check_options, supervised
from effjax.transformers.axformer import axformer
from effjax.transformers.axformer_rules import AxformerConfig
from effjax.transformers.evaluator import GatedEvaluator
from effjax.transformers.gated import axformer_step, gated_apply
from effjax.transformers.prune_spec import PruneShape, PruneSpec, all_gates
from effjax.transformers.slicing import mask_params, slice_pretrained
from effjax.transformers.validation import PruneBatch, prune_batches

Prune = Callable[["Fitted"], tuple[PruneSpec, Any]]
"""From a fine-tuned model to what goes, and the parameters of what stays."""


class PrunedState(NamedTuple):
    """The state of a run.

    Attributes:
      train: of the training; of the whole shape, whatever is pruned.
      gates: all on until something is.
    """

    train: TrainState
    gates: Gates


class Loaded:
    """What the arms of a group share; the fine-tuned parameters and the searches of every seed are computed once.

    Args:
      config: of the study.
      task: without the texts that are held out.
      shape: the model's elements.
      held: the texts that are held out for the search.
      length: tokens of the longest one.
      tuned: whether the model comes fine-tuned.
    """

    def __init__(
        self, config: Any, task: Task, shape: PruneShape, held: Sequence[PruneBatch], length: int, tuned: bool
    ):
        self.config, self.task, self.shape = config, task, shape
        self.held, self.length, self.tuned = held, length, tuned
        self.training = _untrained(task) if tuned else _trained(config, task)
        self.search = functools.cache(self._search)
        self._params: dict[int, Any] = {}
        self._evaluators: dict[int | float, GatedEvaluator] = {}

    def seed_of(self, state: TrainState) -> int:
        """The seed that a state was started from; of one that only measures the cost, the first."""
        bits = lambda key: np.asarray(jax.random.key_data(key)).tolist()
        starts = {seed: bits(jax.random.split(jax.random.key(seed))[1]) for seed in self.config.seeds}
        own = bits(state.key)
        return next((seed for seed, start in starts.items() if start == own), self.config.seeds[0])

    def params(self, seed: int) -> Any:
        """The fine-tuned parameters of a seed, as the arm finetuned has them."""
        if seed not in self._params:
            fitted: Any = fit(self.training, seed, options=self.config.train)
            self._params[seed] = fitted.state.params
        return self._params[seed]

    def keep(self, seed: int, params: Any) -> None:
        """Spare the other arms the fine-tuning of this seed."""
        self._params[seed] = params

    def _search(self, seed: int, rules: AxformerConfig) -> PruneSpec:
        return axformer(self.evaluator(seed, rules.top_k), self.shape, config=rules).spec

    def evaluator(self, seed: int, top_k: int | float = 30) -> GatedEvaluator:
        """Of a seed's fine-tuned parameters on the held-out texts; the seeds share one program."""
        params = self.params(seed)
        if top_k not in self._evaluators:
            self._evaluators[top_k] = GatedEvaluator(self.task.module, params, self.held, top_k=top_k)
        return self._evaluators[top_k].with_params(params)

    @functools.cached_property
    def scores(self) -> Callable[[Any, Gates], dict[str, float]]:
        """``(params, gates) -> accuracy and nll`` on the test texts, with hard attention, which no weights hold."""
        columns = self.task.test
        ids: Any = columns["input_ids"]
        padded = padded_columns(columns, int(ids.lengths.max()), self.task.tokenizer.pad_id)
        labels = padded.pop("label")
        batches = prune_batches(padded, labels, batch_size=min(128, len(labels)))
        apply = gated_apply(self.task.module, top_k=self.config.hard_share)
        run = jax.jit(functools.partial(axformer_step, apply))

        def measured(params: Any, gates: Gates) -> dict[str, float]:
            found = [(run(params, gates, (batch.inputs, batch.labels)), batch) for batch in batches]
            real = [(scores, batch.labels, np.asarray(batch.rows) >= 0) for scores, batch in found]
            hits = sum(int((np.asarray(scores.predicted) == labels)[rows].sum()) for scores, labels, rows in real)
            nll = sum(float(np.asarray(scores.losses, np.float64)[rows].sum()) for scores, _, rows in real)
            return {"accuracy": hits / len(labels), "nll": nll / len(labels)}

        return measured


class Fitted(NamedTuple):
    """A fine-tuned model and what it is pruned on.

    Attributes:
      config: of the study.
      loaded: what the arms share.
      params: fine-tuned.
      seed: of the run.
      key: of the run.
    """

    config: Any
    loaded: Loaded
    params: Any
    seed: int
    key: jax.Array

    @property
    def module(self) -> BertClassifier:
        """The whole model."""
        module: Any = self.loaded.task.module
        return module


# Programs


def _trained(config: TextStudy, task: Task) -> Program:
    """AdamW on planned batches, as in all studies on texts."""
    loader, steps = _batches(config, task, int(config.budget.amount))
    return supervised(
        task._replace(init=lambda key: task.init(jax.random.split(key)[0])),
        _adamw(config, steps),
        steps=steps,
        loader=loader,
        options=config.train,
    )


def _batches(config: TextStudy, task: Task, epochs: int) -> tuple[Loader, int]:
    return planned_loader(functools.partial(bucketed(config), task), config.seeds, epochs, config.batch_size)


def _adamw(config: TextStudy, steps: int) -> optax.GradientTransformationExtraArgs:
    falling = optax.linear_schedule(config.learning_rates[0], 0.0, steps)
    return adamw_by_batch_size(falling, weight_decay=config.weight_decay, reference=config.batch_size)


def _still(state: Any, batch: Any, aux: Any) -> tuple[Any, Mapping[str, jax.Array]]:
    """A step that trains nothing: after it a model is pruned that was fine-tuned before."""
    return state._replace(step=state.step + 1), {"loss": jnp.float32(0)}


def _untrained(task: Task) -> Program:
    init = lambda key: TrainState.start(task.init(key), lambda params: (), key)
    return Program(task, init, (Phase(_still, 1),), lambda state: state.variables, Loader(None, 1))


def finetuned(config: Any, loaded: Loaded) -> Program:
    """The whole model; what it learns is kept for the other arms."""
    (phase,) = loaded.training.phases

    def leave(state: PrunedState) -> PrunedState:
        loaded.keep(loaded.seed_of(state.train), state.train.params)
        return state

    phase = Phase(_within(phase.step), phase.steps, leave=leave)
    return _program(loaded, loaded.training.init, (phase,), loaded.training.loader)


def pruned(config: Any, prune: Prune, loaded: Loaded, *, hard: bool = False) -> Program:
    """The fine-tuned model of the same seed, pruned; nothing is trained on."""
    still = _untrained(loaded.task)
    phase = Phase(_within(_still), 1, leave=functools.partial(_pruned, config, loaded, prune))
    return _program(loaded, still.init, (phase,), still.loader, hard=hard)


def trained_on(config: Any, prune: Prune, weight: float, epochs: int, loaded: Loaded) -> Program:
    """The pruned model trained on, from labels and, with a weight, from the answers of the whole fine-tuned model."""
    task = loaded.task
    module: Any = task.module
    check_options(config.train, task, accumulate=False)
    loader, steps = _batches(config, task, epochs)
    if steps < 2:
        raise ValueError(f"train_rows={config.train_rows} give {steps} step: the first one prunes. Give more.")
    tx = _adamw(config, steps - 1)

    def objective(params: Any, state: PrunedState, batch: Any, teacher: Any) -> jax.Array:
        inputs = (batch["input_ids"], batch.get("mask"), batch.get("token_type_ids"))
        variables = {"params": mask_params(module, params, state.gates)}
        logits = wide(module.apply(variables, *inputs, train=True, rngs={"dropout": state.train.step_key}))
        rows = row_weights(batch, logits.shape[:-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["label"], 0))
        value = (rows * losses).sum() / jnp.maximum(rows.sum(), 1)
        if not weight:
            return value
        wanted = task.infer({"params": teacher}, batch)
        return (1 - weight) * value + weight * kd_loss(
            logits, wanted, temperature=config.temperature, mask=batch["weight"] > 0
        )

    def step(state: PrunedState, batch: Any, aux: Any) -> tuple[PrunedState, Mapping[str, jax.Array]]:
        value, grads = jax.value_and_grad(objective)(state.train.params, state, batch, aux)
        train, rows = state.train, batch["weight"].sum()
        updates, opt = tx.update(grads, train.opt, train.params, batch_size=rows)
        metrics = {"loss": value}
        if config.train.nonfinite == "skip":
            metrics["sound"] = all_finite(grads)
        params = optax.apply_updates(train.params, updates)
        return state._replace(train=train.after(params, {}, opt)), metrics

    def leave(state: PrunedState) -> PrunedState:
        found = _pruned(
            config, loaded, prune, state
        )  # of parameters that other arms read: a step may reuse their memory
        return found._replace(train=found.train._replace(params=copied(found.train.params)))

    init = lambda key: TrainState.start(task.init(jax.random.split(key)[0]), tx.init, key)
    aux = (lambda state: loaded.params(loaded.seed_of(state.train))) if weight else None
    phases = (Phase(_within(_still), 1, leave=leave), Phase(step, steps - 1, aux=aux))
    return _program(loaded, init, phases, loader)


def _within(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step on the training's part of the state."""

    def run(state: PrunedState, batch: Any, aux: Any) -> tuple[PrunedState, Mapping[str, jax.Array]]:
        train, metrics = step(state.train, batch, aux)
        return state._replace(train=train), metrics

    return run


def _pruned(config: Any, loaded: Loaded, prune: Prune, state: PrunedState) -> PrunedState:
    seed = loaded.seed_of(state.train)
    spec, params = prune(Fitted(config, loaded, loaded.params(seed), seed, state.train.key))
    return PrunedState(state.train._replace(params=params), jax.tree.map(jnp.asarray, spec.gates()))


def _program(
    loaded: Loaded,
    init: Callable[[jax.Array], TrainState],
    phases: tuple[Phase, ...],
    loader: Loader | None,
    *,
    hard: bool = False,
) -> Program:
    task, shape = loaded.task, loaded.shape
    module: Any = task.module
    params = lambda state: {"params": mask_params(module, state.train.params, state.gates)}
    # What a model scores that collapsed to one class.
    majority = float(np.bincount(np.asarray(task.test["label"])).max() / len(task.test["label"]))
    layers = shape.layers * (shape.params_of("attention") + shape.params_of("mlp"))

    def evaluate(state: PrunedState) -> dict[str, Any]:
        found = loaded.scores(state.train.params, state.gates) if hard else task.evaluate(params(state))
        spec = _spec(state, shape)
        sizes = {"kept_params": 1 - spec.removed_params / layers, "kept_macs": spec.kept_macs(loaded.length)}
        return {**found, **sizes, "majority": majority}

    gates = jax.tree.map(jnp.asarray, all_gates(shape))
    top_k = loaded.config.hard_share if hard else 30
    return Program(
        task,
        lambda key: PrunedState(init(key), gates),
        phases,
        params,
        loader,
        evaluate,
        trained=lambda state: state.train.params,
        export=None if task.pretrained is None else functools.partial(_export, task, shape, top_k),
        train_metrics=lambda means: {},
    )


def _spec(state: PrunedState, shape: PruneShape, top_k: int | float = 30) -> PruneSpec:
    return PruneSpec.of_gates(jax.device_get(state.gates), shape, top_k=top_k)


def _export(
    task: Task, shape: PruneShape, top_k: int | float, state: PrunedState, out: Path, *, merged: bool = False
) -> None:
    """A Hugging Face folder of the small model, ``prune_spec.json``, and ``latency.json``: milliseconds of a batch."""
    spec = _spec(state, shape, top_k)
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
