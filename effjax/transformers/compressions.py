"""Smaller versions of an input, by modality: images, spectrograms, texts. A level is a size, or a share of tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Shaped

from effjax.core.errors import check_number
from effjax.core.tree import wide
from effjax.data.ragged import Ragged
from effjax.transformers.token_drop import drop_as_many, word_hash

__all__ = ["compress_spectrogram", "compress_text", "compressed_text_columns", "resize_images"]


def resize_images(
    images: Shaped[Array | np.ndarray, "batch height width channels"],
    size: int | Sequence[int],
    *,
    antialias: bool = True,
) -> Float[Array, "batch new_height new_width channels"]:
    """Bilinear resize of whole images, inside the step, so that the host feeds one size only.

    Args:
      images: [batch, height, width, channels]. Integers keep their scale, 0 to 255.
      size: both sides in pixels, or (height, width). Larger than the images is legal: the paper enlarges CIFAR.
      antialias: average what a smaller image's pixel covers; without effect on enlarging.

    Returns:
      Floats, float32 at least; where ``size`` is that of the images, the same values.

    Raises:
      ValueError: images of another form, or sizes below one pixel.

    Example:
      >>> resize_images(jnp.arange(4.0).reshape(1, 2, 2, 1), 1).ravel().tolist()
      [1.5]

    Equals PyTorch's ``interpolate(mode="bilinear", align_corners=False)`` with the same ``antialias``, to rounding.

    Source: Nagarajan, Raghunathan 2023, arXiv:2312.12385 (ECML PKDD 2024).
    """
    if jnp.ndim(images) != 4:
        raise ValueError(
            f"images have shape {jnp.shape(images)}; expected [batch, height, width, channels]. One is images[None]."
        )
    return _resized(images, _pair("size", size), antialias)


def compress_spectrogram(
    spectrogram: Float[Array | np.ndarray, "batch frames bands *channels"], size: Sequence[int]
) -> Float[Array, "batch new_frames new_bands *channels"]:
    """Spectrograms with fewer frames and fewer bands: what a longer hop and wider mel filters would give.

    A new frame and band is the triangle-weighted mean of those that it covers; of a log-mel spectrogram that is the
    geometric mean of their powers, where a longer hop would leave frames out and wider filters add powers up.

    Args:
      spectrogram: [batch, frames, bands] or [batch, frames, bands, channels], time before frequency.
      size: (frames, bands) of the result, neither above those given.

    Returns:
      An array of as many axes, float32 at least.

    Raises:
      ValueError: an array of another form, or a size above the spectrogram's.

    Example:
      >>> compress_spectrogram(jnp.ones((1, 8, 4)), (4, 2)).shape
      (1, 4, 2)
    """
    shape = jnp.shape(spectrogram)
    if len(shape) not in (3, 4):
        raise ValueError(f"spectrogram has shape {shape}; expected [batch, frames, bands] or with channels at the end.")
    frames, bands = _pair("size", size)
    check_number("size[0]", frames, high=shape[1], integer=True, hint="The spectrogram has no more frames.")
    check_number("size[1]", bands, high=shape[2], integer=True, hint="The spectrogram has no more bands.")
    images = jnp.asarray(spectrogram).reshape(*shape[:3], *(shape[3:] or (1,)))
    return _resized(images, (frames, bands), True).reshape(shape[0], frames, bands, *shape[3:])


def compress_text(
    ids: Ragged | Sequence[Sequence[int]] | Any,
    stop_of_id: Integer[np.ndarray, "vocab"],
    share: float,
    *,
    seed: int,
    epoch: int,
    row_ids: Integer[np.ndarray, "n"] | None = None,
) -> tuple[Ragged, Bool[np.ndarray, "total"]]:
    r"""Texts without a share of their insignificant words; the words that stay are numbered 0, 1, ... anew.

    Of a text with k droppable tokens

    .. math:: \lfloor \mathrm{share} \cdot k \rfloor

    go, all copies of one word before another word is touched, in an order that ``(seed, epoch, row id)`` draws; the
    last token of a text stays. Renumbering the words is the text's form of positional consistency: neighbours stay
    neighbours.

    Args:
      ids: token ids, special tokens included: a ``Ragged``, lists, or a column of a Hugging Face ``Dataset``.
      stop_of_id: of ``stop_ids``; below 0 where the token stays.
      share: of the droppable tokens, from 0 to 1: the level.
      seed: 0 or more.
      epoch: from 0.
      row_ids: integers ``[n]`` that name the examples; by default their place.

    Returns:
      The shorter texts, and which tokens stayed, for arrays that go with them: ``types.keep(kept)``.

    Raises:
      ValueError: ids outside the table, numbers out of range.

    Example:
      >>> ids = Ragged.of([[0, 1, 3, 2, 3, 1, 0]])  # 1 and 2 are stop words, three tokens of them
      >>> short, kept = compress_text(ids, np.array([-1, 0, 1, -1]), 0.7, seed=0, epoch=0)
      >>> short.lengths.tolist(), kept[[0, 2, 4, 6]].all().item()
      ([5], True)

    The paper (arXiv:2312.12385) says that it prunes insignificant words; its code for texts is not public. The rule
    here is ours, after TokenDrop, and its words are those of ``stop_ids``.
    """
    ids = ids if isinstance(ids, Ragged) else Ragged.of(ids)
    stop_of_id = np.asarray(stop_of_id)
    check_number("share", share, low=0, high=1)
    check_number("seed", seed, low=0, integer=True)
    check_number("epoch", epoch, low=0, integer=True)
    if ids.values.size and not 0 <= ids.values.min() <= ids.values.max() < len(stop_of_id):
        raise ValueError(
            f"Token ids run from {ids.values.min()} to {ids.values.max()}, outside the {len(stop_of_id)} of "
            "stop_of_id. Use the tokenizer that made them."
        )
    names = np.arange(len(ids)) if row_ids is None else np.asarray(row_ids)
    if names.shape != (len(ids),) or names.dtype.kind not in "iu":
        raise ValueError(f"row_ids is {names.dtype}{list(names.shape)}; it must hold one integer for {len(ids)} rows.")
    words = stop_of_id[ids.values]
    droppable = words >= 0
    counts = (share * np.bincount(ids.rows[droppable], minlength=len(ids)) + 1e-9).astype(np.int64)
    counts = np.minimum(counts, np.maximum(ids.lengths - 1, 0))
    # Halved, every draw is below the number of what stays.
    draws = word_hash(seed, epoch, names[ids.rows], np.maximum(words, 0))
    priority = np.where(droppable, draws >> np.uint64(1), np.uint64(2**64 - 1))
    kept = drop_as_many(ids, counts, priority)
    return ids.keep(kept), kept


def compressed_text_columns(
    columns: Mapping[str, Any], stop_of_id: Integer[np.ndarray, "vocab"], shares: Sequence[float], *, seed: int
) -> Callable[[int], dict[str, Any]]:
    """The columns of every epoch, equal parts of the texts at each level: what ``BucketSampler`` takes.

    A text meets the levels in turn, from epoch to epoch. Buckets of lengths turn its shorter versions into smaller
    batches, so that the level of every single text costs no padding.

    Args:
      columns: ``input_ids``, a ``Ragged``, and others; those with one entry per token lose what ``input_ids`` lose.
      stop_of_id: as for ``compress_text``.
      shares: the levels: of the droppable tokens, what is left out.
      seed: 0 or more; of the first levels and of the words that go.

    Returns:
      ``epoch -> columns``.

    Raises:
      ValueError: no levels, or as ``compress_text``.

    Example:
      >>> columns = {"input_ids": Ragged.of([[0, 1, 1, 0]] * 4), "label": np.arange(4)}
      >>> read = compressed_text_columns(columns, np.array([-1, 0]), (1.0, 0.0), seed=0)
      >>> first, second = (read(epoch)["input_ids"].lengths for epoch in (0, 1))
      >>> sorted(first.tolist()), (first + second).tolist()
      ([2, 2, 4, 4], [6, 6, 6, 6])
    """
    if not len(shares):
        raise ValueError("shares=() must hold one level or more; 0.0 is the whole text.")
    ids: Ragged = columns["input_ids"]
    first = np.random.default_rng(check_number("seed", seed, low=0, integer=True)).permutation(len(ids))

    def read(epoch: int) -> dict[str, Any]:
        places = (first + epoch) % len(shares)
        stays = np.ones(len(ids.values), bool)
        for place, share in enumerate(shares):
            rows = np.flatnonzero(places == place)
            _, kept = compress_text(ids.take(rows), stop_of_id, share, seed=seed, epoch=epoch, row_ids=rows)
            stays[(places == place)[ids.rows]] = kept
        return {name: column.keep(stays) if isinstance(column, Ragged) else column for name, column in columns.items()}

    return read


def _resized(images: Any, size: tuple[int, int], antialias: bool) -> jax.Array:
    shape = (jnp.shape(images)[0], *size, jnp.shape(images)[3])
    return jax.image.resize(wide(images), shape, "bilinear", antialias=antialias)


def _pair(argument: str, size: int | Sequence[int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int | np.integer) else tuple(size)
    if len(pair) != 2:
        raise ValueError(f"{argument}={size} must be one side, or two.")
    first, second = (int(check_number(f"{argument}[{i}]", side, low=1, integer=True)) for i, side in enumerate(pair))
    return first, second
