"""Places for some rows of a batch in static shapes: a fixed number, or the least bucket that holds them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import check_shape
from effjax.core.shapes import check_ladder


def request_slots(
    request: Bool[Array | np.ndarray, "rows"], score: Float[Array | np.ndarray, "rows"] | None = None, *, capacity: int
) -> Int[Array, "capacity"]:
    """The rows that get a place, in increasing order; empty places hold the number of rows. Traceable.

    Args:
      request: rows that ask.
      score: the largest are served, of equals the first, NaN before all; None for the first rows.
      capacity: number of places.

    Returns:
      int32 [capacity].

    Example:
      >>> asks, score = jnp.array([True, True, False, True]), jnp.array([0.1, 0.3, 9.0, 0.2])
      >>> request_slots(asks, capacity=2).tolist(), request_slots(asks, score, capacity=2).tolist()
      ([0, 1], [1, 3])
    """
    rows = request.shape[0]
    if score is None:
        order = jnp.argsort(~request, stable=True)
    else:
        check_shape("score", score, (rows,), "One number for each row.")
        order = jnp.lexsort((-jnp.where(jnp.isnan(score), jnp.inf, score), ~request))
    places = jnp.arange(min(capacity, rows))
    slots = jnp.sort(jnp.where(places < jnp.sum(request), order[: len(places)], rows))
    return jnp.pad(slots, (0, capacity - len(places)), constant_values=rows).astype(jnp.int32)


def in_least_bucket(
    run: Callable[..., Any],
    request: Bool[Array | np.ndarray, "rows"],
    *operands: Any,
    buckets: Sequence[int],
    axis: str | None = None,
    caller: str,
    instead: str,
) -> Any:
    r"""Run a function with a place for every row that asks, in the least bucket that holds them.

    .. math:: C = \min \{ c \in \{0\} \cup \mathrm{buckets} \cup \{B\} : c \ge |R| \}

    Only the branch of C runs, and nothing is read on the host. Not under ``vmap``, where all branches would.

    Args:
      run: ``(slots, *operands) -> anything`` of the same shapes for every number of slots. ``slots`` are int32 [C],
        increasing rows that ask; empty places hold the number of rows.
      request: R, rows that ask.
      *operands: what ``run`` reads, so that it is no constant of the program.
      buckets: increasing sizes; 0 and the batch B are added, sizes above the batch left out.
      axis: of the mesh inside ``shard_map``, if all devices must take the branch of the device where most rows ask.
      caller: the public function, for the message under ``vmap``.
      instead: what does work under ``vmap``.

    Returns:
      What ``run`` returns.

    Raises:
      ValueError: under ``vmap``.

    Example:
      >>> count = lambda slots, x: x + len(slots)
      >>> in_least_bucket(count, jnp.array([True, False, True]), 0, buckets=(1, 2), caller="f", instead="g").item()
      2
    """
    own = request.shape[0]
    sizes = (0, *(rung for rung in check_ladder(buckets, argument="buckets") if rung < own), own)
    order = jnp.argsort(~request, stable=True).astype(jnp.int32)
    count = _not_under_vmap(caller, instead)(jnp.sum(request, dtype=jnp.int32))
    most = count if axis is None else jax.lax.pmax(count, axis)

    def branch(size: int) -> Callable[..., Any]:
        def in_slots(order, count, *operands):
            return run(jnp.where(jnp.arange(size) < count, order[:size], own), *operands)

        return in_slots

    place = jnp.searchsorted(jnp.array(sizes), most)
    return jax.lax.switch(place, [branch(size) for size in sizes], order, count, *operands)


def mesh_parts(mesh: Mesh | None, axis: str, rows: int) -> int:
    """Devices among which the rows of a batch are split; 1 without a mesh.

    Raises:
      ValueError: no such axis, or rows that do not divide.
    """
    if mesh is None:
        return 1
    if axis not in mesh.shape:
        raise ValueError(f"axis={axis!r} is not one of the mesh's axes {tuple(mesh.shape)}.")
    parts = mesh.shape[axis]
    if rows % parts:
        raise ValueError(f"{rows} rows do not divide among the {parts} devices of axis {axis!r}. Pad the batch.")
    return parts


def over_mesh(mesh: Mesh | None, axis: str, run: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """``run(params, *batch)`` on every device's own rows; its results lead with the rows."""
    if mesh_parts(mesh, axis, rows) == 1 or mesh is None:
        return run if mesh is None else jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)

    def mapped(params, *batch):
        specs = (P(), *(P(axis) for _ in batch))
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(axis), check_vma=False)(params, *batch)

    return mapped


@functools.cache
def _not_under_vmap(caller: str, instead: str) -> Callable[[jax.Array], jax.Array]:
    """The identity, which refuses to be batched."""

    @jax.custom_batching.custom_vmap
    def same(count: jax.Array) -> jax.Array:
        return count

    @same.def_vmap
    def refuse(axis_size: int, in_batched: Any, count: jax.Array) -> Any:
        raise ValueError(
            f"{caller} under vmap over {axis_size} would run every bucket for all of them. Use {instead}, or "
            "jax.lax.map."
        )

    return same
