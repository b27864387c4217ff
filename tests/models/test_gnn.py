from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.graph.measures import masked_accuracy, masked_cross_entropy
from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
from effjax.graph.sparse.matrix import sparse_matrix
from effjax.models.gnn import LAYERS, NodeClassifier
from effjax.tasks.graph import draw_split, node_data

RELEASED = np.load(Path(__file__).resolve().parents[1] / "reference" / "fastrain_gnn" / "models_forward_grad.npz")
KEY = jax.random.key(0, impl="rbg")
KEYS = jax.random.split(KEY, 2)
GRAPH = gcn_adjacency([0, 1, 1, 2, 3, 0], [1, 0, 2, 1, 0, 3], 6, capacity=16)
X = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_classifies_and_drops_out(layer):
    model = NodeClassifier(3, hidden=4, heads=2, depth=3, layer=layer)
    shapes = jax.eval_shape(model.init, KEY, X, GRAPH)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    count = 1 if layer == "sgc" else 3
    assert sorted(variables["params"]) == [f"conv_{index}" for index in range(count)]

    @jax.jit
    def run(variables, keys):
        train = lambda key: model.apply(variables, X, GRAPH, train=True, rngs={"dropout": key})
        return model.apply(variables, X, GRAPH), jax.lax.map(train, keys)

    logits, several = run(variables, KEYS)
    assert logits.shape == (6, 3)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    changed = bool(np.abs(np.asarray(several[0]) - np.asarray(several[1])).max() > 0)
    assert changed == (layer != "sgc")  # which has one layer, and keeps its inputs


@pytest.mark.parametrize("layer", ["gcn", "sage", "released-gat"])
def test_one_layer_more_is_a_middle_layer_more(layer):
    shapes = [
        jax.tree.map(jnp.shape, jax.eval_shape(NodeClassifier(3, 8, depth, layer).init, KEY, X, GRAPH))["params"]
        for depth in (2, 3)
    ]
    assert shapes[0]["conv_0"] == shapes[1]["conv_0"]
    assert shapes[0]["conv_1"] == shapes[1]["conv_2"]
    assert shapes[1]["conv_1"]["kernel"] == (8, 8)


def test_gat_has_heads_and_one_in_the_last_layer():
    params = jax.eval_shape(NodeClassifier(3, 8, layer="gat", heads=4).init, KEY, X, GRAPH)["params"]
    assert params["conv_0"]["source"].shape == (4, 2)
    assert params["conv_1"]["source"].shape == (1, 3)


@pytest.mark.parametrize(("name", "layer", "depth"), [("shallowGCN", "gcn", 2), ("deepGCN", "gcn", 3)])
def test_the_released_gcn(name, layer, depth):
    order = ("gc1", "gc2") if depth == 2 else ("gc1", "gc3", "gc2")
    params = {
        f"conv_{index}": {
            "kernel": RELEASED[f"{name}__p__{part}__weight"],
            "bias": RELEASED[f"{name}__p__{part}__bias"],
        }
        for index, part in enumerate(order)
    }
    graph = sparse_matrix(RELEASED["adj_row"], RELEASED["adj_col"], RELEASED["adj_val"], (40, 40))
    model = NodeClassifier(4, 8, depth, layer)
    logits = jax.jit(model.apply)({"params": params}, RELEASED["X"], graph)
    np.testing.assert_allclose(logits, RELEASED[f"{name}__logits"], rtol=1e-5, atol=2e-6)


def test_released_initial_values_are_uniform_in_biases_too():
    model = NodeClassifier(3, hidden=16, initializer="released")
    init = jax.jit(lambda model, x: model.init(KEY, x, GRAPH)["params"]["conv_0"], static_argnums=0)
    params = jax.tree.map(np.asarray, init(model, np.ones((6, 200), np.float32)))
    for leaf in params.values():
        assert np.abs(leaf).max() <= 0.25
        assert np.abs(leaf).max() > 0.2
    assert abs(np.std(params["kernel"]) - 0.25 / np.sqrt(3)) < 0.01
    assert not np.asarray(init(NodeClassifier(3), X)["bias"]).any()


@pytest.mark.parametrize(("layer", "rate"), [("gcn", 0.01), ("gat", 0.005)])
def test_cora_is_learnt(layer, rate):
    task = node_data("cora")
    train, _, test = draw_split(jax.random.key(0), task.labels, task.classes, 20, 30)
    model = NodeClassifier(task.classes, hidden=16, heads=2, layer=layer)
    tx = optax.chain(optax.add_decayed_weights(5e-4), optax.adam(4 * rate))

    @jax.jit
    def fit(key, features, adjacency):
        variables = model.init(KEY, features, adjacency)

        def step(state, key):
            variables, opt_state = state
            logits = lambda v: model.apply(v, features, adjacency, train=True, rngs={"dropout": key})
            loss, grads = jax.value_and_grad(lambda v: masked_cross_entropy(logits(v), task.labels, train))(variables)
            updates, opt_state = tx.update(grads, opt_state, variables)
            return (optax.apply_updates(variables, updates), opt_state), loss

        (variables, _), losses = jax.lax.scan(step, (variables, tx.init(variables)), jax.random.split(key, 40))
        return masked_accuracy(model.apply(variables, features, adjacency), task.labels, test), losses

    accuracy, losses = (
        np.asarray(found) for found in fit(jax.random.key(2, impl="rbg"), task.features, task.adjacency)
    )
    assert losses[-1] < losses[0]
    assert accuracy > 0.74


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "gcnn"}, "Did you mean 'gcn'"),
        ({"hidden": 0}, "hidden=0"),
        ({"depth": 0}, "depth=0"),
        ({"depth": 2, "layer": "gcnii"}, "depth=2"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"input_dropout": -0.1}, "input_dropout=-0.1"),
        ({"hidden": 10, "heads": 4, "layer": "gat"}, "hidden=10 is not a multiple of heads=4"),
        ({"initializer": "he"}, "initializer='he'"),
    ],
)
def test_bad_fields_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NodeClassifier(3, **options).init(KEY, X, GRAPH)
