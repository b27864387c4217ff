"""GEENI's members served: on a fixed graph as one network, or on a new graph inside ``jit`` (a reconstruction)."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from effjax.core.errors import check_choice, check_number
from effjax.graph.error_nodes import active_nodes
from effjax.graph.isolation import Mode, isolated_values, top_entries
from effjax.graph.members import (
    GcnMembers,
    aggregate_members,
    check_features,
    check_graphs,
    ensemble_logits,
    member_probabilities,
)
from effjax.graph.sparse.matrix import SparseMatrix
from effjax.graph.sparse.products import matmul, spmm

__all__ = ["ServedEnsemble", "inductive_probabilities", "serve_ensemble"]


class ServedEnsemble(NamedTuple):
    """What is kept to answer for a fixed graph: members side by side, as one network with a block-diagonal kernel.

    Attributes:
      kernel_0: [F, K H].
      bias_0: [K H].
      kernel_1: [K H, K C]; zero off the members' blocks, which costs less than moving memory between small products.
      bias_1: [K, C].
      features: X, or S X where the first aggregation was done once and for all.
      matrix: S, isolated and compacted; values [nnz], or [K, nnz] where members have graphs of their own.
      propagated: whether ``features`` are S X.
    """

    kernel_0: jax.Array
    bias_0: jax.Array
    kernel_1: jax.Array
    bias_1: jax.Array
    features: Any
    matrix: SparseMatrix
    propagated: bool

    def __call__(self) -> jax.Array:
        """Probabilities [N, C] of all nodes."""
        return _served(self[:-1], self.propagated)


def serve_ensemble(
    members: GcnMembers,
    features: SparseMatrix | jax.Array,
    adjacency: SparseMatrix,
    *,
    precompute: bool | Literal["auto"] = "auto",
) -> ServedEnsemble:
    """The ensemble ready to serve a fixed graph. Runs on the host.

    Args:
      members: trained; of ``fold_members`` for the mean of the logits at the cost of one network.
      features: X.
      adjacency: of ``isolate`` and the prunings, values [nnz]; or [K, nnz] where members have graphs of their own.
      precompute: store S X, which spares the first aggregation; for dense features and one graph only, as S X of sparse
        features is hardly sparse. ``'auto'`` does so where it can.

    Returns:
      A ``ServedEnsemble``; calling it gives the mean probabilities.

    Raises:
      ValueError: ``precompute=True`` with sparse features or several graphs, or graphs for another number of members.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> from effjax.graph.members import init_members
      >>> members = init_members(jax.random.key(0), 2, 2, 4, 2)
      >>> serve_ensemble(members, jnp.eye(2), gcn_adjacency([0, 1], [1, 0], 2))().shape
      (2, 2)
    """
    check_choice("precompute", precompute, (True, False, "auto"))
    if precompute is True and isinstance(features, SparseMatrix):
        raise ValueError("precompute=True with sparse features would make them dense. Use False or features.todense().")
    count, hidden = members.size, members.kernel_0.shape[-1]
    classes = members.kernel_1.shape[-1]
    check_graphs("adjacency", adjacency, members)
    check_features(features, members, adjacency)
    own = adjacency.values.ndim == 2
    if precompute is True and own:
        raise ValueError("precompute=True with a graph per member would store S X once per member. Use False.")
    blocks = np.zeros((count, hidden, count, classes), members.kernel_1.dtype)
    blocks[np.arange(count), :, np.arange(count)] = members.kernel_1
    seen, propagated = features, False
    if not isinstance(features, SparseMatrix) and (precompute is True or (precompute == "auto" and not own)):
        seen, propagated = spmm(adjacency, features), True
    kernel_0, bias_0 = _side_by_side(members)
    return ServedEnsemble(
        kernel_0,
        bias_0,
        jax.device_put(blocks.reshape(count * hidden, count * classes)),
        members.bias_1,
        seen,
        adjacency,
        propagated,
    )


@jax.jit
def _side_by_side(members: GcnMembers) -> tuple[jax.Array, jax.Array]:
    """The first layers of all members as one."""
    count, width, hidden = members.kernel_0.shape
    return jnp.moveaxis(members.kernel_0, 0, 1).reshape(width, count * hidden), members.bias_0.reshape(-1)


@functools.partial(jax.jit, static_argnums=1)
def _served(parts, propagated):
    kernel_0, bias_0, kernel_1, bias_1, features, matrix = parts
    count = bias_1.shape[0]
    hidden = matmul(features, kernel_0)
    hidden = jax.nn.relu((hidden if propagated else _aggregate(matrix, hidden, count)) + bias_0[None])
    return _mean_softmax(_aggregate(matrix, hidden @ kernel_1, count) + bias_1.reshape(1, -1), count)


def _aggregate(matrix: SparseMatrix, x: jax.Array, count: int) -> jax.Array:
    """S times the members' columns."""
    if matrix.values.ndim == 1:
        return spmm(matrix, x)
    return aggregate_members(matrix, x.reshape(x.shape[0], count, -1)).reshape(x.shape)


