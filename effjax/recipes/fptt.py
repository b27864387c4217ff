"""The FPTT study: updates in every part of a sequence against one at its end, with and without the regulariser."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effjax.core.errors import check_choice, check_number
from effjax.data.pipeline import batches
from effjax.data.sequences import SequenceData, sequence_data
from effjax.recipes.fptt_claims import memory_claims, quality_claims, time_claims
from effjax.recipes.fptt_network import CELLS, Network, network
from effjax.recipes.recurrent import axis
from effjax.recipes.spec import Arm, Axis, Claim, StudyConfig, Sweep
from effjax.recurrent.drivers import SequencePart, Train, bptt_step, fptt_step, tbptt_step
from effjax.recurrent.fptt import fptt, fptt_epoch_end, fptt_eval_params, fptt_terminal_loss
from effjax.tasks.sequence import sequence_evaluator, sequence_loss
from effjax.train.program import Program

PyTree = Any

OTHERS = ("bptt-losses", "bptt-small", "tbptt", "fptt-epochs", "chrono-lstm", "lru")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FpttStudy(StudyConfig):
    """Config of the FPTT study."""

    tasks: tuple[str, ...] = ("digits-permuted",)
    """sequence data: add-200, digits-permuted, tiny_shakespeare-chars-96, noisy-digits-200, mnist-permuted,
    cifar10-pixels, ptb-words-300, ...; of texts, the hidden state goes on from batch to batch"""
    compare: Literal["quality", "memory", "overhead"] = "quality"
    """the arms: rivals in quality; or (for --cost-only) what a step needs as sequences grow, in memory or in time"""
    cells: tuple[Literal["lstm", "torch-lstm", "chrono-lstm", "gru", "irnn", "tarnn", "lru"], ...] = ("lstm",)
    """recurrent cells, one group of arms each; torch-lstm starts from PyTorch's initial values, as the authors' do"""
    hidden: tuple[int, ...] = (64,)
    """widths of its state, one group of arms each"""
    parts: int | None = 8
    """parts of a sequence, where it is not part_length that is fixed; a rest is one more, shorter part"""
    part_length: int | None = None
    """steps of a part"""
    alphas: tuple[float, ...] = (0.5, 0.1, 0.02)
    """strengths of FPTT's regulariser, one arm each"""
    lmbda: float = 1.0
    """factor of its quadratic term; 2 in the authors' language models"""
    auxiliary: Literal["none", "uniform"] = "none"
    """what a part that is not the last is asked for besides the label: nothing, or the uniform distribution"""
    batch_size: int = 64
    """sequences of one step; of a text, streams"""
    optimizer: Literal["adam", "sgd"] = "adam"
    """the base optimizer of all arms"""
    learning_rate: float = 2e-3
    """of all arms but those of bptt_rates"""
    bptt_rates: tuple[float, ...] = ()
    """more learning rates for BPTT, one arm each: it makes fewer updates"""
    decay_at: tuple[float, ...] = ()
    """parts of the run after which the learning rate falls to a tenth"""
    momentum: float = 0.9
    """of SGD"""
    clip: float | None = 1.0
    """largest norm of a gradient"""
    train_rows: int | None = None
    """training sequences used; all when None"""
    test_rows: int | None = None
    """test sequences used; all when None"""
    others: tuple[str, ...] = OTHERS
    """arms besides BPTT, updates in every part without the regulariser, and FPTT"""

    def __post_init__(self):
        super().__post_init__()
        if (self.parts is None) == (self.part_length is None):
            raise ValueError(
                f"parts={self.parts} and part_length={self.part_length}: give one of the two, and None for the other."
            )
        split = "parts" if self.part_length is None else "part_length"
        check_number(split, getattr(self, split), low=2 if split == "parts" else 1, integer=True)
        check_number("batch_size", self.batch_size, low=1, integer=True)
        check_choice("compare", self.compare, ("quality", "memory", "overhead"))
        check_choice("optimizer", self.optimizer, ("adam", "sgd"))
        for name in ("tasks", "cells", "hidden", "alphas"):
            if not getattr(self, name):
                raise ValueError(f"{name}=() leaves nothing to compare. Give at least one.")
        for value in self.decay_at:
            check_number("decay_at", value, low=0, high=1, open_low=True, open_high=True)
        for names, legal in (("cells", CELLS), ("others", OTHERS)):
            for name in getattr(self, names):
                check_choice(names, name, legal)
        if self.compare == "memory" and not all(re.search(r"-\d+$", task) for task in self.tasks):
            raise ValueError(f"tasks={self.tasks}: compare='memory' needs names that end in their length, as add-1000.")
        if "bptt-small" in self.others and self.budget.unit == "device_seconds":
            raise ValueError("others: 'bptt-small' gets as many sequences as the others, so a budget must not be time.")
        if self.train.accumulate != 1 or self.train.remat:
            raise ValueError(
                f"train.accumulate={self.train.accumulate} and train.remat={self.train.remat}: FPTT updates within a "
                "batch and holds one part of it in memory. Choose batch_size and parts instead."
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


def arms(config: FpttStudy) -> dict[str, Arm]:
    """Every arm of every task, cell and width, as ``task-cell-width/arm``."""
    return {
        f"{group.name}/{name}": Arm(
            build=lambda group=group, form=form: _program(config, group, form),
            group=group.name,
            label=form.label,
            role=form.role,
        )
        for group in _groups(config)
        for name, form in _forms(config, group.task).items()
        if form.cell is None or group.cell == config.cells[0]  # with cells of their own they are the same in each
    }


def sweeps(config: FpttStudy) -> dict[str, Sweep]:
    """FPTT over its strengths."""
    if config.compare != "quality" or len(config.alphas) < 2:
        return {}
    return {
        f"{group}/fptt-sweep": Sweep(
            members=[f"{group}/fptt-{alpha:g}" for alpha in config.alphas],
            metric=judged.metric,
            goal=judged.goal,
            group=group,
            label=f"FPTT, best of {len(config.alphas)} alphas",
        )
        for group, judged in axes(config).items()
    }


def axes(config: FpttStudy) -> dict[str, Axis]:
    """What each group is judged by."""
    return {group.name: axis(group.task) for group in _groups(config)}


def claims(config: FpttStudy) -> list[Claim]:
    """What the method promises, and what a user should doubt."""
    groups = _groups(config)
    if config.compare == "overhead":
        return [claim for group in groups for claim in time_claims(group.name)]
    if config.compare == "memory":
        networks = dict.fromkeys((group.cell, group.width) for group in groups)
        return [
            claim
            for network in networks
            for claim in memory_claims({_length(g.task): g.name for g in groups if (g.cell, g.width) == network})
        ]
    strengths = {f"fptt-{alpha:g}": alpha for alpha in config.alphas}
    return [
        claim
        for group in groups
        for claim in quality_claims(group.name, axis(group.task), list(_forms(config, group.task)), strengths)
    ]


class _Group(NamedTuple):
    """Arms that are compared with each other."""

    task: str
    cell: str
    width: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.cell}-{self.width}"


