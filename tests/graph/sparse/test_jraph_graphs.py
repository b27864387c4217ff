import re

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jraph._src import utils as jraph_utils

from effjax.graph.sparse.adjacency_matrices import adjacency, gcn_adjacency
from effjax.graph.sparse.jraph_graphs import (
    check_graphs_tuple,
    from_graphs_tuple,
    get_fully_connected_graph,
    to_graphs_tuple,
    with_zero_out_padding_outputs,
    zero_out_padding,
)


@pytest.fixture
def shimmed(monkeypatch):
    """Jraph's own functions, made to work in its module only."""

    class Shim:
        tree_map, tree_leaves = staticmethod(jax.tree.map), staticmethod(jax.tree.leaves)

        def __getattr__(self, name):
            return getattr(jax, name)

    monkeypatch.setattr(jraph_utils, "jax", Shim())
    return jraph_utils


def random_graph(rng, nodes=6, edges=9):
    pairs = rng.permutation(nodes * nodes)[:edges] if nodes else np.zeros(0, int)
    return jraph.GraphsTuple(
        nodes={"x": rng.normal(size=(nodes, 3)).astype(np.float32), "id": np.arange(nodes, dtype=np.int32)},
        edges=rng.normal(size=(len(pairs), 2)).astype(np.float32),
        receivers=(pairs // max(nodes, 1)).astype(np.int32),
        senders=(pairs % max(nodes, 1)).astype(np.int32),
        globals=rng.normal(size=(1, 4)).astype(np.float32),
        n_node=np.array([nodes]),
        n_edge=np.array([len(pairs)]),
    )


def random_batch(seed, count=3):
    rng = np.random.default_rng(seed)
    return jraph.batch_np([random_graph(rng, int(rng.integers(0, 7)), int(rng.integers(0, 12))) for _ in range(count)])


def same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
        assert jnp.result_type(a) == jnp.result_type(b)


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10_000), st.booleans())
def test_the_round_trip_keeps_everything_up_to_the_order_of_edges(seed, pad):
    graph = random_batch(seed)
    if pad:
        graph = jraph.pad_with_graphs(graph, int(graph.n_node.sum()) + 3, int(graph.n_edge.sum()) + 4, 5)
    parts = from_graphs_tuple(graph, weights=np.arange(1.0, 1 + len(graph.senders)), padded=pad)
    again = to_graphs_tuple(*parts, padded=pad)
    same(again.nodes, graph.nodes)
    same(again.globals, graph.globals)
    np.testing.assert_array_equal(again.n_node, graph.n_node)
    np.testing.assert_array_equal(again.n_edge, graph.n_edge)
    real = int(parts.matrix.pattern.size)
    order = np.lexsort((graph.senders[:real], graph.receivers[:real]))
    np.testing.assert_array_equal(again.senders[:real], graph.senders[order])
    np.testing.assert_array_equal(again.receivers[:real], graph.receivers[order])
    np.testing.assert_array_equal(again.edges[:real], graph.edges[order])
    np.testing.assert_array_equal(parts.matrix.values[:real], np.arange(1.0, 1 + real)[order])
    if pad:
        assert real == len(graph.senders) - 4
        np.testing.assert_array_equal(parts.matrix.values[real:], np.zeros(4))
        assert set(np.asarray(again.senders[real:]).tolist()) == {len(graph.nodes["id"]) - 1}
    else:
        assert real == len(graph.senders)
    # and once more, now that it is sorted, nothing moves
    twice = to_graphs_tuple(*from_graphs_tuple(again, padded=pad), padded=pad)
    same(twice, again)


def test_a_sparse_product_is_a_graph_network_that_sums_messages():
    graph = random_batch(3)
    net = jraph.GraphNetwork(
        update_edge_fn=lambda edges, sent, received, globals: sent,
        update_node_fn=lambda nodes, sent, received, globals: received,
    )
    x = graph.nodes["x"]
    theirs = net(graph._replace(nodes=x, globals=None, edges=jnp.zeros((len(graph.senders), 1)))).nodes
    np.testing.assert_allclose(from_graphs_tuple(graph).matrix @ x, theirs, atol=1e-5)


def test_values_travel_as_edges_and_padding_of_the_matrix_stays_behind():
    matrix = gcn_adjacency([0, 1, 2], [1, 2, 0], 3, capacity=10)
    graph = to_graphs_tuple(matrix, edges=matrix.values)
    assert graph.n_edge.tolist() == [6]
    again = from_graphs_tuple(graph, weights=graph.edges)
    np.testing.assert_array_equal(again.matrix.todense(), matrix.todense())


def test_a_graph_without_edges_and_one_without_nodes():
    bare = jraph.GraphsTuple(np.ones((2, 1)), None, None, None, None, np.array([2]), np.array([0]))
    parts = from_graphs_tuple(bare)
    assert parts.matrix.nnz == 0
    assert (parts.matrix @ jnp.ones((2, 3))).tolist() == [[0, 0, 0]] * 2
    assert to_graphs_tuple(*parts).senders.shape == (0,)
    none = jraph.GraphsTuple(np.ones((0, 1)), None, None, None, None, np.array([0]), np.array([0]))
    assert from_graphs_tuple(none).matrix.shape == (0, 0)


# Against jraph


