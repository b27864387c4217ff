"""Graphs padded to few static shapes, batches of many small graphs, and a gate against silent recompilation."""

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Bool

from effjax.core.cost import Executables
from effjax.core.cursor import Cursor
from effjax.core.errors import check_number
from effjax.core.shapes import ladder
from effjax.graph.sparse.jraph_graphs import check_graphs_tuple

__all__ = ["GraphBatches", "ShapeGate", "graph_ladder", "pad_graphs", "padding_masks"]

PyTree = Any


class GraphShape(NamedTuple):
    """Sizes of a graph, or of a batch of them.

    Attributes:
      nodes: in all graphs.
      edges: in all graphs.
      graphs: how many.
    """

    nodes: int
    edges: int
    graphs: int


class GraphMasks(NamedTuple):
    """What is real in a padded graph.

    Attributes:
      nodes: bool [N].
      edges: bool [E].
      graphs: bool [G].
    """

    nodes: Bool[Array, "nodes"]
    edges: Bool[Array, "edges"]
    graphs: Bool[Array, "graphs"]


def graph_shape(graph: jraph.GraphsTuple) -> GraphShape:
    """Sizes of a graph on the host, padding included.

    Example:
      >>> from effjax.graph.sparse.jraph_graphs import get_fully_connected_graph
      >>> graph_shape(get_fully_connected_graph(3, 2))
      GraphShape(nodes=6, edges=18, graphs=2)
    """
    return GraphShape(int(np.sum(graph.n_node)), int(np.sum(graph.n_edge)), len(graph.n_node))


def graph_ladder(
    low: GraphShape, high: GraphShape, *, growth: float = 2.0, multiple: int = 8
) -> tuple[GraphShape, ...]:
    """Rungs that hold every size from ``low`` to ``high``, nodes, edges and graphs climbing together.

    One executable a rung, and not one for every pair of a number of nodes and a number of edges.

    Args:
      low: real sizes of the smallest input.
      high: real sizes of the largest.
      growth: ratio of neighbouring rungs, above 1.
      multiple: every number of nodes and edges is a multiple of it.

    Returns:
      Rungs with room for the spare node and the spare graph that padding needs.

    Raises:
      ValueError: ``high`` below ``low``, or arguments out of range.

    Example:
      >>> [tuple(rung) for rung in graph_ladder(GraphShape(20, 60, 1), GraphShape(50, 400, 1))]
      [(24, 64, 2), (48, 128, 2), (56, 256, 2), (56, 400, 2)]
    """
    columns = []
    for name, least, most in zip(GraphShape._fields, low, high, strict=True):
        check_number(
            f"low.{name}",
            least,
            low=int(name == "graphs"),
            high=most,
            integer=True,
            hint="The ladder climbs from low to high.",
        )
        spare = 0 if name == "edges" else 1
        step = 1 if name == "graphs" else multiple
        columns.append(ladder(max(least + spare, 1), max(most + spare, 1), growth=growth, multiple=step))
    count = max(map(len, columns))
    return tuple(GraphShape(*[column[min(i, len(column) - 1)] for column in columns]) for i in range(count))


def pad_graphs(
    graphs: jraph.GraphsTuple | Sequence[jraph.GraphsTuple], rungs: Sequence[GraphShape | tuple[int, int, int]]
) -> jraph.GraphsTuple:
    """Pad a graph, or the batch of several, to the smallest rung that holds it. Runs on the host.

    Padding is one more graph, with the spare nodes and, as self-edges of its first node, the spare edges; then empty
    graphs (as ``jraph.pad_with_graphs``, whose masks and ``jraph.unpad_with_graphs`` apply). So it shares no edge with
    real nodes, and their rows and the gradients of a masked loss stay what they are.

    Args:
      graphs: one ``GraphsTuple`` (which may be a batch), or several to be joined.
      rungs: see ``graph_ladder``; ascending in every size.

    Returns:
      A ``GraphsTuple`` of NumPy arrays with int32 indices.

    Raises:
      ValueError: the graph is too large for the top rung, naming what would do; invalid rungs; or an unsound graph
        (``check_graphs_tuple``).

    Example:
      >>> from effjax.graph.sparse.jraph_graphs import get_fully_connected_graph
      >>> graph = get_fully_connected_graph(3, 1, node_features=np.ones((3, 2)))
      >>> padded = pad_graphs([graph, graph], [GraphShape(8, 32, 4), GraphShape(16, 64, 8)])
      >>> padded.nodes.shape, padded.n_node.tolist()
      ((8, 2), [3, 3, 2, 0])
    """
    rungs = _check_rungs(rungs)
    if isinstance(graphs, jraph.GraphsTuple):
        joined = check_graphs_tuple(graphs)
    else:
        checked = [check_graphs_tuple(graph, argument=f"graphs[{i}]") for i, graph in enumerate(graphs)]
        _check_alike(checked)
        joined = jraph.batch_np(checked)
    return _padded(joined, _fit(graph_shape(joined), rungs))


