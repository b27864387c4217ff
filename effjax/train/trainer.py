"""The one trainer of everything that is ordinary training by an Optax optimizer."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effjax.tasks.task import Task
from effjax.train.grad import accumulated, all_finite
from effjax.train.loaders import column_loader, examples_in
from effjax.train.options import TrainOptions
from effjax.train.program import Loader, Phase, Program, Rules

__all__ = ["TrainState", "supervised"]

PyTree = Any


class TrainState(NamedTuple):
    """The state of a supervised run.

    Attributes:
      params: what the optimizer moves.
      model: the other collections of the task's variables, such as ``batch_stats``.
      opt: the optimizer's state.
      key: of dropout; folded with ``step`` in every step.
      step: int32, updates done.
    """

    params: PyTree
    model: Mapping[str, PyTree]
    opt: PyTree
    key: jax.Array
    step: jax.Array

    @classmethod
    def start(cls, variables: Mapping[str, PyTree], opt: Callable[[PyTree], PyTree], key: jax.Array) -> "TrainState":
        """The state before the first step; ``opt`` is the optimizer's ``init``, ``key`` the run's."""
        model = dict(variables)
        params = model.pop("params")
        return cls(params, model, opt(params), jax.random.split(key)[1], jnp.int32(0))

    def after(self, params: PyTree, model: Mapping[str, PyTree], opt: PyTree) -> "TrainState":
        """The state after an update."""
        return self._replace(params=params, model={**self.model, **model}, opt=opt, step=self.step + 1)

    @property
    def variables(self) -> dict[str, PyTree]:
        """The task's variables."""
        return {"params": self.params, **self.model}

    @property
    def step_key(self) -> jax.Array:
        """The key of dropout in the next step."""
        return jax.random.fold_in(self.key, self.step)


