import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_graph import write_small_cora

from effjax.data.graphs import GraphData
from effjax.graph.measures import masked_accuracy, masked_cross_entropy
from effjax.graph.sparse.matrix import SparseMatrix
from effjax.models.gnn import NodeClassifier
from effjax.tasks.graph import (
    draw_labelled,
    draw_split,
    node_data,
    node_task,
)
from effjax.train.loop import fit
from effjax.train.trainer import supervised


def small(**changes):
    fields = {
        "name": "small",
        "source": "a test",
        "senders": np.array([0, 1], np.int32),
        "receivers": np.array([1, 0], np.int32),
        "features": np.array([[1.0, 3.0], [0, 2], [0, 0]], np.float32),
        "labels": np.array([0, 1, -1], np.int32),
        "classes": 2,
        "attacks": {"one": (np.array([2], np.int32), np.array([0], np.int32))},
    }
    return GraphData(**(fields | changes))


def test_features_are_dense_or_sparse_and_sum_to_one():
    dense = node_data(small(), row_normalize=True)
    np.testing.assert_allclose(dense.features, [[0.25, 0.75], [0, 1], [0, 0]], rtol=1e-6)
    kept = node_data(small(), sparse_below=1.0)
    assert isinstance(kept.features, SparseMatrix)
    np.testing.assert_allclose(kept.features.todense(), dense.features)
    np.testing.assert_array_equal(node_data(small(), row_normalize=False).features, small().features)
    np.testing.assert_array_equal(node_data(small()).features, small().features)  # dense: taken as they are
    with pytest.raises(ValueError, match="row_normalize='yes' is not one of True, False, 'auto'"):
        node_data(small(), row_normalize="yes")
    assert node_data(small(features=None)).features.shape == (3, 3)
    assert isinstance(node_data("cora").features, SparseMatrix)


def test_attacks_replace_the_edges():
    task = node_data(small(), attack="one")
    assert task.name == "small-one"
    dense = np.asarray(task.adjacency.todense())
    assert dense[0, 2] > 0
    assert dense[0, 1] == 0
    with pytest.raises(ValueError, match="attack='two' is not one of 'one'"):
        node_data(small(), attack="two")


def test_bad_graphs():
    with pytest.raises(ValueError, match="features of 1 nodes, the first 1, are not finite"):
        node_data(small(features=np.array([[1.0], [np.nan], [0]], np.float32)))
    with pytest.raises(ValueError, match="rows holds 3"):
        node_data(small(receivers=np.array([1, 3], np.int32)))
    bare = node_data(small(senders=np.zeros(0, np.int32), receivers=np.zeros(0, np.int32)))
    np.testing.assert_array_equal(bare.adjacency.todense(), np.eye(3))  # no edges: every node sees itself


def test_hidden_labels_change_nothing():
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    mask = np.array([True, False, True, False])
    loss = jax.jit(jax.value_and_grad(masked_cross_entropy))
    first = loss(logits, np.array([0, 1, 2, 0]), mask)
    second = loss(logits, np.array([0, -7, 2, 999]), mask)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(first[0], -np.mean(log_p[[0, 2], [0, 2]]), rtol=1e-6)
    assert float(loss(logits, np.zeros(4, int), np.zeros(4, bool))[0]) == 0
    assert float(jax.jit(masked_accuracy)(logits, np.argmax(logits, 1), mask)) == 1


def test_draws_are_balanced_disjoint_and_repeatable():
    labels = jnp.asarray(np.random.default_rng(0).integers(-1, 4, 200))
    drawn = draw_labelled(jax.random.key(3), labels, 4, 5)
    assert np.bincount(np.asarray(labels)[np.asarray(drawn)], minlength=4).tolist() == [5] * 4
    np.testing.assert_array_equal(drawn, jax.jit(draw_labelled, static_argnums=(2, 3))(jax.random.key(3), labels, 4, 5))
    assert (np.asarray(drawn) != np.asarray(draw_labelled(jax.random.key(4), labels, 4, 5))).any()
    train, val, test = (np.asarray(part) for part in draw_split(jax.random.key(3), labels, 4, 5, 7))
    np.testing.assert_array_equal(train, drawn)
    assert np.bincount(np.asarray(labels)[val], minlength=4).tolist() == [7] * 4
    np.testing.assert_array_equal(train.astype(int) + val + test, np.asarray(labels) >= 0)


