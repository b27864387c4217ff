"""The FPTT study: updates in every part of a sequence against one at its end, with and without the regulariser."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import optax

from effjax.core.errors import check_choice, check_number
from effjax.data.sequences import SequenceData, is_text
from effjax.models.sequence import torch_lstm_init
from effjax.recipes.recurrent import MODALITY, load_sequences
from effjax.recipes.spec import Arm, Claim, Group, Role, StudyConfig, Sweep, chosen
from effjax.recurrent.fptt import fptt, fptt_epoch_end, fptt_eval_params
from effjax.recurrent.through_time import Train, bptt_step, fptt_step, tbptt_step
from effjax.tasks.sequence import example_inputs, sequence_metric
from effjax.tasks.sequence_layers import LAYERS, sequence_cell
from effjax.tasks.sequence_networks import cell_task
from effjax.tasks.task import Task
from effjax.train.program import Program
from effjax.train.sequence_trainer import through_time

CELLS = {
    "lstm": "lstm",
    "torch-lstm": "lstm",
    "chrono-lstm": "chrono-lstm",
    "gru": "gru",
    "irnn": "irnn",
    "tarnn": "tarnn-convex",
    "lru": "lru-long",
}
"""The study's cells, by their names among ``LAYERS``."""
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
        if self.budget.unit == "device_seconds" and chosen("bptt-small", self.arms):
            raise ValueError(
                "budget.unit='device_seconds': the arm 'bptt-small' gets as many sequences as the others, so a budget "
                "must not be time. Add '!bptt-small' to arms."
            )


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
            list(_arms(config, task, cell, width)),
            sweeps,
        )
        for task, cell, width in itertools.product(config.tasks, config.cells, config.hidden)
    ]


def _arms(config: FpttStudy, task: str, cell: str, width: int) -> Iterator[Arm]:
    def arm(name: str, role: Role, label: str, make: Callable[..., Train] = bptt_step, **settings: Any) -> Arm:
        return Arm(name, role, functools.partial(_program, config, width, make, **settings), label)

    cut = f"{config.parts} parts" if config.part_length is None else f"parts of {config.part_length}"
    least, last = min(config.alphas), config.alphas[-1]
    # Of a text the loss of all tokens is the same however it is cut, and smaller batches would be other streams.
    tokens = config.metric(task, MODALITY, sequence_metric).name == "nll"
    yield arm("bptt", "baseline", "BPTT")
    for rate in dict.fromkeys(config.bptt_rates):
        label = f"BPTT, rate {rate:g} (others {config.learning_rate:g})"
        yield arm(f"bptt-{rate:g}", "baseline", label, learning_rate=rate)
    yield arm("bptt-remat", "alternative", "BPTT, √T parts computed twice", split="root")
    if not tokens:
        yield arm("bptt-losses", "control", f"BPTT, losses after {cut}", split="parts")
        yield arm("bptt-small", "alternative", "BPTT, as many updates by smaller batches", small=True)
    yield arm("tbptt", "alternative", f"truncated BPTT, {cut}, one update", tbptt_step, split="parts")
    yield arm("chunked", "control", f"an update per part, {cut}", fptt_step, split="parts")
    method = functools.partial(arm, role="method", make=fptt_step, split="parts")
    for alpha in dict.fromkeys(config.alphas):
        yield method(f"fptt-{alpha:g}", label=f"FPTT, {cut}, alpha {alpha:g}", alpha=alpha)
    # Where costs are compared, under one name whatever alpha is.
    yield method("fptt", label=f"FPTT, {cut}, alpha {last:g}", alpha=last)
    yield method("fptt-epochs", label=f"FPTT, alpha {least:g}, averaged every epoch", alpha=least, epochs=True)
    if cell == config.cells[0]:  # with cells of their own these are the same in each group
        yield arm("chrono-lstm", "alternative", "BPTT, Chrono-LSTM", cell="chrono-lstm")
        yield arm("lru", "alternative", "BPTT, LRU", cell="lru")


# Claims


