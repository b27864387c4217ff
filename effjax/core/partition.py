"""Which axis of which array lies on which axis of a mesh: rules over paths, and their shardings."""

import math
import re
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from effjax.core.tree import leaf_paths, select

__all__: list[str] = []

PyTree = Any
Axes = tuple[str | EllipsisType | None, ...]
Rules = tuple[tuple[str, Axes], ...]
"""``(regex, axes)`` over slash-joined paths, first match wins. ``axes`` names a mesh axis, or None, for each axis of an
array from the first; where it begins with ``...`` it is for the last ones, so that one rule serves a layer and a stack
of layers."""


def check_auto(mesh: Mesh | AbstractMesh) -> None:
    """Refuse a mesh whose axes are Explicit, as those of ``jax.make_mesh`` are where nothing else is said.

    Raises:
      ValueError: with the call that makes another.
    """
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return
    sizes, names = tuple(mesh.shape.values()), tuple(mesh.axis_names)
    raise ValueError(
        f"mesh has axes of the kinds {[kind.name for kind in mesh.axis_types]}: under Explicit ones (the default of "
        "jax.make_mesh, made current by jax.set_mesh) every product would have to say how its result lies. Make them "
        f"Auto: jax.make_mesh({sizes}, {names}, axis_types=(jax.sharding.AxisType.Auto,) * {len(names)})."
    )


def aligned(axes: Axes, ndim: int) -> tuple[str | None, ...]:
    """One name or None for each axis of an array; the rest of a shorter rule is None, a longer one loses its end.

    Example:
      >>> aligned((..., None, "model"), 3), aligned(("data",), 2), aligned((..., None, "model"), 1)
      ((None, None, 'model'), ('data', None), (None,))
    """
    names = tuple(axis for axis in axes if not isinstance(axis, EllipsisType))
    if axes[:1] == (...,):
        return (None,) * ndim if ndim < len(names) else (None,) * (ndim - len(names)) + names
    return (names + (None,) * ndim)[:ndim]


def check_axes(name: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> None:
    """Refuse axes that the mesh lacks or that do not divide the array's.

    Raises:
      ValueError: with the path, the sizes, and the way out.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in mesh.shape]
    if unknown:
        raise ValueError(f"rules put {name!r} on the axis {unknown[0]!r}; the mesh has {', '.join(mesh.shape)}.")
    for size, axis in zip(shape, axes, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{name!r} of shape {tuple(shape)} has {size} rows along the {axis!r} axis of {mesh.shape[axis]} "
                f"devices. Choose a multiple of {mesh.shape[axis]}, a smaller mesh axis, or another rule."
            )


def shardings_by(
    tree: PyTree,
    rules: Rules,
    mesh: Mesh | AbstractMesh,
    *,
    rest: Callable[[str, tuple[int, ...]], Sequence[str | None]] = lambda name, shape: (),
    argument: str = "rules",
) -> PyTree:
    """A ``NamedSharding`` for every leaf.

    Args:
      tree: arrays or their shapes.
      rules: first match wins.
      mesh: of Auto axes.
      rest: ``(path, shape) -> axes`` of a leaf that no rule matches; by default it is replicated.
      argument: what the caller calls the rules.

    Raises:
      ValueError: a rule that matches nothing, an axis that is not there or does not divide.

    Example:
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
      >>> tuple(shardings_by({"kernel": jax.numpy.ones((2, 4))}, (("kernel", (..., "model")),), mesh)["kernel"].spec)
      (None, 'model')
    """
    check_auto(mesh)
    owners = jax.tree.leaves(select(tree, [pattern for pattern, _ in rules], argument=argument).tree)

    def sharding(leaf: Any, owner: int, name: str) -> NamedSharding:
        shape = tuple(leaf.shape)
        axes = tuple(rest(name, shape)) if owner < 0 else aligned(rules[owner][1], len(shape))
        check_axes(name, shape, axes, mesh)
        return NamedSharding(mesh, PartitionSpec(*axes) if any(axes) else PartitionSpec())

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, map(sharding, leaves, owners, leaf_paths(tree)))


_SMALL = 2**16
"""Elements of an array, of a stack those of one layer, that each device may hold where no axis of it divides."""


def spread(
    name: str, shape: tuple[int, ...], axes: Sequence[str | None], mesh: Mesh | AbstractMesh, over: str
) -> tuple:
    """``axes`` with ``over`` on the largest axis that is free and divides: what makes data parallel FSDP-like.

    Vectors stay as they are; of other arrays only the last two axes are looked at, those of a kernel's channels.

    Raises:
      ValueError: a large array of which no axis divides.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
      >>> spread("up/kernel", (12, 64), (None, "model"), mesh, "data")
      ('data', 'model')
    """
    stacked = bool(STACKED.search(name))
    if len(shape) - stacked < 2:
        return tuple(axes)
    free = [
        (size, -index, index)
        for index, size in enumerate(shape)
        if index >= len(shape) - 2 and axes[index] is None and size % mesh.shape[over] == 0
    ]
    if free:
        _, _, chosen = max(free)
        return tuple(over if index == chosen else axis for index, axis in enumerate(axes))
    parts = math.prod(mesh.shape[axis] for axis in axes if axis is not None)
    if math.prod(shape[stacked:]) > _SMALL * parts:
        raise ValueError(
            f"{name!r} of shape {shape}: no free axis is a multiple of the {mesh.shape[over]} devices of {over!r}. "
            "Choose a smaller mesh axis, or give rules of your own."
        )
    return tuple(axes)


def by_rows(x: jax.Array, *, inner: bool = False) -> jax.Array:
    """An activation whose first axis stays split over ``data``, where a mesh with that axis is current.

    Without it XLA may gather activations of the whole batch in place of split kernels. A mesh is current under
    ``jax.set_mesh``, and in the steps of ``effjax.train.fit`` where ``mesh.rules`` split parameters; else nothing is
    done.

    Args:
      x: [rows, ...].
      inner: whether the last axis may be split over ``model``, between two kernels; else every device has all of it.

    Example:
      >>> by_rows(jax.numpy.ones((2, 3))).shape
      (2, 3)
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds.get("data") != AxisType.Auto or x.ndim < 2 or x.shape[0] % mesh.shape["data"]:
        return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1) if inner else ()
    return jax.lax.with_sharding_constraint(x, PartitionSpec("data", *rest))


STACKED = re.compile(r"(^|/)layers/")
"""Paths of layers that are stacked on a leading axis and scanned."""
