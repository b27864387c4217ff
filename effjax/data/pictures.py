"""Pictures decoded into one array, refused where they differ or would lose something."""

import collections
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effjax.core.files import first_line
from effjax.data.tables import Column

__all__: list[str] = []

_SIXTEEN = ("I;16", "I;16B", "I;16L", "I;16N", "I")


class Options(NamedTuple):
    """How pictures that differ are made alike."""

    size: tuple[int, int] | None
    channels: int | None
    alpha: str | None
    scale16: bool


def decode_pictures(where: str, column: Column, options: Options) -> np.ndarray:
    """A column of pictures as one array.

    Args:
      where: the column, for messages.
      column: an array, or a list of paths, encoded bytes, ``{"bytes": ..., "path": ...}`` or arrays.
      options: how pictures that differ are made alike.

    Returns:
      [n, height, width, channels]: uint8, or float32 in [0, 1].

    Raises:
      ValueError: an item is no picture, the pictures differ, or values cannot be represented.
      ImportError: Pillow is not installed.
    """
    if isinstance(column, np.ndarray):
        return _array(where, column, options)
    pictures = []
    for row, item in enumerate(column):
        said = str(item) if isinstance(item, Path) else f"{where}: row {row}"
        pictures.append(_picture(said, item, options))
    shapes = collections.Counter((picture.shape[:2]) for picture in pictures)
    if len(shapes) > 1:
        listed = ", ".join(f"{h} x {w} ({count})" for (h, w), count in shapes.most_common(4))
        most = shapes.most_common(1)[0][0]
        raise ValueError(
            f"{where}: the pictures have {len(shapes)} sizes: {listed}{', ...' if len(shapes) > 4 else ''} (height x "
            f"width). Give size={most} to resize them all."
        )
    depths = collections.Counter(picture.shape[2] for picture in pictures)
    if len(depths) > 1:
        kinds = {1: "grey", 2: "grey with alpha", 3: "colour", 4: "colour with alpha"}
        listed = ", ".join(f"{count} {kinds[depth]}" for depth, count in depths.most_common())
        raise ValueError(f"{where}: {listed}. Give channels=3 or channels=1 to make them alike.")
    if len({picture.dtype for picture in pictures}) > 1:
        raise ValueError(f"{where}: some pictures have 16 bits and some 8. Convert them to one kind.")
    if options.scale16 and pictures[0].dtype == np.uint8:
        raise ValueError(f"{where}: scale16=True, but the pictures have 8 bits. Leave it out.")
    return np.stack(pictures)