def claims(config: FpttStudy) -> dict[str, Sequence[Claim]]:
    """What the method promises, and what a user should doubt."""
    found: dict[str, Sequence[Claim]] = {"*": _TIME_CLAIMS if config.part_length is None else ()}
    lengths = [int(task.rpartition("-")[2]) for task in config.tasks if re.search(r"-\d+$", task)]
    grows = config.part_length is not None and len(lengths) == len(config.tasks) and max(lengths) > min(lengths)
    for cell, width in itertools.product(config.cells, config.hidden):
        names = [f"{task}-{cell}-{width}" for task in config.tasks]
        found |= {name: _quality_claims(config, task) for name, task in zip(names, config.tasks, strict=True)}
        if grows:
            short, long = (names[lengths.index(end)] for end in (min(lengths), max(lengths)))
            found[long] = (*found[long], *_memory_claims(short, long, max(lengths) / min(lengths)))
    return found


_TIME_CLAIMS = (
    Claim("fptt", "<=", "bptt", of="step_ms", times=1.25),
    Claim("fptt", "<=", "bptt-remat", of="step_ms", why="BPTT with remat has the exact gradient in little memory"),
    Claim("fptt", "<=", "chunked", of="step_ms", times=1.1),
)


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


# Programs


def _streams(config: FpttStudy, task: str) -> bool:
    """Whether the hidden state goes on from batch to batch."""
    return config.own is None and is_text(task)


def _load(config: FpttStudy, task: str, cell: str, width: int) -> Task:
    streams = config.batch_size if _streams(config, task) else None
    return _task(config, load_sequences(config, task, streams), cell, width)


def _task(config: FpttStudy, data: SequenceData, kind: str, width: int) -> Task:
    name, dtype = CELLS[kind], config.train.dtype
    if data.kind == "tokens" and f"{name}-shared" in LAYERS:
        name = f"{name}-shared"  # texts go on, so that no step size can belong to a time step
    cell = sequence_cell(name, width, length=data.length, dtype=dtype)
    start = {"adjust": torch_lstm_init} if kind == "torch-lstm" else {}
    task = cell_task(data, cell, name=f"{kind}-{width}", dtype=dtype, **start)
    return task._replace(example_inputs=example_inputs(data, config.batch_size))


def _program(
    config: FpttStudy,
    width: int,
    make: Callable[..., Train],
    task: Task,
    *,
    split: Literal["whole", "parts", "root"] = "whole",
    alpha: float | None = None,
    learning_rate: float | None = None,
    small: bool = False,
    epochs: bool = False,
    cell: str | None = None,
) -> Program:
    """The program of an arm.

    Args:
      config: of the study.
      width: of the cell's state.
      make: ``fptt_step``, ``bptt_step`` or ``tbptt_step``.
      task: of the group.
      split: how a sequence is cut: not at all, as the config says, or in the root of its length, with remat.
      alpha: strength of the regulariser; None without it.
      learning_rate: None for the study's.
      small: whether batches are as many times smaller as there are parts.
      epochs: whether the parameters are set to their average after every epoch.
      cell: None for the group's.
    """
    data: SequenceData = task.details["data"]
    if cell:
        task = _task(config, data, cell, width)
    parts = math.ceil(data.length / (config.part_length or max(1, data.length // (config.parts or 1))))
    size = max(1, config.batch_size // parts) if small else config.batch_size
    epoch = len(data.train["targets"]) // config.batch_size
    steps = config.budget.steps(config.batch_size, lambda _: epoch) * config.batch_size // size
    tx = _optimizer(config, learning_rate or config.learning_rate, steps * parts if make is fptt_step else steps)
    cuts = {
        "whole": {},
        "parts": {"parts": config.parts, "part_length": config.part_length},
        "root": {"parts": math.isqrt(data.length), "remat": True},
    }
    return through_time(
        task,
        functools.partial(make, **cuts[split]),
        tx if alpha is None else fptt(tx, alpha, lmbda=config.lmbda),
        steps=steps,
        batch_size=size,
        streams=_streams(config, data.name),
        auxiliary=config.auxiliary,
        options=config.train,
        eval_params=None if alpha is None else fptt_eval_params,
        epoch_end=fptt_epoch_end if epochs else None,
    )


def _optimizer(config: FpttStudy, rate: float, updates: int) -> optax.GradientTransformation:
    falls = {round(part * updates): 0.1 for part in config.decay_at}
    rates = optax.piecewise_constant_schedule(rate, falls) if falls else rate
    base = optax.adam(rates) if config.optimizer == "adam" else optax.sgd(rates, config.momentum)
    return base if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), base)
