"""Losses of a transformer under gates: one program for all that is tried, and states that need not be computed again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from effjax.core.errors import check_number
from effjax.core.shapes import check_ladder
from effjax.core.tree import wide
from effjax.models.parts import Parts, parts
from effjax.models.pruned import Gates

__all__ = ["GatedEvaluator", "PruneBatch", "Scores", "axformer_step", "gated_apply", "prune_batches", "sample_losses"]

PyTree = Any
Apply = Callable[..., Any]
Loss = Callable[[Any, Any], jax.Array]


class Scores(NamedTuple):
    """What the search reads of a model.

    Attributes:
      losses: [rows], one loss of 0 or more for each validation sample.
      predicted: int [rows], the predicted classes; None where outputs are no logits of classes.
      complete: False where the evaluation ended early; losses that were not computed are 0 then.
    """

    losses: Any
    predicted: Any = None
    complete: bool = True


class PruneBatch(NamedTuple):
    """A batch of the validation set.

    Attributes:
      inputs: an array or a tree of arrays, rows leading.
      labels: [rows] or [rows, length], for the loss.
      rows: int [rows], places in the validation set; -1 for rows that fill the batch up.
    """

    inputs: Any
    labels: Any
    rows: np.ndarray


def sample_losses(
    outputs: Float[Array | np.ndarray, "rows *length classes"], labels: Int[Array | np.ndarray, "rows *length"]
) -> Float[Array, "rows"]:
    r"""Cross-entropy of every sample, in nats; of sequences the mean over their known labels.

    .. math:: \ell_i = -\log \mathrm{softmax}(z_i)_{y_i}

    Args:
      outputs: logits.
      labels: classes, or the next tokens of a language model; -1 is unknown and counts nowhere.

    Returns:
      float32 (float64 of float64 logits) [rows]; 0 where nothing is known.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> sample_losses(jnp.zeros((2, 4)), jnp.array([3, -1])).round(4).tolist() == [jnp.log(4.0).round(4).item(), 0.0]
      True
    """
    if jnp.shape(outputs)[:-1] != jnp.shape(labels):
        raise ValueError(
            f"labels have shape {jnp.shape(labels)}; expected {jnp.shape(outputs)[:-1]}, as outputs are "
            f"{jnp.shape(outputs)}. For other losses give loss=(outputs, labels) -> [rows]."
        )
    outputs, labels = wide(outputs), jnp.asarray(labels)
    known = labels >= 0
    chosen = jnp.take_along_axis(outputs, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    each = jnp.where(known, jax.nn.logsumexp(outputs, axis=-1) - chosen, 0)
    axes = tuple(range(1, labels.ndim))
    return each.sum(axes) / jnp.maximum(known.sum(axes), 1).astype(each.dtype)


def gated_apply(module: nn.Module, *, top_k: int | float = 30) -> Apply:
    """A model of ``effjax.models`` as a function of its parameters, its inputs and its gates.

    Args:
      module: ``Bert``, ``BertClassifier`` or ``Decoder``.
      top_k: of hard attention, see ``keep_largest``.

    Returns:
      ``(params, inputs, gates) -> outputs``, in evaluation; ``inputs`` are the module's arguments by name
      (``input_ids``, ``mask``, ...). Differentiable in the gates; wherever they are all on, the module's outputs.

    Example:
      >>> from effjax.models import Bert
      >>> from effjax.transformers.prune_spec import PruneShape, PruneSpec
      >>> module = Bert(30, 8, num_layers=2, num_heads=2, intermediate_size=8)
      >>> ids = jnp.ones((1, 3), int)
      >>> params = module.init(jax.random.key(0), ids)["params"]
      >>> gates = PruneSpec(PruneShape(layers=2, heads=2, groups=1), mlp=(1,)).gates()
      >>> gated_apply(module)(params, {"input_ids": ids}, gates).shape
      (1, 3, 8)
    """
    cut = parts(module, top_k=top_k)

    def apply(params: PyTree, inputs: Mapping[str, Any], gates: Gates) -> jax.Array:
        layers = (cut.stack(params), jax.tree.map(jnp.asarray, gates))
        body = lambda x, layer: (cut.layer(layer[0], x, inputs, layer[1]), None)
        x, _ = jax.lax.scan(body, cut.embed(params, inputs), layers)
        return cut.head(params, x, inputs)

    return apply


def axformer_step(
    apply: Apply, params: PyTree, gates: Gates, batch: tuple[PyTree, PyTree], *, loss: Loss = sample_losses
) -> Scores:
    """Score one batch of a gated model: the traceable part of the search.

    Args:
      apply: ``(params, inputs, gates) -> outputs``: of ``gated_apply``, or your own model, which reads the gates.
      params: its parameters.
      gates: switches, arrays of 0 and 1: other values need no other program.
      batch: (inputs, labels).
      loss: ``(outputs, labels) -> [rows]``, 0 or more.

    Returns:
      ``Scores`` of the batch.

    Raises:
      ValueError: a loss that is not one number for each row.

    Example:
      >>> apply = lambda params, x, gates: x * gates.mlp[0]
      >>> gates = Gates(jnp.ones(1), jnp.ones(1), jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.zeros(1))
      >>> axformer_step(apply, None, gates, (jnp.array([[0.0, 9.0]]), jnp.array([1]))).predicted.tolist()
      [1]
    """
    inputs, labels = batch
    return _score(loss, apply(params, inputs, gates), labels)


def _score(loss: Loss, outputs: Any, labels: Any) -> Scores:
    losses = loss(outputs, labels)
    rows = jnp.shape(jax.tree.leaves(labels)[0])[0]
    if jnp.shape(losses) != (rows,):
        raise ValueError(f"loss returns shape {jnp.shape(losses)} for {rows} rows; expected ({rows},), one number each.")
    logits = isinstance(outputs, jax.Array) and outputs.ndim == 2 and jnp.ndim(labels) == 1
    return Scores(losses, outputs.argmax(-1).astype(jnp.int32) if logits else None)


def prune_batches(
    inputs: PyTree,
    labels: Num[np.ndarray | Array, "rows *length"],
    *,
    batch_size: int = 128,
    buckets: Sequence[int] | None = None,
) -> list[PruneBatch]:
    """Cut a validation set into batches of one shape, or of one shape for each bucket of lengths.

    Rows whose integer label is unknown (-1; of sequences: whose labels all are) are left out. The last batch of a
    shape is filled up with rows that count nowhere.

    Args:
      inputs: an array or a tree of arrays, rows leading; for ``buckets`` a mapping with ``mask``, True at real tokens,
        padded on the right.
      labels: [rows], or [rows, length].
      batch_size: rows of a batch.
      buckets: lengths that rows are cut to, increasing; a batch holds rows of one bucket. None pads all alike.

    Returns:
      Batches of NumPy arrays, whose ``rows`` are 0, 1, ... over the known rows in their order.

    Raises:
      ValueError: no known row, arrays of different lengths, or buckets without a mask.

    Example:
      >>> batches = prune_batches({"x": np.arange(6.0).reshape(3, 2)}, np.array([0, -1, 1]), batch_size=4)
      >>> len(batches), batches[0].rows.tolist()
      (1, [0, 1, -1, -1])
    """
    check_number("batch_size", batch_size, low=1, integer=True)
    labels = np.asarray(labels)
    inputs = jax.tree.map(np.asarray, inputs)
    sizes = {len(leaf) if leaf.ndim else None for leaf in jax.tree.leaves(inputs)}
    if sizes != {len(labels)}:
        raise ValueError(f"inputs have {sizes} rows, but labels have {len(labels)}. Give one label for each row.")
    known = np.ones(len(labels), bool)
    if labels.dtype.kind in "iu":
        known = (labels >= 0).reshape(len(labels), -1).any(1) if len(labels) else known[:0]
    rows = np.flatnonzero(known)
    if not rows.size:
        raise ValueError(f"The validation set is empty: of {len(labels)} rows 0 have a label. Give at least one.")
    place = np.cumsum(known) - 1
    batches = []
    for length, members in _by_length(inputs, rows, buckets):
        for start in range(0, len(members), batch_size):
            own = members[start : start + batch_size]
            filled = np.concatenate([own, np.repeat(own[:1], batch_size - len(own))])
            number = np.concatenate([place[own], np.full(batch_size - len(own), -1)])
            take = lambda leaf, filled=filled, length=length: _cut(leaf[filled], length)
            batches.append(PruneBatch(jax.tree.map(take, inputs), _cut(labels[filled], length), number))
    return batches


class _Length(NamedTuple):
    whole: int
    kept: int


def _by_length(inputs: Any, rows: np.ndarray, buckets: Sequence[int] | None) -> list[tuple[_Length | None, np.ndarray]]:
    if buckets is None:
        return [(None, rows)]
    if not isinstance(inputs, Mapping) or "mask" not in inputs:
        raise ValueError("buckets need inputs with a mask, True at real tokens. Add it, or leave buckets out.")
    mask = np.asarray(inputs["mask"], bool)
    lengths = mask.sum(1)
    if (mask != (np.arange(mask.shape[1])[None] < lengths[:, None])).any():
        raise ValueError("buckets cut rows on the right, but mask is False before a real token. Leave buckets out.")
    rungs = np.array(check_ladder(buckets, int(lengths[rows].max()), argument="buckets"))
    chosen = np.searchsorted(rungs, lengths[rows])
    whole = mask.shape[1]
    found = ((_Length(whole, int(min(rung, whole))), rows[chosen == i]) for i, rung in enumerate(rungs))
    return [(length, members) for length, members in found if members.size]


def _cut(leaf: np.ndarray, length: _Length | None) -> np.ndarray:
    if length is None or leaf.ndim < 2 or leaf.shape[1] != length.whole:
        return leaf
    return leaf[:, : length.kept]


class GatedEvaluator:
    r"""Score gates on a validation set.

    A model of ``effjax.models`` is run as ``run(gates, h_s, s)``: layers s, s + 1, ... from the input :math:`h_s` of layer
    s, where s is traced. States :math:`h_s` that ``keep`` stored are read wherever the gates below s are those that
    were kept. Gates are data: one program for each shape of a batch, whatever is tried, besides the embeddings', which
    run once.

    Decisions hang on differences of 1e-4: compute in float32, on TPUs and recent GPUs under
    ``jax.default_matmul_precision("highest")``.

    Args:
      model: ``Bert``, ``BertClassifier``, ``Decoder``; or your own ``(params, inputs, gates) -> outputs``, which reads
        the gates itself and is run as a whole.
      params: its parameters.
      batches: of ``prune_batches``.
      loss: ``(outputs, labels) -> [rows]``, 0 or more.
      top_k: of hard attention in a model of ``effjax.models``, see ``keep_largest``.
      cache_bytes: most memory for stored states; where not all layers' fit, those of every n-th layer. 0 stores none.
      mesh: batches are sharded over ``axis`` of this mesh, everything else is replicated.
      axis: name of the batch's axis.

    Raises:
      ValueError: labels that the outputs do not have, or rows that the mesh cannot share.
    """

    def __init__(
        self,
        model: nn.Module | Apply,
        params: PyTree,
        batches: Sequence[PruneBatch],
        *,
        loss: Loss = sample_losses,
        top_k: int | float = 30,
        cache_bytes: int = 4 * 2**30,
        mesh: Mesh | None = None,
        axis: str = "data",
    ):
        check_number("cache_bytes", cache_bytes, low=0, integer=True)
        self.rows = _count_rows(batches)
        self.top_k = top_k if isinstance(model, nn.Module) else None
        self._numbers = [np.asarray(batch.rows) for batch in batches]
        self._sharding = None if mesh is None else (NamedSharding(mesh, P(axis)), NamedSharding(mesh, P()))
        self._params = params if mesh is None else jax.device_put(params, self._sharding[1])
        self._batches = [self._placed((batch.inputs, batch.labels), mesh, axis) for batch in batches]
        self._cut = parts(model, top_k=top_k) if isinstance(model, nn.Module) else None
        self.layers_run = 0
        if self._cut is None:
            out = None if self._sharding is None else self._sharding[1]
            whole = lambda params, gates, batch: axformer_step(model, params, gates, batch, loss=loss)[:2]
            self._run = jax.jit(whole, out_shardings=out)
        else:
            self._layers = jax.jit(self._cut.stack)(self._params)
            self._embed = jax.jit(self._cut.embed)
            out = None if self._sharding is None else (self._sharding[0], self._sharding[1], self._sharding[1])
            self._run = jax.jit(_runner(self._cut, loss), out_shardings=out)
        self._kept: tuple[Gates, dict[int, list[Any]]] | None = None
        self._stride = self._fitting_stride(cache_bytes) if self._cut else 0
        if loss is sample_losses:
            self._check_labels(batches, model)

    @property
    def compiles(self) -> int:
        """Programs of the gated model compiled so far."""
        return self._run._cache_size()

    def __call__(self, gates: Gates, *, weights: np.ndarray | None = None, bound: float = np.inf) -> Scores:
        """Score gates on the whole set.

        Args:
          gates: NumPy arrays.
          weights: [rows], with ``bound``: stop once ``sum(weights * losses)`` of the batches so far is above it.
          bound: see ``weights``.
        """
        if weights is None:
            return self.collect(self.submit(gates))
        total, results = 0.0, []
        for index, numbers in enumerate(self._numbers):
            results.append(self._one(gates, index))
            real = numbers >= 0
            total += float(weights[numbers[real]] @ np.asarray(results[-1][0], np.float64)[real])
            # Sums in another order differ in the last bits.
            if total > bound * (1 + 1e-9):
                break
        return self.collect(results)

    def submit(self, gates: Gates) -> list[Any]:
        """Start scoring without waiting; ``collect`` what it returns."""
        return [self._one(gates, index) for index in range(len(self._batches))]

    def collect(self, results: list[Any]) -> Scores:
        """The ``Scores`` of what was started, in the order of the validation set."""
        losses, predicted = np.zeros(self.rows), None
        if results[0][1] is not None:
            predicted = np.full(self.rows, -1, np.int64)
        for numbers, (own, classes) in zip(self._numbers, results, strict=False):
            real = numbers >= 0
            losses[numbers[real]] = np.asarray(own)[real]
            if predicted is not None:
                predicted[numbers[real]] = np.asarray(classes)[real]
        return Scores(losses, predicted, complete=len(results) == len(self._batches))

    def keep(self, gates: Gates) -> Scores:
        """Score gates, and store the inputs of the layers for whatever agrees with them below."""
        if not self._stride:
            return self(gates)
        self._kept, depth = None, self._cut.num_layers
        stored: dict[int, list[Any]] = {start: [] for start in range(0, depth, self._stride)}
        results = []
        for index, batch in enumerate(self._batches):
            x = self._embed(self._params, batch[0])
            for start in stored:
                stored[start].append(x)
                stop = min(start + self._stride, depth)
                x, losses, predicted = self._advance(gates, x, start, stop, batch)
            results.append((losses, predicted))
        self._kept = (jax.tree.map(np.array, gates), stored)
        return self.collect(results)

    def _one(self, gates: Gates, index: int) -> tuple[Any, Any]:
        batch = self._batches[index]
        if self._cut is None:
            return self._run(self._params, gates, batch)
        start, x = self._start(gates, index)
        x = self._embed(self._params, batch[0]) if x is None else x
        return self._advance(gates, x, start, self._cut.num_layers, batch)[1:]

    def _start(self, gates: Gates, index: int) -> tuple[int, Any]:
        """The last layer whose input is stored, below which the gates are those that were kept."""
        if self._kept is None:
            return 0, None
        kept, stored = self._kept
        agreed = _agreed(kept, gates, self._cut.num_layers)
        start = max(layer for layer in stored if layer <= agreed)
        return start, stored[start][index]

    def _advance(self, gates: Gates, x: Any, start: int, stop: int, batch: tuple[Any, Any]) -> Any:
        self.layers_run += stop - start
        return self._run(self._params, self._layers, gates, x, np.int32(start), np.int32(stop), *batch)

    def _fitting_stride(self, cache_bytes: int) -> int:
        """Between stored layers; 0 for none."""
        shapes = [jax.eval_shape(self._cut.embed, self._params, batch[0]) for batch in self._batches]
        layer = sum(shape.size * shape.dtype.itemsize for shape in shapes)
        fitting = min(cache_bytes // layer, self._cut.num_layers)
        return -(-self._cut.num_layers // fitting) if fitting else 0

    def _placed(self, batch: Any, mesh: Mesh | None, axis: str) -> Any:
        if mesh is None:
            return jax.tree.map(jnp.asarray, batch)
        rows, devices = len(jax.tree.leaves(batch[1])[0]), mesh.shape[axis]
        if rows % devices:
            raise ValueError(f"batches of {rows} rows do not divide among the {devices} devices of axis {axis!r}.")
        return jax.device_put(batch, self._sharding[0])

    def _check_labels(self, batches: Sequence[PruneBatch], model: Any) -> None:
        """Labels that the outputs do not have would count as the nearest one."""
        highest = max(int(np.max(batch.labels)) for batch in batches)
        inputs, labels = self._batches[0]
        if self._cut is not None:
            x = jax.eval_shape(self._cut.embed, self._params, inputs)
            outputs = jax.eval_shape(self._cut.head, self._params, x, inputs)
            if outputs.shape[:-1] != labels.shape:
                raise ValueError(
                    f"outputs of shape {outputs.shape} do not fit labels of shape {labels.shape}: give a model with a "
                    "classifier (load_pretrained(..., classes=n)), or a loss of your own."
                )
            if highest >= outputs.shape[-1]:
                raise ValueError(f"labels go up to {highest}, but the model has {outputs.shape[-1]} classes, from 0 on.")


def _runner(cut: Parts, loss: Loss) -> Callable[..., Any]:
    def run(params, layers, gates, x, start, stop, inputs, labels):
        gates = jax.tree.map(jnp.asarray, gates)

        def body(index, x):
            own, switches = jax.tree.map(lambda leaf: leaf[index], (layers, gates))
            return cut.layer(own, x, inputs, switches)

        x = jax.lax.fori_loop(start, stop, body, x)
        score = lambda x: _score(loss, cut.head(params, x, inputs), labels)[:2]
        nothing = lambda x: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(score, x))
        return x, *jax.lax.cond(stop == cut.num_layers, score, nothing, x)

    return run


def _agreed(kept: Gates, gates: Gates, depth: int) -> int:
    """The first layer where two choices differ; the last layer where they do not."""
    for layer in range(depth):
        if any(not np.array_equal(a[layer], b[layer]) for a, b in zip(kept, gates, strict=True)):
            return layer
    return depth - 1


def _count_rows(batches: Sequence[PruneBatch]) -> int:
    numbers = [np.asarray(batch.rows) for batch in batches]
    held = np.concatenate(numbers) if numbers else np.zeros(0, int)
    held = np.sort(held[held >= 0])
    if not held.size or not np.array_equal(held, np.arange(held.size)):
        raise ValueError(
            f"batches hold {held.size} rows, which must be 0, 1, ... without gaps or repeats, at least one. Make them "
            "with prune_batches."
        )
    return int(held.size)
