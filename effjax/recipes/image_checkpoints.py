"""Trained image classifiers that a study on a user's own images starts from."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effjax.core.errors import near
from effjax.data.sets import DataSet
from effjax.models.convert import find_weights
from effjax.models.image_models import IMAGE_MODELS, load_image_model, new_head, pretrained_mobilenet
from effjax.tasks.image import image_task
from effjax.tasks.task import Task

PyTree = Any
MOBILENETS = ("mobilenet_v1_025_128", "mobilenet_v2_10_224")
# Mean and standard deviation of images in [0, 1]: ImageNet's, and those of images times 2 minus 1.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Checkpoint(NamedTuple):
    """A trained classifier on a user's images.

    Attributes:
      task: with its module and the images' statistics that it was trained with.
      variables: its weights.
      fresh: whether its head is new, for it told other classes.
    """

    task: Task
    variables: PyTree
    fresh: bool


def is_checkpoint(model: str) -> bool:
    """Whether a model is given by its weights: a file or a name in ``EFFJAX_MODELS``, not the name of an architecture.

    Example:
      >>> is_checkpoint("resnet_cifar10/resnet20"), is_checkpoint("resnet20")
      (True, False)
    """
    return model in MOBILENETS or "/" in model or model.endswith(".safetensors")


def model_name(model: str) -> str:
    """A short name of a model that may be given by a path.

    Example:
      >>> model_name("nets/resnet20.safetensors"), model_name("mlp-64")
      ('resnet20', 'mlp-64')
    """
    return Path(model).name.removesuffix(".safetensors")


def load_checkpoint(argument: str, model: str, data: DataSet) -> Checkpoint:
    """A classifier from its weights; a new head where it tells another number of classes than the images have.

    Args:
      argument: how the model is called in messages.
      model: a safetensors file whose name is that of an architecture of ``image_model``, with the names of torchvision;
        such a name in ``EFFJAX_MODELS``, as ``resnet_cifar10/resnet56``; or one of ``MOBILENETS``.
      data: the images.

    Raises:
      ValueError: an unknown architecture, or images that are not in colour.
      FileNotFoundError: no weights.
    """
    channels = np.shape(data.splits["train"]["image"])[-1]
    if channels != 3:
        raise ValueError(f"{argument}={model!r} takes images of 3 channels, and data={data.name!r} has {channels}.")
    if model in MOBILENETS:
        module, variables = pretrained_mobilenet(model)
        statistics = _HALVES
    else:
        kind = find_weights(model).stem
        if kind not in IMAGE_MODELS:
            raise ValueError(
                f"{argument}={model!r}: the file is called {kind!r}, not after its architecture, which is to be one of "
                f"{', '.join(IMAGE_MODELS[2:])}.{near(kind, IMAGE_MODELS)}"
            )
        module, variables = load_image_model(model, kind)
        statistics = _IMAGENET
    fresh = getattr(module, "classes", None) != len(data.classes)
    if fresh:
        module, variables = new_head(module, variables, len(data.classes))
    task = image_task(data, module, statistics=statistics)
    return Checkpoint(task._replace(name=f"{data.name}/{model_name(model)}"), variables, fresh)
