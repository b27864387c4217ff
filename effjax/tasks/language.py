"""Causal language modelling on fixed windows of text."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from effjax.core.errors import check_choice, check_number, check_shape
from effjax.core.shapes import pad_to
from effjax.core.tree import wide
from effjax.data.sets import DataSet, load
from effjax.data.splits import fixed_rows
from effjax.data.tokens import Tokenizer, load_tokenizer
from effjax.models.decoder import Decoder
from effjax.models.mesh_rules import Layout
from effjax.models.pretrained import load_pretrained
from effjax.tasks.task import Metric, Task, Variables
from effjax.tasks.text import check_vocabulary, computes_in

__all__ = ["lm_task"]

Batch = Mapping[str, Array | np.ndarray]


def lm_task(
    data: str | DataSet = "tiny_shakespeare",
    model: str | nn.Module = "stories260k",
    *,
    tokenizer: Tokenizer | None = None,
    length: int = 128,
    train_rows: int | None = None,
    test_rows: int | None = None,
    dtype: str = "float32",
    remat: bool = False,
    scan_layers: bool = False,
    mesh: Mesh | None = None,
    rules: Layout | None = None,
    param_dtype: str | None = None,
    eval_batch: int = 32,
) -> Task:
    """Bundle a text with a causal language model.

    Paragraphs are tokenised one by one (each with the tokenizer's beginning token), joined, and cut into
    windows of ``length`` tokens; the rest is left out. The loss is the mean of ``-log p(t_i | t_1 .. t_{i-1})``
    over the tokens 2 to ``length`` of all real rows, in float32 whatever the model computes in.

    Args:
      data: name of a data set with the column ``text``, or a ``DataSet``; held out is the split ``test``, else
        ``validation``.
      model: a pretrained decoder by name or folder, or a Linen module called like ``Decoder``.
      tokenizer: of a model given as a module.
      length: tokens of a window.
      train_rows: use that many training windows, a fixed random choice; None for all.
      test_rows: the same for the test windows.
      dtype: compute dtype of a model given by name, ``"float32"`` or ``"bfloat16"``.
      remat: recompute the layers' activations of a model given by name in the backward pass.
      scan_layers: one scanned layer instead of a module a layer, for a model given by name.
      mesh: of Auto axes, for a pretrained model that one device cannot hold; see ``load_pretrained``.
      rules: how its parameters lie on the mesh; ``"fsdp"`` where there is one.
      param_dtype: dtype of pretrained parameters; bfloat16 halves a frozen base. None for float32.
      eval_batch: windows of one evaluation batch; the last one is padded.

    Returns:
      A ``Task``. Its column is ``input_ids``, int32 [windows, length]; a batch may hold ``mask`` bool (True at real
      tokens) and ``weight`` [batch], 0 for a dummy row. ``infer`` returns float32 [batch, length, vocabulary]. ``init``
      gives the pretrained parameters whatever the key; fresh ones of a module. ``evaluate`` gives ``nll``, nats per
      token. ``weight`` is the number of tokens that the loss is a mean over.

    Raises:
      ValueError: no text or held-out split, fewer tokens than one window, more rows than there are,
        ``length`` above the model's positions, or settings of named models together with a module.

    Example:
      >>> task = lm_task(length=64, train_rows=8, test_rows=8)
      >>> task.train["input_ids"].shape, 4 < task.evaluate(task.init(jax.random.key(0)))["nll"] < 6
      ((8, 64), True)
    """
    check_number("eval_batch", eval_batch, low=1, integer=True)
    check_number("length", length, low=2, integer=True)
    dataset = load(data) if isinstance(data, str) else data
    held_out = "test" if "test" in dataset.splits else "validation"
    for split in ("train", held_out):
        if "text" not in dataset.splits.get(split, {}):
            held = {name: list(columns) for name, columns in dataset.splits.items()}
            raise ValueError(f"data={dataset.name!r} holds {held}; a language task needs 'text' in {split!r}.")
    loaded = None
    if isinstance(model, str):
        if tokenizer is not None:
            raise ValueError(f"tokenizer is given, but model={model!r} has its own. Give the model as a module.")
        computes = jnp.dtype(check_choice("dtype", dtype, ("float32", "bfloat16")))
        fields: dict[str, Any] = {"mesh": mesh, "rules": rules, "param_dtype": param_dtype or "float32"}
        loaded = load_pretrained(model, scan_layers=scan_layers, dtype=computes, remat=remat, **fields)
        if not isinstance(loaded.module, Decoder):
            raise ValueError(f"model={model!r} is a {type(loaded.module).__name__}; a language task needs a decoder.")
        module, tokenizer = loaded.module, load_tokenizer(model)
    else:
        module = model
        if tokenizer is None or dtype != "float32" or remat or scan_layers or (mesh, param_dtype) != (None, None):
            raise ValueError(
                f"model={type(module).__name__} is a module: give its tokenizer, and set dtype, remat and scan_layers "
                "on it; mesh and param_dtype are for pretrained parameters."
            )
    check_vocabulary(module, tokenizer)
    positions = getattr(module, "max_positions", length)
    check_number("length", length, high=positions, integer=True, hint=f"The model has {positions} positions.")
    columns = {
        split: {
            "input_ids": _windows(f"{dataset.name}[{source}]", split, dataset.splits[source], tokenizer, length, rows)
        }
        for split, source, rows in (("train", "train", train_rows), ("test", held_out, test_rows))
    }
    example = {"input_ids": columns["test"]["input_ids"][:1]}

    def logits(variables: Variables, batch: Batch, train: bool, key: jax.Array | None) -> jax.Array:
        rngs = None if key is None else {"dropout": key}
        return wide(module.apply(variables, batch["input_ids"], batch.get("mask"), train=train, rngs=rngs))

    def init(key: jax.Array) -> Variables:
        return module.init(key, example["input_ids"]) if loaded is None else {"params": loaded.params}

    def infer(variables: Variables, inputs: Batch) -> Float[Array, "batch length vocabulary"]:
        return logits(variables, inputs, False, None)

    def loss(
        variables: Variables, batch: Batch, key: jax.Array | None = None, *, train: bool = True
    ) -> tuple[Float[Array, ""], tuple[Variables, dict[str, jax.Array]]]:
        nll = _nll(logits(variables, batch, train, key), batch["input_ids"])
        weight = _counted(batch)
        value = (weight * nll).sum() / jnp.maximum(weight.sum(), 1)
        return value, ({}, {"loss": value})

    return Task(
        name=f"{dataset.name}/{Path(model).name if isinstance(model, str) else type(model).__name__}",
        source=dataset.source,
        metric=Metric("nll", "min", "test nats a token"),
        init=init,
        loss=loss,
        infer=infer,
        evaluate=_evaluator(infer, columns["test"]["input_ids"], eval_batch),
        train=columns["train"],
        example_inputs=example,
        test=columns["test"],
        module=module,
        tokenizer=tokenizer,
        pretrained=loaded,
        weight=lambda batch: _counted(batch).sum(),
        dtype=computes_in(module),
        remat=bool(getattr(module, "remat", False)),
    )


def _windows(
    where: str, split: str, columns: Mapping[str, Any], tokenizer: Tokenizer, length: int, rows: int | None
) -> np.ndarray:
    paragraphs = [part for text in columns["text"] for part in re.split(r"\n{2,}", text) if part.strip()]
    stream = tokenizer.encode(paragraphs, max_length=sys.maxsize, truncate=False).input_ids.values
    windows = stream[: len(stream) // length * length].reshape(-1, length)
    if not len(windows):
        raise ValueError(f"{where} has {len(stream)} tokens, fewer than one window of length={length}.")
    return windows[fixed_rows(f"{split}_rows", rows, len(windows))]


def _counted(batch: Batch) -> Float[Array, "batch predicted"]:
    """The weight of every token that is predicted: 0 for padding and in dummy rows."""
    rows, length = batch["input_ids"].shape
    if "mask" in batch:
        check_shape("batch['mask']", batch["mask"], (rows, length), "One value for each token.")
    of_row = wide(batch["weight"]) if "weight" in batch else jnp.ones(rows)
    check_shape("batch['weight']", of_row, (rows,), "One weight for each row.")
    weight = jnp.ones((rows, length - 1)) * of_row[:, None]
    return weight * batch["mask"][:, 1:] if "mask" in batch else weight


def _nll(logits: jax.Array, ids: jax.Array | np.ndarray) -> Float[Array, "batch predicted"]:
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])


def _evaluator(
    infer: Callable[[Variables, Batch], jax.Array], windows: np.ndarray, size: int
) -> Callable[[Variables], dict[str, float]]:
    size = min(size, len(windows))

    @jax.jit
    def scores(variables: Variables, ids: jax.Array) -> jax.Array:
        return _nll(infer(variables, {"input_ids": ids}), ids).mean(1)

    def evaluate(variables: Variables) -> dict[str, float]:
        batches = (windows[start : start + size] for start in range(0, len(windows), size))
        parts = jax.device_get([scores(variables, pad_to(batch, size)) for batch in batches])
        return {"nll": float(np.concatenate(parts)[: len(windows)].mean(dtype=np.float64))}

    return evaluate
