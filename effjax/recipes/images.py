"""What the image studies share: smaller images, networks by name, their logits in training, and measures per class."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.errors import near
from effjax.core.shapes import pad_to
from effjax.core.tree import wide
from effjax.data.sets import DataSet
from effjax.models.mlp import MLP
from effjax.models.resnet import BasicBlock, ResNet
from effjax.tasks.image import MODELS, image_task, standardised
from effjax.tasks.task import Task

PyTree = Any
Logits = Callable[[Mapping[str, PyTree], jax.Array, bool, jax.Array | None], tuple[jax.Array, Mapping[str, PyTree]]]


def named_image_task(data: DataSet, model: str, train: Any, **options: Any) -> Task:
    """``image_task`` whose model may also give widths: ``mlp-128-128``, or ``resnet-8-16-32`` of one block per stage.

    Args:
      data: images.
      model: the name.
      train: ``TrainOptions``, for the dtype and remat.
      **options: of ``image_task``.
    """
    kind, *widths = check_model("model", model).split("-")
    if not widths:
        return image_task(data, model, dtype=train.dtype, remat=train.remat, **options)
    sizes = tuple(map(int, widths))
    fields: dict[str, Any] = {"classes": len(data.classes), "dtype": jnp.dtype(train.dtype), "remat": train.remat}
    if kind == "mlp":
        module = MLP(sizes, **fields)
    else:
        block = functools.partial(BasicBlock, shortcut="project")
        module = ResNet(stages=(1,) * len(sizes), widths=sizes, block=block, **fields)
    return image_task(data, module, **options)._replace(name=f"{data.name}/{model}")


def smaller_images(data: DataSet, factor: int) -> DataSet:
    """Images whose pixels are the means of blocks; rows and columns that fill no block are cut off."""

    def shrink(images: Any) -> np.ndarray:
        images = np.asarray(images)
        height, width = (length // factor for length in images.shape[1:3])
        blocks = images[:, : height * factor, : width * factor].reshape(
            -1, height, factor, width, factor, images.shape[3]
        )
        means = blocks.mean((2, 4), dtype=np.float32)
        return means if images.dtype.kind == "f" else np.round(means).astype(images.dtype)

    splits = {name: {**columns, "image": shrink(columns["image"])} for name, columns in data.splits.items()}
    return dataclasses.replace(data, splits=splits)


def check_model(argument: str, name: str) -> str:
    """Return the name of a model of images if there is one, or widths such as ``mlp-64``; else raise ``ValueError``.

    Example:
      >>> check_model("expert", "mlp-64-32")
      'mlp-64-32'
    """
    if name in MODELS or re.fullmatch(r"(mlp|resnet)(-[1-9]\d*)+", name):
        return name
    listed = ", ".join(map(repr, MODELS))
    raise ValueError(
        f"{argument}={name!r} is not one of {listed}, nor has it widths, as mlp-64 or resnet-8-16.{near(name, MODELS)}"
    )


def logits_of(task: Task) -> Logits:
    """``(variables, images in [0, 1], train, key) -> (logits, changed collections)`` of an image task."""

    def logits(variables, images, train, key):
        rngs = None if key is None else {"dropout": key}
        state = [name for name in variables if name != "params"] if train else []
        found, changed = task.module.apply(
            variables, standardised(images, task.details), train=train, rngs=rngs, mutable=state
        )
        return wide(found), changed

    return logits


def class_measures(task: Task, size: int = 256) -> Callable[[Mapping[str, PyTree]], dict[str, float]]:
    """``variables -> measures`` on the test images: accuracy, that of the worst class, NLL in nats, calibration error.

    The expected calibration error is over 15 equal bins of the largest probability.
    """
    images, labels = task.test["image"], np.asarray(task.test["label"])
    size = min(size, len(labels))
    infer = jax.jit(task.infer)

    def evaluate(variables):
        starts = range(0, len(labels), size)
        parts = jax.device_get([infer(variables, pad_to(images[start : start + size], size)) for start in starts])
        logits = np.concatenate(parts)[: len(labels)].astype(np.float64)
        log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        hit, confidence = log_p.argmax(1) == labels, np.exp(log_p.max(1))
        per_class = [hit[labels == label].mean() for label in np.unique(labels)]
        bins = np.minimum((confidence * 15).astype(int), 14)
        gaps = [abs(hit[bins == b].sum() - confidence[bins == b].sum()) for b in np.unique(bins)]
        return {
            "accuracy": float(hit.mean()),
            "worst_class": float(min(per_class)),
            "nll": float(-log_p[np.arange(len(labels)), labels].mean()),
            "ece": float(sum(gaps) / len(labels)),
        }

    return evaluate


def cross_entropies(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """The loss of every row."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)