def _groups(config: FpttStudy) -> list[_Group]:
    return list(itertools.starmap(_Group, itertools.product(config.tasks, config.cells, config.hidden)))


def _length(task: str) -> int:
    return int(task.rpartition("-")[2])


def _is_text(task: str) -> bool:
    return re.search(r"-(chars|words)-\d+$", task) is not None


def _forms(config: FpttStudy, task: str) -> dict[str, _Form]:
    cut = f"{config.parts} parts" if config.part_length is None else f"parts of {config.part_length}"
    rate = config.learning_rate
    bptt = _Form("BPTT", "baseline", bptt_step, "whole")
    tbptt = _Form(f"truncated BPTT, {cut}, one update", "alternative", tbptt_step)
    chunked = _Form(f"an update a part, {cut}", "control", fptt_step)
    method = lambda alpha: _Form(f"FPTT, {cut}, alpha {alpha:g}", "method", fptt_step, alpha=alpha)
    if config.compare != "quality":
        return {
            "bptt": bptt,
            "bptt-remat": _Form("BPTT, √T parts computed twice", "alternative", bptt_step, "root"),
            "tbptt": tbptt,
            "chunked": chunked,
            "fptt": method(config.alphas[-1]),
        }
    least = min(config.alphas)
    found = {"bptt": bptt} | {
        f"bptt-{other:g}": bptt._replace(label=f"BPTT, rate {other:g} (others {rate:g})", learning_rate=other)
        for other in config.bptt_rates
    }
    found |= {"chunked": chunked} | {f"fptt-{alpha:g}": method(alpha) for alpha in config.alphas}
    others = {
        "bptt-losses": _Form(f"BPTT, losses after {cut}", "control", bptt_step),
        "bptt-small": bptt._replace(label="BPTT, as many updates by smaller batches", role="alternative", small=True),
        "tbptt": tbptt,
        "fptt-epochs": method(least)._replace(label=f"FPTT, alpha {least:g}, averaged every epoch", epochs=True),
        "chrono-lstm": bptt._replace(label="BPTT, Chrono-LSTM", role="alternative", cell="chrono-lstm"),
        "lru": bptt._replace(label="BPTT, LRU", role="alternative", cell="lru"),
    }
    # Of a text the loss of all tokens is the same however it is cut, and smaller batches would be other streams.
    idle = ("bptt-losses", "bptt-small") if axis(task).metric == "nll" else ()
    return found | {name: others[name] for name in config.others if name not in idle}


