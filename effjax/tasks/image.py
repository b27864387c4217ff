"""Image classification: data, normalisation, model, loss and evaluation as pure functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Shaped

from effjax.core.errors import check_choice, check_number, check_shape
from effjax.core.products import aligned
from effjax.core.shapes import pad_to
from effjax.core.tree import wide
from effjax.data.sets import DataSet, load
from effjax.data.splits import fixed_rows
from effjax.models.image_models import IMAGE_MODELS, image_model
from effjax.tasks.task import Metric, Task, Variables

__all__ = ["image_task"]

Batch = Mapping[str, Shaped[Array | np.ndarray, "batch ..."]]
Columns = dict[str, np.ndarray]
Images = Shaped[Array | np.ndarray, "batch height width channels"]

MODELS = IMAGE_MODELS

# Mean and standard deviation of images scaled to [0, 1]; elsewhere they are measured. CIFAR-10 takes
# ImageNet's, which its published networks were trained with.
_STATISTICS = {"cifar10": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
_MEASURED_ROWS = 10_000


def image_task(
    data: str | DataSet,
    model: str | nn.Module,
    *,
    dtype: str = "float32",
    remat: bool = False,
    train_rows: int | None = None,
    test_rows: int | None = None,
    label_smoothing: float = 0.0,
    eval_batch: int = 256,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Task:
    """Bundle an image data set with a classifier.

    With ``p = softmax(model((x - mean) / std))`` and ``q = (1 - s) onehot(y) + s / classes``, the loss
    is ``-sum_c q_c log p_c``, in float32 whatever the model computes in.

    Args:
      data: name of a data set of ``effjax.data.sets``, or a ``DataSet`` with splits ``train`` and ``test``.
      model: a name of ``image_model``, such as ``"cnn"``, ``"resnet20"`` or ``"mobilenet_v2_cifar"``, or a Linen
        module called as ``module(images, train=...)`` that returns logits.
      dtype: compute dtype of a model given by name, ``"float32"`` or ``"bfloat16"``.
      remat: recompute activations of a model given by name in the backward pass.
      train_rows: use that many training images, a fixed random choice; None for all.
      test_rows: the same for the test images.
      label_smoothing: ``s``, in [0, 1).
      eval_batch: images in one evaluation batch; the last one is padded.
      statistics: mean and standard deviation of every channel of images in [0, 1], by which they are normalised, where
        the model was trained on others; None measures the training images.

    Returns:
      A ``Task``. Its columns are ``image`` [rows, height, width, channels] and ``label`` int32 [rows]; images are
      normalised on the device, integers scaled by 1/255 first. ``details`` holds the per-channel ``mean`` and ``std``;
      ``evaluate`` gives ``accuracy`` and ``nll``, in nats and without label smoothing.

    Raises:
      ValueError: unknown names, more rows than there are, non-finite images, labels out of range, a
        module whose output is not [batch, classes], or ``dtype``/``remat`` together with a module.

    Example:
      >>> images = np.zeros((20, 8, 8, 1), np.uint8)
      >>> columns = {"image": images, "label": np.arange(20, dtype=np.int32) % 2}
      >>> data = DataSet("black", {"train": columns, "test": columns}, ("a", "b"), "CC0", "made up", "image")
      >>> task = image_task(data, "mlp", eval_batch=8)
      >>> variables = task.init(jax.random.key(0))
      >>> task.evaluate(variables)["accuracy"]
      0.5
    """
    check_number("label_smoothing", label_smoothing, low=0, high=1, open_high=True)
    check_number("eval_batch", eval_batch, low=1, integer=True)
    dataset = load(data) if isinstance(data, str) else data
    classes = len(dataset.classes)
    train = _columns(dataset, "train", train_rows)
    test = _columns(dataset, "test", test_rows)
    module = _module(model, classes, dtype, remat)
    mean, std = _statistics("" if dataset.facts else dataset.name, train["image"], statistics)
    example = test["image"][:1]

    def inputs(images: Images) -> jax.Array:
        return standardised(unit_images(images), {"mean": mean, "std": std})

    def init(key: jax.Array) -> Variables:
        return module.init(key, inputs(example), train=False)

    def infer(variables: Variables, images: Images) -> Float[Array, "batch classes"]:
        return wide(module.apply(variables, inputs(images), train=False))

    shapes = jax.eval_shape(init, jax.random.key(0))
    state_names = [name for name in shapes if name != "params"]
    _check_logits(module, jax.eval_shape(infer, shapes, example).shape, classes)

    def loss(
        variables: Variables, batch: Batch, key: jax.Array | None = None, *, train: bool = True
    ) -> tuple[Float[Array, ""], tuple[Variables, dict[str, jax.Array]]]:
        rngs = None if key is None else {"dropout": key}
        logits, state = module.apply(variables, inputs(batch["image"]), train=train, rngs=rngs, mutable=state_names)
        check_shape("batch['label']", batch["label"], logits.shape[:-1], "One label for each image.")
        labels = jnp.asarray(batch["label"])
        known = labels >= 0
        # The mean over the known; the factor is 1 where all are, so that it changes no bit.
        mean = lambda each: jnp.where(known, each, 0).mean() * (known.size / jnp.maximum(known.sum(), 1))
        targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), label_smoothing)
        value = mean(optax.softmax_cross_entropy(wide(logits), targets))
        return value, (state, {"loss": value, "accuracy": mean(logits.argmax(-1) == labels)})

    return Task(
        name=f"{dataset.name}/{model if isinstance(model, str) else type(model).__name__}",
        source=dataset.source,
        metric=Metric("accuracy", "max", "test accuracy"),
        init=init,
        loss=loss,
        infer=infer,
        evaluate=_evaluator(infer, test, min(eval_batch, len(test["label"]))),
        train=train,
        test=test,
        example_inputs=example,
        classes=classes,
        module=module,
        dtype=jnp.dtype(getattr(module, "dtype", None) or jnp.float32).name,
        remat=bool(getattr(module, "remat", False)),
        details={"mean": mean, "std": std},
    )


def _columns(dataset: DataSet, split: str, rows: int | None) -> Columns:
    """``image`` and ``label`` of one split, checked; ``rows`` of them, a fixed random choice in stored order."""
    if split not in dataset.splits or not {"image", "label"} <= dataset.splits[split].keys():
        held = {name: list(columns) for name, columns in dataset.splits.items()}
        raise ValueError(f"data={dataset.name!r} holds {held}; an image task needs 'image' and 'label' in {split!r}.")
    images, labels = (np.asarray(dataset.splits[split][column]) for column in ("image", "label"))
    where = f"data={dataset.name!r}, split {split!r}"
    if images.ndim != 4 or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"{where}: image {images.shape} and label {labels.shape} must be [rows, height, width, channels] and "
            "[rows], with at least one row."
        )
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise ValueError(f"{where}: image has dtype {images.dtype}; it must be uint8, or floating in [0, 1].")
    if images.dtype.kind == "f" and (bad := int((~np.isfinite(images)).any((1, 2, 3)).sum())):
        raise ValueError(f"{where}: {bad} of {len(images)} images hold NaN or infinity. Remove or repair them.")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(dataset.classes):
        raise ValueError(
            f"{where}: labels ({labels.dtype}, {labels.min()} to {labels.max()}) must be integers in "
            f"[0, {len(dataset.classes) - 1}], the {len(dataset.classes)} classes."
        )
    if rows is not None:
        chosen = fixed_rows(f"{split}_rows", rows, len(labels))
        images, labels = images[chosen], labels[chosen]
    return {"image": images, "label": labels.astype(np.int32)}


def _module(model: str | nn.Module, classes: int, dtype: str, remat: bool) -> nn.Module:
    check_choice("dtype", dtype, ("float32", "bfloat16"))
    if not isinstance(model, str):
        if dtype != "float32" or remat:
            raise ValueError(
                f"dtype={dtype!r} and remat={remat!r} apply to models given by name. "
                f"Set them on the module: {type(model).__name__}(..., dtype=..., remat=...)."
            )
        return model
    check_choice("model", model, MODELS)
    fields = {"classes": classes, "dtype": jnp.dtype(dtype), "remat": remat}
    return image_model(model, **fields)


def unit_images(images: Any) -> jax.Array:
    """Images in [0, 1], float32; integers are divided by 255."""
    return wide(images) / (255.0 if jnp.issubdtype(images.dtype, jnp.integer) else 1.0)


def standardised(images: jax.Array, details: Mapping[str, Any]) -> jax.Array:
    """Images in [0, 1] as an image task's network takes them, by the ``mean`` and ``std`` of its ``details``."""
    return (images - aligned(details["mean"], images)) / aligned(details["std"], images)


