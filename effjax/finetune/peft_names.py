"""Modules of a PEFT folder and leaves of a tree: names, layers that lie side by side in one module, whole modules."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax.core.tree import path_name

__all__: list[str] = []

PyTree = Any
Names = Callable[[str, int | None], str | None] | Mapping[str, str | Sequence[str]]

_PART = re.compile(r"(?P<module>.+)\[(?P<index>\d+)/(?P<count>\d+)\]")
_SAVED = re.compile(r"base_model\.model\.(?P<module>.+)\.(?:weight|bias)")
_AXES = {"kernel": 2, "embedding": 2, "scale": 1, "bias": 1}
"""What a leaf of a module that is saved whole may be called, and its axes without a stack."""


class Part(NamedTuple):
    """One of ``count`` equal parts of a module's outputs, which all are kernels of their own here."""

    module: str
    index: int = 0
    count: int = 1


def part_of(name: str) -> Part:
    """The module and the part of it that a name means.

    Raises:
      ValueError: a part that cannot be.

    Example:
      >>> part_of("h.0.attn.c_attn[2/3]")
      Part(module='h.0.attn.c_attn', index=2, count=3)
    """
    match = _PART.fullmatch(name)
    if match is None:
        return Part(name)
    part = Part(match["module"], int(match["index"]), int(match["count"]))
    if part.index >= part.count:
        raise ValueError(f"names: {name!r} must be a part from 0 to {part.count - 1} of {part.count}.")
    return part


def name_of(names: Names, path: str, layer: int | None) -> str | None:
    """The module's name of a leaf, or of one layer of a stack."""
    if callable(names):
        return names(path, layer)
    entry = names.get(path)
    if entry is None or isinstance(entry, str) != (layer is None):
        return None
    if isinstance(entry, str):
        return entry
    return entry[layer] if layer is not None and layer < len(entry) else None


def at(layer: int | None) -> str:
    """Of a message."""
    return "" if layer is None else f" for layer {layer}"


class Piece(NamedTuple):
    """An adapter of one layer: ``a`` [..., in, r], ``b`` [r, out] and its scale."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def side_by_side(parts: Mapping[int, Piece], count: int) -> Piece:
    """One adapter of a module from those of its parts: theirs if all share ``a``, else of the summed rank.

    Example:
      >>> one = Piece(np.ones((4, 1)), np.ones((1, 2)), 1.0)
      >>> two = one._replace(a=np.zeros((4, 1)))
      >>> [side_by_side({0: one, 1: other}, 3).b.shape for other in (one, two)]
      [(2, 6), (2, 6)]
      >>> side_by_side({0: one, 1: one, 2: one}, 3).b.shape
      (1, 6)
    """
    if count == 1:
        return parts[0]
    held = [parts[index] for index in sorted(parts)]
    first = held[0]
    if len(parts) == count and all(np.array_equal(piece.a, first.a) and piece.scale == first.scale for piece in held):
        return first._replace(b=np.concatenate([piece.b for piece in held], axis=-1))
    width = first.b.shape[-1]
    b = np.zeros((sum(len(piece.b) for piece in held), count * width), first.b.dtype)
    row = 0
    for index in sorted(parts):
        own = parts[index].b * (parts[index].scale / first.scale)
        b[row : row + len(own), index * width : (index + 1) * width] = own
        row += len(own)
    return Piece(np.concatenate([piece.a for piece in held], axis=-1), b, first.scale)


def whole_tensors(leaves: Mapping[str, Any], names: Names) -> dict[str, np.ndarray]:
    """Dense layers, norms and tables of embeddings in PyTorch's names and layout.

    Args:
      leaves: by path.
      names: as for ``save_lora``.

    Raises:
      ValueError: a leaf that is no part of such a layer, or one without a name.
    """
    tensors = {}
    for path, leaf in leaves.items():
        holder, _, kind = path.rpartition("/")
        main = next((name for name in ("kernel", "scale", "embedding") if _joined(holder, name) in leaves), None)
        lead = np.ndim(leaf) - _AXES.get(kind, -9)
        if main is None or lead not in (0, 1) or (kind != "bias" and kind != main):
            raise ValueError(
                f"modules: {path} of shape {np.shape(leaf)} is no part of a dense layer, a norm or a table of "
                "embeddings with its weight; only those are saved whole."
            )
        for layer in range(len(leaf)) if lead else [None]:
            module = name_of(names, _joined(holder, main), layer)
            if module is None:
                raise ValueError(
                    f"names: {_joined(holder, main)!r} of modules has no name{at(layer)}. Add it to the table."
                )
            if part_of(module).count > 1:
                raise ValueError(
                    f"modules: {path} lies beside others in {part_of(module).module!r}, which is saved whole or not at "
                    "all. Adapt it, or save_pretrained the whole model."
                )
            own = np.asarray(leaf) if layer is None else np.asarray(leaf)[layer]
            name = f"base_model.model.{module}.{'bias' if kind == 'bias' else 'weight'}"
            tensors[name] = np.ascontiguousarray(own.T if kind == "kernel" else own)
    return tensors


def _joined(holder: str, name: str) -> str:
    return f"{holder}/{name}".lstrip("/")


def saved_names(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """PEFT's names of modules that are saved whole: of the parts of a classifier its own."""
    found = (match["module"] for name in tensors if (match := _SAVED.fullmatch(name)))
    return list(dict.fromkeys(re.sub(r"^(classifier|score)\..*", r"\1", module) for module in found))


def whole_places(params: PyTree, names: Names) -> dict[str, tuple[str, int | None]]:
    """Module name -> path of its weight, and the layer of a stack, of all that may be saved whole."""
    places = {}
    for key, leaf in jax.tree_util.tree_leaves_with_path(params):
        path, shape = path_name(key), np.shape(leaf)
        kind = path.rpartition("/")[2]
        lead = len(shape) - _AXES.get(kind, -9)
        if kind == "bias" or lead not in (0, 1):
            continue
        for layer in range(shape[0]) if lead else [None]:
            try:
                module = name_of(names, path, layer)
            except ValueError:
                module = None
            if module is not None:
                places[module] = path, layer
    return places


def whole_leaves(
    whole: Mapping[str, Mapping[str, np.ndarray]], places: Mapping[str, tuple[str, int | None]]
) -> dict[str, dict[int | None, np.ndarray]]:
    """Path -> layer -> tensor in our layout, of modules that a folder holds whole."""
    found: dict[str, dict[int | None, np.ndarray]] = {}
    for module, parts in whole.items():
        path, layer = places[module]
        holder, _, kind = path.rpartition("/")
        for part, tensor in parts.items():
            own = path if part == "weight" else _joined(holder, "bias")
            found.setdefault(own, {})[layer] = tensor.T if part == "weight" and kind == "kernel" else tensor
    return found
