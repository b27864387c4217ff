"""Text classification, pairs of texts, multiple choice and similarity scores: data, tokens, model, loss, evaluation."""

import re
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from effjax.core.errors import check_choice, check_number, check_shape
from effjax.core.shapes import fit_ladder, pad_to, smallest_fit
from effjax.core.tree import leaf_paths, wide
from effjax.data.ragged import Ragged
from effjax.data.sets import DataSet, load
from effjax.data.splits import fixed_rows
from effjax.data.tokens import Tokenizer, load_tokenizer, train_tokenizer
from effjax.models.bert import Bert, BertClassifier
from effjax.models.embeddings import check_ids
from effjax.models.mesh_rules import Layout
from effjax.models.pretrained import Pretrained, load_pretrained
from effjax.tasks.task import Metric, Task, Variables

__all__ = ["text_task"]

PyTree = Any
Batch = Mapping[str, Array | np.ndarray]
Columns = Mapping[str, Any]

# How the columns of a set become a first and a second text, as format strings; the first row whose columns are all
# there counts. Two texts in a tuple are choices: each makes a row of its own.
_FORMS: tuple[tuple[str, str | tuple[str, str] | None], ...] = (
    ("{premise} What was the {question}?", ("{choice1}", "{choice2}")),  # COPA
    ("{word}: {sentence1}", "{sentence2}"),  # WiC
    ("{text}", "{span2_text} means {span1_text}"),  # WSC
    ("{sentence1}", "{sentence2}"),  # RTE, MRPC, STS-B, WNLI
    ("{premise}", "{hypothesis}"),  # CB
    ("{question}", "{passage}"),  # BoolQ
    ("{question}", "{sentence}"),  # QNLI
    ("{sentence}", None),  # SST-2, CoLA
    ("{text}", None),  # SMS spam, AG News, TREC, IMDB
)
_ENCODER = re.compile(r"encoder-(\d+)x(\d+)")
_VOCABULARY = 8192
_EVALUATION_LENGTHS = 4


