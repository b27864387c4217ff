"""Distribution shifts for phase studies, in NumPy, on whole batches.

``permute_pixels`` and ``permute_labels`` make a map of batches, one permutation each; the corruptions
act on images. All fit into the ``transform`` of a pipeline:

    phases = [lambda batch: batch, permute_pixels(1, (28, 28, 1)), permute_pixels(2, (28, 28, 1))]

    def transform(batch, index, rng):
        return phases[min(index // 300, 2)](batch)
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from effjax.core.errors import check_number
from effjax.data.augment import check_images

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


def gaussian_noise(images: np.ndarray, rng: np.random.Generator, *, std: float) -> np.ndarray:
    """Add independent normal noise and clip to 0..255.

    Args:
      images: uint8 ``[n, height, width, channel]``.
      rng: of the noise.
      std: in grey levels (0..255).

    Returns:
      uint8 images of the same shape.

    Example:
      >>> gaussian_noise(np.full((1, 2, 2, 1), 100, np.uint8), np.random.default_rng(0), std=5.0).dtype
      dtype('uint8')
    """
    check_images(images)
    check_number("std", std, low=0)
    return _to_uint8(images + rng.standard_normal(images.shape, np.float32) * np.float32(std))


def contrast(images: np.ndarray, *, factor: float) -> np.ndarray:
    """Scale every image about its own mean: ``mean + factor * (image - mean)``.

    Args:
      images: uint8 ``[n, height, width, channel]``.
      factor: below 1 flattens, above 1 (with clipping) sharpens, 1 changes nothing.

    Returns:
      uint8 images of the same shape.

    Example:
      >>> contrast(np.array([0, 100], np.uint8).reshape(1, 1, 2, 1), factor=0.5).ravel().tolist()
      [25, 75]
    """
    check_images(images)
    check_number("factor", factor, low=0)
    mean = images.mean(axis=(1, 2), keepdims=True, dtype=np.float32)
    return _to_uint8(mean + np.float32(factor) * (images - mean))


def blur(images: np.ndarray, *, radius: int) -> np.ndarray:
    """Replace every pixel by the mean of the ``2 radius + 1`` square around it; edges repeat.

    Args:
      images: uint8 ``[n, height, width, channel]``.
      radius: in pixels; 0 changes nothing.

    Returns:
      uint8 images of the same shape.

    Example:
      >>> blur(np.array([0, 0, 90], np.uint8).reshape(1, 1, 3, 1), radius=1).ravel().tolist()
      [0, 30, 60]
    """
    check_images(images)
    check_number("radius", radius, low=0, integer=True)
    side = 2 * radius + 1
    padded = np.pad(images, ((0, 0), (radius, radius), (radius, radius), (0, 0)), mode="edge").astype(np.float32)
    height, width = images.shape[1:3]
    rows = np.sum([padded[:, i : i + height] for i in range(side)], axis=0)
    return _to_uint8(np.sum([rows[:, :, i : i + width] for i in range(side)], axis=0) / np.float32(side**2))


def _permutation(size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(check_number("seed", seed, low=0, integer=True))
    order = identity = np.arange(check_number("size", size, low=2, integer=True))
    while np.array_equal(order, identity):  # for two classes every other draw is
        order = rng.permutation(size)
    return order


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, 255).astype(np.uint8)