def padding_masks(graph: jraph.GraphsTuple) -> GraphMasks:
    """What is real in a graph from ``pad_graphs``; traceable.

    Args:
      graph: padded, with node features (their rows tell the number of nodes).

    Returns:
      ``GraphMasks``.

    Raises:
      ValueError: there are no node features.

    Example:
      >>> from effjax.graph.sparse.jraph_graphs import get_fully_connected_graph
      >>> graph = get_fully_connected_graph(2, 1, node_features=np.ones(2), add_self_edges=False)
      >>> [mask.tolist() for mask in padding_masks(pad_graphs(graph, [GraphShape(3, 4, 2)]))]
      [[True, True, False], [True, True, False, False], [True, False]]
    """
    if not jax.tree.leaves(graph.nodes):
        raise ValueError(
            "graph.nodes holds no features, so the number of nodes is unknown. Give nodes=np.zeros((N, 0))."
        )
    # On the device: jraph indexes n_node by a traced number, which NumPy arrays refuse.
    graph = graph._replace(n_node=jnp.asarray(graph.n_node), n_edge=jnp.asarray(graph.n_edge))
    masks = (jraph.get_node_padding_mask, jraph.get_edge_padding_mask, jraph.get_graph_padding_mask)
    return GraphMasks(*(jnp.asarray(mask(graph)) for mask in masks))


class GraphBatches(Cursor[jraph.GraphsTuple]):
    """Batches of many small graphs within fixed budgets of nodes, edges and graphs, resumable.

    Graphs are taken in a random order until the next would burst the top rung; a batch is padded to the smallest rung
    that holds it (with one rung all have one shape). Every graph comes once per epoch. All epochs are planned before
    the run, from sizes and seed alone, so the shapes and the number of steps are known. By index and as a resumable
    iterator (``get_state``, ``set_state``); every process draws the same batches.

    Args:
      graphs: each with the same kinds of features. Labels of graphs travel as ``globals``.
      rungs: shapes of a batch, the last one the budget; one node and one graph of it are spare.
      seed: of the order.
      epochs: passes over the graphs; a number, for all are planned ahead.
      shuffle: a new order every epoch, or the order given.

    Raises:
      ValueError: no graphs, a graph that exceeds the top rung, features that differ in kind, or an unsound graph.

    Example:
      >>> from effjax.graph.sparse.jraph_graphs import get_fully_connected_graph
      >>> graphs = [get_fully_connected_graph(n, 1, node_features=np.ones((n, 2))) for n in (2, 3, 4, 2, 3)]
      >>> data = GraphBatches(graphs, [GraphShape(8, 32, 4)], seed=0, epochs=1)
      >>> len(data), data.shapes, next(data).nodes.shape
      (2, (GraphShape(nodes=8, edges=32, graphs=4),), (8, 2))
    """

    def __init__(
        self,
        graphs: Sequence[jraph.GraphsTuple],
        rungs: Sequence[GraphShape | tuple[int, int, int]],
        *,
        seed: int,
        epochs: int,
        shuffle: bool = True,
    ):
        check_number("seed", seed, low=0, integer=True)
        check_number("epochs", epochs, low=1, integer=True, hint="Every epoch is planned, so None is illegal.")
        self._graphs = [check_graphs_tuple(graph, argument=f"graphs[{i}]") for i, graph in enumerate(graphs)]
        _check_alike(self._graphs)
        self._rungs = _check_rungs(rungs)
        sizes = np.array([graph_shape(graph) for graph in self._graphs])
        for i, size in enumerate(sizes):
            _fit(GraphShape(*size.tolist()), self._rungs, name=f"graphs[{i}]")
        budget = np.array(self._rungs[-1]) - (1, 0, 1)
        self._batches: list[np.ndarray] = []
        for epoch in range(epochs):
            order = np.arange(len(sizes))
            if shuffle:
                order = np.random.default_rng((seed, epoch)).permutation(order)
            self._batches += [order[start:stop] for start, stop in _cuts(sizes[order], budget)]
        totals = [GraphShape(*sizes[rows].sum(0).tolist()) for rows in self._batches]
        self._shapes = [_fit(total, self._rungs) for total in totals]
        self._real = np.sum(totals, axis=0)
        digest = zlib.crc32(np.concatenate(self._batches).data, zlib.crc32(np.ascontiguousarray(sizes).data))
        self._settings = {
            "graphs": len(sizes),
            "seed": seed,
            "epochs": epochs,
            "shuffle": shuffle,
            "rungs": [list(rung) for rung in self._rungs],
            "plan": f"{digest:08x}",
        }

    @property
    def shapes(self) -> tuple[GraphShape, ...]:
        """Every padded shape of the run: one executable each."""
        return tuple(sorted(set(self._shapes)))

    @property
    def fill(self) -> dict[str, float]:
        """Share of the run's padded nodes, edges and graphs that is real."""
        shares = self._real / np.maximum(np.sum(self._shapes, axis=0), 1)
        return dict(zip(GraphShape._fields, shares.tolist(), strict=True))

    def example_batches(self) -> Iterator[jraph.GraphsTuple]:
        """One batch of the run for every shape, to compile all executables before the first step."""
        for shape in self.shapes:
            yield self[self._shapes.index(shape)]

    def __len__(self) -> int:
        return len(self._batches)

    def _item(self, index: int) -> jraph.GraphsTuple:
        return _padded(jraph.batch_np([self._graphs[row] for row in self._batches[index]]), self._shapes[index])


