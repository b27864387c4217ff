"""Classification by prompts: a causal language model scores label words after a template."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from effjax.core.errors import check_choice, check_number
from effjax.core.shapes import pad_to
from effjax.core.tree import wide
from effjax.data.sets import DataSet, load
from effjax.data.splits import fixed_rows
from effjax.data.tokens import Tokenizer, load_tokenizer
from effjax.models.decoder import Decoder
from effjax.models.mesh_rules import Layout
from effjax.models.pretrained import load_pretrained
from effjax.tasks.task import Metric, Task, Variables
from effjax.tasks.text import check_vocabulary, class_metrics, computes_in, row_weights, train_and_test

__all__ = ["prompt_task"]

Batch = Mapping[str, Array | np.ndarray]

# Templates and label words (in the order of the labels) of MeZO, Malladi et al. 2023, and one of ours for SMS.
_PROMPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sst2": ("{sentence} It was", ("terrible", "great")),
    "sms_spam": ("{text}\nIs this message spam? Yes or No?\n", ("No", "Yes")),
    "glue/rte": ('{sentence1}\nDoes this mean that "{sentence2}" is true? Yes or No?\n', ("Yes", "No")),
    "superglue/cb": (
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
    ),
    "superglue/boolq": ("{passage} {question}?\n", ("No", "Yes")),
    "superglue/wsc": (
        '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n',
        ("No", "Yes"),
    ),
    "superglue/wic": (
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
        ("No", "Yes"),
    ),
    "superglue/multirc": (
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
        ("No", "Yes"),
    ),
}


def prompt_task(
    data: str | DataSet,
    model: str = "stories260k",
    *,
    max_length: int = 256,
    train_rows: int | None = None,
    test_rows: int | None = None,
    dtype: str = "float32",
    remat: bool = False,
    scan_layers: bool = False,
    mesh: Mesh | None = None,
    rules: Layout | None = None,
    param_dtype: str | None = None,
    eval_batch: int = 8,
) -> Task:
    """Bundle a labelled text data set with a pretrained decoder, as MeZO does ("train as classification").

    Args:
      data: name of a data set that has a template here, or a ``DataSet`` of that name.
      model: a pretrained decoder by name or folder.
      max_length: tokens of a prompt with its label word; longer ones lose their beginning.
      train_rows: use that many training rows, a fixed random choice; None for all.
      test_rows: the same for the test rows.
      dtype: compute dtype, ``"float32"`` or ``"bfloat16"``.
      remat: recompute the layers' activations in the backward pass.
      scan_layers: one scanned layer instead of a module a layer.
      mesh: of Auto axes, for a pretrained model that one device cannot hold; see ``load_pretrained``.
      rules: how its parameters lie on the mesh; ``"fsdp"`` where there is one.
      param_dtype: dtype of pretrained parameters; bfloat16 halves a frozen base. None for float32.
      eval_batch: rows of one evaluation batch; the last one is padded.

    Returns:
      A ``Task``. Its columns are ``input_ids`` int32 [rows, classes, length] (the prompt with each label word),
      ``scored`` bool of that shape (True at the label word's tokens) and ``label`` int32 [rows]; a batch may hold
      ``weight`` [batch], 0 for a dummy row. ``infer`` returns float32 [batch, classes], the mean log-likelihood of each
      label word's tokens; ``loss`` is the cross-entropy of the softmax over them. ``init`` gives the pretrained
      parameters whatever the key. ``evaluate`` gives ``accuracy``, ``nll`` and for two classes ``f1``.

    Raises:
      ValueError: a data set without template or held-out rows, more rows than there are, a model that is no decoder,
        ``max_length`` above its positions or below a label word.

    Example:
      >>> task = prompt_task("sms_spam", max_length=32)
      >>> task.train["input_ids"].shape[1:]
      (2, 32)

    Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes" (arXiv 2305.17333).
    """
    dataset = load(data) if isinstance(data, str) else data
    check_choice("data", dataset.name, tuple(_PROMPTS))
    computes = jnp.dtype(check_choice("dtype", dtype, ("float32", "bfloat16")))
    fields: dict[str, Any] = {"mesh": mesh, "rules": rules, "param_dtype": param_dtype or "float32"}
    loaded = load_pretrained(model, scan_layers=scan_layers, dtype=computes, remat=remat, **fields)
    if not isinstance(loaded.module, Decoder):
        raise ValueError(f"model={model!r} is a {type(loaded.module).__name__}; prompts need a decoder.")
    positions = loaded.module.max_positions
    hint = f"The model has {positions} positions."
    check_number("max_length", max_length, low=8, high=positions, integer=True, hint=hint)
    tokenizer = load_tokenizer(model)
    check_vocabulary(loaded.module, tokenizer)
    train, test = (
        _rows(dataset.name, _chosen(split, columns, rows), tokenizer, max_length)
        for split, columns, rows in zip(
            ("train", "test"), train_and_test(dataset), (train_rows, test_rows), strict=True
        )
    )

    def scores(variables: Variables, batch: Batch, train: bool, key: jax.Array | None) -> jax.Array:
        rows, classes, length = batch["input_ids"].shape
        ids = batch["input_ids"].reshape(rows * classes, length)
        rngs = None if key is None else {"dropout": key}
        logits = wide(loaded.module.apply(variables, ids, None, train=train, rngs=rngs))
        likelihood = -optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
        scored = batch["scored"].reshape(rows * classes, length)[:, 1:]
        mean = jnp.where(scored, likelihood, 0).sum(-1) / jnp.maximum(scored.sum(-1), 1)
        return mean.reshape(rows, classes)

    def infer(variables: Variables, inputs: Batch) -> Float[Array, "batch classes"]:
        return scores(variables, inputs, False, None)

    def loss(
        variables: Variables, batch: Batch, key: jax.Array | None = None, *, train: bool = True
    ) -> tuple[Float[Array, ""], tuple[Variables, dict[str, jax.Array]]]:
        found = scores(variables, batch, train, key)
        weight = row_weights(batch, found.shape[:-1])
        mean = lambda each: jnp.where(weight > 0, weight * each, 0).sum() / jnp.maximum(weight.sum(), 1)
        value = mean(optax.softmax_cross_entropy_with_integer_labels(found, batch["label"]))
        return value, ({}, {"loss": value, "accuracy": mean(found.argmax(-1) == batch["label"])})

    return Task(
        name=f"{dataset.name}/{Path(model).name}",
        source=dataset.source,
        metric=Metric("accuracy", "max", "test accuracy"),
        init=lambda key: {"params": loaded.params},
        loss=loss,
        infer=infer,
        evaluate=_evaluator(infer, test, min(eval_batch, len(test["label"]))),
        train=train,
        example_inputs={name: test[name][:1] for name in ("input_ids", "scored")},
        test=test,
        classes=train["input_ids"].shape[1],
        module=loaded.module,
        tokenizer=tokenizer,
        pretrained=loaded,
        dtype=computes_in(loaded.module),
        remat=remat,
    )


def _chosen(split: str, columns: Mapping[str, Any], rows: int | None) -> Mapping[str, Any]:
    """``rows`` of the columns, a fixed random choice in stored order."""
    if rows is None:
        return columns
    chosen = fixed_rows(f"{split}_rows", rows, len(columns["label"]))
    return {name: [values[row] for row in chosen] for name, values in columns.items()}


def _rows(name: str, columns: Mapping[str, Any], tokenizer: Tokenizer, max_length: int) -> dict[str, np.ndarray]:
    template, words = _PROMPTS[name]
    labels = np.asarray(columns["label"], np.int32)
    fields = [field for field in columns if f"{{{field}}}" in template]
    prompts = [template.format_map({field: columns[field][row] for field in fields}) for row in range(len(labels))]
    encode = lambda texts: tokenizer.encode(texts, max_length=1 << 20, truncate=False).input_ids
    heads = encode(prompts)
    # A space joins a word to a sentence; after a line break there is none.
    joint = "" if template.endswith("\n") else " "
    input_ids = np.full((len(labels), len(words), max_length), tokenizer.pad_id, np.int32)
    scored = np.zeros(input_ids.shape, bool)
    for choice, word in enumerate(words):
        whole = encode([prompt + joint + word for prompt in prompts])
        for row in range(len(labels)):
            ids, before = whole[row], len(heads[row])
            if len(ids) > max_length:  # keep the first token, which opens every sequence
                cut = len(ids) - max_length
                ids, before = np.concatenate([ids[:1], ids[1 + cut :]]), before - cut
            input_ids[row, choice, : len(ids)] = ids
            scored[row, choice, max(1, before) : len(ids)] = True
    return {"input_ids": input_ids, "scored": scored, "label": labels}


def _evaluator(
    infer: Callable[[Variables, Batch], jax.Array], columns: dict[str, np.ndarray], size: int
) -> Callable[[Variables], dict[str, float]]:
    run, rows = jax.jit(infer), len(columns["label"])

    def evaluate(variables: Variables) -> dict[str, float]:
        parts = []
        for start in range(0, rows, size):
            batch = {name: pad_to(columns[name][start : start + size], size) for name in ("input_ids", "scored")}
            parts.append(run(variables, batch))
        logits = np.concatenate(jax.device_get(parts))[:rows].astype(np.float64)
        return class_metrics(logits, columns["label"], f1=logits.shape[1] == 2)

    return evaluate