def _mean_softmax(logits: jax.Array, count: int) -> jax.Array:
    """Mean of the members' softmax, [N, K C] -> [N, C]; sums over members as products, which CPUs do faster."""
    nodes, width = logits.shape
    classes = width // count
    member = np.repeat(np.eye(count, dtype=logits.dtype), classes, axis=0)  # [K C, K]
    exactly = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    highest = jnp.max(logits.reshape(nodes, count, classes), axis=2)
    powers = jnp.exp(logits - exactly(highest, member.T))
    scale = 1 / exactly(powers, member)
    columns = lambda k: slice(k * classes, (k + 1) * classes)
    parts = (powers[:, columns(k)] * scale[:, k : k + 1] for k in range(count))
    return sum(parts, jnp.zeros((), logits.dtype)) / count


def inductive_probabilities(
    members: GcnMembers,
    features: SparseMatrix | Float[Array, "nodes features"],
    adjacency: SparseMatrix,
    known: Bool[Array, "nodes"],
    *,
    fraction: float = 0.1,
    mode: Mode = "full",
    capacity: int | None = None,
) -> Float[Array, "nodes classes"]:
    """Probabilities on a graph that was not there in training; one traceable program of static shapes.

    The first member runs on the whole graph; the nodes it is least sure of are isolated, and the other members run on
    what is left.

    Args:
      members: two or more.
      features: X of all nodes, new ones included.
      adjacency: S, values [nnz].
      known: nodes with known labels, which are never isolated.
      fraction: of all nodes, of ``active_nodes``.
      mode: of the isolation.
      capacity: entries of the isolated matrix, a real saving; the smallest beyond it are dropped (``top_entries``).
        None keeps all nnz and multiplies the isolated ones by zero, which saves nothing.

    Returns:
      [N, C], the mean over all members.

    Raises:
      ValueError: a single member, or numbers out of range.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> from effjax.graph.members import init_members
      >>> members = init_members(jax.random.key(0), 2, 2, 4, 2)
      >>> graph = gcn_adjacency([0, 1], [1, 0], 2)
      >>> inductive_probabilities(members, jnp.eye(2), graph, jnp.array([True, False]), capacity=3).shape
      (2, 2)
    """
    check_number("members.size", members.size, low=2, hint="One member scores and the others need to be there.")
    scorer, others = (jax.tree.map(lambda leaf, part=part: leaf[part], members) for part in (slice(1), slice(1, None)))
    first = member_probabilities(ensemble_logits(scorer, features, adjacency))
    active = active_nodes(jnp.max(first[0], axis=1), fraction, known)
    isolated = adjacency._replace(values=isolated_values(adjacency, active, mode=mode))
    if capacity is not None:
        isolated = top_entries(isolated, capacity)
    rest = member_probabilities(ensemble_logits(others, features, isolated))
    return jnp.mean(jnp.concatenate([first, rest]), axis=0)
