"""What the studies of recurrent cells share: layers by name, and ordinary training by backpropagation through time."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from effjax.core.errors import check_choice, check_number
from effjax.data.pipeline import batches
from effjax.data.sequences import SequenceData, sequence_data
from effjax.models.linear_recurrence import LRU, MinGRU
from effjax.models.sequence import (
    AntisymmetricRNNCell,
    CoRNNCell,
    FastGRNNCell,
    FastRNNCell,
    GRUCell,
    LSTMCell,
    Recurrent,
    RNNCell,
)
from effjax.models.sequence_network import SequenceNetwork
from effjax.recipes.spec import Arm, Axis, Claim, Metrics, StudyConfig
from effjax.recurrent.dual_ode import DualODE
from effjax.recurrent.equilibrium import EquilibriumRNN
from effjax.recurrent.irnn import IncrementalRNN
from effjax.recurrent.tarnn import TARNN
from effjax.tasks.sequence import SequenceTask, sequence_task
from effjax.train.grad import accumulated
from effjax.train.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentStudy(StudyConfig):
    """Config of a study of recurrent cells."""

    tasks: tuple[str, ...] = ("noisy-digits-200",)
    """sequence problems: noisy-digits-200, fsdd, hmp_accel-256, mnist-permuted, add-200, ptb-words-300, ..."""
    cells: tuple[str, ...] = ()
    """arms, by the names of effjax.recipes.recurrent.LAYERS"""
    hidden: int = 64
    """width of the state, and of the embedding where inputs are ids"""
    batch_size: int = 64
    """sequences of one step"""
    learning_rate: float = 3e-3
    """of Adam"""
    clip: float = 1.0
    """largest global norm of a gradient"""
    read: Literal["last", "mean"] = "last"
    """the state that a classifier's head reads: the last, or the mean over time"""
    dropout: float = 0.0
    """on the states that the head reads, and on embeddings"""
    train_rows: int | None = None
    """training sequences used; all when None"""
    test_rows: int | None = None
    """test sequences used; all when None"""
    chunk: int | None = None
    """steps between stored states, the others are recomputed; None stores all"""
    unroll: int = 1
    """time steps in one iteration of the compiled loop"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("hidden", "batch_size"):
            check_number(name, getattr(self, name), low=1, integer=True)
        for name in ("learning_rate", "clip"):
            check_number(name, getattr(self, name), low=0, open_low=True)
        check_choice("read", self.read, ("last", "mean"))
        check_number("dropout", self.dropout, low=0, high=1, open_high=True)
        for name in self.cells:
            check_choice("cells", name, tuple(LAYERS))


class Layer(NamedTuple):
    """A layer of states over time, as an arm of a study.

    Attributes:
      label: the name shown in the report.
      make: ``(config, steps of the sequence) -> module``.
    """

    label: str
    make: Callable[[RecurrentStudy, int], nn.Module]


class LRUStack(nn.Module):
    r"""LRU layers as they are used in practice, each normalised before and gated and added after.

    .. math:: x \leftarrow x + \mathrm{GLU}(\mathrm{gelu}(\mathrm{LRU}(\mathrm{norm}(x))))
    """

    features: int
    layers: int
    r_min: float
    r_max: float
    max_phase: float
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ring = {"r_min": self.r_min, "r_max": self.r_max, "max_phase": self.max_phase}
        x = nn.Dense(self.features)(x)
        for _ in range(self.layers):
            y = LRU(self.features, dtype=self.dtype, **ring)(nn.LayerNorm()(x))
            x = x + nn.glu(nn.Dense(2 * self.features)(nn.gelu(y)))
        return x


def _operands(config: RecurrentStudy) -> dict[str, Any]:
    return {} if config.train.dtype == "float32" else {"dtype": jnp.dtype(config.train.dtype)}


def _loop(config: RecurrentStudy, length: int) -> dict[str, Any]:
    """Fields of a layer with a loop over time."""
    chunk = config.chunk
    if chunk is None and config.train.remat:
        chunk = max(1, round(length**0.5))
    return {"chunk": chunk, "unroll": config.unroll}


def _looped(cell: Callable[..., nn.Module], **options: Any) -> Callable[[RecurrentStudy, int], nn.Module]:
    return lambda config, length: Recurrent(
        cell(config.hidden, **_operands(config), **options), **_loop(config, length)
    )


def _stepped(layer: Callable[..., nn.Module], **options: Any) -> Callable[[RecurrentStudy, int], nn.Module]:
    """A layer with step sizes, which are per time step unless the options say otherwise."""
    per_time = options.get("eta_mode", "per_time") == "per_time"
    return lambda config, length: layer(
        config.hidden, length=length if per_time else None, **_operands(config), **_loop(config, length), **options
    )


def _parallel(layer: Callable[..., nn.Module], **options: Any) -> Callable[[RecurrentStudy, int], nn.Module]:
    return lambda config, length: layer(config.hidden, **_operands(config), **options)


def _chrono(config: RecurrentStudy, length: int) -> nn.Module:
    return _looped(LSTMCell, chrono_length=max(3, length))(config, length)


def _fast_rnn_per_time(config: RecurrentStudy, length: int) -> nn.Module:
    return _looped(FastRNNCell, length=length)(config, length)


def _min_gru(config: RecurrentStudy, length: int) -> nn.Module:
    return MinGRU(config.hidden, chrono_length=max(3, length), **_operands(config))


_LONG = {"r_min": 0.99, "r_max": 0.9999, "max_phase": math.pi / 10}

LAYERS: dict[str, Layer] = {
    "rnn": Layer("tanh RNN", _looped(RNNCell)),
    "lstm": Layer("LSTM", _looped(LSTMCell)),
    "chrono-lstm": Layer("Chrono-LSTM", _chrono),
    "gru": Layer("GRU", _looped(GRUCell)),
    "fastrnn": Layer("FastRNN", _looped(FastRNNCell)),
    "fastrnn-per-time": Layer("FastRNN, alpha and beta per time step", _fast_rnn_per_time),
    "fastgrnn": Layer("FastGRNN", _looped(FastGRNNCell)),
    "antisymmetric": Layer("AntisymmetricRNN", _looped(AntisymmetricRNNCell)),
    "antisymmetric-gated": Layer("AntisymmetricRNN, gated", _looped(AntisymmetricRNNCell, gated=True)),
    "cornn": Layer("coRNN", _looped(CoRNNCell)),
    "lru": Layer("LRU, |lambda| .9 to .999", _parallel(LRU)),
    "lru-long": Layer("LRU, |lambda| .99 to .9999", _parallel(LRU, **_LONG)),
    "lru-4": Layer("4 LRU blocks, |lambda| .99 to .9999", _parallel(LRUStack, layers=4, **_LONG)),
    "min-gru": Layer("minGRU, Chrono start", _min_gru),
    "irnn": Layer("iRNN, K=1", _stepped(IncrementalRNN)),
    "irnn-3": Layer("iRNN, K=3", _stepped(IncrementalRNN, K=3)),
    # Step sizes of 0.9 from the zero start: with the default 0.01 this form forgets everything at once.
    "irnn-zero-3": Layer("iRNN, K=3, zero start", _stepped(IncrementalRNN, K=3, start="zero", eta=0.9)),
    "irnn-shared": Layer("iRNN, K=1, one eta for all times", _stepped(IncrementalRNN, eta_mode="shared")),
    "irnn-equilibrium": Layer("iRNN at equilibrium", _parallel(EquilibriumRNN, iterations=20)),
    "dual-ode": Layer("iRNN, dual ODE, K=2", _stepped(DualODE)),
    "tarnn-euler": Layer("TARNN, Euler", _stepped(TARNN, variant="euler")),
    "tarnn-convex": Layer("TARNN, convex", _stepped(TARNN, variant="convex")),
    "tarnn-euler-3": Layer("TARNN, Euler, K=3", _stepped(TARNN, variant="euler", K=3)),
    "tarnn-euler-shared": Layer(
        "TARNN, Euler, one eta for all times", _stepped(TARNN, variant="euler", eta_mode="shared")
    ),
    "tarnn-convex-shared": Layer(
        "TARNN, convex, one eta for all times", _stepped(TARNN, variant="convex", eta_mode="shared")
    ),
    "tarnn-euler-input": Layer(
        "TARNN, Euler, tanh, eta of the input", _stepped(TARNN, variant="euler", eta_mode="input", activation=jnp.tanh)
    ),
    "tarnn-convex-input": Layer(
        "TARNN, convex, tanh, eta of the input",
        _stepped(TARNN, variant="convex", eta_mode="input", activation=jnp.tanh),
    ),
}


def recurrent_arms(config: RecurrentStudy, roles: Mapping[str, str]) -> dict[str, Arm]:
    """Every cell on every task, as ``task/cell``; cells without a role are alternatives."""
    return {
        f"{task}/{cell}": Arm(
            build=lambda task=task, cell=cell: _program(config, task, cell),
            group=task,
            label=LAYERS[cell].label,
            role=roles.get(cell, "alternative"),
        )
        for task in config.tasks
        for cell in config.cells
    }


def recurrent_axes(config: RecurrentStudy) -> dict[str, Axis]:
    """What each task is judged by."""
    return {task: axis(task) for task in config.tasks}


def axis(task: str) -> Axis:
    """What a task is judged by, from its name alone: the data are not read."""
    if task.startswith("add-"):
        return Axis("mse", "min", "test squared error")
    if task.startswith(("copy-", "tiny_shakespeare-", "ptb-")):
        return Axis("nll", "min", "test nats a token")
    return Axis("accuracy", "max", "test accuracy")


def score(task: str, cell: str) -> Callable[[Metrics], float]:
    """The judged number of an arm, for claims."""
    return lambda m: m[f"{task}/{cell}"].get(axis(task).metric, math.nan)


def bound(task: str, cell: str, op: str, value: float) -> Claim:
    """That an arm reaches a number, or stays below it."""
    word = "at least" if op == ">=" else "at most"
    text = f"{task}: {LAYERS[cell].label} has {axis(task).label} {word} {value:g}"
    return Claim(text, score(task, cell), op, lambda m: value)


def no_worse(task: str, cell: str, rival: str, why: str = "") -> Claim:
    """That an arm is at least as good as another."""
    op = ">=" if axis(task).goal == "max" else "<="
    text = f"{task}: {why}{LAYERS[cell].label} is no worse than {LAYERS[rival].label}"
    return Claim(text, score(task, cell), op, score(task, rival))


@functools.lru_cache(maxsize=4)
def _data(task: str, train_rows: int | None, test_rows: int | None) -> SequenceData:
    return sequence_data(task, train_rows=train_rows, test_rows=test_rows)


def _network(config: RecurrentStudy, data: SequenceData, cell: str) -> nn.Module:
    ids = {"vocabulary": data.vocabulary, "embedding": config.hidden} if data.vocabulary else {}
    return SequenceNetwork(
        LAYERS[cell].make(config, data.length),
        data.outputs,
        read="all" if data.kind == "tokens" else config.read,
        dropout=config.dropout,
        **ids,
    )


def _program(config: RecurrentStudy, task_name: str, cell: str) -> Program:
    data = _data(task_name, config.train_rows, config.test_rows)
    task = sequence_task(data, _network(config, data, cell))
    tx = optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(config.learning_rate))
    init, step = _training(config, task, tx)
    rows = len(data.train["targets"])
    params = lambda state: {"params": state["params"]}
    return Program(
        init=init,
        step=step,
        batches=lambda seed: batches(data.train, config.batch_size, seed=seed, transform=data.draw),
        evaluate=lambda state: task.evaluate(params(state)),
        infer=task.infer,
        params=params,
        example_inputs=data.test["inputs"][: config.batch_size],
        total_steps=config.budget.steps(config.batch_size, lambda epoch: rows // config.batch_size),
        batch_size=config.batch_size,
        source=f"{task_name}: {data.source}",
    )


def _training(
    config: RecurrentStudy, task: SequenceTask, tx: optax.GradientTransformation
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``init`` and ``step`` of a Program: one update a batch by backpropagation through the whole sequence."""

    def loss(params, batch, key):
        value, (_, metrics) = task.loss({"params": params}, batch, key)
        return value, metrics

    value_and_grad = accumulated(loss, config.train.accumulate)

    def init(key):
        params = task.init(key)["params"]
        return {"params": params, "opt": tx.init(params), "key": jax.random.fold_in(key, 1), "step": jnp.zeros((), int)}

    def step(state, batch, aux):
        key = jax.random.fold_in(state["key"], state["step"]) if config.dropout else None
        (_, metrics), grads = value_and_grad(state["params"], batch, key)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt, "key": state["key"], "step": state["step"] + 1}, metrics

    return init, step
