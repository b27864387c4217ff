"""Image augmentation on the host, whole batches at a time, and the normalisation for the device."""

from typing import Any

import numpy as np

from effjax.core.errors import check_number


def random_crop_flip(
    images: np.ndarray, rng: np.random.Generator, *, padding: int = 4, flip: bool = True
) -> np.ndarray:
    """Shift every image by up to ``padding`` pixels, zeros coming in, and mirror half of them.

    Args:
      images: ``[n, height, width, channel]`` of any dtype.
      rng: draws one offset pair and one coin for each image.
      padding: pixels of zeros around the image from which the crop is cut.
      flip: mirror left and right with probability 1/2.

    Returns:
      Images of the same shape and dtype.

    Raises:
      ValueError: nothing would change (``padding=0`` without ``flip``), or ``images`` is no batch.

    Example:
      >>> images = np.ones((2, 4, 4, 1), np.uint8)
      >>> random_crop_flip(images, np.random.default_rng(0), padding=1).shape
      (2, 4, 4, 1)
    """
    check_images(images)
    check_number("padding", padding, low=0, integer=True)
    if not padding and not flip:
        raise ValueError("padding=0 without flip changes nothing. Choose padding >= 1 or flip=True.")
    n, height, width, channels = images.shape
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    top, left = rng.integers(0, 2 * padding + 1, (2, n), dtype=np.int32)
    columns = np.broadcast_to(np.arange(width, dtype=np.int32), (n, width))
    if flip:
        columns = np.where(rng.random(n)[:, None] < 0.5, columns[:, ::-1], columns)
    wide, tall = width + 2 * padding, height + 2 * padding
    rows = np.arange(n)[:, None] * tall + top[:, None] + np.arange(height, dtype=np.int32)
    flat = rows[:, :, None] * wide + (left[:, None] + columns)[:, None, :]
    return padded.reshape(n * tall * wide, channels).take(flat.ravel(), axis=0).reshape(images.shape)


def normalize(images: Any, mean: Any = 0.0, std: Any = 1.0) -> Any:
    """``(images / 255 - mean) / std`` in float32; call it on the device, inside the step.

    Sending uint8 moves a quarter of the bytes, and XLA fuses this into the first layer.

    Args:
      images: uint8 ``[..., channel]``, NumPy or JAX.
      mean: per channel, in units of the full range.
      std: per channel, in units of the full range.

    Returns:
      float32 of the shape of ``images``.

    Example:
      >>> normalize(np.array([[0, 255]], np.uint8), 0.5, 0.5)
      array([[-1.,  1.]], dtype=float32)
    """
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if not (std > 0).all():
        raise ValueError(f"std={std.tolist()} must be above 0 in every channel.")
    mean, std = (np.expand_dims(each, tuple(range(images.ndim - each.ndim))) for each in (mean, std))
    return (images.astype(np.float32) / np.float32(255) - mean) / std


def check_images(images: np.ndarray) -> None:
    """Raise ``ValueError`` unless ``images`` is ``[n, height, width, channel]``."""
    if images.ndim != 4:
        raise ValueError(f"images has shape {images.shape}; expected [n, height, width, channel].")