def test_a_class_with_too_few_nodes_gives_all():
    assert np.asarray(draw_labelled(jax.random.key(0), jnp.array([0, 1, 1, -1]), 3, 2)).tolist() == [True] * 3 + [False]


class Normalised(nn.Module):
    """A linear graph layer after a batch normalisation, which keeps running statistics."""

    @nn.compact
    def __call__(self, features, adjacency, train=False):
        x = features.todense() if isinstance(features, SparseMatrix) else features
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return adjacency @ nn.Dense(7)(x)


def test_a_task_trains_on_the_whole_graph(tmp_path):
    data = node_data(write_small_cora(tmp_path / "small.npz"))
    task = node_task(data, NodeClassifier(classes=7, hidden=8, dropout=0.2), per_class=5)
    train, test = np.asarray(task.train["weight"]), np.asarray(task.test["weight"])
    np.testing.assert_array_equal(train, draw_labelled(jax.random.key(0), data.labels, 7, 5))
    np.testing.assert_array_equal(test, ~train)
    program = supervised(task, optax.adam(1e-2), steps=60)
    state = jax.jit(program.init)(jax.random.key(0))
    before = program.judged(state)
    found = fit(program, 0)
    assert found.steps == 60
    after = program.judged(found.state)
    assert after["accuracy"] > before["accuracy"] + 0.2
    # Only the training nodes' labels are read.
    hidden = node_task(data._replace(labels=jnp.asarray(np.where(train, data.labels, 0))), task.module, train=train)
    blind = fit(supervised(hidden, optax.adam(1e-2), steps=60), 0)
    jax.tree.map(np.testing.assert_array_equal, blind.state.params, found.state.params)
    infer = jax.jit(task.infer)
    logits = infer(program.params(found.state), (np.array([3, 1]), data.features, data.adjacency))
    whole = np.asarray(infer(program.params(found.state), task.example_inputs))
    np.testing.assert_array_equal(logits, whole[[3, 1]])


def test_a_task_keeps_running_statistics(tmp_path):
    data = node_data(write_small_cora(tmp_path / "small.npz"))
    program = supervised(node_task(data, Normalised(), per_class=5), optax.sgd(0.1), steps=2)
    mean = fit(program, 0).state.model["batch_stats"]["BatchNorm_0"]["mean"]
    # Two updates with momentum 0.5 from 0 leave three quarters of the mean.
    np.testing.assert_allclose(mean, 0.75 * np.asarray(data.features.todense()).mean(0), rtol=1e-4, atol=1e-7)


def test_splits_are_given_standard_or_drawn():
    graph = small(labels=np.array([0, 1, 0], np.int32))
    module = NodeClassifier(classes=2, hidden=4)
    masks = lambda task: [np.flatnonzero(task.train["weight"]).tolist(), np.flatnonzero(task.test["weight"]).tolist()]
    assert masks(node_task(graph, module, train=[0, 1])) == [[0, 1], [2]]
    assert masks(node_task(graph, module, train=np.array([True, False, False]), test=[2])) == [[0], [2]]
    assert masks(node_task(graph, module, per_class=1))[1] in ([0], [2])
    own = graph._replace(train=np.array([0]), val=np.array([1]), test=np.array([2]))
    assert masks(node_task(own, module)) == [[0], [2]]
    assert masks(node_task(own._replace(test=None, val=None), module)) == [[0], [1, 2]]
    assert masks(node_task(own, module, train=[2])) == [[2], [0, 1]]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [0], "per_class": 1}, "per_class=1 draws the training nodes"),
        ({"train": [0, 1], "test": [1]}, "train and test share 1 nodes"),
        ({"train": [0, 3]}, r"train holds 3; nodes are 0\.\.2"),
        ({"train": [-1]}, r"train holds -1; nodes are 0\.\.2"),
        ({"train": [0.5]}, r"train is float64\[1\]"),
        ({"train": np.ones(2, bool)}, r"train has shape \[2\]"),
        ({"train": [0, 2]}, "train holds 1 nodes without a label"),
        ({"train": []}, "train"),
        ({"train": [0, 1]}, "test holds no node"),
        ({"per_class": 0}, "per_class=0"),
    ],
)
def test_bad_splits(splits, message):
    with pytest.raises(ValueError, match=message):
        node_task(small(), NodeClassifier(classes=2, hidden=4), **splits)
