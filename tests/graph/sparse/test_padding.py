import itertools
import json
import re

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.core.cost import count_compiles
from effjax.data.pipeline import ResumableIterator
from effjax.graph.sparse.padding import (
    GraphBatches,
    GraphShape,
    ShapeGate,
    graph_ladder,
    graph_shape,
    pad_graphs,
    padding_masks,
)


def random_graph(rng, nodes=None, edges=None):
    nodes = int(rng.integers(1, 12)) if nodes is None else nodes
    edges = int(rng.integers(0, 25)) if edges is None else edges
    return jraph.GraphsTuple(
        nodes=rng.normal(size=(nodes, 3)).astype(np.float32),
        edges=rng.normal(size=(edges, 1)).astype(np.float32),
        receivers=rng.integers(0, max(nodes, 1), edges),
        senders=rng.integers(0, max(nodes, 1), edges),
        globals={"label": np.array([nodes])},
        n_node=np.array([nodes]),
        n_edge=np.array([edges]),
    )


def many(count=40, seed=0):
    rng = np.random.default_rng(seed)
    return [random_graph(rng) for _ in range(count)]


RUNGS = graph_ladder(GraphShape(10, 20, 1), GraphShape(60, 150, 12))


def network(params, graph):
    """Two rounds of messages and a mean readout."""
    x = graph.nodes
    for kernel in params["layers"]:
        messages = graph.edges * x[graph.senders]
        x = jnp.tanh(x @ kernel + jax.ops.segment_sum(messages, graph.receivers, len(x)) @ kernel)
    return x


def loss(params, graph):
    nodes, _, graphs = padding_masks(graph)
    x = network(params, graph)
    owner = jnp.repeat(jnp.arange(len(graph.n_node)), graph.n_node, total_repeat_length=len(x))
    each = jax.ops.segment_sum(jnp.where(nodes[:, None], x, 0) @ params["out"], owner, len(graph.n_node))
    return jnp.sum(jnp.where(graphs, each**2, 0)) + jnp.sum(jnp.where(nodes[:, None], x, 0) ** 2)


PARAMS = {
    "layers": [jnp.asarray(np.random.default_rng(i).normal(size=(3, 3)), jnp.float32) for i in range(2)],
    "out": jnp.arange(3.0),
}


LOSS = jax.jit(loss)


def unpadded_loss(params, graph):
    x = network(params, graph)
    owner = np.repeat(np.arange(len(graph.n_node)), graph.n_node)
    return jnp.sum(jax.ops.segment_sum(x @ params["out"], owner, len(graph.n_node)) ** 2) + jnp.sum(x**2)


# Padding