def _statistics(name: str, images: np.ndarray, given: Any) -> tuple[np.ndarray, np.ndarray]:
    if given is not None or name in _STATISTICS:
        mean, std = (np.asarray(column, np.float32) for column in given or _STATISTICS[name])
        for which, column in (("mean", mean), ("standard deviation", std)):
            check_shape(f"statistics: the {which}", column, images.shape[-1:], "One number for each channel.")
    else:
        sample = images[:_MEASURED_ROWS].astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
        mean = sample.mean((0, 1, 2), np.float64)
        std = np.maximum(sample.std((0, 1, 2), np.float64), 1 / 255)
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)


def _check_logits(module: nn.Module, shape: tuple[int, ...], classes: int) -> None:
    if shape != (1, classes):
        raise ValueError(
            f"model={type(module).__name__} returns shape {shape} for one image; the data set has {classes} classes. "
            f"Build it with classes={classes}."
        )


def _evaluator(
    infer: Callable[[Variables, jax.Array], jax.Array], columns: Columns, size: int
) -> Callable[[Variables], dict[str, float]]:
    rows = len(columns["label"])

    @jax.jit
    def scores(variables: Variables, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = infer(variables, images)
        return logits.argmax(-1) == labels, optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def evaluate(variables: Variables) -> dict[str, float]:
        parts = []
        for start in range(0, rows, size):
            batch = (columns[name][start : start + size] for name in ("image", "label"))
            parts.append(scores(variables, *(pad_to(column, size) for column in batch)))
        # Per-example scores, so that the padding is cut off before anything is averaged.
        correct, nll = (np.concatenate(part)[:rows] for part in zip(*jax.device_get(parts), strict=True))
        return {"accuracy": float(correct.mean()), "nll": float(nll.mean(dtype=np.float64))}

    return evaluate
