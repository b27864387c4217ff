"""How each backbone lies on a mesh: copied, split over ``data`` (FSDP-like), over ``model`` (tensor parallel), or both.

============  ==========================================================================================================
data          every device has all parameters and a part of the batch
fsdp          every matrix is split along its largest axis that divides over ``data``; XLA gathers it where it is used
tensor        the table below: heads, neurons and channels over ``model``, one sum over devices for each block
fsdp+tensor   both: what ``tensor`` leaves free is split over ``data``
============  ==========================================================================================================

Adapters and the optimizer's moments follow, as their paths end like those of the kernels. Megatron-LM: Shoeybi et al.
2019, arXiv 1909.08053; fully sharded data parallel: Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, Mesh

from effjax.core.errors import check_choice
from effjax.core.partition import Axes, Rules, aligned, shardings_by, spread
from effjax.core.tree import leaf_paths

__all__: list[str] = []

PyTree = Any
AnyMesh = Mesh | AbstractMesh
Layout = Literal["data", "fsdp", "tensor", "fsdp+tensor"]
LAYOUTS: tuple[Layout, ...] = ("data", "fsdp", "tensor", "fsdp+tensor")

_OUT: tuple[Axes, ...] = ((..., None, "model"),)
_IN: tuple[Axes, ...] = ((..., "model", None),)


def _kernel(module: str, split: Literal["in", "out"], bias: bool = True) -> tuple[tuple[str, tuple[Axes, ...]], ...]:
    """Rules of a kernel [..., in, out], its bias and its adapters ``a`` [..., in, r], ``b`` [..., r, out]."""
    if split == "in":
        return ((f"{module}/kernel$", _IN), (f"{module}/kernel/a$", _IN))
    more = ((f"{module}/bias$", ((..., "model"),)),) if bias else ()
    return ((f"{module}/kernel$", _OUT), (f"{module}/kernel/b$", _OUT), *more)


# Backbone -> (regex, axes or the next that divides).
TABLES: dict[str, tuple[tuple[str, tuple[Axes, ...]], ...]] = {
    "bert, decoder, vit": (
        *_kernel("attention/(query|key|value)", "out"),
        *_kernel("attention/output", "in"),
        *_kernel("mlp/(up|gate)", "out"),
        *_kernel("mlp/down", "in"),
        ("embeddings/word/embedding$", (*_IN, *_OUT)),
        ("head/kernel$", (*_OUT, *_IN, (..., None, None))),
    ),
    "resnet": (
        *_kernel(r"stage\d+_block\d+/conv1", "out", bias=False),
        *_kernel(r"stage\d+_block\d+/conv2", "in"),
    ),
    "gnn": (
        (r"conv_\d*[02468]/(kernel|root|source|target)$", _OUT),
        (r"conv_\d*[13579]/(kernel|root|source|target)$", _IN),
    ),
}
_FACTORED = re.compile(r"(^|/)(v_row|v_col)/")
"""Adafactor's rows and columns have the paths of kernels and not their axes."""


def mesh_shardings(tree: PyTree, rules: Layout | Rules, mesh: AnyMesh, *, first: Rules = ()) -> PyTree:
    """Shardings of parameters, or of any tree that holds some: a ``NamedSharding`` for every leaf.

    Args:
      tree: arrays or their shapes.
      rules: the name of a layout, or rules of one's own.
      mesh: with the axes that the rules name; those of the layouts are ``data`` and ``model``.
      first: rules that go before a layout.

    Raises:
      ValueError: a layout that knows none of the leaves, a rule that matches none, an axis that does not divide.
    """
    if not isinstance(rules, str):
        return shardings_by(tree, (*first, *rules), mesh)
    check_choice("rules", rules, LAYOUTS)
    needed = {"data": ("data",), "fsdp": ("data",), "tensor": ("model",), "fsdp+tensor": ("data", "model")}[rules]
    if absent := [axis for axis in needed if axis not in mesh.shape]:
        raise ValueError(
            f"rules={rules!r} needs the axis {absent[0]!r}; the mesh has {', '.join(mesh.shape)}. Name its axes "
            "'data' and 'model', or give rules of your own."
        )
    return shardings_by(tree, first, mesh, rest=_axes_of(tree, rules, mesh))


def _axes_of(tree: PyTree, layout: Layout, mesh: AnyMesh) -> Callable[[str, tuple[int, ...]], Sequence[str | None]]:
    tensor, fsdp = "tensor" in layout, "fsdp" in layout
    shapes = dict(zip(leaf_paths(tree), (tuple(leaf.shape) for leaf in jax.tree.leaves(tree)), strict=True))
    table = _table(shapes) if tensor else ()

    def axes_of(name: str, shape: tuple[int, ...]) -> Sequence[str | None]:
        axes: tuple[str | None, ...] = (None,) * len(shape)
        if _FACTORED.search(name):
            return axes
        choices = next((choices for rule, choices in table if rule.search(name)), None)
        if choices is not None:
            axes = _first_that_divides([aligned(choice, len(shape)) for choice in choices], shape, mesh)
        return spread(name, shape, axes, mesh, "data") if fsdp else axes

    return axes_of


def _table(shapes: dict[str, tuple[int, ...]]) -> list[tuple[re.Pattern[str], tuple[Axes, ...]]]:
    """The rules of the backbone that the leaves are of."""
    best, most = (), 0
    for rules in TABLES.values():
        compiled = [(re.compile(f"(^|/){pattern}"), choices) for pattern, choices in rules]
        count = sum(any(rule.search(name) for rule, _ in compiled) for name in shapes)
        if count > most:
            best, most = compiled, count
    if not most:
        raise ValueError(
            f"rules='tensor' knows none of the {len(shapes)} leaves, which begin with {list(shapes)[:3]}; it knows "
            f"{', '.join(TABLES)}. Use 'data' or 'fsdp', or rules of your own: ((regex, (..., None, 'model')), ...)."
        )
    return _bottlenecks(list(best), shapes)


def _bottlenecks(table: list[Any], shapes: dict[str, tuple[int, ...]]) -> list[Any]:
    """Blocks of three convolutions: the second widens what the third sums."""
    if not any(re.search(r"stage\d+_block\d+/conv3/kernel$", name) for name in shapes):
        return table
    block = r"(^|/)stage\d+_block\d+"
    return [(re.compile(rf"{block}/conv2/kernel$"), _OUT), (re.compile(rf"{block}/conv3/kernel$"), _IN)]


def _first_that_divides(
    choices: list[tuple[str | None, ...]], shape: tuple[int, ...], mesh: AnyMesh
) -> tuple[str | None, ...]:
    divides = lambda axes: all(
        axis is None or size % mesh.shape[axis] == 0 for size, axis in zip(shape, axes, strict=True)
    )
    return next(filter(divides, choices), choices[-1])


def shard_bytes(tree: PyTree, shardings: PyTree) -> int:
    """Bytes of the parts that one device holds."""
    part = lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(part, tree, shardings)))
