"""Node classification on one graph, as the methods take it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.graph.sparse.checks import check_array
from effjax.graph.sparse.matrix import SparseMatrix, check_matrix

__all__ = ["GeeniProblem", "NodeProblem"]


class NodeProblem(NamedTuple):
    """A graph some of whose nodes have a label.

    Attributes:
      features: passed on to the network; usually [N, F], or a ``SparseMatrix``.
      adjacency: ``SparseMatrix`` [N, N], normalised, with self-loops (``gcn_adjacency``).
      labels: int [N], classes in [0, C) where ``mask``; not read elsewhere.
      mask: bool [N], nodes with a label.
      classes: C.
    """

    features: Any
    adjacency: SparseMatrix
    labels: jax.Array
    mask: jax.Array
    classes: int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("features", "adjacency", "labels", "train", "val", "weights", "alike"),
    meta_fields=("classes",),
)
@dataclasses.dataclass(frozen=True)
class GeeniProblem:
    """Nodes of one graph to be classified.

    Attributes:
      features: X, float [N, F] or a ``SparseMatrix``.
      adjacency: ``gcn_adjacency``: symmetric normalisation, with self-loops; values [nnz].
      labels: int32 [N]; read at ``train`` and ``val`` only, except by the detector 'oracle'.
      train: bool [N], nodes the networks are trained on.
      val: bool [N], labelled nodes they are not trained on: they fit the detector and choose the isolation.
      classes: C.
      weights: float [nnz], what ``adjacency`` normalises; None for ones.
      alike: bool [nnz], the edges that denoised members see (``alike_edges``).
    """

    features: jax.Array | SparseMatrix
    adjacency: SparseMatrix
    labels: jax.Array
    train: jax.Array
    val: jax.Array
    classes: int
    weights: jax.Array | None = None
    alike: jax.Array | None = None


def check_node_problem(problem: NodeProblem) -> None:
    """Raise ``ValueError`` where shapes or dtypes are wrong; values are not read."""
    nodes = check_matrix("problem.adjacency", problem.adjacency, square=True).shape[0]
    hint = f"The adjacency has {nodes} nodes."
    check_array("problem.labels", problem.labels, (nodes,), "integers", hint)
    check_array("problem.mask", problem.mask, (nodes,), "bool", hint)


def checked_node_problem(problem: NodeProblem) -> NodeProblem:
    """The problem with labels of -1 outside the mask; raises where labels and mask do not make one. On the host."""
    check_node_problem(problem)
    labels, mask = np.asarray(problem.labels), np.asarray(problem.mask)
    given = labels[mask]
    wrong = given[(given < 0) | (given >= problem.classes)]
    if wrong.size:
        raise ValueError(f"labels holds {wrong[0]} inside the mask; classes are 0..{problem.classes - 1}.")
    empty = np.setdiff1d(np.arange(problem.classes), given)
    if empty.size:
        raise ValueError(
            f"mask holds no node of the classes {empty.tolist()}, and self-training cannot find a class that it has "
            "never seen. Label at least one node of each, or renumber the classes."
        )
    labels = jnp.asarray(np.where(mask, labels, -1), jnp.int32)
    return problem._replace(labels=labels, mask=jnp.asarray(mask))


def check_geeni_shapes(problem: GeeniProblem) -> None:
    """Raise where shapes or dtypes are wrong; values are not read."""
    nodes = check_matrix("problem.adjacency", problem.adjacency, square=True).shape[0]
    hint, entries = f"The adjacency has {nodes} nodes.", problem.adjacency.nnz
    if isinstance(problem.features, SparseMatrix):
        check_matrix("problem.features", problem.features)
    if len(problem.features.shape) != 2 or problem.features.shape[0] != nodes:
        raise ValueError(f"problem.features has shape {problem.features.shape}; [{nodes}, F] is needed.")
    check_array("problem.labels", problem.labels, (nodes,), "integers", hint)
    for name in ("train", "val"):
        check_array(f"problem.{name}", getattr(problem, name), (nodes,), "bool", hint)
    for name, kind in (("alike", "bool"), ("weights", "numbers")):
        if getattr(problem, name) is not None:
            check_array(f"problem.{name}", getattr(problem, name), (entries,), kind, "One for every entry.")
