"""What the studies of recurrent cells share: layers by name, and ordinary training by backpropagation through time."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import optax

from effjax.core.errors import check_choice, check_number
from effjax.data.sequences import SequenceData, few_rows, sequence_data
from effjax.models.linear_recurrence import LRU, LRUStack, MinGRU
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
from effjax.recipes.spec import Arm, Group, StudyConfig
from effjax.recurrent.dual_ode import DualODE
from effjax.recurrent.equilibrium import EquilibriumRNN
from effjax.recurrent.irnn import IncrementalRNN
from effjax.recurrent.tarnn import TARNN
from effjax.tasks.sequence import sequence_metric, sequence_task
from effjax.train.program import Program
from effjax.train.trainer import supervised

MODALITY = "sequence"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentStudy(StudyConfig):
    """Config of a study of recurrent cells."""

    tasks: tuple[str, ...] = ("noisy-digits-200",)
    """Sequence problems, such as noisy-digits-200, fsdd, hmp_accel-256, mnist-permuted, add-200 or ptb-words-300."""
    hidden: int = 64
    """Width of the state, and of the embedding where inputs are ids."""
    batch_size: int = 64
    """Sequences of one step."""
    learning_rate: float = 3e-3
    """Learning rate of Adam in all arms."""
    clip: float = 1.0
    """Largest global norm of a gradient."""
    read: Literal["last", "mean"] = "last"
    """The state that a classifier's head reads: the last, or the mean over time."""
    dropout: float = 0.0
    """Rate of dropout on the states that the head reads, and on embeddings."""
    train_rows: int | None = None
    """Number of training sequences used; None takes all."""
    test_rows: int | None = None
    """Number of test sequences used; None takes all."""
    chunk: int | None = None
    """Time steps between stored states, the others are computed again; None stores all."""
    unroll: int = 1
    """Time steps in one iteration of the compiled loop."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("hidden", "batch_size"):
            check_number(name, getattr(self, name), low=1, integer=True)
        for name in ("learning_rate", "clip"):
            check_number(name, getattr(self, name), low=0, open_low=True)
        check_choice("read", self.read, ("last", "mean"))
        check_number("dropout", self.dropout, low=0, high=1, open_high=True)


class Layer(NamedTuple):
    """A layer of states over time, as an arm of a study.

    Attributes:
      label: the name shown in the report.
      make: ``(config, steps of the sequence) -> module``.
    """

    label: str
    make: Callable[[RecurrentStudy, int], nn.Module]


def _operands(config: RecurrentStudy) -> dict[str, Any]:
    return {} if config.train.dtype == "float32" else {"dtype": jnp.dtype(config.train.dtype)}


def _loop(config: RecurrentStudy, length: int) -> dict[str, Any]:
    """Fields of a layer with a loop over time."""
    chunk = config.chunk
    if chunk is None and config.train.remat:
        chunk = max(1, round(length**0.5))
    return {"chunk": chunk, "unroll": config.unroll}


def _looped(
    cell: Callable[..., nn.Module], length_field: str = "", **options: Any
) -> Callable[[RecurrentStudy, int], nn.Module]:
    """A cell in a loop over time; ``length_field`` is its field for the sequence's length, if it has one."""

    def make(config: RecurrentStudy, length: int) -> nn.Module:
        sized = {length_field: max(3, length)} if length_field else {}
        return Recurrent(cell(config.hidden, **_operands(config), **sized, **options), **_loop(config, length))

    return make


def _stepped(layer: Callable[..., nn.Module], **options: Any) -> Callable[[RecurrentStudy, int], nn.Module]:
    """A layer with step sizes, which are per time step unless the options say otherwise."""
    per_time = options.get("eta_mode", "per_time") == "per_time"
    return lambda config, length: layer(
        config.hidden, length=length if per_time else None, **_operands(config), **_loop(config, length), **options
    )


def _parallel(
    layer: Callable[..., nn.Module], length_field: str = "", **options: Any
) -> Callable[[RecurrentStudy, int], nn.Module]:
    """A layer without a loop over time."""

    def make(config: RecurrentStudy, length: int) -> nn.Module:
        kind = nn.remat(layer) if config.train.remat else layer
        sized = {length_field: max(3, length)} if length_field else {}
        return kind(config.hidden, **_operands(config), **sized, **options)

    return make


_LONG = {"r_min": 0.99, "r_max": 0.9999, "max_phase": math.pi / 10}

LAYERS: dict[str, Layer] = {
    "rnn": Layer("tanh RNN", _looped(RNNCell)),
    "lstm": Layer("LSTM", _looped(LSTMCell)),
    "chrono-lstm": Layer("Chrono-LSTM", _looped(LSTMCell, "chrono_length")),
    "gru": Layer("GRU", _looped(GRUCell)),
    "fastrnn": Layer("FastRNN", _looped(FastRNNCell)),
    "fastrnn-per-time": Layer("FastRNN, alpha and beta per time step", _looped(FastRNNCell, "length")),
    "fastgrnn": Layer("FastGRNN", _looped(FastGRNNCell)),
    "antisymmetric": Layer("AntisymmetricRNN", _looped(AntisymmetricRNNCell)),
    "antisymmetric-gated": Layer("AntisymmetricRNN, gated", _looped(AntisymmetricRNNCell, gated=True)),
    "cornn": Layer("coRNN", _looped(CoRNNCell)),
    "lru": Layer("LRU, |lambda| .9 to .999", _parallel(LRU)),
    "lru-long": Layer("LRU, |lambda| .99 to .9999", _parallel(LRU, **_LONG)),
    "lru-4": Layer("4 LRU blocks, |lambda| .99 to .9999", _parallel(LRUStack, layers=4, **_LONG)),
    "min-gru": Layer("minGRU, Chrono start", _parallel(MinGRU, "chrono_length")),
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


def recurrent_groups(config: RecurrentStudy, roles: Mapping[str, str]) -> list[Group]:
    """One group per task, one arm per layer; layers without a role are alternatives."""
    arms = [
        Arm(name, roles.get(name, "alternative"), functools.partial(_program, config, layer), layer.label)
        for name, layer in LAYERS.items()
    ]
    return [
        Group(
            task, config.metric(task, MODALITY, sequence_metric), functools.partial(load_sequences, config, task), arms
        )
        for task in config.tasks
    ]


def load_sequences(config: StudyConfig, task: str, streams: int | None = None) -> SequenceData:
    """The problem of a study's ``train_rows`` and ``test_rows``, or the user's own."""
    data, rows = config.data(task, MODALITY), {"train": config.train_rows, "test": config.test_rows}
    if isinstance(data, str):
        return sequence_data(data, train_rows=rows["train"], test_rows=rows["test"], streams=streams)
    return few_rows(data, **rows)


def _program(config: RecurrentStudy, layer: Layer, data: SequenceData) -> Program:
    ids = {"vocabulary": data.vocabulary, "embedding": config.hidden} if data.vocabulary else {}
    network = SequenceNetwork(
        layer.make(config, data.length),
        data.outputs,
        read="all" if data.kind == "tokens" else config.read,
        dropout=config.dropout,
        **ids,
    )
    task = sequence_task(data, network, dtype=config.train.dtype, remat=config.train.remat)
    return supervised(
        task._replace(example_inputs=data.test["inputs"][: config.batch_size]),
        optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(config.learning_rate)),
        batch_size=config.batch_size,
        options=config.train,
    )
