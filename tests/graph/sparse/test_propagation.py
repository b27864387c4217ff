from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.cost import count_compiles
from effjax.graph.sparse.adjacency_matrices import adjacency, gcn_normalize
from effjax.graph.sparse.propagation import correct, correct_and_smooth, label_propagation, smooth

VECTORS = np.load(Path(__file__).parents[2] / "reference" / "fastrain_gnn" / "pyg_layers.npz")
LABELS, MASK, BASE = VECTORS["y"], VECTORS["train_mask"], VECTORS["cs_base_soft"]
NODES, CLASSES = BASE.shape
GRAPH = gcn_normalize(adjacency(*VECTORS["edge_index"], NODES))
near = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


def test_label_propagation_equals_pyg():
    near(label_propagation(GRAPH, LABELS, MASK, CLASSES, steps=20), VECTORS["label_propagation_L20_a0.9"])


@pytest.mark.parametrize(("autoscale", "scale"), [(1, None), (0, 1.5)])
def test_correct_and_smooth_equals_pyg(autoscale, scale):
    corrected = correct(GRAPH, BASE, LABELS, MASK, steps=10, alpha=0.8, scale=scale)
    near(corrected, VECTORS[f"cs_correct_autoscale{autoscale}"])
    near(smooth(GRAPH, corrected, LABELS, MASK, steps=10, alpha=0.7), VECTORS[f"cs_smooth_autoscale{autoscale}"])
    options = {"correct_steps": 10, "smooth_steps": 10, "smooth_alpha": 0.7, "scale": scale}
    whole = correct_and_smooth(GRAPH, BASE, LABELS, MASK, **options)
    near(whole, VECTORS[f"cs_smooth_autoscale{autoscale}"])


def outputs(labels):
    return (
        label_propagation(GRAPH, labels, MASK, CLASSES),
        correct(GRAPH, BASE, labels, MASK),
        correct(GRAPH, BASE, labels, MASK, scale=2.0),
        smooth(GRAPH, BASE, labels, MASK),
        correct_and_smooth(GRAPH, BASE, labels, MASK),
    )


def test_hidden_labels_cannot_leak():
    for run in (outputs, jax.jit(outputs)):
        right = run(LABELS)
        for hidden in (0, -1, CLASSES, 2**31 - 1, -(2**31)):
            changed = np.where(MASK, LABELS, hidden).astype(np.int32)
            assert (changed != LABELS).any()
            for ours, theirs in zip(run(changed), right, strict=True):
                assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_known_labels_count():
    changed = LABELS.copy()
    changed[np.flatnonzero(MASK)[0]] = (changed[np.flatnonzero(MASK)[0]] + 1) % CLASSES
    for ours, theirs in zip(outputs(changed), outputs(LABELS), strict=True):
        assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() > 0.01


def test_a_label_travels_one_edge_a_step_and_never_to_an_isolated_node():
    chain = gcn_normalize(adjacency([0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2], 5))
    labels, mask = np.zeros(5, np.int32), np.arange(5) == 0
    for steps in (0, 1, 3):
        reached = np.asarray(label_propagation(chain, labels, mask, 2, steps=steps))[:, 0] > 0
        assert reached.tolist() == [i <= steps and i < 4 for i in range(5)]


def test_a_graph_without_edges_and_a_perfect_base():
    empty = gcn_normalize(adjacency([], [], 3))
    labels, mask = np.array([1, 0, 0]), np.array([True, False, False])
    scores = label_propagation(empty, labels, mask, 2, steps=5, alpha=0.9)
    np.testing.assert_allclose(scores, [[0, 0.1], [0, 0], [0, 0]], atol=1e-6)
    perfect = np.eye(CLASSES, dtype=np.float32)[LABELS]
    for scale in (None, 2.0):
        np.testing.assert_array_equal(correct(GRAPH, perfect, LABELS, MASK, scale=scale), perfect)
    far = correct(empty, np.full((3, 2), 0.5), labels, mask, steps=3)
    np.testing.assert_allclose(far, [[0, 1], [0.5, 0.5], [0.5, 0.5]], atol=1e-6)


def test_gradients_reach_the_base_and_the_edges_and_are_finite():
    def loss(values, base):
        graph = GRAPH._replace(values=values)
        return jnp.sum(correct_and_smooth(graph, base, LABELS, MASK, correct_steps=3, smooth_steps=3) ** 2)

    for grad in jax.jit(jax.grad(loss, (0, 1)))(GRAPH.values, jnp.asarray(BASE)):
        assert np.isfinite(grad).all()
        assert np.abs(grad).max() > 0


def test_one_program_for_other_labels_and_graphs():
    run = jax.jit(lambda graph, labels: label_propagation(graph, labels, MASK, CLASSES))
    run(GRAPH, LABELS)
    with count_compiles() as log:
        run(GRAPH, (LABELS + 1) % CLASSES)
    assert log.count == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": np.where(MASK, 7, 0)}, r"labels\[.*\]=7 at a node of mask.*outside \[0, 2\]"),
        ({"labels": LABELS[:-1]}, "one integer for each of 20 nodes"),
        ({"labels": LABELS.astype(np.float32)}, "one integer"),
        ({"mask": np.flatnonzero(MASK)}, "np.isin"),
        ({"mask": np.zeros(NODES, bool)}, "no label to spread"),
        ({"steps": -1}, "steps=-1"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"classes": 1}, "classes=1"),
        ({"matrix": gcn_normalize(adjacency([0], [1], 3))}, "labels is"),
    ],
)
def test_bad_input(change, words):
    arguments = {"matrix": GRAPH, "labels": LABELS, "mask": MASK, "classes": CLASSES} | change
    with pytest.raises(ValueError, match=words):
        label_propagation(**arguments)


def test_bad_scores():
    with pytest.raises(ValueError, match=r"probabilities has shape \(20,\)"):
        correct(GRAPH, BASE[:, 0], LABELS, MASK)
    with pytest.raises(ValueError, match="scale=0"):
        correct(GRAPH, BASE, LABELS, MASK, scale=0.0)
    with pytest.raises(ValueError, match="scores has shape"):
        smooth(GRAPH, BASE[1:], LABELS, MASK)
