"""ICPC on texts: an encoder that trains on texts without some of their insignificant words, and on whole ones."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from effjax.core.shapes import pad_to
from effjax.data.files import fitting_modality
from effjax.data.ragged import Ragged, padded_columns
from effjax.optim.batch_size import adamw_by_batch_size
from effjax.recipes.icpc_measures import CURVES, METRIC, check_held_out, level_measures
from effjax.recipes.spec import Arm, Group, Role
from effjax.recipes.texts import bucketed
from effjax.tasks.task import Task
from effjax.tasks.text import text_task
from effjax.train.loaders import planned_loader, token_counts
from effjax.train.program import Program
from effjax.train.trainer import supervised
from effjax.transformers.compressions import compress_text, compressed_text_columns
from effjax.transformers.token_drop import drop_as_many, vocabulary_stop_ids

MODALITY = ("image", "text")
_NAME = re.compile(r"encoder-\d+x\d+|minilm")

# (task, seed) to the columns of every epoch.
Columns = Callable[["Loaded", int], Callable[[int], Any]]


def is_text(config: Any, task: str) -> bool:
    """Whether a task DATA/MODEL is one of texts: by its model, one's own data by their columns."""
    if config.own is not None:
        return fitting_modality(MODALITY, dict(config.own.columns)) == "text"
    return _NAME.fullmatch(task.rpartition("/")[2]) is not None


class Loaded(NamedTuple):
    """What the arms share.

    Attributes:
      task: with whole texts.
      stops: of the tokenizer's vocabulary, as for ``compress_text``.
      tokens: of a test text at each level, on average.
      logits: ``variables -> [rows, levels, classes]`` of the test texts.
    """

    task: Task
    stops: np.ndarray
    tokens: tuple[float, ...]
    logits: Callable[[Any], np.ndarray]


def text_group(config: Any, name: str) -> Group:
    """The arms on one set of texts."""
    return Group(
        name.replace("/", "-"), METRIC, functools.partial(_load, config, name), list(_arms(config)), curves=CURVES
    )


def _load(config: Any, name: str) -> Loaded:
    data, model = name.split("/")
    rows = {"train_rows": config.train_rows, "test_rows": config.test_rows}
    fields = {"dtype": config.train.dtype, "remat": config.train.remat}
    task = text_task(config.data(data, "text"), config.model(model), max_length=config.max_length, **rows, **fields)
    if (task.classes or 0) < 2:
        raise ValueError(
            f"{name} has {task.classes} outputs; a cascade reads the probabilities of two or more classes."
        )
    check_held_out(config, len(task.test["label"]))
    stops = vocabulary_stop_ids(task.tokenizer)
    ids: Any = task.test["input_ids"]
    short = [compress_text(ids, stops, share, seed=0, epoch=0)[1] for share in config.dropped]
    columns = [
        {part: column.keep(kept) for part, column in task.test.items() if isinstance(column, Ragged)} for kept in short
    ]
    tokens = tuple(float(kept.sum() / len(ids)) for kept in short)
    return Loaded(task, stops, tokens, functools.partial(_logits, jax.jit(task.infer), task, columns))


def _logits(
    run: Callable[..., jax.Array], task: Task, levels: list[Any], variables: Any, size: int = 128
) -> np.ndarray:
    """Whole and short texts in one shape: the shorter ones are padded."""
    length, rows = int(levels[-1]["input_ids"].lengths.max()), len(task.test["label"])
    found = []
    for columns in levels:
        padded = padded_columns(columns, length, task.tokenizer.pad_id)
        parts = [
            run(variables, {name: pad_to(column[start : start + size], size) for name, column in padded.items()})
            for start in range(0, rows, size)
        ]
        found.append(np.concatenate(jax.device_get(parts))[:rows])
    return np.stack(found, 1)


def _arms(config: Any) -> Iterator[Arm]:
    def arm(name: str, role: Role, label: str, columns: Columns, share: float | None = 1.0) -> Arm:
        return Arm(name, role, functools.partial(_program, config, columns, share), label)

    whole: Columns = lambda loaded, seed: lambda epoch: loaded.task.train
    mixed: Columns = lambda loaded, seed: compressed_text_columns(
        loaded.task.train, loaded.stops, config.dropped, seed=seed
    )
    last = int(config.budget.amount) - max(1, round(config.late * config.budget.amount))

    def late(loaded: Loaded, seed: int) -> Callable[[int], Any]:
        read = mixed(loaded, seed)
        return lambda epoch: read(epoch) if epoch < last else loaded.task.train

    yield arm("full", "baseline", "whole texts only", whole)
    yield arm("full-short", "baseline", "whole texts only, as many tokens as ICPC", whole, None)
    yield arm("icpc", "method", "ICPC, without stop words", mixed)
    yield arm("icpc-late", "method", "ICPC, whole texts at the end", late)
    yield arm("icpc-random", "control", "as many words at random", functools.partial(_at_random, mixed))


def _at_random(mixed: Columns, loaded: Loaded, seed: int) -> Callable[[int], Any]:
    """As many tokens of every text are dropped at random, special ones last."""
    columns, read = loaded.task.train, mixed(loaded, seed)
    ids: Any = columns["input_ids"]
    special = np.isin(ids.values, list(loaded.task.tokenizer.special_ids))

    def other(epoch: int) -> dict[str, Any]:
        counts = ids.lengths - read(epoch)["input_ids"].lengths
        draws = np.random.default_rng((seed, epoch)).random(len(ids.values))
        kept = drop_as_many(ids, counts, draws + special)
        return {name: column.keep(kept) if isinstance(column, Ragged) else column for name, column in columns.items()}

    return other


def _program(config: Any, columns: Columns, share: float | None, loaded: Loaded) -> Program:
    """AdamW on planned batches; ``share`` of the steps, None for that of ICPC's tokens."""
    task, size = loaded.task, max(8, config.batch_size // 8 * 8)
    plan = lambda seed, epochs: bucketed(config, lambda task, seed: columns(loaded, seed), cap=size)(task, seed, epochs)
    loader, steps = planned_loader(plan, config.seeds, int(config.budget.amount), size)
    share = float(np.mean(loaded.tokens) / loaded.tokens[-1]) if share is None else share
    steps = max(1, round(share * steps))
    falling = optax.linear_schedule(config.learning_rate, 0.0, steps)
    program = supervised(
        task._replace(init=lambda key: task.init(jax.random.split(key)[0])),
        adamw_by_batch_size(falling, weight_decay=config.weight_decay, reference=size),
        steps=steps,
        loader=loader,
        options=config.train,
        counts=token_counts,
        train_metrics=lambda means: {"processed_tokens": round(means["tokens"] * steps)},
    )
    labels, names = np.asarray(task.test["label"]), [f"without_{round(100 * share)}" for share in config.dropped]
    evaluate = lambda state: level_measures(config, loaded.logits(state.variables), labels, loaded.tokens, names)
    return program._replace(evaluate=evaluate)