class _Ground(NamedTuple):
    """What the arms of a group share, so that evaluation compiles once."""

    data: SequenceData
    network: Network
    evaluate: Callable[[PyTree], dict[str, float]]


@functools.lru_cache(maxsize=4)
def _ground(config: FpttStudy, group: _Group) -> _Ground:
    data = sequence_data(
        group.task,
        train_rows=config.train_rows,
        test_rows=config.test_rows,
        streams=config.batch_size if _is_text(group.task) else None,
    )
    dtype = None if config.train.dtype == "float32" else jnp.dtype(config.train.dtype)
    net = network(data, group.cell, group.width, dtype)
    return _Ground(data, net, sequence_evaluator(data, net.infer))


def _program(config: FpttStudy, group: _Group, form: _Form) -> Program:
    data, net, scores = _ground(config, group._replace(cell=form.cell or group.cell))
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
    goes_on = _is_text(group.task)

    def init(key: jax.Array) -> PyTree:
        params = net.init(key)
        return {"params": params, "opt": tx.init(params)} | ({"carry": net.start(size)} if goes_on else {})

    def step(state: PyTree, batch: PyTree, aux: None) -> tuple[PyTree, dict[str, jax.Array]]:
        carry = state["carry"] if goes_on else net.start(size)
        params, opt, carry, metrics = train(state["params"], state["opt"], carry, batch["inputs"], batch["targets"])
        state = {"params": params, "opt": opt} | ({"carry": carry} if goes_on else {})
        return state, {"loss": metrics.loss.mean() if data.kind == "tokens" else metrics.loss[-1]}

    def evaluated(state: PyTree) -> PyTree:
        return state["params"] if form.alpha is None else fptt_eval_params(state["opt"], state["params"])

    def evaluate(state: PyTree) -> dict[str, float]:
        found = scores(evaluated(state))
        if form.alpha is None:
            return found
        return found | {f"{name}_w": value for name, value in scores(state["params"]).items()}

    return Program(
        init=init,
        step=step,
        batches=lambda seed: batches(data.train, size, seed=seed, shuffle=not goes_on, transform=data.draw),
        evaluate=evaluate,
        infer=net.infer,
        params=evaluated,
        example_inputs=data.test["inputs"][: config.batch_size],
        total_steps=steps,
        batch_size=size,
        source=f"{data.name}: {data.source}",
        between=_epoch_ends(epoch) if form.epochs else None,
        sharding=(("^carry", ("data",)),) if goes_on else (),
        train_metrics=lambda means: {"train_loss": means["loss"]},
    )


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


def _part_loss(config: FpttStudy, data: SequenceData, net: Network) -> Callable[..., jax.Array]:
    """The loss of one part: of a single target it weighs (p + 1) / P', the share of the sequence seen."""

    def loss(params: PyTree, states: jax.Array, targets: jax.Array, part: SequencePart) -> jax.Array:
        outputs = net.read(params, states)
        if data.kind == "class":
            return fptt_terminal_loss(outputs, targets, part, auxiliary=config.auxiliary)
        value = sequence_loss(data.kind, outputs, targets)
        return value if data.kind == "tokens" else part.progress * value

    return loss


def _epoch_ends(epoch: int) -> Callable[[PyTree, int], PyTree]:
    @jax.jit
    def close(state: PyTree) -> PyTree:
        params, opt = fptt_epoch_end(state["params"], state["opt"])
        return state | {"params": params, "opt": opt}

    return lambda state, done: state if done % epoch else close(state)