@pytest.mark.promotes  # as jraph's own code does
@pytest.mark.parametrize("seed", range(2))
def test_zero_out_padding_is_jraphs(seed, shimmed):
    graph = random_batch(seed)
    padded = jraph.pad_with_graphs(graph, int(graph.n_node.sum()) + 2, int(graph.n_edge.sum()) + seed, 6)
    dirty = padded._replace(
        nodes=jax.tree.map(lambda leaf: leaf + 3, padded.nodes), edges=padded.edges + 1, globals=padded.globals + 2
    )
    same(zero_out_padding(dirty), shimmed.zero_out_padding(dirty))
    same(jax.jit(zero_out_padding)(dirty), shimmed.zero_out_padding(dirty))
    net = lambda graph: graph._replace(nodes=graph.nodes["x"] * 2)
    same(with_zero_out_padding_outputs(net)(dirty), shimmed.with_zero_out_padding_outputs(net)(dirty))


def test_zero_out_padding_removes_nan_and_leaves_absent_features():
    graph = jraph.pad_with_graphs(get_fully_connected_graph(2, 1, node_features=jnp.ones((2, 1))), 4, 8)
    nan = graph._replace(nodes=jnp.array([[1.0], [2.0], [jnp.nan], [jnp.inf]]))
    assert zero_out_padding(nan).nodes.tolist() == [[1], [2], [0], [0]]
    grad = jax.grad(lambda x: zero_out_padding(graph._replace(nodes=x)).nodes.sum())(nan.nodes)
    assert grad.tolist() == [[1], [1], [0], [0]]
    bare = graph._replace(nodes=None, globals=jnp.ones(2))
    assert zero_out_padding(bare).nodes is None
    assert zero_out_padding(bare).globals.tolist() == [1, 0]


@pytest.mark.parametrize("self_edges", [True, False])
@pytest.mark.parametrize(("nodes", "graphs"), [(1, 1), (4, 1), (3, 3)])
def test_fully_connected_graphs_are_jraphs(nodes, graphs, self_edges, shimmed):
    features = {"x": jnp.arange(2.0 * nodes * graphs).reshape(-1, 2)}
    arguments = (nodes, graphs, features, jnp.ones((graphs, 3)), self_edges)
    same(get_fully_connected_graph(*arguments), shimmed.get_fully_connected_graph(*arguments))
    same(
        get_fully_connected_graph(nodes, graphs, None, None, self_edges),
        jraph.get_fully_connected_graph(nodes, graphs, None, None, self_edges),
    )
    traced = jax.jit(lambda features: get_fully_connected_graph(nodes, graphs, features))(features)
    same(traced, get_fully_connected_graph(nodes, graphs, features))


def test_jraph_itself_is_left_as_it_was():
    assert jraph_utils.jax is jax
    assert not hasattr(jax, "tree_leaves")
    with pytest.raises(AttributeError):
        jraph.get_fully_connected_graph(2, 1, jnp.ones((2, 1)))


# Bad input


GRAPH = random_graph(np.random.default_rng(0))
BATCH = jraph.batch_np([GRAPH, GRAPH])


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (
            GRAPH._replace(senders=GRAPH.senders + 6),
            r"graph.senders\[0\]=.* is outside its graph 0, whose 6 nodes are 0..5",
        ),
        (GRAPH._replace(receivers=GRAPH.receivers - 9), "9 of 9 edges leave theirs"),
        (BATCH._replace(senders=np.r_[GRAPH.senders, GRAPH.senders]), r"graph.senders\[9\]=.*nodes are 6..11"),
        (GRAPH._replace(senders=GRAPH.senders[1:]), r"graph.senders has shape \(8,\), but 9 rows"),
        (GRAPH._replace(n_node=np.array([7])), r"graph.nodes\['id'\] has shape \(6,\), but 7 rows"),
        (GRAPH._replace(globals=np.ones((2, 1))), "graph.globals has shape"),
        (GRAPH._replace(n_edge=np.array([4, 5])), "counts 1 graphs and n_edge 2"),
        (GRAPH._replace(n_edge=np.array([-1])), "below 0"),
        (GRAPH._replace(senders=GRAPH.senders.astype(float)), "one axis of integers"),
        (
            GRAPH._replace(nodes=np.where(np.arange(6)[:, None] % 2, np.nan, np.ones((6, 2)))),
            "graph.nodes has NaN or infinity in 3 of 6 rows, the first at 1",
        ),
        (GRAPH._replace(edges=np.full((9, 1), np.inf)), "graph.edges has NaN or infinity in 9 of 9 rows"),
        (GRAPH._replace(senders=np.zeros(9, int), receivers=np.zeros(9, int)), "entries stand twice"),
    ],
)
def test_unsound_graphs(graph, words):
    with pytest.raises(ValueError, match=words):
        from_graphs_tuple(graph)


def test_other_bad_input():
    with pytest.raises(TypeError, match=r"graph is a dict; a jraph.GraphsTuple"):
        check_graphs_tuple({})
    with pytest.raises(ValueError, match=r"weights has shape \(3,\), but the graph has 9 edges"):
        from_graphs_tuple(GRAPH, weights=np.ones(3))
    ring = adjacency([0, 1, 2], [1, 2, 0], 3)
    with pytest.raises(ValueError, match=re.escape("n_node=[2, 2] sums to 4, but the matrix has 3 nodes")):
        to_graphs_tuple(ring, n_node=[2, 2])
    with pytest.raises(ValueError, match="outside its graph"):
        to_graphs_tuple(ring, n_node=[2, 1])
    with pytest.raises(ValueError, match=r"edges has shape \(2,\), but 3 rows"):
        to_graphs_tuple(ring, edges=np.ones(2))
    with pytest.raises(ValueError, match="node_features has shape"):
        get_fully_connected_graph(2, 1, np.ones(3))
    with pytest.raises(ValueError, match="global_features has shape"):
        get_fully_connected_graph(2, 2, None, np.ones(3))
    with pytest.raises(ValueError, match="n_graph=0"):
        get_fully_connected_graph(2, 0)