def _picture(where: str, item: Any, options: Options) -> np.ndarray:
    """One picture, [height, width, channels]: uint8, or float32 in [0, 1] of a 16-bit one."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("Encoded pictures need Pillow: pip install 'effjax[study]'.") from error
    if isinstance(item, np.ndarray | list):
        return _array(where, np.asarray(item)[None], options)[0]
    try:
        data = _bytes(item)
        opened = Image.open(io.BytesIO(data))
        frames = getattr(opened, "n_frames", 1)
        picture = ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} is not a readable picture ({first_line(error)}).") from error
    if frames > 1:
        raise ValueError(f"{where} has {frames} frames. Save the frame that counts as a picture of its own.")
    if data.startswith(b"\x89PNG") and data[24] == 16 and picture.mode not in _SIXTEEN:
        raise ValueError(f"{where} has 16 bits per colour, which Pillow cuts to 8. Convert it to 8 bits yourself.")
    if picture.mode in _SIXTEEN or picture.mode == "F":
        return _wide(where, picture, options)
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA" if "transparency" in picture.info or picture.mode == "PA" else "RGB")
    elif "transparency" in picture.info:
        picture = picture.convert("LA" if picture.mode == "L" else "RGBA")
    picture = picture.convert("L") if picture.mode == "1" else picture
    if picture.mode not in ("L", "LA", "RGB", "RGBA"):
        raise ValueError(f"{where} has the colour space {picture.mode}; expected grey or RGB. Convert it first.")
    if picture.mode in ("LA", "RGBA"):
        picture = _without_alpha(where, picture, options.alpha)
    if options.channels is not None:
        if picture.mode in ("LA", "RGBA"):
            raise ValueError(f"alpha='keep' and channels={options.channels} exclude each other. Give one of them.")
        picture = picture.convert("L" if options.channels == 1 else "RGB")
    if options.size is not None:
        picture = picture.resize(options.size[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, np.uint8)
    return pixels.reshape(*pixels.shape[:2], -1)


def _bytes(item: Any) -> bytes:
    if isinstance(item, bytes):
        return item
    if isinstance(item, dict):
        return item["bytes"] if item.get("bytes") is not None else Path(item["path"]).read_bytes()
    return Path(item).read_bytes()


def _without_alpha(where: str, picture: Any, alpha: str | None) -> Any:
    from PIL import Image

    opaque = picture.getchannel("A").getextrema()[0] == 255
    if alpha == "keep":
        return picture
    if not opaque and alpha is None:
        raise ValueError(f"{where} is transparent in places. Give alpha='white', 'black' or 'keep'.")
    colour = "RGB" if picture.mode == "RGBA" else "L"
    if opaque:
        return picture.convert(colour)
    background = Image.new("RGBA", picture.size, (255, 255, 255, 255) if alpha == "white" else (0, 0, 0, 255))
    return Image.alpha_composite(background, picture.convert("RGBA")).convert(colour)


def _wide(where: str, picture: Any, options: Options) -> np.ndarray:
    from PIL import Image

    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{where} holds values from {values.min():g} to {values.max():g}; expected 8 or 16 bits.")
    if not options.scale16:
        raise ValueError(
            f"{where} has 16 bits per pixel. Give scale16=True to divide by 65535, or convert it to 8 bits."
        )
    scaled = values.astype(np.float32) / 65535
    if options.size is not None:
        scaled = np.asarray(Image.fromarray(scaled).resize(options.size[::-1], Image.Resampling.BILINEAR))
    return np.repeat(scaled[..., None], options.channels or 1, -1)


def _array(where: str, images: np.ndarray, options: Options) -> np.ndarray:
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[3] not in (1, 2, 3, 4):
        first = images.ndim == 4 and images.shape[1] in (1, 3, 4)
        hint = " Channels come last: array.transpose(0, 2, 3, 1)." if first else ""
        raise ValueError(
            f"{where}: has shape {list(images.shape)}; expected [n, height, width] or [n, height, width, channels]."
            f"{hint}"
        )
    if images.dtype.kind not in "biuf":
        raise ValueError(f"{where}: holds {images.dtype}, not numbers.")
    images = _in_range(where, images, options)
    if options.alpha is not None and images.shape[3] in (1, 3):
        raise ValueError(
            f"{where}: alpha={options.alpha!r}, but the array has {images.shape[3]} channels and no alpha."
        )
    if images.shape[3] in (2, 4) and options.alpha != "keep":
        opaque = images[..., -1].min() == (255 if images.dtype == np.uint8 else 1)
        if not opaque:
            raise ValueError(
                f"{where}: its {images.shape[3]} channels hold transparency. Give alpha='keep', or save the array "
                "without its last channel."
            )
        images = images[..., :-1]
    if options.channels is not None and images.shape[3] != options.channels:
        if options.channels == 1 or images.shape[3] != 1:
            raise ValueError(
                f"{where}: channels={options.channels}, but the array has {images.shape[3]}; only grey arrays are made "
                "colour. Convert the array first."
            )
        images = np.repeat(images, 3, -1)
    if options.size is not None and images.shape[1:3] != options.size:
        images = np.stack([_resized(picture, options.size) for picture in images])
    return images


def _in_range(where: str, images: np.ndarray, options: Options) -> np.ndarray:
    """uint8, or float32 in [0, 1]; what is neither is refused."""
    if not images.size:
        raise ValueError(f"{where}: has shape {list(images.shape)}: no pixels.")
    if options.scale16 and images.dtype != np.uint16:
        raise ValueError(f"{where}: scale16=True, but the array is {images.dtype}, not uint16. Leave it out.")
    if images.dtype == np.uint8:
        return images
    low, high = images.min(), images.max()
    if images.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise ValueError(f"{where}: floats from {low:g} to {high:g}; expected [0, 1]. Divide 0..255 by 255 first.")
        return images.astype(np.float32)
    if images.dtype.kind == "b":
        return images.astype(np.uint8) * np.uint8(255)
    if images.dtype == np.uint16 and options.scale16:
        return images.astype(np.float32) / 65535
    if images.dtype == np.uint16 or low < 0 or high > 255:
        hint = " Give scale16=True to divide by 65535." if images.dtype == np.uint16 else ""
        raise ValueError(f"{where}: {images.dtype} from {low} to {high}; expected 0..255.{hint}")
    return images.astype(np.uint8)


def _resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    layers = [
        np.asarray(Image.fromarray(picture[..., channel]).resize(size[::-1], Image.Resampling.BILINEAR))
        for channel in range(picture.shape[-1])
    ]
    return np.stack(layers, -1)
