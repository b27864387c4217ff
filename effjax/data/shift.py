"""Distribution shifts for phase studies, in NumPy, on whole batches.

``permute_pixels`` and ``permute_labels`` make a map of batches, one permutation each, which fits into the ``transform``
of a pipeline:

    phases = [lambda batch: batch, permute_pixels(1, (28, 28, 1)), permute_pixels(2, (28, 28, 1))]

    def transform(batch, index, rng):
        return phases[min(index // 300, 2)](batch)
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from effjax.core.errors import check_number

Batch = Mapping[str, Any]


def permute_pixels(seed: int, shape: tuple[int, int, int]) -> Callable[[Batch], Batch]:
    """Move the pixels of ``image`` by one permutation, the same for every image and channel.

    Args:
      seed: which permutation; never the identity.
      shape: ``(height, width, channel)`` of the images.

    Returns:
      A map of batches; it leaves the other columns alone.

    Raises:
      ValueError: images of another shape, when it is called.

    Example:
      >>> batch = {"image": np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)}
      >>> sorted(permute_pixels(1, (2, 2, 1))(batch)["image"].ravel().tolist())
      [0, 1, 2, 3]
    """
    height, width, channels = shape
    order = _permutation(height * width, seed)

    def apply(batch: Batch) -> Batch:
        images = batch["image"]
        if images.shape[1:] != (height, width, channels):
            raise ValueError(f"batch['image'] has shape {images.shape}; the permutation is for [n, *{shape}].")
        flat = images.reshape(-1, height * width, channels)
        return {**batch, "image": flat.take(order, axis=1).reshape(images.shape)}

    return apply


def permute_labels(seed: int, classes: int) -> Callable[[Batch], Batch]:
    """Rename the classes in ``label`` by one permutation.

    Args:
      seed: which permutation; never the identity.
      classes: how many there are.

    Returns:
      A map of batches; it leaves the other columns alone.

    Raises:
      ValueError: labels outside ``[0, classes)``, when it is called.

    Example:
      >>> permute_labels(1, 2)({"label": np.array([0, 1, 1])})["label"]
      array([1, 0, 0])
    """
    check_number("classes", classes, low=2, integer=True)
    order = _permutation(classes, seed)

    def apply(batch: Batch) -> Batch:
        labels = batch["label"]
        if labels.size and not (labels.min() >= 0 and labels.max() < classes):
            raise ValueError(f"batch['label'] lies in [{labels.min()}, {labels.max()}], outside [0, {classes}).")
        return {**batch, "label": order.astype(labels.dtype)[labels]}

    return apply


def _permutation(size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(check_number("seed", seed, low=0, integer=True))
    order = identity = np.arange(check_number("size", size, low=2, integer=True))
    while np.array_equal(order, identity):  # for two classes every other draw is
        order = rng.permutation(size)
    return order
