"""A task from the user's own network, data, loss and metric."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.errors import check_choice, check_number, check_shape, near
from effjax.core.shapes import pad_to
from effjax.core.tree import wide
from effjax.data.sets import DataSet
from effjax.tasks.networks import as_network
from effjax.tasks.task import Metric, Task, Variables

__all__ = ["Score", "task"]

PyTree = Any
Columns = dict[str, np.ndarray]
PerExample = Callable[[PyTree, Mapping[str, jax.Array]], jax.Array]
TARGETS = ("label", "labels", "target", "targets", "score", "y", "weight")


class Score(NamedTuple):
    """What a task is judged by, per example.

    Attributes:
      name: of the metric.
      goal: ``'min'`` or ``'max'``.
      of: ``(outputs, batch) -> [rows]``; None for the loss of each row.
    """

    name: str
    goal: Literal["min", "max"]
    of: PerExample | None


def task(
    module: Any,
    data: DataSet | Mapping[str, Mapping[str, Any]],
    *,
    loss: Literal["cross_entropy", "squared_error"] | PerExample = "cross_entropy",
    metric: Literal["accuracy", "loss"] | Score | None = None,
    inputs: str | tuple[str, ...] | None = None,
    name: str | None = None,
    source: str | None = None,
    eval_batch: int = 256,
) -> Task:
    r"""Bundle your own network and data, to be trained and compared.

    With the outputs :math:`o_i` of row i and its weight :math:`w_i` (the column ``weight`` if the data have one, else
    1) the loss is :math:`\sum_i w_i \ell(o_i, b_i) / \sum_i w_i`, in float32.

    Args:
      module: a Linen module; an NNX module, or a function of ``rngs`` that makes one; an Equinox module, called per
        example, or a function of ``key`` that makes one; or two functions ``(init, apply)`` with ``init(key)`` and
        ``apply(params, inputs, *, key=None)``. An NNX or Equinox module that is made already starts every seed from
        its own parameters.
      data: ``{"train": columns, "test": columns}``, arrays with one row per example, or a ``DataSet``.
      loss: ``'cross_entropy'`` (outputs [rows, classes], integer column ``label``), ``'squared_error'`` (outputs [rows]
        or [rows, 1], column ``target``), or ``(outputs, batch) -> [rows]``, the loss of every row.
      metric: ``'accuracy'`` (of ``label``), ``'loss'``, or a ``Score``. None for accuracy with the cross-entropy, else
        the loss.
      inputs: the column that the network is called with, or several, of which it gets a dictionary. None for the only
        column that is no target.
      name: of the task; None for the module's name.
      source: where the data came from; None for their sizes.
      eval_batch: rows of one evaluation batch; the last one is padded.

    Returns:
      A ``Task``; its ``evaluate`` gives the metric and ``loss`` over the test rows.

    Raises:
      TypeError: a module of an unknown kind.
      ValueError: columns that are missing, differ in length or hold NaN; labels out of range; a loss or a metric that
        does not fit the outputs.

    Example:
      >>> import flax.linen as nn
      >>> x = np.linspace(-1, 1, 40, dtype=np.float32)[:, None]
      >>> columns = {"x": x, "label": (x[:, 0] > 0).astype(np.int32)}
      >>> problem = task(nn.Dense(2), {"train": columns, "test": columns})
      >>> sorted(problem.evaluate(problem.init(jax.random.key(0))))
      ['accuracy', 'loss']
    """
    check_number("eval_batch", eval_batch, low=1, integer=True)
    network = as_network(module)
    train, test = _splits(data)
    chosen = _inputs(train, inputs)
    of_row, judged = _loss(loss, train, test), _metric(metric, loss)
    if judged.name == "accuracy" and not isinstance(metric, Score):
        _check_known(train, test)

    def given(batch: Mapping[str, Any]) -> PyTree:
        return batch[chosen] if isinstance(chosen, str) else {column: batch[column] for column in chosen}

    example = {column: values[:1] for column, values in test.items()}

    def init(key: jax.Array) -> Variables:
        return network.init(key, given(example))

    def infer(variables: Variables, inputs: PyTree) -> PyTree:
        return network.apply(variables, inputs, False, None)[0]

    def loss_of(variables: Variables, batch: PyTree, key: jax.Array | None = None, *, train: bool = True):
        outputs, changed = network.apply(variables, given(batch), train, key)
        each = wide(of_row(outputs, batch))
        weight = wide(batch["weight"]) if "weight" in batch else jnp.ones(each.shape)
        check_shape("batch['weight']", weight, each.shape, "One weight for each row.")
        value = jnp.where(weight > 0, weight * each, 0).sum() / jnp.maximum(weight.sum(), 1e-9)
        return value, (changed, {"loss": value})

    evaluate = _evaluator(infer, given, {"loss": of_row, judged.name: judged.of or of_row}, test, eval_batch)
    classes = int(max(train["label"].max(), test["label"].max())) + 1 if loss == "cross_entropy" else None
    _check_fit(init, infer, given, of_row, judged, test, classes, network.name)
    sizes = f"train {len(next(iter(train.values())))}, test {len(next(iter(test.values())))} rows"
    return Task(
        name=name or network.name,
        source=source or (data.source if isinstance(data, DataSet) else f"given arrays ({sizes})"),
        metric=Metric(judged.name, judged.goal, f"test {judged.name.replace('_', ' ')}"),
        init=init,
        loss=loss_of,
        infer=infer,
        evaluate=evaluate,
        train=train,
        test=test,
        example_inputs=given({column: values[:eval_batch] for column, values in test.items()}),
        classes=classes,
        module=module,
    )


def _splits(data: DataSet | Mapping[str, Mapping[str, Any]]) -> tuple[Columns, Columns]:
    splits = data.splits if isinstance(data, DataSet) else data
    if not isinstance(splits, Mapping):
        raise ValueError(f"data is a {type(splits).__name__}; give {{'train': columns, 'test': columns}} or a DataSet.")
    held_out = "test" if "test" in splits else "validation"
    if "train" not in splits or held_out not in splits:
        raise ValueError(f"data holds {list(splits)}; it must hold 'train' and 'test', each with its columns.")
    train, test = (_columns(split, splits[split]) for split in ("train", held_out))
    if train.keys() != test.keys():
        raise ValueError(
            f"data: 'train' has the columns {sorted(train)} and {held_out!r} {sorted(test)}. Give the same."
        )
    for column, values in train.items():
        if values.shape[1:] != test[column].shape[1:]:
            raise ValueError(
                f"data: rows of {column!r} have shape {values.shape[1:]} in 'train' and {test[column].shape[1:]} in "
                f"{held_out!r}. Give the same."
            )
    return train, test


def _columns(split: str, columns: Mapping[str, Any]) -> Columns:
    if not isinstance(columns, Mapping) or not columns:
        raise ValueError(f"data[{split!r}] must be a dictionary of arrays with one row per example.")
    found = {column: np.asarray(values) for column, values in columns.items()}
    for column, values in found.items():
        where = f"data[{split!r}][{column!r}]"
        if values.dtype.kind not in "biuf" or not values.ndim:
            raise ValueError(f"{where} is {values.dtype}{list(values.shape)}; give numbers, one row per example.")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            rows = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
            raise ValueError(
                f"{where} holds NaN or infinity in {len(rows)} rows, the first {rows[0]}. Drop or fill them."
            )
        if values.dtype.kind in "iu" and values.size and not -(2**31) <= int(values.min()) <= int(values.max()) < 2**31:
            raise ValueError(f"{where} holds integers beyond 32 bits. Renumber them.")
        if values.dtype.itemsize == 8:
            found[column] = values.astype(np.float32 if values.dtype.kind == "f" else np.int32)
    if (weight := found.get("weight")) is not None and (weight.ndim != 1 or not weight.size or weight.min() < 0):
        raise ValueError(
            f"data[{split!r}]['weight'] is {weight.dtype}{list(weight.shape)}; give one number of 0 or more per row."
        )
    sizes = {column: len(values) for column, values in found.items()}
    if len(set(sizes.values())) > 1 or not next(iter(sizes.values())):
        raise ValueError(f"data[{split!r}] has columns of the lengths {sizes}; all need one row per example.")
    return found


def _inputs(train: Columns, inputs: str | tuple[str, ...] | None) -> str | tuple[str, ...]:
    if inputs is None:
        free = [column for column in train if column not in TARGETS]
        if len(free) != 1:
            raise ValueError(f"inputs=None, but data has the columns {sorted(train)}. Name those of the network.")
        return free[0]
    for column in (inputs,) if isinstance(inputs, str) else inputs:
        if column not in train:
            raise ValueError(f"inputs: data has no column {column!r}, only {sorted(train)}.{near(column, train)}")
    return inputs if isinstance(inputs, str) else tuple(inputs)


def _loss(loss: Any, train: Columns, test: Columns) -> PerExample:
    if callable(loss):
        return loss
    check_choice("loss", loss, ("cross_entropy", "squared_error"))
    column = {"cross_entropy": "label", "squared_error": "target"}[loss]
    if column not in train:
        raise ValueError(
            f"loss={loss!r} needs the column {column!r}, and data has {sorted(train)}.{near(column, train)}"
        )
    if loss == "squared_error":
        return _squared_error
    for split, columns in (("train", train), ("test", test)):
        labels = columns["label"]
        if labels.dtype.kind not in "iu" or labels.ndim != 1 or labels.min() < 0:
            raise ValueError(
                f"data[{split!r}]['label'] is {labels.dtype}{list(labels.shape)}, from {labels.min()} on; the "
                "cross-entropy needs integers [rows] from 0 on."
            )
    return lambda outputs, batch: optax.softmax_cross_entropy_with_integer_labels(wide(outputs), batch["label"])


def _squared_error(outputs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    rows = outputs[:, 0] if outputs.ndim == 2 and outputs.shape[1] == 1 else outputs
    if rows.shape != batch["target"].shape:
        raise ValueError(f"outputs have shape {outputs.shape} and the targets {batch['target'].shape}.")
    return jnp.square(wide(rows) - batch["target"])


def _metric(metric: Any, loss: Any) -> Score:
    if isinstance(metric, Score):
        return metric
    if metric is None:
        metric = "accuracy" if loss == "cross_entropy" else "loss"
    check_choice("metric", metric, ("accuracy", "loss"))
    if metric == "loss":
        return Score("loss", "min", None)
    return Score("accuracy", "max", lambda outputs, batch: outputs.argmax(-1) == batch["label"])


def _check_known(train: Columns, test: Columns) -> None:
    """Refuse unknown labels, which the accuracy would count as wrong."""
    for split, columns in (("train", train), ("test", test)):
        labels = columns.get("label")
        if labels is not None and labels.dtype.kind in "if" and labels.size and labels.min() < 0:
            raise ValueError(
                f"data[{split!r}]['label'] goes down to {labels.min()}: the accuracy would count unknown labels as "
                "wrong. Drop those rows, or judge by a Score of your own."
            )


def _check_fit(
    init, infer, given, of_row: PerExample, judged: Score, test: Columns, classes: int | None, name: str
) -> None:
    """Trace one batch, so that what does not fit is refused here and not in the first step."""
    batch = {column: jax.ShapeDtypeStruct((2, *values.shape[1:]), values.dtype) for column, values in test.items()}
    variables = jax.eval_shape(init, jax.random.key(0))
    outputs = jax.eval_shape(infer, variables, given(batch))
    shapes = jax.tree.map(lambda leaf: leaf.shape, outputs)
    for argument, function in (("loss", of_row), ("metric", judged.of)):
        if function is None:
            continue
        try:
            found = jax.eval_shape(function, outputs, batch).shape
        except (TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
            raise ValueError(f"{argument} does not fit the outputs of {name}, {shapes} for 2 rows: {error}") from error
        if found != (2,):
            raise ValueError(
                f"{argument} returns shape {found} for 2 rows, whose outputs from {name} are {shapes}; it must return "
                "one number per row."
            )
    if classes is not None and outputs.shape[-1] < classes:
        raise ValueError(
            f"labels go up to {classes - 1}, and {name} has {outputs.shape[-1]} outputs. Give it {classes}."
        )


def _evaluator(infer, given, scores: Mapping[str, PerExample], test: Columns, size: int) -> Callable[[Variables], dict]:
    rows = len(next(iter(test.values())))
    size = min(size, rows)

    @jax.jit
    def one(variables: Variables, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        outputs = infer(variables, given(batch))
        return {name: wide(score(outputs, batch)) for name, score in scores.items()}

    def evaluate(variables: Variables) -> dict[str, float]:
        parts = []
        for start in range(0, rows, size):
            batch = {column: pad_to(values[start : start + size], size) for column, values in test.items()}
            parts.append(one(variables, batch))
        found = jax.device_get(parts)
        # Scores per row, so that the padding is cut off before anything is averaged.
        return {
            name: float(np.concatenate([part[name] for part in found])[:rows].mean(dtype=np.float64)) for name in scores
        }

    return evaluate
