"""Full-graph message passing over several devices: every device holds the edges into its own rows."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from effjax.core.errors import check_choice
from effjax.core.shapes import pad_to
from effjax.graph.sparse.matrix import SparseMatrix, check_matrix, sparse_matrix
from effjax.graph.sparse.products import spmm

__all__ = ["shard_matrix", "shard_rows", "sharded_spmm"]

PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("blocks",),
    meta_fields=("mesh", "axis", "rows", "shape"),
)
@dataclasses.dataclass(frozen=True)
class ShardedMatrix:
    """A sparse matrix in blocks of rows, one a device; ``matrix @ x`` is ``sharded_spmm``.

    Attributes:
      blocks: a ``SparseMatrix`` whose arrays have a leading axis of D devices, sharded over it; block d holds rows
        d R / D to (d + 1) R / D, and as many entries as the fullest block, the rest being inert padding.
      mesh: where it lives.
      axis: name of the mesh axis with D devices.
      rows: rows before padding.
      shape: (R, C), both multiples of D.
    """

    blocks: SparseMatrix
    mesh: Mesh
    axis: str
    rows: int
    shape: tuple[int, int]

    @property
    def fill(self) -> float:
        """Share of the stored entries that is real; low where some rows hold most entries. Runs on the host.

        Products take as long as the fullest block. Numbering the nodes at random evens the blocks out.
        """
        sizes = np.asarray(self.blocks.pattern.size)
        return float(sizes.sum() / max(self.blocks.values.size, 1))

    def __matmul__(self, x: jax.Array) -> jax.Array:
        return sharded_spmm(self, x)


def shard_matrix(matrix: SparseMatrix, mesh: Mesh, axis: str) -> ShardedMatrix:
    """Cut a matrix into blocks of rows, one for each device along a mesh axis. Runs on the host.

    Args:
      matrix: [R, C]; R and C are padded with zero rows and columns to multiples of the number of devices.
      mesh: of any axis types; devices along other axes hold copies.
      axis: a name of its axes.

    Returns:
      A ``ShardedMatrix``.

    Raises:
      ValueError: the mesh has no such axis.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> matrix = shard_matrix(adjacency([0, 1, 2], [1, 2, 0], 3), mesh, "data")
      >>> (matrix @ shard_rows(jnp.arange(3.0)[:, None], mesh, "data")).ravel().tolist()
      [2.0, 0.0, 1.0]
    """
    check_matrix("matrix", matrix)
    check_choice("axis", axis, mesh.axis_names)
    devices = mesh.shape[axis]
    rows, columns = (-(-size // devices) * devices for size in matrix.shape)
    share = rows // devices
    size = int(matrix.pattern.size)  # without padding
    at, to = np.asarray(matrix.pattern.rows)[:size], np.asarray(matrix.pattern.columns)[:size]
    values = np.asarray(matrix.values)[:size]
    ends = np.searchsorted(at, np.arange(devices + 1) * share)
    most = int(np.diff(ends).max())
    blocks = [
        sparse_matrix(at[part] - d * share, to[part], values[part], (share, columns), capacity=most or None)
        for d, part in enumerate(slice(start, stop) for start, stop in itertools.pairwise(ends))
    ]
    stacked = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *blocks)
    placed = jax.device_put(stacked, NamedSharding(mesh, PartitionSpec(axis)))
    return ShardedMatrix(placed, mesh, axis, matrix.shape[0], (rows, columns))


def shard_rows(tree: PyTree, mesh: Mesh, axis: str) -> PyTree:
    """Arrays with one row a node, padded with zeros to a multiple of the devices along ``axis`` and sharded over it.

    Args:
      tree: arrays [N, ...]: features, labels, and the mask of the loss, False in the padding.
      mesh: that of the matrix.
      axis: that of the matrix.

    Returns:
      Arrays [R, ...].

    Raises:
      ValueError: the mesh has no such axis.

    Example:
      >>> shard_rows(np.ones((3, 2)), jax.make_mesh((1,), ("data",)), "data").shape
      (3, 2)
    """
    check_choice("axis", axis, mesh.axis_names)
    devices = mesh.shape[axis]
    sharding = NamedSharding(mesh, PartitionSpec(axis))

    def place(leaf: ArrayLike) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.device_put(pad_to(leaf, -(-len(leaf) // devices) * devices), sharding)

    return jax.tree.map(place, tree)


def sharded_spmm(matrix: ShardedMatrix, x: Float[Array, "columns ..."]) -> Float[Array, "rows ..."]:
    r"""The product of a sharded matrix with rows that are sharded over the same axis.

    .. math:: Y_{(d)} = A_{(d)}\, \mathrm{all\_gather}(X_{(1)}, \dots, X_{(D)})

    One all-gather of ``x`` forward and one reduce-scatter of its size backward; entries never move. A layer should
    therefore multiply by its kernel first where that makes the features narrower.

    Args:
      matrix: [R, C].
      x: [C, ...], see ``shard_rows``.

    Returns:
      [R, ...], sharded like ``x``; rows of the padding are zero. Equal to ``spmm`` up to the order of sums.

    Raises:
      ValueError: ``x`` has not C rows.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> pair = shard_matrix(adjacency([0, 1], [1, 0], 2, self_loops=True), mesh, "data")
      >>> sharded_spmm(pair, shard_rows(np.asarray([[1.0, 2.0], [3.0, 4.0]]), mesh, "data")).tolist()
      [[4.0, 6.0], [4.0, 6.0]]
    """
    if not isinstance(matrix, ShardedMatrix):
        raise TypeError(f"matrix is a {type(matrix).__name__}; cut it into blocks with effjax.graph.shard_matrix.")
    x = jnp.asarray(x)
    if x.shape[:1] != matrix.shape[1:]:
        raise ValueError(
            f"x has shape {x.shape}, but the sharded matrix {matrix.shape} needs {matrix.shape[1]} rows. Pad and place "
            "x with shard_rows."
        )

    return _product(matrix.blocks, x, matrix.mesh, matrix.axis)


@functools.partial(jax.jit, static_argnums=(2, 3))  # where it is called eagerly, so that it compiles once
def _product(blocks: SparseMatrix, x: jax.Array, mesh: Mesh, axis: str) -> jax.Array:
    def product(blocks: SparseMatrix, x: jax.Array) -> jax.Array:
        block = jax.tree.map(lambda leaf: leaf[0], blocks)
        return spmm(block, jax.lax.all_gather(x, axis, tiled=True))

    spec = PartitionSpec(axis)
    mapped = jax.shard_map(
        product,
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=spec,
        axis_names={axis},  # gradients are not summed over other axes
        check_vma=False,  # JAX's CSR product forgets over which axes its result varies
    )
    return mapped(blocks, x)
