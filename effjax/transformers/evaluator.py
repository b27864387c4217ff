"""Scores of gates on a validation set: one program for all that is tried, and states that are not computed again."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.core.errors import check_number
from effjax.models.parts import Parts, parts
from effjax.models.pruned import Gates
from effjax.transformers.gated import Apply, Loss, Scores, axformer_step, sample_losses, score_outputs
from effjax.transformers.validation import PruneBatch

__all__ = ["GatedEvaluator"]

PyTree = Any


class GatedEvaluator:
    r"""Score gates on a validation set.

    A model of ``effjax.models`` is run as ``run(gates, h_s, s)``: layers s, s + 1, ... from the input :math:`h_s` of
    layer s, where s is traced. States :math:`h_s` that ``keep`` stored are read wherever the gates below s are those
    that were kept. Gates are data: one program for each shape of a batch, whatever is tried, besides the embeddings',
    which run once.

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
        # Of the batches, and of everything else.
        self._sharding: tuple[Any, ...] = (
            () if mesh is None else (NamedSharding(mesh, P(axis)), NamedSharding(mesh, P()))
        )
        self._batches = [self._placed((batch.inputs, batch.labels), mesh, axis) for batch in batches]
        self._cut: Any = parts(model, top_k=top_k) if isinstance(model, nn.Module) else None
        self._run: Any
        if self._cut is None:
            out = self._sharding[1] if self._sharding else None
            whole = lambda params, gates, batch: axformer_step(model, params, gates, batch, loss=loss)[:2]
            self._run = jax.jit(whole, out_shardings=out)
        else:
            self._stack = jax.jit(self._cut.stack)
            self._embed = jax.jit(self._cut.embed)
            out = (*self._sharding, self._sharding[1]) if self._sharding else None
            self._run = jax.jit(_runner(self._cut, loss), out_shardings=out)
        self._hold(params)
        self._stride = self._fitting_stride(cache_bytes) if self._cut else 0
        if loss is sample_losses:
            self._check_labels(batches, model)

    def with_params(self, params: PyTree) -> "GatedEvaluator":
        """The same for other parameters of the same model, such as another seed's: nothing is compiled again."""
        other = copy.copy(self)
        other._hold(params)
        return other

    def _hold(self, params: PyTree) -> None:
        self._params = jax.device_put(params, self._sharding[1]) if self._sharding else params
        self._layers = None if self._cut is None else self._stack(self._params)
        self._kept: Any = None  # gates, and the inputs of layers in each batch
        self.layers_run = 0

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
        for batch in self._batches:
            x, losses, predicted = self._embed(self._params, batch[0]), None, None
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
                raise ValueError(
                    f"labels go up to {highest}, but the model has {outputs.shape[-1]} classes, from 0 on."
                )


def _runner(cut: Parts, loss: Loss) -> Callable[..., Any]:
    def run(params, layers, gates, x, start, stop, inputs, labels):
        gates = jax.tree.map(jnp.asarray, gates)

        def body(index, x):
            own, switches = jax.tree.map(lambda leaf: leaf[index], (layers, gates))
            return cut.layer(own, x, inputs, switches)

        x = jax.lax.fori_loop(start, stop, body, x)
        score = lambda x: score_outputs(loss, cut.head(params, x, inputs), labels)[:2]
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
