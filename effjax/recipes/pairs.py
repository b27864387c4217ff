"""Pairs of a small network and a large one, on images or on texts, and rows that neither has seen."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.errors import NoEffectWarning
from effjax.core.macs import count_macs
from effjax.core.tree import wide
from effjax.data.bucket_sampler import BucketSampler
from effjax.data.sets import DataSet, load
from effjax.hardness.hybrid import hybrid_examples, hybrid_init
from effjax.hardness.hybrid_config import HybridConfig, HybridExamples, HybridNetworks
from effjax.models.resnet import SIZES, pretrained_resnet
from effjax.optim.batch_size import adamw_by_batch_size
from effjax.recipes.image_checkpoints import is_checkpoint, load_checkpoint, model_name
from effjax.recipes.images import check_model, named_image_task
from effjax.tasks.image import standardised, unit_images
from effjax.tasks.task import Task
from effjax.tasks.text import text_columns, text_task, train_and_test
from effjax.train.loaders import planned_loader
from effjax.train.loop import fit
from effjax.train.trainer import supervised

PyTree = Any
Columns = Mapping[str, Any]
Rows = tuple[PyTree, np.ndarray]
"""Inputs, an array or a tree of arrays with the rows leading, and their labels."""


class Network(NamedTuple):
    """A trained network.

    Attributes:
      task: what it was made for.
      params: its variables.
      apply: ``(variables, inputs, *, key=None) -> (logits, features)``, the features those of its last layer.
      inputs: from columns of the data set to its inputs.
      note: a sentence about its weights, after a space, where they were given.
    """

    task: Task
    params: PyTree
    apply: Callable[..., tuple[jax.Array, jax.Array]]
    inputs: Callable[[Columns], PyTree]
    note: str = ""


class Pair(NamedTuple):
    """What the arms of a group share: two trained networks, and rows that they have not seen.

    Attributes:
      task: of the base model.
      base: ``(variables, inputs) -> (logits, features)``.
      expert: ``(variables, inputs) -> logits``.
      params: their variables.
      train: rows that they were trained on; None where those are not here.
      held: rows for routers.
      calibration: rows for thresholds.
      test: rows to report on.
    """

    task: Task
    base: Callable[..., Any]
    expert: Callable[..., Any]
    params: tuple[PyTree, PyTree]
    train: Rows | None
    held: Rows
    calibration: Rows
    test: Rows

    def rows(self, name: str) -> Rows:
        """``train`` (``held`` where that is None), ``held``, ``calibration`` or ``test``."""
        return getattr(self, name) or self.held


def seen_by(pair: Pair) -> Callable[[str], HybridExamples]:
    """What the two networks, as they were given, say of the rows of a set; they run once, whoever asks again."""
    networks = HybridNetworks(pair.base, pair.expert)

    @functools.cache
    def seen(name: str) -> HybridExamples:
        inputs, labels = pair.rows(name)
        state = hybrid_init(jax.random.key(0), networks, pair.params, inputs, config=HybridConfig())
        found = hybrid_examples(state, inputs, labels, networks)
        return found._replace(request=np.zeros(len(labels), bool))  # which rows ask is a router's word

    return seen


def is_pretrained(data: str, base: str, expert: str) -> bool:
    """Whether both networks of a pair come trained, so that none of their training data are here."""
    return data == "cifar10" and base in SIZES and expert in SIZES


def load_pair(config: Any, given: str | DataSet, base: str, expert: str) -> Pair:
    """Train or load the two networks, on all rows but those of routers and thresholds.

    Args:
      config: a ``HybridStudy``.
      given: images or texts, or the name of a set.
      base: name of the small network.
      expert: of the large one.
    """
    data = load(given) if isinstance(given, str) else given
    if data.modality not in _MAKERS:
        raise ValueError(f"data={data.name!r} are of modality {data.modality!r}; pairs are of {' or '.join(_MAKERS)}.")
    pretrained = isinstance(given, str) and is_pretrained(given, base, expert)
    splits = dict(data.splits)
    if data.modality == "text":
        splits = dict(zip(("train", "test"), train_and_test(data), strict=True))
    split = "test" if pretrained else "train"
    rest, held, calibration = parts_of(config, data.name, splits[split])
    _check_calibration(config, calibration["label"])
    data = dataclasses.replace(data, splits={**splits, split: rest})
    small, large = _MAKERS[data.modality](config, data, (base, expert), pretrained)

    def rows(columns: Columns) -> Rows:
        # Each network reads inputs of its own where they are not the same.
        inputs = small.inputs(columns)
        if large.inputs is not small.inputs:
            inputs = {"base": inputs, "expert": large.inputs(columns)}
        return inputs, np.asarray(columns["label"], np.int32)

    train, test = data.splits["train"], data.splits["test"]
    tested = rows(test)
    _check_costs(small, large, tested[0], base, expert)
    learned = f" A router learns from {len(held['label'])} rows that the networks have not seen."
    source = f"{small.task.source}{small.note}{large.note}{learned}"
    return Pair(
        small.task._replace(name=f"{data.name}/{'/'.join(map(model_name, (base, expert)))}", source=source),
        small.apply,
        lambda variables, inputs, *, key=None: large.apply(variables, inputs, key=key)[0],
        (small.params, large.params),
        None if pretrained else rows(train),
        rows(held),
        rows(calibration),
        tested,
    )


def parts_of(config: Any, name: str, columns: Columns) -> list[dict[str, Any]]:
    """The rows that are left, those of routers and those of thresholds, by one fixed draw."""
    rows = len(columns["label"])
    order = np.random.default_rng(0).permutation(rows)
    held, calibrated = (max(1, round(rows * share)) for share in (config.router_share, config.calibration_share))
    cuts = np.split(order, [rows - held - calibrated, rows - calibrated])
    if not len(cuts[0]):
        raise ValueError(f"{name}: {rows} rows are too few to be split into three. Give more.")
    return [{name: _taken(column, np.sort(cut)) for name, column in columns.items()} for cut in cuts]


def _taken(column: Any, places: np.ndarray) -> Any:
    return [column[place] for place in places] if isinstance(column, list) else np.asarray(column)[places]


def _check_calibration(config: Any, labels: Any) -> None:
    known = int((np.asarray(labels) >= 0).sum())
    least = math.ceil(1 / min(config.coverage, 1 - config.coverage) - 1e-9)
    if known < least:
        raise ValueError(
            f"calibration_share={config.calibration_share} leaves {known} rows for the threshold, and "
            f"coverage={config.coverage} needs {least}. Give a larger share, or more rows."
        )


def _check_costs(small: Network, large: Network, inputs: PyTree, base: str, expert: str) -> None:
    row = jax.tree.map(lambda leaf: leaf[:1], inputs)
    spent = [count_macs(network.apply, network.params, row).most or 0 for network in (small, large)]
    if spent[1] <= spent[0]:
        warnings.warn(
            f"expert={expert!r} takes {spent[1]:,} multiply-adds and the base model {base!r} {spent[0]:,}: not asking "
            "it saves nothing. Give a larger expert, or a smaller base model.",
            NoEffectWarning,
            stacklevel=2,
        )


# Images


def _images(config: Any, data: DataSet, names: tuple[str, str], pretrained: bool) -> list[Network]:
    inputs = lambda columns: np.asarray(columns["image"])
    for role, name in zip(("model", "expert"), names, strict=True):
        if not is_checkpoint(name):
            check_model(role, name)
    found = []
    for role, name in zip(("model", "expert"), names, strict=True):
        note = ""
        if is_checkpoint(name):
            task, params, fresh = load_checkpoint(role, name, data)
            said = "as it is" if not fresh else f"with a new head, fine-tuned in {config.tune_steps} steps"
            note = f" The weights of {model_name(name)} are taken {said}."
            params = _trained_on_images(config, task, params) if fresh else params
        else:
            task = named_image_task(data, name, config.train)
            params = pretrained_resnet(name)[1] if pretrained else _trained_on_images(config, task)
        found.append(Network(task, params, _image_apply(task), inputs, note))
    return found


def _trained_on_images(config: Any, task: Task, start: PyTree = None) -> PyTree:
    """From scratch, or from given weights: their new head learns at the larger rate, the rest keeps what it knows."""
    size = min(config.pair_batch, len(task.train["label"]))
    if start is None:
        steps, tx = config.pair_steps, optax.adam(optax.linear_schedule(config.pair_rate, 0.0, config.pair_steps))
    else:
        steps = config.tune_steps
        rates = {"head": config.pair_rate, "rest": config.tune_rate}
        tx = optax.partition(
            {part: optax.adam(optax.linear_schedule(rate, 0.0, steps)) for part, rate in rates.items()},
            lambda params: {name: "head" if name == "head" else "rest" for name in params},
        )
        task = task._replace(init=lambda key: start)
    made = supervised(task, tx, steps=steps, batch_size=size)
    return jax.tree.map(jnp.asarray, fit(made, seed=0).state.variables)


def _image_apply(task: Task) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def apply(variables: PyTree, images: Any, *, key: Any = None) -> tuple[jax.Array, jax.Array]:
        x = standardised(unit_images(images), task.details)
        found, layers = task.module.apply(variables, x, train=False, capture=True)
        return wide(found), wide(list(layers.values())[-1])  # the last before the logits, whatever it is called

    return apply


# Texts


def _texts(config: Any, data: DataSet, names: tuple[str, str], pretrained: bool) -> list[Network]:
    found = []
    for role, name in zip(("base", "expert"), names, strict=True):
        task = text_task(data, name, max_length=config.max_length)
        if task.classes == 1 or task.details["choices"] > 1:
            raise ValueError(f"data={data.name!r} are scores or choices; a hybrid answers with classes, one per row.")
        inputs = functools.partial(_padded, data, task, config.max_length)
        found.append(Network(task, _trained_on_texts(config, task), _text_apply(task, role), inputs))
    return found


def _padded(data: DataSet, task: Task, length: int, columns: Columns) -> dict[str, np.ndarray]:
    """Tokens of one length, so that every batch is a batch of any other."""
    tokens = text_columns(data, columns, task.tokenizer, max_length=length)
    ids = tokens["input_ids"]
    every = np.arange(len(ids))
    found = {"input_ids": ids.pad(every, length, task.tokenizer.pad_id)}
    found["mask"] = np.arange(length)[None, :] < ids.lengths[:, None]
    if "token_type_ids" in tokens:
        found["token_type_ids"] = tokens["token_type_ids"].pad(every, length, 0)
    return found


def _trained_on_texts(config: Any, task: Task) -> PyTree:
    """From scratch, or a pretrained encoder with a fresh head, on batches of few lengths."""
    fresh = task.pretrained is None
    steps, rate = (config.pair_steps, config.pair_rate) if fresh else (config.tune_steps, config.tune_rate)
    rows = len(task.train["label"])
    size = min(config.pair_batch, rows)
    tokens = size * (config.max_length + 8)  # so that every batch has as many rows
    fields: dict[str, Any] = {"pad_id": task.tokenizer.pad_id, "cap": size, "multiple": 1, "length_multiple": 8}

    def plan(seed: int, epochs: int) -> BucketSampler:
        return BucketSampler(task.train, seed=seed, epochs=epochs, max_shapes=3, tokens=tokens, **fields)

    loader, _ = planned_loader(plan, (0,), -(-steps * size // rows), size)
    falling = optax.linear_schedule(rate, 0.0, steps)
    made = supervised(task, adamw_by_batch_size(falling, reference=size), steps=steps, loader=loader)
    return jax.tree.map(jnp.asarray, fit(made, seed=0).state.variables)


def _text_apply(task: Task, role: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def apply(variables: PyTree, inputs: Any, *, key: Any = None) -> tuple[jax.Array, jax.Array]:
        own, read = inputs[role], []

        def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.module.name == "head" and context.method_name == "__call__":
                read.append(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            logits = task.module.apply(variables, own["input_ids"], own["mask"], own.get("token_type_ids"))
        return wide(logits), wide(read[-1])

    return apply


_MAKERS: dict[str, Callable[..., list[Network]]] = {"image": _images, "text": _texts}