def text_task(
    data: str | DataSet,
    model: str | nn.Module,
    *,
    tokenizer: Tokenizer | None = None,
    pretrained: PyTree | None = None,
    max_length: int = 128,
    train_rows: int | None = None,
    test_rows: int | None = None,
    dtype: str = "float32",
    remat: bool = False,
    scan_layers: bool = False,
    dropout: float | None = None,
    mesh: Mesh | None = None,
    rules: Layout | None = None,
    eval_batch: int = 64,
) -> Task:
    """Bundle a text data set with a classifier.

    With logits ``z`` and weights ``w`` (1, or 0 for a dummy row) the loss is
    ``sum_i w_i (-log softmax(z_i)[y_i]) / max(sum_i w_i, 1)``, for scores ``sum_i w_i (z_i - y_i)^2 / ...``,
    in float32 whatever the model computes in. Padding and dummy rows change neither it nor its gradient.
    A batch holds ``input_ids`` and optionally ``mask``, ``token_type_ids``, ``weight``; a packed one has
    ``segment_ids``, ``position_ids`` and ``label``, ``weight`` [batch, segments].

    A question with two choices (COPA) is two rows, each right or wrong, told apart in training like any
    two classes; in evaluation the choice with the larger ``z_1 - z_0`` is taken, and ``nll`` is that of the
    softmax over the choices.

    The held-out rows are the split ``test`` where it has labels, else ``validation``; a set with only a
    ``validation`` split gives its first 70 % for training and the rest for the test.

    Args:
      data: name of a text data set of ``effjax.data.sets``, or a ``DataSet``. Its text is the column ``text`` or
        ``sentence``, or a pair such as ``sentence1`` and ``sentence2``; its target ``label`` or ``score``.
      model: ``"encoder-2x64"`` (2 layers of width 64, 4 heads, from scratch, with a WordPiece vocabulary
        trained on the training texts), a pretrained encoder by name or folder (``"minilm"``), or a
        Linen module called like ``BertClassifier``.
      tokenizer: of a model given as a module; those given by name have their own.
      pretrained: parameters of the encoder, ``params["encoder"]``, to start from instead of fresh ones.
      max_length: tokens of a sequence, special ones included; longer texts are truncated.
      train_rows: use that many training rows (questions), a fixed random choice; None for all.
      test_rows: the same for the test rows.
      dtype: compute dtype of a model given by name, ``"float32"`` or ``"bfloat16"``.
      remat: recompute the layers' activations of a model given by name in the backward pass.
      scan_layers: one scanned layer instead of a module a layer, for a model given by name.
      dropout: every dropout rate of a model given by name; None for 0.1.
      mesh: of Auto axes, for a pretrained encoder that one device cannot hold; see ``load_pretrained``.
      rules: how its parameters lie on the mesh; ``"fsdp"`` where there is one.
      eval_batch: rows of one evaluation batch. Batches have at most four lengths; the last is filled up.

    Returns:
      A ``Task``. Its columns are ``input_ids`` (``Ragged``), ``token_type_ids`` (``Ragged``, for pairs, where the
      tokenizer and the model have them) and ``label``, int32 [rows] or for scores float32 [rows]; ``classes`` is 1 for
      scores. ``infer`` takes ``input_ids`` int32 [batch, length] and optionally ``mask`` bool and ``token_type_ids``,
      and returns float32 [batch, classes]. ``evaluate`` gives ``accuracy`` and ``nll`` (nats), for two classes ``f1``
      of label 1; for scores ``spearman`` (0 if all predictions are equal) and ``mse``. ``init`` puts a fresh head on
      ``pretrained``, whose parameters are the entry ``params["encoder"]``, named by ``details["body"]``;
      ``details["choices"]`` is the number of rows that belong to one question, 1 where every row is its own.

    Raises:
      ValueError: unknown names, missing columns or splits, empty texts, labels out of range, more rows
        than there are, ``max_length`` above the model's positions, a module whose output is not
        [batch, classes], or settings of named models together with a module.

    Example:
      >>> task = text_task("sms_spam", "encoder-1x8", max_length=16, train_rows=200, test_rows=50)
      >>> int(task.train["input_ids"].lengths.max()), task.classes
      (16, 2)
      >>> sorted(task.evaluate(task.init(jax.random.key(0))))
      ['accuracy', 'f1', 'nll']
    """
    check_number("eval_batch", eval_batch, low=1, integer=True)
    check_number("max_length", max_length, low=3, integer=True)
    dataset = load(data) if isinstance(data, str) else data
    form, target = _form(dataset), _target(dataset)
    classes = len(dataset.classes) if target == "label" else 1
    train_split, test_split = train_and_test(dataset)
    train = _texts(dataset.name, "train", train_split, form, target, classes, train_rows)
    test = _texts(dataset.name, "test", test_split, form, target, classes, test_rows)
    choices = 2 if isinstance(form[1], tuple) else 1
    outputs = 2 if choices > 1 else classes
    loaded = None
    if isinstance(model, str):
        if tokenizer is not None:
            raise ValueError(f"tokenizer is given, but model={model!r} has its own. Give the model as a module.")
        module, tokenizer, loaded = _named(
            model,
            outputs,
            train,
            max_length,
            {"dtype": jnp.dtype(check_choice("dtype", dtype, ("float32", "bfloat16"))), "remat": remat},
            {"scan_layers": scan_layers, "mesh": mesh, "rules": rules},
            0.1 if dropout is None else check_number("dropout", dropout, low=0, high=1, open_high=True),
        )
        pretrained = loaded.params if loaded is not None and pretrained is None else pretrained
    else:
        module = model
        if mesh is not None:
            raise ValueError(f"mesh is for a pretrained encoder given by name, not for a {type(model).__name__}.")
        tokenizer = _checked_tokenizer(module, tokenizer, dtype, remat, scan_layers, dropout)
    _check_positions(module, max_length)
    check_vocabulary(module, tokenizer)
    types = getattr(getattr(module, "encoder", module), "type_vocab_size", 1) > 0
    columns = {name: _tokens(rows, tokenizer, max_length, types) for name, rows in (("train", train), ("test", test))}
    evaluation = _batches(columns["test"], tokenizer.pad_id, min(eval_batch, len(test.target)))
    example = evaluation[len(evaluation) // 2][1]

    def logits(variables: Variables, batch: Batch, train: bool, key: jax.Array | None) -> jax.Array:
        packed: dict[str, Any] = {}
        if "segment_ids" in batch:
            packed = {name: batch[name] for name in ("segment_ids", "position_ids")}
            packed["segments"] = batch["label"].shape[1]
        rngs = None if key is None else {"dropout": key}
        inputs = (batch["input_ids"], batch.get("mask"), batch.get("token_type_ids"))
        return wide(module.apply(variables, *inputs, train=train, rngs=rngs, **packed))

    one = {name: column[:1] for name, column in example.items()}
    arguments = (one["input_ids"], one["mask"], one.get("token_type_ids"))
    fresh = jax.eval_shape(module.init, jax.random.key(0), *arguments)
    if pretrained is not None:
        _check_pretrained(pretrained, fresh["params"])

    def init(key: jax.Array) -> Variables:
        if pretrained is None:
            return module.init(key, *arguments)
        # Flax draws the parameters that are missing.
        given = {"params": {"encoder": pretrained}}
        return module.apply(given, *arguments, rngs={"params": key}, mutable=["params"])[1]

    def infer(variables: Variables, inputs: Batch) -> Float[Array, "batch classes"]:
        return logits(variables, inputs, False, None)

    def loss(
        variables: Variables, batch: Batch, key: jax.Array | None = None, *, train: bool = True
    ) -> tuple[Float[Array, ""], tuple[Variables, dict[str, jax.Array]]]:
        scores, labels = logits(variables, batch, train, key), batch["label"]
        weight = row_weights(batch, scores.shape[:-1], known=target == "label")
        mean = lambda each: jnp.where(weight > 0, weight * each, 0).sum() / jnp.maximum(weight.sum(), 1)
        if target == "score":
            value = mean(jnp.square(scores[..., 0] - labels))
            return value, ({}, {"loss": value})
        value = mean(optax.softmax_cross_entropy_with_integer_labels(scores, labels))
        return value, ({}, {"loss": value, "accuracy": mean(scores.argmax(-1) == labels)})

    shape = jax.eval_shape(infer, fresh, one).shape
    if shape != (1, outputs):
        raise ValueError(
            f"model={type(module).__name__} returns shape {shape} for one row; the data set needs {outputs} outputs. "
            f"Build it with classes={outputs}."
        )
    metric = "spearman" if target == "score" else "accuracy"
    return Task(
        name=f"{dataset.name}/{Path(model).name if isinstance(model, str) else type(model).__name__}",
        source=dataset.source + _cut(dataset, columns, max_length),
        metric=Metric(metric, "max", f"test {metric}"),
        init=init,
        loss=loss,
        infer=infer,
        evaluate=_evaluator(infer, evaluation, columns["test"]["label"], target, choices),
        train=columns["train"],
        example_inputs=example,
        test=columns["test"],
        classes=classes,
        module=module,
        tokenizer=tokenizer,
        pretrained=loaded,
        dtype=computes_in(module),
        remat=bool(getattr(getattr(module, "encoder", module), "remat", False)),
        details={"choices": choices, "body": "encoder"},
    )


def row_weights(batch: Batch, shape: tuple[int, ...], *, known: bool = True) -> jax.Array:
    """The weight of every answer of a batch, checked against broadcasting; with ``known`` 0 where its label is -1."""
    check_shape("batch['label']", batch["label"], shape, "One label for each answer.")
    weight = wide(batch["weight"]) if "weight" in batch else jnp.ones(shape)
    check_shape("batch['weight']", weight, shape, "One weight for each answer.")
    return jnp.where(jnp.asarray(batch["label"]) >= 0, weight, 0) if known else weight


def computes_in(module: nn.Module) -> str:
    """The dtype that a network of text, or its encoder, computes in."""
    return jnp.dtype(getattr(getattr(module, "encoder", module), "dtype", None) or jnp.float32).name


class _Texts(NamedTuple):
    """Rows as texts, the choices of a question one after another."""

    first: list[str]
    second: list[str] | None
    target: np.ndarray


def _form(dataset: DataSet) -> tuple[str, str | tuple[str, str] | None]:
    columns = next(iter(dataset.splits.values())).keys()
    for form in _FORMS:
        if _fields(form) <= columns:
            return form
    known = "; ".join(", ".join(sorted(_fields(form))) for form in _FORMS)
    raise ValueError(
        f"data={dataset.name!r} has the columns {sorted(columns)}; a text task needs one of these groups of columns: "
        f"{known}. Rename yours."
    )


def _fields(form: tuple[str, str | tuple[str, str] | None]) -> set[str]:
    texts = [form[0], *([form[1]] if isinstance(form[1], str) else form[1] or ())]
    return {name for text in texts for _, name, _, _ in string.Formatter().parse(text) if name}


def _target(dataset: DataSet) -> str:
    columns = next(iter(dataset.splits.values())).keys()
    for name in ("label", "score"):
        if name in columns:
            return name
    raise ValueError(f"data={dataset.name!r} has the columns {sorted(columns)}; a text task needs 'label' or 'score'.")


def train_and_test(dataset: DataSet) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The rows to train and to test on, as ``text_task`` describes them."""
    splits = dataset.splits
    held_out = splits.get("test", splits.get("validation"))
    if held_out is None:
        raise ValueError(
            f"data={dataset.name!r} has only the splits {list(splits)}; nothing is held out to test on. "
            "Add a 'test' or 'validation' split."
        )
    if "train" in splits:
        return splits["train"], held_out
    cut = round(0.7 * len(next(iter(held_out.values()))))
    return (
        {name: column[:cut] for name, column in held_out.items()},
        {name: column[cut:] for name, column in held_out.items()},
    )


def text_columns(dataset: DataSet, columns: Columns, tokenizer: Tokenizer, *, max_length: int) -> Columns:
    """Further rows of a data set, as the columns of a text task.

    Args:
      dataset: whose columns, target and classes they have.
      columns: of the rows.
      tokenizer: of the task.
      max_length: tokens of a sequence, special ones included; longer texts are truncated.
    """
    target = _target(dataset)
    classes = len(dataset.classes) if target == "label" else 1
    texts = _texts(dataset.name, "further", columns, _form(dataset), target, classes, None)
    return _tokens(texts, tokenizer, max_length)


def _texts(
    name: str,
    split: str,
    columns: Mapping[str, Any],
    form: tuple[str, str | tuple[str, str] | None],
    target: str,
    classes: int,
    rows: int | None,
) -> _Texts:
    where = f"data={name!r}, {split} rows"
    if missing := (_fields(form) | {target}) - columns.keys():
        raise ValueError(f"{where}: lack the columns {sorted(missing)}, which other splits have.")
    values = np.asarray(columns[target])
    _check_target(where, target, values, classes)
    chosen = fixed_rows(f"{split}_rows", rows, len(values))
    records = [{field: columns[field][row] for field in _fields(form)} for row in chosen]
    for row, record in zip(chosen, records, strict=True):
        if empty := [field for field, text in record.items() if not str(text).strip()]:
            raise ValueError(f"{where}: row {row} has an empty text in {empty}. Remove or fill such rows.")
    first, second = form
    firsts = [first.format_map(record) for record in records]
    if isinstance(second, tuple):
        seconds = [text.format_map(record) for record in records for text in second]
        right = values[chosen][:, None] == np.arange(len(second))
        return _Texts([text for text in firsts for _ in second], seconds, right.reshape(-1).astype(np.int32))
    seconds = [second.format_map(record) for record in records] if second else None
    return _Texts(firsts, seconds, values[chosen].astype(np.int32 if target == "label" else np.float32))


def _check_target(where: str, target: str, values: np.ndarray, classes: int) -> None:
    if not len(values):
        raise ValueError(f"{where}: there are none.")
    if target == "score":
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise ValueError(f"{where}: score ({values.dtype}) must be finite floating-point numbers.")
    elif values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= classes:
        raise ValueError(
            f"{where}: labels ({values.dtype}, {values.min()} to {values.max()}) must be integers in "
            f"[0, {classes - 1}], the {classes} classes."
        )


def _named(
    model: str,
    outputs: int,
    train: _Texts,
    max_length: int,
    fields: dict[str, Any],
    loading: dict[str, Any],
    dropout: float,
) -> tuple[nn.Module, Tokenizer, Pretrained | None]:
    """The module, the tokenizer and the checkpoint (None for fresh parameters) of a model by name."""
    loaded = None
    rates = {"dropout": dropout, "attention_dropout": dropout}
    if scratch := _ENCODER.fullmatch(model):
        layers, width = int(scratch[1]), int(scratch[2])
        if width % 4 or not layers:
            raise ValueError(f"model={model!r}: needs a layer at least, and a width that its 4 heads divide.")
        tokenizer = train_tokenizer([*train.first, *(train.second or ())], _VOCABULARY)
        encoder = Bert(
            tokenizer.vocab_size,
            width,
            layers,
            num_heads=4,
            intermediate_size=4 * width,
            max_positions=max(128, max_length),
            scan_layers=loading["scan_layers"],
            **rates,
            **fields,
        )
    else:
        try:
            loaded = load_pretrained(model, **loading, **rates, **fields)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"model={model!r} is not like 'encoder-2x64', and {error}") from None
        if not isinstance(loaded.module, Bert):
            raise ValueError(f"model={model!r} is a {type(loaded.module).__name__}; a text task needs an encoder.")
        tokenizer = load_tokenizer(model)
        encoder = loaded.module
    return BertClassifier(encoder, outputs, dropout=dropout), tokenizer, loaded


def _checked_tokenizer(
    module: nn.Module, tokenizer: Tokenizer | None, dtype: str, remat: bool, scan_layers: bool, dropout: float | None
) -> Tokenizer:
    """The tokenizer of a model given as a module, which takes no settings of named models."""
    if tokenizer is None:
        raise ValueError(f"model={type(module).__name__} is a module, whose tokens are not known. Give its tokenizer.")
    if dtype != "float32" or remat or scan_layers or dropout is not None:
        raise ValueError(
            f"dtype={dtype!r}, remat={remat!r}, scan_layers={scan_layers!r} and dropout={dropout!r} apply to models "
            f"given by name. Set them on the module: {type(module).__name__}(...)."
        )
    return tokenizer


def _check_pretrained(pretrained: PyTree, fresh: PyTree) -> None:
    def layout(tree):
        return {name: np.shape(leaf) for name, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True)}

    given, wanted = layout(pretrained), layout(fresh.get("encoder", {}))
    if wrong := sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name)):
        raise ValueError(
            f"pretrained: {len(wrong)} leaves differ from the model's 'encoder', first {wrong[0]!r}: "
            f"{given.get(wrong[0])} given, {wanted.get(wrong[0])} wanted. Load them with its sizes and scan_layers."
        )


def _check_positions(module: nn.Module, max_length: int) -> None:
    positions = getattr(getattr(module, "encoder", module), "max_positions", max_length)
    check_number(
        "max_length", max_length, high=positions, integer=True, hint=f"The model has {positions} positions; truncate."
    )


def check_vocabulary(module: nn.Module, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that makes ids without a row in the model's table."""
    rows = getattr(getattr(module, "encoder", module), "vocab_size", None)
    if rows is not None:
        check_ids(0, tokenizer.vocab_size - 1, rows, "the tokenizer's ids")


def _cut(dataset: DataSet, columns: Mapping[str, Columns], max_length: int) -> str:
    """How many of the user's own texts may have lost their end."""
    full = sum(int((part["input_ids"].lengths == max_length).sum()) for part in columns.values())
    return f" {full} texts fill max_length={max_length} tokens; longer ones were cut." if dataset.facts and full else ""


def _tokens(texts: _Texts, tokenizer: Tokenizer, max_length: int, types: bool = True) -> Columns:
    tokens = tokenizer.encode(texts.first, texts.second, max_length=max_length)
    known = {} if tokens.token_type_ids is None or not types else {"token_type_ids": tokens.token_type_ids}
    return {"input_ids": tokens.input_ids, **known, "label": texts.target}


def _batches(columns: Columns, pad_id: int, size: int) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Batches of ``size`` rows in the order of their lengths, padded to few lengths; with their rows."""
    lengths = columns["input_ids"].lengths
    distinct = len(np.unique(-(-lengths // 8)))
    ladder = fit_ladder(lengths, min(_EVALUATION_LENGTHS, distinct))
    order = np.argsort(lengths, kind="stable")
    found = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        length = smallest_fit(int(lengths[rows[-1]]), ladder)
        batch = {"mask": np.arange(length) < lengths[rows][:, None]}
        for name, column in columns.items():
            if isinstance(column, Ragged):
                batch[name] = column.pad(rows, length, pad_id if name == "input_ids" else 0)
        found.append((rows, {name: pad_to(array, size) for name, array in batch.items()}))
    return found


def _evaluator(
    infer: Callable[[Variables, Batch], jax.Array],
    batches: list[tuple[np.ndarray, dict[str, np.ndarray]]],
    labels: np.ndarray,
    target: str,
    choices: int,
) -> Callable[[Variables], dict[str, float]]:
    run = jax.jit(infer)

    def evaluate(variables: Variables) -> dict[str, float]:
        # All batches are on their way before the first is read.
        scores = jax.device_get([run(variables, batch) for _, batch in batches])
        logits = np.empty((len(labels), scores[0].shape[1]), np.float64)
        for (rows, _), part in zip(batches, scores, strict=True):
            logits[rows] = part[: len(rows)]
        if target == "score":
            return score_metrics(logits[:, 0], labels)
        if choices > 1:
            margins = (logits[:, 1] - logits[:, 0]).reshape(-1, choices)
            return class_metrics(margins, labels.reshape(-1, choices).argmax(1), f1=False)
        return class_metrics(logits, labels, f1=logits.shape[1] == 2)

    return evaluate


def class_metrics(logits: Float[np.ndarray, "rows classes"], labels: np.ndarray, *, f1: bool) -> dict[str, float]:
    """Accuracy and mean negative log-likelihood in nats; with ``f1``, that of label 1 (0 if it is never right).

    Example:
      >>> class_metrics(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1, 1]), f1=True)["f1"]
      0.6666666666666666
    """
    chosen = logits.argmax(1)
    shifted = logits - logits.max(1, keepdims=True)
    nll = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    metrics = {"accuracy": float((chosen == labels).mean()), "nll": float(nll.mean())}
    if f1:
        found, right = int((chosen == 1).sum() + (labels == 1).sum()), int(((chosen == 1) & (labels == 1)).sum())
        metrics["f1"] = 2 * right / found if found else 0.0
    return metrics


def score_metrics(scores: Float[np.ndarray, "rows"], labels: np.ndarray) -> dict[str, float]:
    """Spearman's rank correlation (ties share their mean rank; 0 if all scores are equal) and mean squared error.

    Example:
      >>> round(score_metrics(np.array([1.0, 2.0, 9.0]), np.array([0.0, 1.0, 2.0]))["spearman"], 6)
      1.0
    """
    ranks = np.stack([_ranks(scores), _ranks(labels)])
    ranks -= ranks.mean(1, keepdims=True)
    norms = np.sqrt(np.square(ranks).sum(1)).prod()
    spearman = float(np.clip(ranks[0] @ ranks[1] / norms, -1, 1)) if norms else 0.0
    return {"spearman": spearman, "mse": float(np.square(scores - labels).mean(dtype=np.float64))}


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
