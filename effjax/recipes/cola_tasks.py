"""What the COLA study adapts: a pretrained network, the task it is adapted to, and where adapters sit."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from effjax.data.ragged import Ragged
from effjax.data.sets import DataSet, load
from effjax.data.shift import permute_pixels
from effjax.models.convert import module_name
from effjax.models.mlp import MLP
from effjax.models.pretrained import Pretrained, load_pretrained, save_pretrained
from effjax.recipes.spec import Axis
from effjax.tasks.image import image_task
from effjax.tasks.language import lm_task
from effjax.tasks.prompt import prompt_task
from effjax.tasks.text import TextTask, text_task

PyTree = Any
Variables = Mapping[str, PyTree]

LANGUAGE = ("tiny_shakespeare", "wikitext2", "ptb")
"""Data without labels: the task is to predict the next token."""
_QUERY_VALUE = "(query|value)/kernel$"
_MLP = re.compile(r"mlp((?:-\d+)+)")


class Adaptation(NamedTuple):
    """A pretrained network and a task.

    Attributes:
      name: ``data/model``.
      source: where the data came from.
      init: ``key -> params``, pretrained, under a fresh head where the task needs one.
      loss: ``(variables, batch) -> (loss, aux)``; traceable.
      infer: ``(variables, inputs) -> outputs``; traceable.
      evaluate: ``variables -> metrics``.
      columns: the training rows, arrays of one length each.
      example_inputs: for ``infer``.
      head: entries of the parameters that are no pretrained layers: trained whole, beside the adapters.
      targets: regex on the paths of the kernels that are adapted.
      names: ``(kernel path, layer) -> module name`` in a PEFT folder.
      base_model: where PEFT finds the pretrained network.
      task_type: PEFT's word for the kind of model.
      text: the text task, for other ways to batch it; None where it is none.
      save: ``(folder, params)``, writes a Hugging Face folder; None where the model has no such layout.
    """

    name: str
    source: str
    init: Callable[[jax.Array], PyTree]
    loss: Callable[[Variables, PyTree], tuple[Float[Array, ""], Any]]
    infer: Callable[[Variables, PyTree], PyTree]
    evaluate: Callable[[Variables], dict[str, float]]
    columns: dict[str, np.ndarray]
    example_inputs: PyTree
    head: tuple[str, ...]
    targets: str
    names: Callable[[str, int | None], str | None]
    base_model: str = ""
    task_type: str | None = None
    text: TextTask | None = None
    save: Callable[[Path, PyTree], None] | None = None


class Options(NamedTuple):
    """How tasks are loaded; see the fields of ``ColaStudy``."""

    max_length: int
    train_rows: int | None
    test_rows: int | None
    dtype: str
    remat: bool
    scan_layers: bool
    dropout: float


def axis(task: str) -> Axis:
    """What a task is judged by."""
    data, _, _ = task.rpartition("/")
    if data in LANGUAGE:
        return Axis("nll", "min", "test nats a token")
    name = "spearman" if data == "glue/stsb" else "accuracy"
    return Axis(name, "max", f"test {name}")


@functools.lru_cache(maxsize=4)
def adaptation(task: str, options: Options) -> Adaptation:
    """Load a task named DATA/MODEL; shared by the arms."""
    data, _, model = task.rpartition("/")
    if data == "digits":
        return _digits(model)
    loaded = load_pretrained(model, scan_layers=options.scan_layers)
    if data in LANGUAGE:
        return _language(data, model, loaded, options)
    rows = _at_most(load(data), options)
    if loaded.config["model_type"] in ("opt", "llama"):
        return _prompt(rows, model, loaded, options)
    return _text(rows, model, loaded, options)


def _digits(model: str) -> Adaptation:
    """An MLP trained on the digits, to be adapted to the digits with their pixels permuted."""
    widths = _MLP.fullmatch(model)
    if not widths:
        raise ValueError(f"tasks='digits/{model}': the model must be like 'mlp-64-64', the widths of hidden layers.")
    data = load("digits")
    module = MLP(tuple(map(int, widths[1][1:].split("-"))), classes=len(data.classes))
    before = image_task(data, module)
    permuted = permute_pixels(0, data.splits["train"]["image"].shape[1:])
    splits = {name: permuted(columns) for name, columns in data.splits.items()}
    after = image_task(dataclasses.replace(data, splits=splits), module)
    params = _train(before.init(jax.random.key(0))["params"], before.loss, before.train)
    return Adaptation(
        name=f"digits, pixels permuted/{model}",
        source=after.source,
        init=lambda key: params,
        loss=after.loss,
        infer=after.infer,
        evaluate=after.evaluate,
        columns=after.train,
        example_inputs=after.test["image"][:64],
        head=(),
        targets="kernel$",
        names=lambda path, layer: path.removesuffix("/kernel").replace("/", "."),
    )


def _train(
    params: PyTree, loss: Callable, columns: dict[str, np.ndarray], steps: int = 1500, batch: int = 64
) -> PyTree:
    """Plain Adam, the rate falling linearly from 3e-3."""
    tx = optax.adam(optax.linear_schedule(3e-3, 0.0, steps))
    rows = np.random.default_rng(0).integers(0, len(columns["label"]), (steps, batch))
    columns = jax.tree.map(jnp.asarray, columns)

    @jax.jit
    def run(params: PyTree) -> PyTree:
        def step(carry, rows):
            params, opt = carry
            grads = jax.grad(lambda p: loss({"params": p}, {k: v[rows] for k, v in columns.items()})[0])(params)
            updates, opt = tx.update(grads, opt)
            return (optax.apply_updates(params, updates), opt), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.asarray(rows))[0][0]

    return run(params)


def _language(data: str, model: str, loaded: Pretrained, options: Options) -> Adaptation:
    task = lm_task(
        data,
        model,
        length=options.max_length,
        train_rows=options.train_rows,
        test_rows=options.test_rows,
        dtype=options.dtype,
        remat=options.remat,
        scan_layers=options.scan_layers,
    )
    return _decoder(task, task.train, loaded)


def _prompt(data: DataSet, model: str, loaded: Pretrained, options: Options) -> Adaptation:
    task = prompt_task(
        data,
        model,
        max_length=options.max_length,
        dtype=options.dtype,
        remat=options.remat,
        scan_layers=options.scan_layers,
    )
    return _decoder(task, task.train, loaded)


def _decoder(task: Any, columns: dict[str, np.ndarray], loaded: Pretrained) -> Adaptation:
    return Adaptation(
        name=task.name,
        source=task.source,
        init=lambda key: task.init(key)["params"],
        loss=task.loss,
        infer=task.infer,
        evaluate=task.evaluate,
        columns=columns,
        example_inputs=task.example_inputs,
        head=(),
        targets=_QUERY_VALUE,
        names=lambda path, layer: module_name(path, loaded.rules, layer),
        base_model=loaded.folder.name,
        task_type="CAUSAL_LM",
        save=lambda folder, params: save_pretrained(folder, loaded, params),
    )


def _text(data: DataSet, model: str, loaded: Pretrained, options: Options) -> Adaptation:
    task = text_task(
        data,
        model,
        max_length=options.max_length,
        dtype=options.dtype,
        remat=options.remat,
        scan_layers=options.scan_layers,
        dropout=options.dropout,
    )
    return Adaptation(
        name=task.name,
        source=task.source,
        init=lambda key: task.init(key)["params"],
        loss=task.loss,
        infer=task.infer,
        evaluate=task.evaluate,
        columns=_padded(task, options.max_length),
        example_inputs=task.example_inputs,
        head=("head",),
        targets=_QUERY_VALUE,
        names=lambda path, layer: module_name(path, loaded.rules, layer),
        base_model=loaded.folder.name,
        task_type="FEATURE_EXTRACTION",
        text=task,
        save=lambda folder, params: save_pretrained(folder, loaded, params["encoder"]),
    )


def _padded(task: TextTask, length: int) -> dict[str, np.ndarray]:
    """All training rows at one length."""
    lengths = task.train["input_ids"].lengths
    columns = {"mask": np.arange(length) < lengths[:, None]}
    for name, column in task.train.items():
        value = task.tokenizer.pad_id if name == "input_ids" else 0
        columns[name] = column.pad(np.arange(len(lengths)), length, value) if isinstance(column, Ragged) else column
    return columns


def _at_most(data: DataSet, options: Options) -> DataSet:
    """The data set with a fixed random choice of rows, where it has more of them."""
    splits = dict(data.splits)
    held_out = "test" if "test" in splits else "validation"
    for name, most in (("train", options.train_rows), (held_out, options.test_rows)):
        rows = len(next(iter(splits[name].values()))) if name in splits else 0
        if most is not None and rows > most:
            chosen = np.sort(np.random.default_rng(0).permutation(rows)[:most])
            splits[name] = {column: _take(values, chosen) for column, values in splits[name].items()}
    return dataclasses.replace(data, splits=splits)


def _take(values: Any, rows: np.ndarray) -> Any:
    return values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]
