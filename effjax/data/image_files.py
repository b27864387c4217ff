"""Pictures of the user's own: a folder of class folders, arrays, or a table of pictures or of their paths."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from effjax.core.errors import check_choice, check_number
from effjax.data.facts import unread
from effjax.data.labels import known_splits, read_labels
from effjax.data.npz_files import read_arrays
from effjax.data.pictures import Options, decode_pictures
from effjax.data.sets import DataSet
from effjax.data.splits import data_set, own_splits, part
from effjax.data.tables import SPLITS, Column, Table, existing, parquet_folder, pick, read_splits

_ENDINGS = ("png", "jpg", "jpeg", "bmp", "webp", "tif", "tiff", "gif", "ppm", "pgm")
_IMAGES = ("image", "img", "picture", "pixels", "x", "file_name", "file", "path")
_LABELS = ("label", "class", "target", "y")
_KERAS = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}


def image_data(
    path: str | os.PathLike,
    *,
    image: str | None = None,
    label: str | None = None,
    size: tuple[int, int] | None = None,
    channels: Literal[1, 3] | None = None,
    alpha: Literal["white", "black", "keep"] | None = None,
    scale16: bool = False,
    test: str | os.PathLike | None = None,
    split: float | None = None,
    seed: int = 0,
) -> DataSet:
    """Pictures, one class per picture.

    The path is one of

    - a folder of class folders with PNG, JPEG, BMP, WebP, TIFF or PNM files, or of ``train`` and ``test`` with class
      folders in both;
    - an ``.npz`` file with an array of pictures, [n, height, width] or [n, height, width, channels], and one of
      labels; or with ``x_train``, ``y_train``, ``x_test`` and ``y_test``;
    - a Parquet file, or a Hugging Face data set (saved by ``save_to_disk``, copied from the hub with its Parquet
      files, or ``hf:owner/name``), with a column of encoded pictures;
    - a CSV or JSON lines file with a column of paths, relative to its folder.

    Nothing is changed unasked: pictures of unlike size or channels, transparency and 16-bit values are refused unless
    a keyword says what to do. Photographs are turned as their EXIF orientation says.

    Args:
      path: see above.
      image: the column or array of the pictures; ``image`` and the like when None.
      label: the column or array of the classes; ``label`` and the like when None.
      size: (height, width) to resize every picture to, bilinear with antialiasing, whatever its proportions.
      channels: 1 for grey, 3 for colour; None where all pictures have as many.
      alpha: what to do with transparency: a ``'white'`` or ``'black'`` background, or ``'keep'`` it as a channel.
        An opaque alpha channel is dropped, which loses nothing.
      scale16: divide 16-bit values by 65535; the pictures become float32 in [0, 1].
      test: another path of the same kind to test on.
      split: the share to hold out where there is no test set, of every class alike; 0.2 when None.
      seed: of the draw of the held-out rows.

    Returns:
      A ``DataSet`` with the splits ``train`` and ``test`` and the columns ``image``, uint8 [n, height, width, channels]
      (float32 in [0, 1] where the source is), and ``label``, int32 [n]. ``facts`` describes it.

    Raises:
      ValueError: a file is no picture, the pictures differ, values cannot be represented, there are no pictures, one
        class only, or a class with one picture and no test set.
      FileNotFoundError: nothing is there.
      ImportError: Pillow is not installed.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "dots.npz"
      >>> np.savez(path, image=np.zeros((8, 5, 4), np.uint8), label=np.arange(8) % 2)
      >>> data = image_data(path, split=0.25)
      >>> data.splits["train"]["image"].shape, data.classes
      ((6, 5, 4, 1), ('0', '1'))
    """
    if size is not None:
        if not isinstance(size, tuple | list) or len(size) != 2:
            raise ValueError(f"size={size!r} must be (height, width).")
        for side in size:
            check_number("size", side, low=1, integer=True)
        size = (int(size[0]), int(size[1]))
    check_choice("channels", channels, (None, 1, 3))
    check_choice("alpha", alpha, (None, "white", "black", "keep"))
    options = Options(size, channels, alpha, scale16)
    tables, others = own_splits(path, test, split, _read)
    first = tables["train"]
    image = pick(first, "image", image, _IMAGES)
    label = pick(first, "label", label, _LABELS)
    tables, hidden = known_splits(tables, label) if test is None else (tables, ())
    labels, classes = {}, ()
    for name, table in tables.items():
        labels[name], classes = read_labels(table, pick(table, "label", label), classes or None)
    pictures = {name: _pictures(table, image, options) for name, table in tables.items()}
    _alike({tables[name].where: found for name, found in pictures.items()})
    splits: dict[str, dict[str, Column]] = {name: {"image": pictures[name], "label": labels[name]} for name in tables}
    parted = part(splits, "label", classes, split, seed, f"label={label!r} of {first.where}")
    height, width, depth = pictures["train"].shape[1:]
    sizes = f"Images of {height} x {width} pixels and {depth} channel{'s' * (depth > 1)}."
    notes = [*_said(options), *others, *hidden, *_beside(tables), *unread(first, (image, label, _LEFT))]
    return data_set(path, parted, classes, "image", "label", sizes, notes)


# Where pictures lie

_LEFT = "left out"  # a pseudo-column: files of a folder that are no pictures


def _read(path: str | os.PathLike) -> dict[str, Table]:
    given = os.fspath(path)
    if given.startswith("hf:"):
        return read_splits(given)
    file = existing(given)
    saved = any((file / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    if file.is_dir() and not saved and not parquet_folder(file):
        return _folders(file)
    if file.suffix.lower().lstrip(".") in _ENDINGS:
        raise ValueError(f"{file} is one picture; give the folder of class folders, {file.parent.parent}.")
    if file.suffix.lower() == ".npz" and (arrays := read_arrays(file)).keys() & {"x_train", "x_test"}:
        return _keras(file, arrays)
    splits = read_splits(file)
    return {
        name: table._replace(columns={key: _located(file.parent, column) for key, column in table.columns.items()})
        for name, table in splits.items()
    }


def _keras(file: Path, arrays: dict[str, np.ndarray]) -> dict[str, Table]:
    """``x_train``, ``y_train``, ``x_test``, ``y_test``, as the files of Keras have them."""
    wanted = [name for pair in _KERAS.values() for name in pair]
    if arrays.keys() != set(wanted):
        raise ValueError(f"{file}: holds {sorted(arrays)}; with 'x_train' it must hold exactly {wanted}.")
    return {
        name: Table(f"{file}[{name}]", {"image": arrays[x], "label": _flat(arrays[y])})
        for name, (x, y) in _KERAS.items()
    }


def _flat(labels: Column) -> Column:
    """Labels [n, 1], as CIFAR files of Keras have them, as [n]."""
    return labels[:, 0] if isinstance(labels, np.ndarray) and labels.shape[1:] == (1,) else labels


def _located(folder: Path, column: Column) -> Column:
    """Relative paths of pictures made to begin at the table's folder; other columns as they are."""
    ending = lambda value: isinstance(value, str) and value.lower().rpartition(".")[2] in _ENDINGS
    if isinstance(column, list) and column and all(ending(value) for value in column):
        return [folder / value for value in column]
    return column


