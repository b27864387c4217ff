"""Positions of images of several sizes from one learned table, for any vision transformer that has one.

A table holds the rows of ``prefix`` special tokens (the class token), then G x G' positions row by row. Patch (r, c) of
an image of h x w patches may read

- ``crop``: row r, column c, so the top left corner of the grid, as in ICPC: neighbours stay neighbours;
- ``spread``: row floor((r + 1/2) G / h), the nearest at the same place of the picture;
- ``interp``: the table resized to h x w, bilinear and antialiased, which is what FlexiViT does;
- ``fractional``: the table at the point ((r + 1/2) G / h - 1/2, ...), bilinear between its four neighbours and without
  antialiasing, which takes grids larger than the table too.

At h = G, w = G' all four are the table itself.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.core.errors import check_choice, check_number
from effjax.core.tree import wide

__all__ = ["position_rows", "position_selector", "select_positions"]

Grid = tuple[int, int]
How = Literal["crop", "spread", "interp", "fractional"]
HOWS: tuple[How, ...] = ("crop", "spread", "interp", "fractional")


def position_rows(
    table_grid: Grid, grid: Grid, how: Literal["crop", "spread"] = "crop", *, prefix: int = 1, corner: Grid = (0, 0)
) -> Int[np.ndarray, "tokens"]:
    r"""The rows of the table that an image's tokens read, where they are rows: ``crop`` and ``spread``.

    .. math:: i(r, c) = \mathrm{prefix} + a(r)\, G' + b(c), \qquad
        a(r) = r_0 + r \;\; (\mathrm{crop}) \quad\text{or}\quad
        \left\lfloor (r + \tfrac12) G / h \right\rfloor \;\; (\mathrm{spread})

    Args:
      table_grid: (G, G'), rows and columns of the table.
      grid: (h, w), rows and columns of the image's patches; neither above the table's.
      how: ``'crop'`` or ``'spread'``.
      prefix: rows of special tokens before the grid's; they come first, as they are.
      corner: (r_0, c_0), where the crop begins. The paper's is the top left one; others let the rows that only large
        sizes reach be trained by small ones too.

    Returns:
      int32 [prefix + h * w], computed in NumPy, so that ``table[rows]`` is a static gather.

    Raises:
      ValueError: a grid larger than the table, or a crop that leaves it.

    Example:
      >>> position_rows((3, 3), (2, 2)).tolist(), position_rows((3, 3), (2, 2), "spread").tolist()
      ([0, 1, 2, 4, 5], [0, 1, 3, 7, 9])

    ICPC (Nagarajan, Raghunathan 2023, arXiv:2312.12385), whose code clears a mask over the table. ``corner`` is ours.
    """
    check_choice("how", how, ("crop", "spread"))
    check_number("prefix", prefix, low=0, integer=True)
    _check_grids(table_grid, grid)
    places = []
    for axis, (size, count, start) in enumerate(zip(table_grid, grid, corner, strict=True)):
        check_number(f"corner[{axis}]", start, low=0, integer=True)
        if how == "spread" and start:
            raise ValueError(f"corner={corner} is for how='crop'; 'spread' covers the whole table.")
        if start + count > size:
            raise ValueError(
                f"corner={corner}: a crop of {grid[0]} x {grid[1]} from there leaves the table of {table_grid[0]} x "
                f"{table_grid[1]} positions. The last corner that fits is "
                f"{(table_grid[0] - grid[0], table_grid[1] - grid[1])}."
            )
        index = np.arange(count)
        places.append(start + index if how == "crop" else (2 * index + 1) * size // (2 * count))
    patches = (places[0][:, None] * table_grid[1] + places[1][None, :]).ravel()
    return np.concatenate([np.arange(prefix), prefix + patches]).astype(np.int32)


def select_positions(
    table: Float[Array | np.ndarray, "*batch rows hidden"],
    grid: Grid,
    *,
    how: How = "crop",
    table_grid: Grid | None = None,
    prefix: int = 1,
    corner: Grid = (0, 0),
) -> Float[Array, "*batch tokens hidden"]:
    """The positions of an image of ``grid`` patches, from the table of a model for another size.

    With ``crop`` and ``spread`` a gather, whose gradient is exactly zero in all other rows: leave the table out of
    weight decay, which would shrink the rows that a step does not read. ``interp`` and ``fractional`` are linear in it.

    Args:
      table: [..., prefix + G * G', hidden], such as [1, 197, 768] of ViT-B/16 at 224 pixels.
      grid: (h, w), rows and columns of the image's patches. Only ``interp`` and ``fractional`` go above the table's.
      how: ``'crop'`` (the paper's), ``'spread'``, ``'interp'`` or ``'fractional'``; see the module.
      table_grid: (G, G'); None for a square table.
      prefix: rows of special tokens at the table's start, which are kept as they are.
      corner: see ``position_rows``; for ``'crop'`` only.

    Returns:
      [..., prefix + h * w, hidden] in the table's dtype; weights and sums of ``interp`` and ``fractional`` are float32.

    Raises:
      ValueError: rows that are not those of the grid, a grid above the table.

    Example:
      >>> table = jnp.arange(10.0)[:, None]
      >>> select_positions(table, (2, 2)).ravel().tolist()
      [0.0, 1.0, 2.0, 4.0, 5.0]
      >>> select_positions(table, (1, 1), how="fractional").ravel().tolist()
      [0.0, 5.0]

    ``crop``: Nagarajan, Raghunathan 2023, arXiv:2312.12385; ``interp``: Beyer et al. 2023 (FlexiViT),
    arXiv:2212.08013; relative places as in ``fractional``: Dehghani et al. 2023 (NaViT), arXiv:2307.06304, which learns
    functions of them in place of a table.
    """
    check_choice("how", how, HOWS)
    table = jnp.asarray(table)
    table_grid = _table_grid(table, table_grid, prefix)
    if how in ("crop", "spread"):
        rows = position_rows(table_grid, grid, how, prefix=prefix, corner=corner)
        return jnp.take(table, rows, axis=-2, unique_indices=True, indices_are_sorted=True)
    if tuple(corner) != (0, 0):
        raise ValueError(f"corner={corner} is for how='crop'; {how!r} covers the whole table.")
    _check_grids(grid, grid)
    if tuple(grid) == table_grid:
        return table
    first, rest = table[..., :prefix, :], table[..., prefix:, :]
    rest = wide(rest).reshape(*table.shape[:-2], *table_grid, table.shape[-1])
    shape = (*table.shape[:-2], *grid, table.shape[-1])
    rest = jax.image.resize(rest, shape, "bilinear", antialias=how == "interp")
    rest = rest.reshape(*table.shape[:-2], math.prod(grid), table.shape[-1])
    return jnp.concatenate([first, rest.astype(table.dtype)], axis=-2)


def position_selector(
    how: How = "crop", *, table_grid: Grid | None = None, prefix: int = 1
) -> Callable[[Any, Grid], Float[Array, "*batch tokens hidden"]]:
    """``select_positions`` with its settings, as models take it: ``ViT(positions=position_selector("crop"))``.

    Args:
      how: as for ``select_positions``.
      table_grid: (G, G'); None for a square table.
      prefix: special tokens, ``model.prefix`` of a ``ViT``.

    Returns:
      ``(table, grid) -> positions``. Two made alike are equal, so that modules that hold them are.

    Raises:
      ValueError: an unknown ``how``.

    Example:
      >>> position_selector("spread")(jnp.arange(10.0)[:, None], (2, 2)).ravel().tolist()
      [0.0, 1.0, 3.0, 7.0, 9.0]
    """
    check_choice("how", how, HOWS)
    check_number("prefix", prefix, low=0, integer=True)
    return _Selector(select_positions, how=how, table_grid=table_grid, prefix=prefix)


class _Selector(functools.partial):
    """A partial that equals another one with the same settings."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Selector) and self.keywords == other.keywords

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.keywords.items(), key=str)))


def _table_grid(table: jax.Array, table_grid: Grid | None, prefix: int) -> Grid:
    if table.ndim < 2:
        raise ValueError(f"table has shape {table.shape}; expected [..., rows, hidden].")
    check_number("prefix", prefix, low=0, high=table.shape[-2], integer=True)
    rows = table.shape[-2] - prefix
    if table_grid is None:
        table_grid = (math.isqrt(rows),) * 2
        if math.prod(table_grid) != rows or not rows:
            raise ValueError(
                f"table has {rows} rows after the prefix={prefix}, which is no square. Give table_grid=(rows, columns),"
                " or the number of special tokens as prefix."
            )
    elif len(table_grid) != 2 or math.prod(table_grid) != rows:
        raise ValueError(f"table_grid={table_grid} must be (rows, columns) of the {rows} rows after prefix={prefix}.")
    return (int(table_grid[0]), int(table_grid[1]))


def _check_grids(table_grid: Grid, grid: Grid) -> None:
    if len(table_grid) != 2 or len(grid) != 2:
        raise ValueError(f"table_grid={table_grid} and grid={grid} must be (rows, columns).")
    for axis, (most, count) in enumerate(zip(table_grid, grid, strict=True)):
        check_number(f"table_grid[{axis}]", most, low=1, integer=True)
        hint = "Use smaller images, or how='interp' or 'fractional', which stretch the table."
        check_number(f"grid[{axis}]", count, low=1, high=most, integer=True, hint=hint)
