"""Sequence problems: data, model, loss and evaluation as pure functions."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Shaped

from effjax.core.errors import check_choice, check_number
from effjax.core.layers import check_lengths
from effjax.core.shapes import pad_to
from effjax.core.tree import wide
from effjax.data.sequences import Kind, SequenceData, sequence_data, sequence_kind
from effjax.tasks.task import Metric, Task

__all__ = ["sequence_task"]

PyTree = Any
Variables = Mapping[str, PyTree]
Batch = Mapping[str, Shaped[Array | np.ndarray, "batch ..."]]
Infer = Callable[[Variables, jax.Array], jax.Array]

KINDS = get_args(Kind)


METRICS: Mapping[str, Metric] = {
    "class": Metric("accuracy", "max", "test accuracy"),
    "value": Metric("mse", "min", "test squared error"),
    "tokens": Metric("nll", "min", "test nats per token"),
}


def sequence_metric(name: str) -> Metric:
    """What a sequence problem is judged by, from its name alone: no data are read.

    Args:
      name: of ``effjax.data.sequences``.

    Returns:
      A ``Metric`` of what ``sequence_evaluator`` returns.

    Raises:
      ValueError: an unknown name.

    Example:
      >>> sequence_metric("add-200").name
      'mse'
    """
    return METRICS[sequence_kind(name)]


def sequence_task(
    data: str | SequenceData,
    model: nn.Module,
    *,
    eval_batch: int = 256,
    dtype: str = "float32",
    remat: bool = False,
) -> Task:
    """A sequence problem with a Flax module.

    Args:
      data: a name of ``effjax.data.sequences``, or a ``SequenceData``.
      model: a Linen module called as ``module(inputs)``, or ``module(inputs, train=...)`` if it takes ``train``,
        that returns [batch, outputs] (class, value) or [batch, time, outputs] (tokens). Where the data have a column
        ``lengths``, it is called with ``seq_lengths`` too.
      eval_batch: sequences of one evaluation batch; the last one is padded.
      dtype: what the module was made to compute in; trainers compare it with their options.
      remat: whether the module recomputes activations; the same.

    Returns:
      A ``Task``. ``infer`` returns float32 outputs, of inputs or, where the data have a column ``lengths``, of a
      mapping of ``inputs`` and ``lengths``; ``loss`` is ``sequence_loss`` and its metrics hold ``accuracy`` (but of
      values), ``evaluate`` is ``sequence_evaluator``. Of ``details``, ``data`` is the ``SequenceData`` and
      ``draw``, where there is one, completes a training batch on the host.

    Raises:
      ValueError: an unknown name, columns of another shape, dtype or range, NaN in the test data, a
        module whose outputs have another shape, or one without ``seq_lengths`` for sequences of unlike length.

    Example:
      >>> class Mean(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return nn.Dense(10)(x.mean(1))
      >>> task = sequence_task("digits-pixels", Mean())
      >>> batch = {name: column[:4] for name, column in task.train.items()}
      >>> loss, (state, metrics) = task.loss(task.init(jax.random.key(0)), batch)
      >>> loss.shape, state, sorted(metrics)
      ((), {}, ['accuracy', 'loss'])
    """
    problem = sequence_data(data) if isinstance(data, str) else data
    taken = inspect.signature(model.__call__).parameters
    if problem.told_lengths and "seq_lengths" not in taken:
        raise ValueError(
            f"model={type(model).__name__} takes no seq_lengths, but the sequences of {problem.name!r} differ in "
            "length and are filled up at the end: it would read the filling. Take seq_lengths in __call__, as "
            "effjax.models.SequenceNetwork does, or fill them up at the start: pad='start'."
        )
    takes_train = "train" in taken
    example = problem.test["inputs"][:1]

    def mode(train: bool) -> dict[str, Any]:
        return {"train": train} if takes_train else {}

    def init(key: jax.Array) -> Variables:
        return model.init(key, example, **mode(False))

    state_names = [name for name in jax.eval_shape(init, jax.random.key(0)) if name != "params"]

    def apply(variables: Variables, inputs: Any, key: jax.Array | None, train: bool) -> tuple[jax.Array, Any]:
        rngs = None if key is None else {"dropout": key}
        inputs, lengths = inputs_and_lengths(inputs)
        told = {} if lengths is None else {"seq_lengths": lengths}
        return model.apply(variables, inputs, rngs=rngs, mutable=state_names, **mode(train), **told)

    name = type(model).__name__
    return task_of_functions(problem, name, init, apply, eval_batch=eval_batch, dtype=dtype, remat=remat)._replace(
        module=model
    )


def network_inputs(data: SequenceData, columns: Mapping[str, Any]) -> Any:
    """What the network of a task reads of some columns: ``inputs``, with ``lengths`` where it must be told them."""
    if not data.told_lengths:
        return columns["inputs"]
    return {name: columns[name] for name in ("inputs", "lengths")}


def inputs_and_lengths(inputs: Any) -> tuple[Any, Any]:
    """``inputs`` and ``lengths`` (None where there are none) of what ``network_inputs`` gives."""
    return (inputs["inputs"], inputs["lengths"]) if isinstance(inputs, Mapping) else (inputs, None)


def example_inputs(data: SequenceData, rows: int) -> Any:
    """The first test sequences, as a task's ``infer`` takes them."""
    return network_inputs(data, {name: column[:rows] for name, column in data.test.items()})


def task_of_functions(
    data: SequenceData,
    model: str,
    init: Callable[[jax.Array], Variables],
    apply: Callable[[Variables, Any, jax.Array | None, bool], tuple[jax.Array, Variables]],
    *,
    eval_batch: int = 256,
    dtype: str = "float32",
    remat: bool = False,
) -> Task:
    """``sequence_task`` of a network in two functions.

    Args:
      data: the problem.
      model: the network's name.
      init: ``key -> variables``; traceable.
      apply: ``(variables, inputs, key, train) -> (outputs, model_state)``; traceable. ``inputs`` are a mapping of
        ``inputs`` and ``lengths`` where the data have lengths; ``key`` feeds dropout and may be None, ``model_state``
        holds the collections other than ``params``.
      eval_batch: as for ``sequence_task``.
      dtype: as for ``sequence_task``.
      remat: as for ``sequence_task``.

    Returns:
      A ``Task``.

    Raises:
      ValueError: as ``sequence_task``.
    """
    infer = lambda variables, inputs: wide(apply(variables, inputs, None, False)[0])
    evaluate = sequence_evaluator(data, infer, eval_batch)
    example = example_inputs(data, 1)
    _check_outputs(data, model, jax.eval_shape(infer, jax.eval_shape(init, jax.random.key(0)), example).shape)

    def loss(
        variables: Variables, batch: Batch, key: jax.Array | None = None, *, train: bool = True
    ) -> tuple[Float[Array, ""], tuple[Variables, dict[str, jax.Array]]]:
        outputs, state = apply(variables, network_inputs(data, batch), key, train)
        scores = _scores(data.kind, outputs, asked_targets(data, batch["targets"], batch.get("lengths")))
        value = _mean(scores.loss, scores.asked)
        metrics = {"loss": value}
        if data.kind != "value":
            metrics["accuracy"] = _mean(scores.correct, scores.asked)
        return value, (state, metrics)

    return Task(
        name=f"{data.name}/{model}",
        source=data.source,
        metric=METRICS[data.kind],
        init=init,
        loss=loss,
        infer=infer,
        evaluate=evaluate,
        train=data.train,
        example_inputs=example,
        test=data.test,
        classes=None if data.kind == "value" else data.outputs,
        weight=(lambda batch: (asked_targets(data, batch["targets"], batch.get("lengths")) >= 0).sum())
        if data.kind == "tokens"
        else None,
        dtype=dtype,
        remat=remat,
        details={"data": data} | ({} if data.draw is None else {"draw": data.draw}),
    )


def sequence_loss(
    kind: Kind,
    outputs: Float[Array | np.ndarray, "*batch outputs"],
    targets: Float[Array | np.ndarray, "*batch"] | Int[Array | np.ndarray, "*batch"],
) -> Float[Array, ""]:
    r"""The mean loss over what is asked, in float32.

    .. math:: \frac{1}{|A|} \sum_{i \in A} -\log \mathrm{softmax}(o_i)_{y_i}
              \quad\text{or}\quad \frac{1}{|A|} \sum_{i \in A} (o_i - y_i)^2

    Args:
      kind: ``"class"`` or ``"tokens"`` for the cross-entropy in nats, ``"value"`` for the squared error.
      outputs: [batch, classes] (class), [batch, 1] (value) or [batch, time, vocabulary] (tokens).
      targets: int [batch] (class), float [batch] (value) or int [batch, time] (tokens), where a negative
        number asks for nothing.

    Returns:
      A scalar; 0 where nothing is asked.

    Raises:
      ValueError: an unknown kind, or shapes that do not belong together.

    Example:
      >>> float(sequence_loss("value", jnp.array([[1.0], [3.0]]), jnp.array([1.0, 1.0])))
      2.0
    """
    scores = _scores(kind, outputs, targets)
    return _mean(scores.loss, scores.asked)


def sequence_evaluator(
    data: SequenceData, infer: Infer, eval_batch: int = 256
) -> Callable[[Variables], dict[str, float]]:
    """A function that scores a model on ``data.test``, in batches of one size.

    Args:
      data: the problem.
      infer: ``(variables, inputs) -> outputs``, shaped as in ``sequence_loss``; traceable.
      eval_batch: sequences of one batch; the last one is padded, and the padding not scored.

    Returns:
      ``variables -> {"accuracy", "nll"}`` with ``nll`` in nats per sequence (class) or per token asked for (tokens);
      ``variables -> {"mse"}`` (value).

    Raises:
      ValueError: columns of another shape, dtype or range, or NaN in the test data.

    Example:
      >>> data = sequence_data("add-20")
      >>> evaluate = sequence_evaluator(data, lambda variables, inputs: jnp.ones((len(inputs), 1)))
      >>> round(evaluate({})["mse"], 2)  # 1/6, but for the choice of 1,000 examples
      0.17
    """
    check_number("eval_batch", eval_batch, low=1, integer=True)
    for split in ("train", "test"):
        _check_columns(data, split)
    inputs, targets = network_inputs(data, data.test), data.test["targets"]
    rows = len(targets)
    size = min(eval_batch, rows)

    @jax.jit
    def scores(variables: Variables, inputs: PyTree, targets: jax.Array) -> _Scores:
        _, lengths = inputs_and_lengths(inputs)
        return _scores(data.kind, infer(variables, inputs), asked_targets(data, targets, lengths))

    def evaluate(variables: Variables) -> dict[str, float]:
        parts = []
        for start in range(0, rows, size):
            cut = lambda column, start=start: pad_to(column[start : start + size], size)
            parts.append(scores(variables, *jax.tree.map(cut, (inputs, targets))))
        # Sums of each sequence, so that the padding is cut off before anything is averaged.
        sums = _Scores(
            *(np.concatenate(part)[:rows].sum(dtype=np.float64) for part in zip(*jax.device_get(parts), strict=True))
        )
        if data.kind == "value":
            return {"mse": float(sums.loss / sums.asked)}
        return {"accuracy": float(sums.correct / sums.asked), "nll": float(sums.loss / sums.asked)}

    return evaluate


def asked_targets(data: SequenceData, targets: Any, lengths: Any) -> Any:
    """Targets that ask for nothing at the padding, where there is one of every step."""
    if data.kind != "tokens" or lengths is None or not data.told_lengths:
        return targets
    return jnp.where(jnp.arange(targets.shape[1])[None] < lengths[:, None], targets, -1)


class _Scores(NamedTuple):
    """Sums over the answers of each sequence, float32 [batch]."""

    loss: jax.Array
    correct: jax.Array
    asked: jax.Array


def _scores(kind: Kind, outputs: jax.Array | np.ndarray, targets: jax.Array | np.ndarray) -> _Scores:
    check_choice("kind", kind, KINDS)
    axes = 2 if kind == "tokens" else 1
    wrong_size = kind == "value" and outputs.shape[-1:] != (1,)
    if targets.ndim != axes or outputs.shape[:-1] != targets.shape or wrong_size:
        form = {"class": "[batch, classes] and [batch]", "value": "[batch, 1] and [batch]"}
        raise ValueError(
            f"outputs {outputs.shape} and targets {targets.shape} of kind {kind!r} must be "
            f"{form.get(kind, '[batch, time, vocabulary] and [batch, time]')}."
        )
    outputs = wide(outputs)
    if kind == "value":
        loss = (outputs[:, 0] - wide(targets)) ** 2
        return _Scores(loss, jnp.zeros_like(loss), jnp.ones_like(loss))
    asked = targets >= 0
    labels = jnp.maximum(targets, 0)
    nll = jnp.where(asked, optax.softmax_cross_entropy_with_integer_labels(outputs, labels), 0)
    correct = asked & (outputs.argmax(-1) == labels)
    return _Scores(*(wide(part).reshape(len(targets), -1).sum(1) for part in (nll, correct, asked)))


def _mean(sums: jax.Array, asked: jax.Array) -> jax.Array:
    return sums.sum() / jnp.maximum(asked.sum(), 1)


def _check_columns(data: SequenceData, split: str) -> None:
    """Refuse columns that are not as ``SequenceData`` says."""
    check_choice("data.kind", data.kind, KINDS)
    inputs, targets = (getattr(data, split)[name] for name in ("inputs", "targets"))
    where = f"data={data.name!r}, split {split!r}"
    if not len(targets) or len(inputs) != len(targets):
        raise ValueError(f"{where}: {len(inputs)} inputs and {len(targets)} targets must be as many, and not none.")
    shape, tail = inputs.shape[1:], (data.features,) if data.features else ()
    if shape[1:] != tail or (shape[0] != data.length and (split == "test" or data.draw is None)):
        raise ValueError(f"{where}: inputs have shape {inputs.shape}; expected {('rows', data.length, *tail)}.")
    if ("lengths" in data.train) != ("lengths" in data.test):
        raise ValueError(f"data={data.name!r}: one split has a column 'lengths' and the other none. Give it to both.")
    if "lengths" in getattr(data, split):
        try:
            check_lengths(getattr(data, split)["lengths"], len(targets), data.length, least=1)
        except ValueError as error:
            raise ValueError(f"{where}, column 'lengths': {error}") from None
    if not data.features:
        _check_range(f"{where}: inputs", inputs, 0, data.vocabulary)
    elif split == "test":  # ``Batches`` checks what is trained on
        _check_finite(f"{where}: inputs", inputs)
    if data.kind != "value":
        _check_range(f"{where}: targets", targets, -1 if data.kind == "tokens" else 0, data.outputs)
    elif split == "test":
        _check_finite(f"{where}: targets", targets)


def _check_finite(what: str, array: np.ndarray) -> None:
    if array.dtype.kind != "f":
        raise ValueError(f"{what} have dtype {array.dtype}; expected float32.")
    bad = sum(not np.isfinite(row).all() for row in array)  # row by row: a mask of all would be large
    if bad:
        raise ValueError(f"{what} hold NaN or infinity in {bad} of {len(array)} rows. Drop or repair those rows.")


def _check_range(what: str, array: np.ndarray, low: int, size: int) -> None:
    if array.dtype.kind not in "iu" or array.min() < low or array.max() >= size:
        raise ValueError(
            f"{what} ({array.dtype}, {array.min()} to {array.max()}) must be integers in [{low}, {size - 1}]."
        )


def _check_outputs(data: SequenceData, model: str, shape: tuple[int, ...]) -> None:
    expected = (1, data.length, data.outputs) if data.kind == "tokens" else (1, data.outputs)
    if shape != expected:
        read = "one answer a step" if data.kind == "tokens" else "one answer a sequence"
        raise ValueError(
            f"model={model} maps a sequence of {data.name!r} to shape {shape}; expected {expected}. "
            f"Build it for {read} and {data.outputs} outputs."
        )