class ShapeGate:
    """A function of a state and inputs, compiled for the declared shapes of inputs and refused for all others.

    ``jax.jit`` compiles a new shape in silence, in the middle of a run. Here the shapes are declared by ``warm_up``
    and nothing compiles after it.

    Args:
      function: traceable, ``(state, *inputs) -> outputs``.
      donate_argnums: arguments whose buffers a call consumes.

    Example:
      >>> from effjax.graph.sparse.jraph_graphs import get_fully_connected_graph
      >>> rungs = [GraphShape(4, 16, 2), GraphShape(8, 64, 2)]
      >>> total = ShapeGate(lambda state, graph: state + graph.nodes.sum())
      >>> graphs = [get_fully_connected_graph(n, 1, node_features=np.ones(n, np.float32)) for n in (3, 4, 5)]
      >>> for rung in rungs:
      ...     total.warm_up(np.float32(0), pad_graphs(graphs[0], [rung]))
      >>> [float(total(np.float32(0), pad_graphs(graph, rungs))) for graph in graphs], total.compiles
      ([3.0, 4.0, 5.0], 2)
      >>> total(np.float32(0), graphs[0])
      Traceback (most recent call last):
      ValueError: No executable for GraphsTuple of 3 nodes, 9 edges, 1 graphs. Declared: ...
    """

    def __init__(self, function: Callable[..., Any], *, donate_argnums: int | Sequence[int] = (0,)):
        self._executables = Executables(function, donate_argnums=donate_argnums)
        self._declared: dict[Any, tuple[jax.stages.Compiled, str]] = {}

    @property
    def compiles(self) -> int:
        """Executables compiled so far."""
        return self._executables.compiles

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling."""
        return self._executables.compile_s

    def warm_up(self, state: PyTree, *inputs: PyTree) -> None:
        """Compile for inputs of these shapes; nothing is run.

        Args:
          state: as in a call.
          *inputs: arrays, or ``jax.ShapeDtypeStruct``.
        """
        self._declared[_signature(inputs)] = self._executables.compile(state, *inputs), _described(inputs)

    def __call__(self, state: PyTree, *inputs: PyTree) -> Any:
        """The function's outputs.

        Raises:
          ValueError: inputs of a shape that no ``warm_up`` declared.
          TypeError: a state of other shapes than the one declared.
        """
        found = self._declared.get(_signature(inputs))
        if found is None:
            listed = "; ".join(text for _, text in self._declared.values()) or "nothing yet"
            raise ValueError(
                f"No executable for {_described(inputs)}. Declared: {listed}. Pad to one of these (pad_graphs), or "
                "declare this shape with warm_up before the run."
            )
        return found[0](state, *inputs)


def _signature(inputs: tuple[PyTree, ...]) -> Any:
    leaves, structure = jax.tree.flatten(inputs)
    return structure, tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def _described(inputs: tuple[PyTree, ...]) -> str:
    parts = []
    for one in inputs:
        if isinstance(one, jraph.GraphsTuple):
            rows = [np.shape(leaf)[0] for leaf in jax.tree.leaves(one.nodes)[:1]]
            edges = 0 if one.senders is None else np.shape(one.senders)[0]
            nodes = f"{rows[0]} nodes" if rows else "no node features"
            parts.append(f"GraphsTuple of {nodes}, {edges} edges, {np.shape(one.n_node)[0]} graphs")
        else:
            parts.append(f"shapes {[np.shape(leaf) for leaf in jax.tree.leaves(one)]}")
    return " and ".join(parts)


def _check_rungs(rungs: Sequence[GraphShape | tuple[int, int, int]]) -> tuple[GraphShape, ...]:
    shapes = tuple(GraphShape(*rung) for rung in rungs)
    if not shapes:
        raise ValueError("rungs=() holds no shape. Give at least one GraphShape.")
    for i, rung in enumerate(shapes):
        for name, size, least in zip(GraphShape._fields, rung, (1, 0, 2), strict=True):
            check_number(f"rungs[{i}].{name}", size, low=least, integer=True, hint="Padding needs a node and a graph.")
    for below, above in itertools.pairwise(shapes):
        if above == below or any(a < b for a, b in zip(above, below, strict=True)):
            raise ValueError(f"rungs hold {below} before {above}. They must climb, and shrink in no size. Sort them.")
    return shapes


def _fit(real: GraphShape, rungs: tuple[GraphShape, ...], *, name: str = "the graph") -> GraphShape:
    """The smallest rung with room for ``real``, a padding node and a padding graph."""
    needed = GraphShape(real.nodes + 1, real.edges, real.graphs + 1)
    for rung in rungs:
        if all(need <= size for need, size in zip(needed, rung, strict=True)):
            return rung
    top = rungs[-1]
    short = [
        f"{key} {need} > {size}" for key, need, size in zip(GraphShape._fields, needed, top, strict=True) if need > size
    ]
    doubled = GraphShape(*[max(need, 2 * size) for need, size in zip(needed, top, strict=True)])
    raise ValueError(
        f"Padding too small: {name} has {real.nodes} nodes, {real.edges} edges and {real.graphs} graphs, and padding "
        f"needs one more node and graph, but the top rung is {top} ({', '.join(short)}). The next rung could "
        f"be {doubled}."
    )


def _padded(graph: jraph.GraphsTuple, rung: GraphShape) -> jraph.GraphsTuple:
    padded = jraph.pad_with_graphs(graph, *rung)
    names = ("senders", "receivers", "n_node", "n_edge")
    return padded._replace(**{name: getattr(padded, name).astype(np.int32) for name in names})  # batching widens them


def _check_alike(graphs: Sequence[jraph.GraphsTuple]) -> None:
    if not graphs:
        raise ValueError("graphs=[] holds no graph. Give at least one.")

    def kind(graph: jraph.GraphsTuple) -> Any:
        leaves, structure = jax.tree.flatten((graph.nodes, graph.edges, graph.globals))
        return structure, [(leaf.shape[1:], leaf.dtype) for leaf in leaves]

    first = kind(graphs[0])
    odd = next((i for i, graph in enumerate(graphs) if kind(graph) != first), None)
    if odd is not None:
        raise ValueError(
            f"graphs[{odd}] has features {kind(graphs[odd])[1]} and graphs[0] {first[1]} (shape of a row, dtype; "
            "nodes, edges, globals). All must be of one kind."
        )


def _cuts(sizes: np.ndarray, budget: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of consecutive graphs, each as long as the budget allows."""
    ends = np.cumsum(sizes, axis=0)
    start = 0
    while start < len(sizes):
        used = ends[start - 1] if start else np.zeros_like(budget)
        stop = min(int(np.searchsorted(ends[:, k], used[k] + budget[k], side="right")) for k in range(len(budget)))
        yield start, stop
        start = stop
