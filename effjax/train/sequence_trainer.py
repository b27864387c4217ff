"""The trainer of recurrent networks by FPTT, BPTT and truncated BPTT."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from effjax.recurrent.sequence_problem import SequenceProblem
from effjax.recurrent.through_time import Train
from effjax.tasks.sequence import asked_targets, inputs_and_lengths, network_inputs
from effjax.tasks.sequence_networks import part_loss
from effjax.tasks.task import Task
from effjax.train.loaders import column_loader
from effjax.train.options import TrainOptions
from effjax.train.program import Phase, Program
from effjax.train.trainer import check_options

__all__ = ["through_time"]

PyTree = Any


class ThroughTimeState(NamedTuple):
    """The state of a run; ``carry`` is empty where every sequence starts from zeros."""

    carry: PyTree
    opt: PyTree
    params: PyTree


def through_time(
    task: Task,
    make: Callable[[SequenceProblem, optax.GradientTransformation], Train],
    tx: optax.GradientTransformation,
    *,
    steps: int | None = None,
    batch_size: int = 64,
    streams: bool = False,
    auxiliary: str = "none",
    options: TrainOptions | None = None,
    eval_params: Callable[[PyTree, PyTree], PyTree] | None = None,
    epoch_end: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]] | None = None,
) -> Program:
    """Training of a ``cell_task`` by FPTT, BPTT or truncated BPTT through each batch of sequences.

    Args:
      task: of ``cell_task``.
      make: ``fptt_step``, ``bptt_step`` or ``tbptt_step``, with its keywords in a ``functools.partial``.
      tx: the optimizer, with ``fptt_step`` one update per part.
      steps: of a run, each on one batch; None for as many as a budget allows.
      batch_size: sequences of one step.
      streams: whether row b of a batch continues row b of the batch before, as ``sequence_data`` orders a text with
        ``streams=batch_size``: the hidden state then goes on.
      auxiliary: as for ``part_loss``.
      options: how the run is executed.
      eval_params: ``(state, params) -> params`` to be evaluated, such as ``fptt_eval_params``; the metrics of those
        in training are then reported too, with names that end in ``_w``.
      epoch_end: ``(state, params) -> (state, params)`` at the end of every whole epoch, such as
        ``fptt_epoch_end``; needs ``steps``.

    Returns:
      A ``Program`` whose state is a ``ThroughTimeState``.

    Raises:
      ValueError: options that the task cannot honour, a batch larger than the data, ``epoch_end`` without ``steps``, or
        as ``make``.

    Example:
      >>> from functools import partial
      >>> from effjax.models.sequence import LSTMCell
      >>> from effjax.recurrent.through_time import fptt_step
      >>> from effjax.recurrent.fptt import fptt, fptt_eval_params
      >>> from effjax.tasks.sequence_networks import cell_task
      >>> from effjax.train.loop import fit
      >>> task, tx = cell_task("add-20", LSTMCell(4)), fptt(optax.adam(1e-2), alpha=0.02)
      >>> program = through_time(task, partial(fptt_step, parts=5), tx, steps=2, eval_params=fptt_eval_params)
      >>> sorted(program.judged(fit(program, seed=0).state))
      ['mse', 'mse_w']
    """
    check_options(options or TrainOptions(), task, accumulate=False, remat=False)
    if epoch_end is not None and steps is None:
        raise ValueError("epoch_end needs the number of steps of a run: give steps=.")
    data, network = task.details["data"], task.details["network"]
    if streams and data.told_lengths:
        raise ValueError("streams=True, but the sequences differ in length: a row cannot go on from the one before.")
    loader = column_loader(data.train, batch_size, shuffle=not streams, transform=data.draw)
    tokens = data.kind == "tokens"
    loss = part_loss(data.kind, network, auxiliary=auxiliary)
    problem = SequenceProblem(network.cell, loss, encode=network.encode, terminal=not tokens, time_axis=1)
    train = make(problem, tx)

    def init(key: jax.Array) -> ThroughTimeState:
        params = task.init(key)["params"]
        return ThroughTimeState(network.start(batch_size) if streams else (), tx.init(params), params)

    def step(state: ThroughTimeState, batch: PyTree, aux: PyTree) -> tuple[ThroughTimeState, dict[str, jax.Array]]:
        carry = state.carry if streams else network.start(batch_size)
        inputs, lengths = inputs_and_lengths(network_inputs(data, batch))
        told = {} if lengths is None else {"seq_lengths": lengths}
        targets = asked_targets(data, batch["targets"], lengths)
        opt, params, carry, metrics = train(state.opt, state.params, carry, inputs, targets, **told)
        value = metrics.loss.mean() if tokens else metrics.loss[-1]
        return ThroughTimeState(carry if streams else (), opt, params), {"loss": value}

    def evaluated(state: ThroughTimeState) -> PyTree:
        return {"params": state.params if eval_params is None else eval_params(state.opt, state.params)}

    def evaluate(state: ThroughTimeState) -> dict[str, float]:
        found = task.evaluate({"params": state.params})
        return {**task.evaluate(evaluated(state)), **{f"{name}_w": value for name, value in found.items()}}

    phases: tuple[Phase, ...] = (Phase(step, steps),)
    if epoch_end is not None and steps is not None:
        averaged = epoch_end

        @jax.jit
        def close(state: ThroughTimeState) -> ThroughTimeState:
            opt, params = averaged(state.opt, state.params)
            return state._replace(params=params, opt=opt)

        epoch = len(data.train["targets"]) // batch_size
        whole, rest = divmod(steps, epoch)
        phases = (Phase(step, epoch, leave=close),) * whole + ((Phase(step, rest),) if rest else ())
    return Program(
        task=task,
        init=init,
        phases=phases,
        params=evaluated,
        loader=loader,
        evaluate=None if eval_params is None else evaluate,
        sharding=(("^carry", ("data",)),) if streams else (),
        train_metrics=lambda means: {"train_loss": means["loss"]},
    )