def supervised(
    task: Task,
    tx: optax.GradientTransformation,
    *,
    steps: int | None = None,
    loader: Loader | None = None,
    batch_size: int = 64,
    options: TrainOptions | None = None,
    eval_params: Callable[[PyTree, PyTree], PyTree] | None = None,
    counts: Callable[[PyTree], Mapping[str, Any]] | None = None,
    period: int = 1,
    sharding: Rules = (),
    train_metrics: Callable[[Mapping[str, float]], Mapping[str, float]] = dict,
) -> Program:
    """Ordinary training of a task's network: one update per batch.

    ``tx.update`` is given what optimizers ask for: ``value`` (the loss), ``grad``, ``value_fn`` (``params -> loss`` on
    the same batch, with the same dropout and the same running statistics) and ``batch_size`` (real examples).

    Args:
      task: what is learned.
      tx: the optimizer.
      steps: of a run; None for as many as a budget allows.
      loader: of the batches; None for the rows of ``task.train`` in a seeded order, each batch completed by
        ``task.details["draw"]`` if there is one, or for a ``full_batch`` task all of it in every step.
      batch_size: rows of one step, where there is no ``loader``.
      options: how the run is executed: ``accumulate`` is done here; ``dtype`` and ``remat`` must be the task's.
      eval_params: ``(state, params) -> params``, what is evaluated, from the optimizer's state and what is trained;
        None where the two are the same.
      counts: ``batch -> {name: number}``, more step metrics.
      period: steps after which the cost of a step repeats.
      sharding: rules over the paths of ``TrainState``.
      train_metrics: see ``Program``.

    Returns:
      A ``Program`` whose state is a ``TrainState``.

    Raises:
      ValueError: options that the task cannot honour, or a batch larger than the data.

    Example:
      >>> from effjax.tasks.image import image_task
      >>> program = supervised(image_task("digits", "mlp"), optax.adam(1e-3), steps=3)
      >>> from effjax.train.loop import fit
      >>> int(fit(program, seed=0).state.step)
      3
    """
    options = options or TrainOptions()
    check_options(options, task, accumulate=not task.full_batch)
    tx = optax.with_extra_args_support(tx)
    if loader is None and not task.full_batch:
        loader = column_loader(task.train, batch_size, transform=task.details.get("draw"))

    def loss(params: PyTree, batch: PyTree, model: PyTree, key: jax.Array) -> tuple[jax.Array, Any]:
        return task.loss({"params": params, **model}, batch, key)

    value_and_grad = accumulated(jax.value_and_grad(loss, has_aux=True), options.accumulate, weight=task.weight)
    without_grad = lambda *arguments: (loss(*arguments), ())
    value_of = accumulated(without_grad, options.accumulate, weight=task.weight)

    def init(key: jax.Array) -> TrainState:
        return TrainState.start(task.init(key), tx.init, key)

    def step(state: TrainState, batch: PyTree, aux: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = aux if batch is None else batch
        key = state.step_key
        (value, (model, metrics)), grads = value_and_grad(state.params, batch, state.model, key)
        updates, opt = tx.update(
            grads,
            state.opt,
            state.params,
            value=value,
            grad=grads,
            value_fn=lambda params: value_of(params, batch, state.model, key)[0][0],
            batch_size=examples_in(batch),
        )
        metrics = {**metrics, "loss": value, **(counts(batch) if counts else {})}
        if options.nonfinite == "skip":
            metrics["sound"] = all_finite(grads)
        return state.after(optax.apply_updates(state.params, updates), model, opt), metrics

    def variables(state: TrainState) -> PyTree:
        return (
            state.variables
            if eval_params is None
            else {**state.variables, "params": eval_params(state.opt, state.params)}
        )

    aux = (lambda state: task.train) if task.full_batch and loader is None else None
    return Program(
        task=task,
        init=init,
        phases=(Phase(step, steps, aux=aux, period=period),),
        params=variables,
        loader=loader,
        sharding=sharding,
        trained=None,
        train_metrics=train_metrics,
    )


def with_knots(program: Program, knots: Sequence[int], leave: Callable[..., tuple[Any, Any]]) -> Program:
    """A program of ``supervised`` that is left for a moment at its knots.

    Args:
      program: of a known number of steps.
      knots: increasing steps, counted from 0, at whose start ``leave`` is called.
      leave: ``(variables, opt_state) -> (variables, opt_state)`` on the host, such as ``next_link``.

    Returns:
      The program with one phase per link; all of them share one step.

    Example:
      >>> from effjax.tasks.image import image_task
      >>> program = supervised(image_task("digits", "mlp"), optax.adam(1e-3), steps=6)
      >>> [phase.steps for phase in with_knots(program, (2,), lambda variables, opt: (variables, opt)).phases]
      [2, 4]
    """
    (phase,) = program.phases

    def left(state: TrainState) -> TrainState:
        model, opt = leave(state.variables, state.opt)
        model = dict(model)
        return state._replace(params=model.pop("params"), model=model, opt=opt)

    *links, last = (after - before for before, after in itertools.pairwise((0, *knots, program.total_steps)))
    phases = (*(phase._replace(steps=steps, leave=left) for steps in links), phase._replace(steps=last))
    return program._replace(phases=phases)


def check_options(
    options: TrainOptions, task: Task, *, accumulate: bool = True, remat: bool = True, dtype: bool = True
) -> None:
    """Refuse options that a run of ``task`` would not honour.

    Args:
      options: of the run.
      task: what is learned.
      accumulate: whether the trainer accumulates gradients.
      remat: whether the network can recompute activations.
      dtype: whether the network can compute in another dtype.

    Raises:
      ValueError: an option that would do nothing.
    """
    if options.accumulate != 1 and not accumulate:
        raise ValueError(
            f"train.accumulate={options.accumulate}: a step of {task.name!r} is no mean over rows that could be split. "
            "Leave it at 1."
        )
    for name, able, here in (("remat", remat, task.remat), ("dtype", dtype, task.dtype)):
        wanted = getattr(options, name)
        if wanted != here:
            way = f"Make the task with {name}={wanted!r}" if able else f"Leave it at {here!r}"
            raise ValueError(f"train.{name}={wanted!r}, but {task.name!r} was made with {name}={here!r}. {way}.")
