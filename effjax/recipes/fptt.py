"""The FPTT study: updates in every part of a sequence against one at its end, with and without the regulariser."""

import dataclasses
import fnmatch
import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effjax.core.errors import check_choice, check_number
from effjax.data.sequences import SequenceData, is_text
from effjax.models.linear_recurrence import LRUCell
from effjax.models.sequence import GRUCell, LSTMCell, torch_lstm_init
from effjax.models.sequence_network import StepNetwork, step_network
from effjax.recipes.recurrent import MODALITY, load_sequences
from effjax.recipes.spec import Arm, Claim, Group, StudyConfig, Sweep
from effjax.recurrent.drivers import SequencePart, Train, bptt_step, fptt_step, tbptt_step
from effjax.recurrent.fptt import fptt, fptt_epoch_end, fptt_eval_params, fptt_terminal_loss
from effjax.recurrent.irnn import IncrementalRNNCell
from effjax.recurrent.tarnn import TARNNCell
from effjax.tasks.sequence import sequence_loss, sequence_metric, task_of_functions
from effjax.tasks.task import Task
from effjax.train.loaders import column_loader
from effjax.train.program import Phase, Program
from effjax.train.trainer import check_options

PyTree = Any

CELLS = ("lstm", "torch-lstm", "chrono-lstm", "gru", "irnn", "tarnn", "lru")
SOLVED, PLATEAU = 0.05, 0.14
"""Squared errors of the adding problem: of a solution, and of hardly more than always answering 1 (1/6)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FpttStudy(StudyConfig):
    """Config of the FPTT study."""

    tasks: tuple[str, ...] = ("digits-permuted",)
    """Sequence problems, such as add-200, digits-permuted, noisy-digits-200 or ptb-words-300; in texts the hidden state
    goes on from batch to batch."""
    cells: tuple[Literal["lstm", "torch-lstm", "chrono-lstm", "gru", "irnn", "tarnn", "lru"], ...] = ("lstm",)
    """Recurrent cells, one group of arms for each; torch-lstm starts from PyTorch's initial values, as the authors'
    programs do."""
    hidden: tuple[int, ...] = (64,)
    """Widths of the cell's state, one group of arms for each."""
    parts: int | None = 8
    """Number of parts of a sequence, where part_length is None; a rest is one more, shorter part."""
    part_length: int | None = None
    """Time steps of a part, where parts is None."""
    alphas: tuple[float, ...] = (0.5, 0.1, 0.02)
    """Strengths of FPTT's regulariser, one arm for each."""
    lmbda: float = 1.0
    """Factor of the regulariser's quadratic term; 2 in the authors' language models."""
    auxiliary: Literal["none", "uniform"] = "none"
    """What a part that is not the last is asked for besides the label: nothing, or the uniform distribution."""
    batch_size: int = 64
    """Sequences of one step; in texts, the number of streams."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """The base optimizer of all arms."""
    learning_rate: float = 2e-3
    """Learning rate of all arms but those of bptt_rates."""
    bptt_rates: tuple[float, ...] = ()
    """More learning rates for BPTT, one arm for each, as it makes fewer updates."""
    decay_at: tuple[float, ...] = ()
    """Parts of the run, between 0 and 1, after which the learning rate falls to a tenth."""
    momentum: float = 0.9
    """Momentum of SGD."""
    clip: float | None = 1.0
    """Largest norm of a gradient; None clips nothing."""
    train_rows: int | None = None
    """Number of training sequences used; None takes all."""
    test_rows: int | None = None
    """Number of test sequences used; None takes all."""

    def __post_init__(self):
        super().__post_init__()
        if (self.parts is None) == (self.part_length is None):
            raise ValueError(
                f"parts={self.parts} and part_length={self.part_length}: give one of the two, and None for the other."
            )
        split = "parts" if self.part_length is None else "part_length"
        check_number(split, getattr(self, split), low=2 if split == "parts" else 1, integer=True)
        check_number("batch_size", self.batch_size, low=1, integer=True)
        check_choice("optimizer", self.optimizer, ("adam", "sgd"))
        for name in ("tasks", "cells", "hidden", "alphas"):
            if not getattr(self, name):
                raise ValueError(f"{name}=() leaves nothing to compare. Give at least one.")
        for value in self.decay_at:
            check_number("decay_at", value, low=0, high=1, open_low=True, open_high=True)
        for name in self.cells:
            check_choice("cells", name, CELLS)
        small = lambda patterns: any(fnmatch.fnmatchcase("bptt-small", pattern) for pattern in patterns)
        unwanted = [pattern[1:] for pattern in self.arms if pattern.startswith("!")]
        if self.budget.unit == "device_seconds" and small(self.arms) and not small(unwanted):
            raise ValueError(
                "budget.unit='device_seconds': the arm 'bptt-small' gets as many sequences as the others, so a budget "
                "must not be time. Add '!bptt-small' to arms."
            )


class _Form(NamedTuple):
    """One arm, but for its task.

    Attributes:
      driver: of ``effjax.recurrent.drivers``.
      split: how the sequence is cut: not at all, as the config says, or in the root of its length, with remat.
      alpha: strength of the regulariser; None without it.
      learning_rate: None for the study's.
      small: whether batches are as many times smaller as there are parts.
      epochs: whether the parameters are set to their average after every epoch.
      cell: None for the group's.
    """

    label: str
    role: Literal["baseline", "method", "control", "alternative"]
    driver: Callable[..., Train]
    split: Literal["whole", "parts", "root"] = "parts"
    alpha: float | None = None
    learning_rate: float | None = None
    small: bool = False
    epochs: bool = False
    cell: str | None = None


def groups(config: FpttStudy) -> list[Group]:
    """One group per task, cell and width."""
    sweeps = {}
    if len(config.alphas) > 1:
        sweeps = {"fptt-sweep": Sweep("fptt-[0-9]*", f"FPTT, best of {len(config.alphas)} alphas")}
    return [
        Group(
            f"{task}-{cell}-{width}",
            config.metric(task, MODALITY, sequence_metric),
            functools.partial(_load, config, task, cell, width),
            [
                Arm(name, form.role, functools.partial(_program, config, form, width), form.label)
                for name, form in _forms(config, task).items()
                if form.cell is None or cell == config.cells[0]  # with cells of their own they are the same in each
            ],
            sweeps,
        )
        for task, cell, width in itertools.product(config.tasks, config.cells, config.hidden)
    ]


def _forms(config: FpttStudy, task: str) -> dict[str, _Form]:
    cut = f"{config.parts} parts" if config.part_length is None else f"parts of {config.part_length}"
    rate, least = config.learning_rate, min(config.alphas)
    bptt = _Form("BPTT", "baseline", bptt_step, "whole")
    rival = bptt._replace(role="alternative")
    method = lambda alpha: _Form(f"FPTT, {cut}, alpha {alpha:g}", "method", fptt_step, alpha=alpha)
    found = {
        "bptt": bptt,
        **{
            f"bptt-{other:g}": bptt._replace(label=f"BPTT, rate {other:g} (others {rate:g})", learning_rate=other)
            for other in config.bptt_rates
        },
        "bptt-remat": _Form("BPTT, √T parts computed twice", "alternative", bptt_step, "root"),
        "bptt-losses": _Form(f"BPTT, losses after {cut}", "control", bptt_step),
        "bptt-small": rival._replace(label="BPTT, as many updates by smaller batches", small=True),
        "tbptt": _Form(f"truncated BPTT, {cut}, one update", "alternative", tbptt_step),
        "chunked": _Form(f"an update per part, {cut}", "control", fptt_step),
        **{f"fptt-{alpha:g}": method(alpha) for alpha in config.alphas},
        "fptt": method(config.alphas[-1]),  # where costs are compared, under one name whatever alpha is
        "fptt-epochs": method(least)._replace(label=f"FPTT, alpha {least:g}, averaged every epoch", epochs=True),
        "chrono-lstm": rival._replace(label="BPTT, Chrono-LSTM", cell="chrono-lstm"),
        "lru": rival._replace(label="BPTT, LRU", cell="lru"),
    }
    # Of a text the loss of all tokens is the same however it is cut, and smaller batches would be other streams.
    tokens = config.metric(task, MODALITY, sequence_metric).name == "nll"
    idle = ("bptt-losses", "bptt-small") if tokens else ()
    return {name: form for name, form in found.items() if name not in idle}


# Claims


def claims(config: FpttStudy) -> dict[str, Sequence[Claim]]:
    """What the method promises, and what a user should doubt."""
    found: dict[str, list[Claim]] = {"*": _time_claims() if config.part_length is None else []}
    lengths = [int(task.rpartition("-")[2]) for task in config.tasks if re.search(r"-\d+$", task)]
    grows = config.part_length is not None and len(lengths) == len(config.tasks) and max(lengths) > min(lengths)
    for cell, width in itertools.product(config.cells, config.hidden):
        names = [f"{task}-{cell}-{width}" for task in config.tasks]
        found |= {name: _quality_claims(config, task) for name, task in zip(names, config.tasks, strict=True)}
        if grows:
            short, long = (names[lengths.index(end)] for end in (min(lengths), max(lengths)))
            found[long] += _memory_claims(short, long, max(lengths) / min(lengths))
    return found


def _quality_claims(config: FpttStudy, task: str) -> list[Claim]:
    chunked, methods = f"best chunked|fptt-{min(config.alphas):g}", "best fptt-[0-9]*"
    found = []
    if task.startswith("add-"):
        solvers = ["chunked", *(f"fptt-{alpha:g}" for alpha in config.alphas if alpha <= 0.02)]
        found += [Claim(name, "<=", SOLVED) for name in solvers] + [Claim("bptt", ">=", PLATEAU)]
    found.append(Claim(chunked, "no worse", "bptt", plus=0.05 if task.endswith("-permuted") else 0.0))
    if config.bptt_rates:
        found.append(Claim(chunked, "no worse", "best bptt|bptt-[0-9]*", why="at its best rate BPTT does no better"))
    return [
        *found,
        Claim(methods, "no worse", "chunked", why="the regulariser helps"),
        Claim("chunked", "no worse", "bptt-losses", why="the updates do it, not the losses"),
        Claim(methods, "no worse", "bptt-small", why="as many updates by smaller batches would not do"),
    ]


def _memory_claims(short: str, long: str, times: float) -> list[Claim]:
    """On the temporary bytes of a step, between groups whose sequences differ ``times`` in length."""
    grown = lambda arm, op, factor: Claim(f"{long}/{arm}", op, f"{short}/{arm}", of="temp_bytes", times=factor)
    return [
        *(grown(arm, "<=", 1.05) for arm in ("fptt", "chunked", "tbptt")),
        grown("bptt", ">=", 0.75 * times),
        Claim("fptt", "<=", "bptt-remat", of="temp_bytes"),
    ]


def _time_claims() -> list[Claim]:
    return [
        Claim("fptt", "<=", "bptt", of="step_ms", times=1.25),
        Claim("fptt", "<=", "bptt-remat", of="step_ms", why="BPTT with remat has the exact gradient in little memory"),
        Claim("fptt", "<=", "chunked", of="step_ms", times=1.1),
    ]


# Programs


class _State(NamedTuple):
    """The state of a run; ``carry`` is empty where every sequence starts from zeros."""

    carry: PyTree
    opt: PyTree
    params: PyTree


def _load(config: FpttStudy, task: str, cell: str, width: int) -> Task:
    streams = config.batch_size if is_text(task) and config.own is None else None
    return _task(config, load_sequences(config, task, streams), cell, width)


def _task(config: FpttStudy, data: SequenceData, kind: str, width: int) -> Task:
    dtype = None if config.train.dtype == "float32" else jnp.dtype(config.train.dtype)
    net = step_network(
        _cell(data, kind, width, dtype),
        data.outputs,
        inputs=data.features or None,
        vocabulary=data.vocabulary or None,
        read="all" if data.kind == "tokens" else "last",
        dtype=dtype,
        adjust=torch_lstm_init if kind == "torch-lstm" else lambda key, params: params,
    )
    task = task_of_functions(
        data,
        f"{kind}-{width}",
        init=lambda key: {"params": net.init(key)},
        apply=lambda variables, inputs, key, train: (net.infer(variables["params"], inputs), {}),
        dtype=config.train.dtype,
    )
    inputs = data.test["inputs"][: config.batch_size]
    return task._replace(example_inputs=inputs, details={**task.details, "network": net})


def _cell(data: SequenceData, kind: str, width: int, dtype: Any) -> Any:
    if kind.endswith("lstm"):
        return LSTMCell(width, dtype=dtype, chrono_length=data.length if kind == "chrono-lstm" else None)
    if kind == "gru":
        return GRUCell(width, dtype=dtype)
    if kind == "lru":
        return LRUCell(width, dtype=dtype, r_min=0.99, r_max=0.9999, max_phase=math.pi / 10)
    # Trained step sizes belong to time steps, but are shared by all of them in texts, which go on.
    steps = {"eta_mode": "shared"} if data.kind == "tokens" else {"eta_mode": "per_time", "length": data.length}
    return {"irnn": IncrementalRNNCell, "tarnn": TARNNCell}[kind](width, dtype=dtype, **steps)


def _program(config: FpttStudy, form: _Form, width: int, task: Task) -> Program:
    check_options(config.train, task, accumulate=False, remat=False)
    data: SequenceData = task.details["data"]
    if form.cell:
        task = _task(config, data, form.cell, width)
    net: StepNetwork = task.details["network"]
    length = config.part_length or max(1, data.length // config.parts)
    parts = math.ceil(data.length / length)
    size = max(1, config.batch_size // parts) if form.small else config.batch_size
    epoch = len(data.train["targets"]) // config.batch_size
    steps = config.budget.steps(config.batch_size, lambda _: epoch) * config.batch_size // size
    updates = steps * parts if form.driver is fptt_step else steps
    tx = _optimizer(config, form.learning_rate or config.learning_rate, updates)
    tx = tx if form.alpha is None else fptt(tx, form.alpha, lmbda=config.lmbda)
    train = form.driver(
        net.cell,
        _part_loss(config, data, net),
        tx,
        terminal=data.kind != "tokens",
        encode=net.encode,
        time_axis=1,
        **_split(config, form, data.length),
    )
    goes_on = is_text(data.name) and config.own is None

    def init(key: jax.Array) -> _State:
        params = task.init(key)["params"]
        return _State(net.start(size) if goes_on else (), tx.init(params), params)

    def step(state: _State, batch: PyTree, aux: PyTree) -> tuple[_State, dict[str, jax.Array]]:
        carry = state.carry if goes_on else net.start(size)
        params, opt, carry, metrics = train(state.params, state.opt, carry, batch["inputs"], batch["targets"])
        loss = metrics.loss.mean() if data.kind == "tokens" else metrics.loss[-1]
        return _State(carry if goes_on else (), opt, params), {"loss": loss}

    def averaged(state: _State) -> PyTree:
        return {"params": state.params if form.alpha is None else fptt_eval_params(state.opt, state.params)}

    def evaluate(state: _State) -> dict[str, float]:
        """The averaged parameters, and those in training."""
        found = task.evaluate({"params": state.params})
        return task.evaluate(averaged(state)) | {f"{name}_w": value for name, value in found.items()}

    return Program(
        task=task,
        init=init,
        phases=_epochs(step, steps, epoch) if form.epochs else (Phase(step, steps),),
        params=averaged,
        loader=column_loader(data.train, size, shuffle=not goes_on, transform=data.draw),
        evaluate=None if form.alpha is None else evaluate,
        sharding=(("^carry", ("data",)),) if goes_on else (),
        train_metrics=lambda means: {"train_loss": means["loss"]},
    )


def _epochs(step: Callable[..., Any], steps: int, epoch: int) -> tuple[Phase, ...]:
    """One phase per epoch, at whose end the parameters become their average; a rest of an epoch ends as it is."""

    @jax.jit
    def close(state: _State) -> _State:
        params, opt = fptt_epoch_end(state.params, state.opt)
        return state._replace(params=params, opt=opt)

    whole, rest = divmod(steps, epoch)
    return (Phase(step, epoch, leave=close),) * whole + ((Phase(step, rest),) if rest else ())


def _split(config: FpttStudy, form: _Form, length: int) -> dict[str, Any]:
    if form.split == "whole":
        return {}
    if form.split == "root":
        return {"parts": math.isqrt(length), "remat": True}
    return {"parts": config.parts} if config.part_length is None else {"part_length": config.part_length}


def _optimizer(config: FpttStudy, rate: float, updates: int) -> optax.GradientTransformation:
    falls = {round(part * updates): 0.1 for part in config.decay_at}
    rates = optax.piecewise_constant_schedule(rate, falls) if falls else rate
    base = optax.adam(rates) if config.optimizer == "adam" else optax.sgd(rates, config.momentum)
    return base if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), base)


def _part_loss(config: FpttStudy, data: SequenceData, net: StepNetwork) -> Callable[..., jax.Array]:
    """The loss of one part: of a single target it weighs (p + 1) / P', the share of the sequence seen."""

    def loss(params: PyTree, states: jax.Array, targets: jax.Array, part: SequencePart) -> jax.Array:
        outputs = net.read(params, states)
        if data.kind == "class":
            return fptt_terminal_loss(outputs, targets, part, auxiliary=config.auxiliary)
        value = sequence_loss(data.kind, outputs, targets)
        return value if data.kind == "tokens" else part.progress * value

    return loss
