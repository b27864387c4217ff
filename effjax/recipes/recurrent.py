"""What the studies of recurrent cells share: one arm per layer, trained by backpropagation through time."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import optax

from effjax.core.errors import Count, Positive, Rate
from effjax.data.sequences import SequenceData, few_rows, sequence_data
from effjax.recipes.spec import Arm, Group, Role, StudyConfig
from effjax.tasks.sequence import example_inputs, sequence_metric
from effjax.tasks.sequence_layers import LAYERS, sequence_layer
from effjax.tasks.sequence_networks import layer_task
from effjax.train.program import Program
from effjax.train.trainer import supervised

MODALITY = "sequence"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentStudy(StudyConfig):
    """Config of a study of recurrent cells."""

    tasks: tuple[str, ...] = ("noisy-digits-200",)
    """Sequence problems, such as noisy-digits-200, fsdd, hmp_accel-256, mnist-permuted, add-200 or ptb-words-300."""
    hidden: Count = 64
    """Width of the state, and of the embedding where inputs are ids."""
    batch_size: Count = 64
    """Sequences of one step."""
    learning_rate: Positive = 3e-3
    """Learning rate of Adam in all arms."""
    clip: Positive = 1.0
    """Largest global norm of a gradient."""
    read: Literal["last", "mean"] = "last"
    """The state that a classifier's head reads: the last, or the mean over time."""
    dropout: Rate = 0.0
    """Rate of dropout on the states that the head reads, and on embeddings."""
    train_rows: int | None = None
    """Number of training sequences used; None takes all."""
    test_rows: int | None = None
    """Number of test sequences used; None takes all."""
    chunk: int | None = None
    """Time steps between stored states, the others are computed again; None stores all."""
    unroll: int = 1
    """Time steps in one iteration of the compiled loop."""


def recurrent_groups(config: RecurrentStudy, roles: Mapping[str, Role]) -> list[Group]:
    """One group per task, one arm per layer; layers without a role are alternatives."""
    arms = [
        Arm(name, roles.get(name, "alternative"), functools.partial(_program, config, name), layer.label)
        for name, layer in LAYERS.items()
    ]
    return [
        Group(
            task, config.metric(task, MODALITY, sequence_metric), functools.partial(load_sequences, config, task), arms
        )
        for task in config.tasks
    ]


def load_sequences(config: Any, task: str, streams: int | None = None) -> SequenceData:
    """The problem of a study's ``train_rows`` and ``test_rows``, or the user's own."""
    data = config.data(task, MODALITY)
    if isinstance(data, str):
        return sequence_data(data, train_rows=config.train_rows, test_rows=config.test_rows, streams=streams)
    if getattr(config, "read", "last") == "mean" and data.pad == "start" and "lengths" in data.train:
        raise ValueError(
            "read='mean' with pad='start': the mean over time would take in the filling before each series. Leave "
            "pad out, or give --read last."
        )
    return few_rows(data, train=config.train_rows, test=config.test_rows)


def _program(config: RecurrentStudy, name: str, data: SequenceData) -> Program:
    run = {"dtype": config.train.dtype, "remat": config.train.remat}
    layer = sequence_layer(name, config.hidden, length=data.length, chunk=config.chunk, unroll=config.unroll, **run)
    task = layer_task(data, layer, embedding=config.hidden, read=config.read, dropout=config.dropout, **run)
    return supervised(
        task._replace(example_inputs=example_inputs(data, config.batch_size)),
        optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(config.learning_rate)),
        batch_size=config.batch_size,
        options=config.train,
    )