def test_padding_never_changes_real_rows_or_gradients():
    graphs = many(4)
    joined = jraph.batch_np(graphs)
    rows, edges = len(joined.nodes), len(joined.edges)

    def run(value, graph):
        def with_output(params, x, e):
            moved = graph._replace(nodes=x, edges=e)
            return value(params, moved), network(params, moved)

        return jax.jit(jax.grad(with_output, (0, 1, 2), has_aux=True))(PARAMS, graph.nodes, graph.edges)

    grads, out = run(unpadded_loss, joined)
    padded = pad_graphs(graphs, [RUNGS[-1]])
    assert graph_shape(padded) == RUNGS[-1] == (len(padded.nodes), len(padded.senders), len(padded.n_node))
    ours, padded_out = run(loss, padded)
    np.testing.assert_allclose(padded_out[:rows], out, rtol=2e-6, atol=1e-6)
    for a, b in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(grads[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    for a, b, real in ((ours[1], grads[1], rows), (ours[2], grads[2], edges)):
        np.testing.assert_allclose(a[:real], b, rtol=1e-4, atol=1e-5)
        assert len(a) > real
        assert not np.asarray(a[real:]).any()
    assert [int(mask.sum()) for mask in padding_masks(padded)] == list(graph_shape(joined))
    for a, b in zip(jax.tree.leaves(jraph.unpad_with_graphs(padded)), jax.tree.leaves(joined), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {getattr(padded, name).dtype.name for name in ("senders", "receivers", "n_node", "n_edge")} == {"int32"}


@pytest.mark.parametrize(("nodes", "edges"), [(0, 0), (3, 0)])
def test_an_empty_graph(nodes, edges):
    rng = np.random.default_rng(0)
    padded = pad_graphs(random_graph(rng, nodes, edges), RUNGS)
    assert graph_shape(padded) == RUNGS[0]
    masks = padding_masks(padded)
    assert [int(mask.sum()) for mask in masks] == [nodes, edges, 1]
    assert np.isfinite(LOSS(PARAMS, padded))
    between = pad_graphs([random_graph(rng, 2, 1), random_graph(rng, 0, 0), random_graph(rng, 1, 1)], RUNGS)
    assert [int(mask.sum()) for mask in padding_masks(between)] == [3, 2, 3]
    none = jraph.GraphsTuple(np.ones((1, 2)), None, None, None, None, np.array([1]), np.array([0]))
    assert set(pad_graphs([none, none], RUNGS).senders.tolist()) == {2}


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(0, 50), st.integers(0, 200), st.integers(1, 5)),
    st.tuples(st.integers(0, 500), st.integers(0, 900), st.integers(0, 40)),
    st.sampled_from([1.3, 2.0]),
)
def test_a_ladder_climbs_and_holds_its_ends(low, more, growth):
    high = GraphShape(*[a + b for a, b in zip(low, more, strict=True)])
    rungs = graph_ladder(GraphShape(*low), high, growth=growth)
    for below, above in itertools.pairwise(rungs):
        assert above != below
        assert all(a <= b <= max(growth * a + 8, a + 1) for a, b in zip(below, above, strict=True))
    for real, rung in ((low, rungs[0]), (high, rungs[-1])):
        assert rung.nodes > real[0]
        assert rung.edges >= real[1]
        assert rung.graphs > real[2]


def test_too_small_a_padding_names_the_sizes_and_the_next_rung():
    graph = random_graph(np.random.default_rng(0), nodes=8, edges=20)
    words = (
        "the graph has 8 nodes, 20 edges and 1 graphs, and padding needs one more node and graph, but the top rung is "
        "GraphShape(nodes=8, edges=16, graphs=2) (nodes 9 > 8, edges 20 > 16). The next rung could be "
        "GraphShape(nodes=16, edges=32, graphs=4)."
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        pad_graphs(graph, [GraphShape(8, 16, 2)])
    assert graph_shape(pad_graphs(graph, [GraphShape(8, 16, 2), GraphShape(16, 32, 4)])) == (16, 32, 4)


GOOD = random_graph(np.random.default_rng(1), nodes=5, edges=4)


@pytest.mark.parametrize(
    ("graphs", "rungs", "words"),
    [
        (
            [GOOD, GOOD._replace(nodes=GOOD.nodes * np.nan)],
            RUNGS,
            r"graphs\[1\].nodes has NaN or infinity in 5 of 5 rows",
        ),
        ([GOOD, GOOD._replace(senders=GOOD.senders + 5)], RUNGS, r"graphs\[1\].senders\[0\]=.*is outside its graph 0"),
        ([GOOD, GOOD._replace(edges=None)], RUNGS, r"graphs\[1\] has features"),
        ([GOOD, GOOD._replace(nodes=GOOD.nodes[:, :2])], RUNGS, r"graphs\[1\] has features .*\(2,\)"),
        ([], RUNGS, "no graph"),
        (GOOD, [], "holds no shape"),
        (GOOD, [GraphShape(8, 8, 1)], r"rungs\[0\].graphs=1"),
        (GOOD, [GraphShape(16, 8, 2), GraphShape(8, 16, 2)], "must climb"),
        (GOOD, [GraphShape(16, 8, 2)] * 2, "must climb"),
    ],
)
def test_bad_input(graphs, rungs, words):
    with pytest.raises(ValueError, match=words):
        pad_graphs(graphs, rungs)


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"low.edges=9 .*climbs"):
        graph_ladder(GraphShape(1, 9, 1), GraphShape(2, 8, 1))
    with pytest.raises(ValueError, match="number of nodes is unknown"):
        padding_masks(pad_graphs(GOOD, RUNGS)._replace(nodes=None))


# Batches


def test_an_epoch_holds_every_graph_once_within_the_budget():
    graphs = many()
    data = GraphBatches(graphs, RUNGS, seed=0, epochs=2)
    assert isinstance(data, ResumableIterator)
    assert set(data.shapes) <= set(RUNGS)
    seen, filled = [], []
    for batch in data:
        assert graph_shape(batch) in data.shapes
        assert graph_shape(batch) == (len(batch.nodes), len(batch.senders), len(batch.n_node))
        one_by_one = jraph.unbatch_np(jraph.unpad_with_graphs(batch))
        filled.append([int(mask.sum()) for mask in padding_masks(batch)])
        for graph in one_by_one:
            index = next(i for i, one in enumerate(graphs) if np.array_equal(one.nodes, graph.nodes))
            np.testing.assert_array_equal(graph.senders, graphs[index].senders)
            np.testing.assert_array_equal(graph.edges, graphs[index].edges)
            assert graph.globals["label"].tolist() == graphs[index].globals["label"].tolist()
            seen.append(index)
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))
    assert seen[:40] != seen[40:]
    padded = np.sum([graph_shape(data[i]) for i in range(len(data))], 0)
    np.testing.assert_allclose(list(data.fill.values()), np.sum(filled, 0) / padded)
    assert {graph_shape(batch) for batch in data.example_batches()} == set(data.shapes)