def _folders(folder: Path) -> dict[str, Table]:
    inside = [item for item in sorted(folder.iterdir()) if item.is_dir() and not item.name.startswith((".", "__"))]
    split_names = {item.name: SPLITS[item.name.lower()] for item in inside if item.name.lower() in SPLITS}
    if "train" in split_names.values():
        if other := [item.name for item in inside if item.name not in split_names]:
            raise ValueError(f"{folder}: has the folder 'train' and others that are no split, {other[:5]}. Move them.")
        if len(set(split_names.values())) < len(split_names):
            raise ValueError(f"{folder}: has two folders of one split among {sorted(split_names)}. Merge them.")
        return {split_names[item.name]: _classes(item) for item in inside}
    return {"": _classes(folder)}


def _classes(folder: Path) -> Table:
    """Pictures of the class folders, in the order of their names; files of other kinds are counted, not read."""
    paths, names, left = [], [], []
    for item in sorted(folder.rglob("*")):
        parts = item.relative_to(folder).parts
        if item.is_dir() or any(part.startswith((".", "__")) for part in parts) or item.name == "Thumbs.db":
            continue
        if item.suffix.lower().lstrip(".") not in _ENDINGS:
            left.append(str(item.relative_to(folder)))
        elif len(parts) == 1:
            raise ValueError(
                f"{folder}: {item.name} lies beside the class folders, without a class. Pictures lie in one folder per "
                "class; or give a table with a column of their paths and one of labels."
            )
        else:
            paths.append(item)
            names.append(parts[0])
    if not paths:
        held = [item.name for item in sorted(folder.iterdir())][:5]
        raise ValueError(
            f"{folder}: holds no pictures in class folders ({', '.join(_ENDINGS)}); found {held or 'nothing'}. "
            "Expected FOLDER/CLASS/picture.png."
        )
    return Table(str(folder), {"image": paths, "label": names, **({_LEFT: left} if left else {})})


def _beside(tables: Mapping[str, Table]) -> list[str]:
    left = [name for table in tables.values() for name in table.columns.get(_LEFT, ())]
    return [f"Not read: {len(left)} files that are no pictures, such as {left[0]!r}."] if left else []


def _pictures(table: Table, name: str, options: Options) -> np.ndarray:
    column = table.columns[pick(table, "image", name)]
    files = isinstance(column, list) and all(isinstance(item, Path) for item in column)
    return decode_pictures(table.where if files else f"image={name!r} of {table.where}", column, options)


def _alike(pictures: Mapping[str, np.ndarray]) -> None:
    kinds = {where: (*found.shape[1:], found.dtype.name) for where, found in pictures.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"The splits hold pictures of unlike kinds: {kinds}. Give size=(height, width) or channels=.")


def _said(options: Options) -> Iterable[str]:
    if options.size is not None:
        yield f"Every picture was resized to {options.size[0]} x {options.size[1]} (bilinear)."
    if options.channels is not None:
        yield f"Every picture was made {'grey' if options.channels == 1 else 'colour'}."
    if options.alpha is not None:
        yield {"keep": "Alpha is a channel."}.get(options.alpha, f"Transparent places are {options.alpha}.")
    if options.scale16:
        yield "16-bit values were divided by 65535."
