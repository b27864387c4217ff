"""Trees whose arrays carry a leading axis of copies (experts, members, seeds), on any mesh."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from effjax.core.tree import wide

PyTree = Any


def column(values: Array, like: Array) -> Array:
    """One value per copy, of a shape that broadcasts against ``like``."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def take(tree: PyTree, index: Array | int) -> PyTree:
    """``leaf[index]`` as a masked sum: NaN of other copies stay out, and a sharded leading axis costs one all-reduce.

    Example:
      >>> take(jnp.array([[1.0, 2.0], [jnp.nan, 3.0]]), 0).tolist()
      [1.0, 2.0]
    """
    place = jnp.asarray(index)

    def one(leaf: Array) -> Array:
        mask = column(jnp.arange(leaf.shape[0], dtype=place.dtype) == place, leaf)
        return jnp.sum(jnp.where(mask, leaf, jnp.zeros_like(leaf)), axis=0, dtype=leaf.dtype)

    return jax.tree.map(one, tree)


def weighted_sum(tree: PyTree, weights: Float[Array, "copies"]) -> PyTree:
    """The weighted sum over copies, in float32 or wider; copies of weight 0 may hold NaN."""

    def one(leaf: Array) -> Array:
        shares = column(weights, leaf)
        return jnp.sum(jnp.where(shares > 0, shares * wide(leaf), 0.0), axis=0).astype(leaf.dtype)

    return jax.tree.map(one, tree)


def spread_out(one: PyTree, like: PyTree) -> PyTree:
    """One copy's arrays for all; the sum takes over the sharding of ``like`` on explicit meshes too."""
    return jax.tree.map(lambda leaf, stacked: jnp.zeros_like(stacked) + leaf[None], one, like)


def finite_copies(tree: PyTree) -> Bool[Array, "copies"]:
    """Which copies are finite throughout."""
    sound = [
        replicated(jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.stack(sound).all(axis=0)


def aligned(tree: PyTree, like: PyTree) -> PyTree:
    """On explicit meshes, shard all leading axes as ``like``'s, which ``vmap`` requires; else change nothing."""
    leaves = jax.tree.leaves(like)
    sharding = jax.typeof(leaves[0]).sharding if leaves else None  # none under optax.tree.map_params
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return tree

    def align(leaf: Array) -> Array:
        spec = P(sharding.spec[0], *jax.typeof(leaf).sharding.spec[1:])
        return jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, spec))

    return jax.tree.map(align, tree)


def replicated(values: Array) -> Array:
    """On explicit meshes, the array on every device; else the array."""
    mesh = jax.typeof(values).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return values
    return jax.sharding.reshard(values, NamedSharding(mesh, P(*[None] * values.ndim)))