def test_batches_in_order_are_those_of_jraph():
    graphs, rung = many(), GraphShape(40, 64, 6)
    ours = list(GraphBatches(graphs, [rung], seed=0, epochs=1, shuffle=False))
    theirs = list(jraph.dynamically_batch(iter(graphs), *rung))
    assert len(ours) == len(theirs) > 5
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_resume_is_exact():
    make = lambda seed=3, graphs=None, **options: GraphBatches(graphs or many(), RUNGS, seed=seed, epochs=2, **options)
    whole = list(make())
    cut = make()
    for _ in range(4):
        next(cut)
    state = json.loads(json.dumps(cut.get_state()))
    other = make()
    other.set_state(state)
    rest = list(other)
    assert len(rest) == len(whole) - 4
    for a, b in zip(jax.tree.leaves(rest), jax.tree.leaves(whole[4:]), strict=True):
        assert a.tobytes() == b.tobytes()
    with pytest.raises(ValueError, match="seed is 3 in the state and 4 here"):
        make(seed=4).set_state(state)
    with pytest.raises(ValueError, match="plan is"):
        make(graphs=many(seed=9)).set_state(state)
    with pytest.raises(ValueError, match="is not a state of GraphBatches"):
        make().set_state({"next": 0})


def test_a_graph_beyond_the_budget_is_named():
    graphs = [*many(3), random_graph(np.random.default_rng(0), nodes=90)]
    with pytest.raises(ValueError, match=r"graphs\[3\] has 90 nodes.*nodes 91 > "):
        GraphBatches(graphs, RUNGS, seed=0, epochs=1)


# The gate


@pytest.mark.promotes
def test_nothing_compiles_after_warm_up_and_an_undeclared_shape_is_refused():
    data = GraphBatches(many(), RUNGS, seed=0, epochs=2)
    gate = ShapeGate(lambda state, graph: {"sum": state["sum"] + (padding_masks(graph).nodes @ graph.nodes)})
    state = {"sum": jnp.zeros(3)}
    for batch in data.example_batches():
        gate.warm_up(state, batch)
    assert gate.compiles == len(data.shapes)
    assert gate.compile_s > 0
    with count_compiles() as log:
        for batch in data:
            state = gate(state, batch)
    assert log.names == []
    assert gate.compiles == len(data.shapes)
    np.testing.assert_allclose(state["sum"], 2 * sum(graph.nodes.sum(0) for graph in many()), rtol=1e-4)
    other = pad_graphs(many(1), [GraphShape(13, 40, 2)])
    with (
        count_compiles() as log,
        pytest.raises(
            ValueError, match=r"No executable for GraphsTuple of 13 nodes, 40 edges, 2 graphs. Declared: Graph"
        ),
    ):
        gate(state, other)
    assert log.names == []
    with pytest.raises(ValueError, match="No executable"):  # another dtype
        gate(state, data[0]._replace(nodes=data[0].nodes.astype(np.float16)))
    gate.warm_up(state, other)
    gate(state, other)


def test_a_gate_takes_abstract_shapes_and_several_inputs():
    gate = ShapeGate(lambda state, x, y: state + x.sum() * y.sum(), donate_argnums=())
    abstract = jax.ShapeDtypeStruct((3,), jnp.float32)
    gate.warm_up(jnp.float32(0), abstract, {"y": abstract}["y"])
    assert float(gate(jnp.float32(1), np.ones(3), np.ones(3, np.float32))) == 10
    with pytest.raises(ValueError, match=re.escape("shapes [(4,)] and shapes [(3,)]")):
        gate(jnp.float32(1), np.ones(4), np.ones(3))
    with pytest.raises(ValueError, match="Declared: nothing yet"):
        ShapeGate(jnp.add)(jnp.float32(1), jnp.float32(1))
