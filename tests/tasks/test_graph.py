import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data.graphs import GraphData
from effjax.graph.sparse import SparseMatrix
from effjax.tasks.graph import draw_labelled, draw_split, masked_accuracy, masked_cross_entropy, node_task


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
    dense = node_task(small(), row_normalize=True)
    np.testing.assert_allclose(dense.features, [[0.25, 0.75], [0, 1], [0, 0]], rtol=1e-6)
    kept = node_task(small(), sparse_below=1.0)
    assert isinstance(kept.features, SparseMatrix)
    np.testing.assert_allclose(kept.features.todense(), dense.features)
    np.testing.assert_array_equal(node_task(small(), row_normalize=False).features, small().features)
    np.testing.assert_array_equal(node_task(small()).features, small().features)  # dense: taken as they are
    with pytest.raises(ValueError, match="row_normalize='yes' is not one of True, False, 'auto'"):
        node_task(small(), row_normalize="yes")
    assert node_task(small(features=None)).features.shape == (3, 3)
    assert isinstance(node_task("cora").features, SparseMatrix)


def test_attacks_replace_the_edges():
    task = node_task(small(), attack="one")
    assert task.name == "small-one"
    assert float(task.adjacency.todense()[0, 2]) > 0
    assert float(task.adjacency.todense()[0, 1]) == 0
    with pytest.raises(ValueError, match="attack='two' is not one of 'one'"):
        node_task(small(), attack="two")


def test_bad_graphs():
    with pytest.raises(ValueError, match="features of 1 nodes, the first 1, are not finite"):
        node_task(small(features=np.array([[1.0], [np.nan], [0]], np.float32)))
    with pytest.raises(ValueError, match="rows holds 3"):
        node_task(small(receivers=np.array([1, 3], np.int32)))
    bare = node_task(small(senders=np.zeros(0, np.int32), receivers=np.zeros(0, np.int32)))
    np.testing.assert_array_equal(bare.adjacency.todense(), np.eye(3))  # no edges: every node sees itself


def test_hidden_labels_change_nothing():
    logits = jax.random.normal(jax.random.key(0), (4, 3))
    mask = jnp.array([True, False, True, False])
    loss = jax.value_and_grad(masked_cross_entropy)
    first = loss(logits, jnp.array([0, 1, 2, 0]), mask)
    second = loss(logits, jnp.array([0, -7, 2, 999]), mask)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    wanted = -np.mean(np.asarray(jax.nn.log_softmax(logits))[[0, 2], [0, 2]])
    np.testing.assert_allclose(first[0], wanted, rtol=1e-6)
    assert float(masked_cross_entropy(logits, jnp.zeros(4, int), jnp.zeros(4, bool))) == 0
    assert float(masked_accuracy(logits, jnp.argmax(logits, 1), mask)) == 1


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
