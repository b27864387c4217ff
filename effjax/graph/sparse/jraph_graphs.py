"""Jraph's ``GraphsTuple`` and our sparse matrices, and working forms of what is broken in jraph 0.0.6.dev0.

Jraph is archived. Its container, batching and segment operations work with today's JAX; ``zero_out_padding``,
``with_zero_out_padding_outputs`` and ``get_fully_connected_graph`` call functions that JAX has removed, so they stand
here under the same names.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from effjax.core.errors import check_number
from effjax.graph.sparse.matrix import SparseMatrix, check_matrix, sparse_matrix

__all__ = [
    "from_graphs_tuple",
    "get_fully_connected_graph",
    "to_graphs_tuple",
    "zero_out_padding",
]

PyTree = Any


class SparseGraph(NamedTuple):
    """One graph or a batch of them: what a ``GraphsTuple`` holds, with the edges as a sparse matrix.

    Attributes:
      matrix: [N, N], rows receive, columns send; block-diagonal where there are several graphs.
      nodes: pytree of arrays [N, ...], or None.
      edges: pytree of arrays [nnz, ...] in the order of the matrix's entries, or None.
      globals: pytree of arrays [G, ...], or None.
      n_node: int32 [G], nodes of every graph.
    """

    matrix: SparseMatrix
    nodes: PyTree
    edges: PyTree
    globals: PyTree
    n_node: Int[np.ndarray, "graphs"]


def from_graphs_tuple(
    graph: jraph.GraphsTuple, *, weights: ArrayLike | None = None, padded: bool = False
) -> SparseGraph:
    """The graph with its edges as a sparse matrix, sorted by receiver, then sender. Runs on the host.

    The edges of a batch stay in the order of its graphs, as a graph's nodes have consecutive numbers.

    Args:
      graph: one or a batch; any order of edges within a graph.
      weights: the matrix's values, in the order of ``graph``'s edges; None for ones.
      padded: ``graph`` comes from ``pad_graphs`` or ``jraph.pad_with_graphs``. Its padding edges become inert entries
        of value 0 at the last node, so that graphs of one rung give matrices of one shape.

    Returns:
      A ``SparseGraph`` of JAX arrays.

    Raises:
      ValueError: an invalid graph (``check_graphs_tuple``), parallel edges, or weights of another length.

    Example:
      >>> triangle = get_fully_connected_graph(3, 1, node_features=jnp.arange(3.0), add_self_edges=False)
      >>> parts = from_graphs_tuple(triangle)
      >>> (parts.matrix @ parts.nodes).tolist()
      [3.0, 2.0, 1.0]
      >>> to_graphs_tuple(*parts).senders.tolist()
      [1, 2, 0, 2, 0, 1]
    """
    graph = check_graphs_tuple(graph)
    senders, receivers = np.asarray(graph.senders), np.asarray(graph.receivers)
    nodes, edges = int(graph.n_node.sum()), len(senders)
    weights = np.ones(edges, np.float32) if weights is None else np.asarray(weights)
    if weights.shape != (edges,):
        raise ValueError(
            f"weights has shape {weights.shape}, but the graph has {edges} edges. Give one number an edge."
        )
    real = edges - int(jraph.get_number_of_padding_with_graphs_edges(graph)) if padded else edges
    senders, receivers = senders[:real], receivers[:real]
    order = np.concatenate([np.lexsort((senders, receivers)), np.arange(real, edges)])
    matrix = sparse_matrix(receivers, senders, weights[:real], (nodes, nodes), capacity=edges or None)
    return SparseGraph(
        matrix,
        nodes=jax.device_put(graph.nodes),
        edges=jax.tree.map(lambda leaf: jax.device_put(leaf[order]), graph.edges),
        globals=jax.device_put(graph.globals),
        n_node=np.asarray(graph.n_node),
    )


def to_graphs_tuple(
    matrix: SparseMatrix,
    nodes: PyTree = None,
    edges: PyTree = None,
    globals: PyTree = None,
    n_node: ArrayLike | None = None,
    *,
    padded: bool = False,
) -> jraph.GraphsTuple:
    """The matrix's entries as edges, in their order, with features. Runs on the host.

    A ``GraphsTuple`` has no edge weights of its own: pass ``edges=matrix.values`` to keep the values.

    Args:
      matrix: [N, N], rows receive.
      nodes: pytree of arrays [N, ...].
      edges: pytree of arrays [nnz, ...].
      globals: pytree of arrays [G, ...].
      n_node: nodes of each graph of a batch; None for one graph.
      padded: the matrix's padding are the edges of the padding graph, to which the last node belongs (see
        ``from_graphs_tuple``); else they are left out.

    Returns:
      A ``GraphsTuple``; ``from_graphs_tuple`` of it gives the arguments back.

    Raises:
      ValueError: sizes that do not fit, an entry between two graphs of a batch, NaN features.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency
      >>> graph = to_graphs_tuple(adjacency([1, 0, 2], [0, 1, 2], 3), n_node=[2, 1])
      >>> graph.receivers.tolist(), graph.n_edge.tolist()
      ([0, 1, 2], [2, 1])
    """
    pattern = check_matrix("matrix", matrix, square=True).pattern
    n_node = np.asarray([matrix.shape[0]] if n_node is None else n_node)
    if n_node.sum() != matrix.shape[0]:
        raise ValueError(
            f"n_node={n_node.tolist()} sums to {n_node.sum()}, but the matrix has {matrix.shape[0]} nodes."
        )
    _check_rows("edges", edges, matrix.nnz)
    count = matrix.nnz if padded else int(pattern.size)
    rows = np.asarray(pattern.rows)[:count]
    # In NumPy, which jraph takes, but does not annotate.
    indices: dict[str, Any] = {
        "receivers": rows,
        "senders": np.asarray(pattern.columns)[:count],
        "n_node": n_node,
        "n_edge": np.diff(np.searchsorted(rows, np.cumsum(n_node)), prepend=0),
    }
    kept = jax.tree.map(lambda leaf: leaf[:count], edges)
    graph = jraph.GraphsTuple(nodes=nodes, edges=kept, globals=globals, **indices)
    return jax.tree.map(jnp.asarray, check_graphs_tuple(graph))


def check_graphs_tuple(graph: jraph.GraphsTuple, *, argument: str = "graph") -> jraph.GraphsTuple:
    """The graph in NumPy with int32 indices, if it is sound.

    Args:
      graph: of NumPy or JAX arrays. Senders and receivers may be None where there are no edges.
      argument: the caller's argument name, for the messages.

    Returns:
      A ``GraphsTuple`` of NumPy arrays.

    Raises:
      TypeError: no ``GraphsTuple``.
      ValueError: sizes that do not fit each other, an edge that leaves its graph, or features with NaN or infinity.

    Example:
      >>> lone = get_fully_connected_graph(1, 1)
      >>> check_graphs_tuple(lone._replace(senders=np.array([5])))
      Traceback (most recent call last):
      ValueError: graph.senders[0]=5 is outside its graph 0, whose 1 nodes are 0..0. ...
    """
    if not isinstance(graph, jraph.GraphsTuple):
        raise TypeError(f"{argument} is a {type(graph).__name__}; a jraph.GraphsTuple is needed.")
    graph = jax.tree.map(np.asarray, graph)
    absent: dict[str, Any] = {
        name: np.zeros(0, np.int32) for name in ("senders", "receivers") if getattr(graph, name) is None
    }
    graph = graph._replace(**absent)
    for name in ("n_node", "n_edge", "senders", "receivers"):
        array = getattr(graph, name)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(f"{argument}.{name} is {array.dtype}{list(array.shape)}; one axis of integers is needed.")
        if name.startswith("n_") and array.min(initial=0) < 0:
            raise ValueError(f"{argument}.{name}={array.tolist()} holds a number below 0.")
    graphs, nodes, edges = len(graph.n_node), int(graph.n_node.sum()), int(graph.n_edge.sum())
    if len(graph.n_edge) != graphs:
        raise ValueError(f"{argument}.n_node counts {graphs} graphs and n_edge {len(graph.n_edge)}. They must agree.")
    for name, rows in (
        ("senders", edges),
        ("receivers", edges),
        ("nodes", nodes),
        ("edges", edges),
        ("globals", graphs),
    ):
        _check_rows(f"{argument}.{name}", getattr(graph, name), rows)
    for name in ("senders", "receivers"):
        _check_ends(f"{argument}.{name}", getattr(graph, name), np.asarray(graph.n_node), np.asarray(graph.n_edge))
    for name in ("nodes", "edges", "globals"):
        _check_finite(f"{argument}.{name}", getattr(graph, name))
    indices = {name: getattr(graph, name).astype(np.int32) for name in ("senders", "receivers", "n_node", "n_edge")}
    return graph._replace(**indices)


def _check_rows(name: str, tree: PyTree, rows: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if np.shape(leaf)[:1] != (rows,):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}, but {rows} rows are needed: the sum "
                "of n_node for nodes, of n_edge for edges, one a graph for globals."
            )


def _check_ends(name: str, ends: np.ndarray, n_node: np.ndarray, n_edge: np.ndarray) -> None:
    owner = np.repeat(np.arange(len(n_node)), n_edge)
    stop = np.cumsum(n_node)
    bad = np.flatnonzero((ends < (stop - n_node)[owner]) | (ends >= stop[owner]))
    if len(bad):
        at, graph = bad[0], owner[bad[0]]
        raise ValueError(
            f"{name}[{at}]={ends[at]} is outside its graph {graph}, whose {n_node[graph]} nodes are "
            f"{stop[graph] - n_node[graph]}..{stop[graph] - 1}. {len(bad)} of {len(ends)} edges leave theirs; in a "
            "batch node numbers count on from graph to graph (jraph.batch does that)."
        )


def _check_finite(name: str, tree: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not leaf.size or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        bad = np.flatnonzero(~np.isfinite(leaf.reshape(len(leaf), -1)).all(axis=1))
        if len(bad):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has NaN or infinity in {len(bad)} of {len(leaf)} rows, the first "
                f"at {bad[0]}. Repair the features, or drop those rows."
            )


# Working forms of broken functions


def zero_out_padding(graph: jraph.GraphsTuple) -> jraph.GraphsTuple:
    """Zero the features of padding nodes, edges and graphs; traceable.

    Args:
      graph: padded by ``pad_graphs`` or ``jraph.pad_with_graphs``.

    Returns:
      The same graph, real features unchanged. NaN in the padding becomes zero too (jraph multiplies by a mask).

    Raises:
      ValueError: features with more or fewer rows than the graph has nodes, edges or graphs.

    Example:
      >>> graph = jraph.pad_with_graphs(get_fully_connected_graph(2, 1, node_features=jnp.ones(2)), 4, 8)
      >>> zero_out_padding(graph._replace(nodes=jnp.full(4, 7.0))).nodes.tolist()
      [7.0, 7.0, 0.0, 0.0]
    """
    # Jraph's masks index n_node by a traced number, which NumPy arrays refuse.
    graph = graph._replace(n_node=jnp.asarray(graph.n_node), n_edge=jnp.asarray(graph.n_edge))

    def zeroed(name: str, mask: Callable[[jraph.GraphsTuple], PyTree]) -> PyTree:
        tree = getattr(graph, name)
        if not jax.tree.leaves(tree):  # without features the number of nodes is not known
            return tree
        keep = mask(graph)
        _check_rows(f"graph.{name}", tree, keep.shape[0])
        return jax.tree.map(lambda leaf: jnp.where(keep.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0), tree)

    return graph._replace(
        nodes=zeroed("nodes", jraph.get_node_padding_mask),
        edges=zeroed("edges", jraph.get_edge_padding_mask),
        globals=zeroed("globals", jraph.get_graph_padding_mask),
    )


def with_zero_out_padding_outputs(
    graph_net: Callable[..., jraph.GraphsTuple],
) -> Callable[..., jraph.GraphsTuple]:
    """``graph_net`` with ``zero_out_padding`` of what it returns.

    Args:
      graph_net: a function to a padded graph.

    Returns:
      A function of the same arguments.

    Example:
      >>> graph = jraph.pad_with_graphs(get_fully_connected_graph(2, 1, node_features=jnp.ones(2)), 4, 8)
      >>> net = with_zero_out_padding_outputs(lambda graph: graph._replace(nodes=graph.nodes + 1))
      >>> net(graph).nodes.tolist()
      [2.0, 2.0, 0.0, 0.0]
    """

    @functools.wraps(graph_net)
    def wrapper(*args: Any, **kwargs: Any) -> jraph.GraphsTuple:
        return zero_out_padding(graph_net(*args, **kwargs))

    return wrapper


def get_fully_connected_graph(
    n_node_per_graph: int,
    n_graph: int,
    node_features: PyTree = None,
    global_features: PyTree = None,
    add_self_edges: bool = True,
) -> jraph.GraphsTuple:
    """Graphs in which every node sends to every other, as a batch; traceable in the features.

    Args:
      n_node_per_graph: n, nodes of each graph.
      n_graph: G.
      node_features: pytree of arrays [G n, ...].
      global_features: pytree of arrays [G, ...].
      add_self_edges: whether every node sends to itself too.

    Returns:
      A ``GraphsTuple`` with edges by receiver. The senders of a receiver i ascend with self-edges; without, they are
      i + 1, ..., i - 1 modulo n, as in jraph.

    Raises:
      ValueError: features with another number of rows.

    Example:
      >>> graph = get_fully_connected_graph(3, 1, add_self_edges=False)
      >>> graph.senders.tolist(), graph.receivers.tolist()
      ([1, 2, 2, 0, 0, 1], [0, 0, 1, 1, 2, 2])
    """
    n = check_number("n_node_per_graph", n_node_per_graph, low=1, integer=True)
    check_number("n_graph", n_graph, low=1, integer=True)
    _check_rows("node_features", node_features, n * n_graph)
    _check_rows("global_features", global_features, n_graph)
    first = 0 if add_self_edges else 1
    receivers = np.repeat(np.arange(n), n - first)
    steps = np.tile(np.arange(first, n), n)
    senders = steps if add_self_edges else (receivers + steps) % n
    offsets = n * np.arange(n_graph)[:, None]
    return jraph.GraphsTuple(
        nodes=node_features,
        edges=None,
        receivers=_int32(offsets + receivers),
        senders=_int32(offsets + senders),
        globals=global_features,
        n_node=_int32([n] * n_graph),
        n_edge=_int32([len(senders)] * n_graph),
    )


def _int32(numbers: np.ndarray | Sequence[int]) -> jax.Array:
    return jnp.asarray(np.ravel(numbers), jnp.int32)
