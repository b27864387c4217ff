"""Error nodes: parity in float64, invariances, the learned detector against known facts, and that no label leaks."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.graph.error_nodes import (
    Detector,
    active_nodes,
    error_auc,
    error_scores,
    feature_view,
    fit_detector,
    held_out_correctness,
    label_view,
    learned_correctness,
    neighbour_agreement,
    spread_errors,
)
from effjax.graph.problems import GeeniProblem
from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
from effjax.graph.sparse.matrix import sparse_matrix

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "geeni"
NODES, CLASSES, FOLDS = 120, 3, 4


@functools.cache
def world():
    """Classes that show in edges and features, and members that all take class 2 for class 1."""
    rng = np.random.default_rng(0)
    labels = np.arange(NODES) % CLASSES
    joined = rng.random((NODES, NODES)) < np.where(labels[:, None] == labels, 0.15, 0.01)
    rows, columns = np.nonzero(np.triu(joined, 1) | np.triu(joined, 1).T)
    features = np.eye(CLASSES)[labels] + 0.3 * rng.random((NODES, CLASSES))
    said = np.where(labels == 2, 1, labels)
    logits = 2.0 * np.eye(CLASSES)[said] + rng.normal(0, 0.3, (4, NODES, CLASSES))
    split = rng.permutation(NODES)
    train, checked = np.zeros(NODES, bool), np.zeros(NODES, bool)
    train[split[:15]], checked[split[15:60]] = True, True
    folds = rng.integers(0, FOLDS, NODES)
    return {
        "scores": scored(softmax(logits)),
        "features": jax.device_put(features.astype(np.float32)),
        "matrix": gcn_adjacency(columns, rows, NODES),
        "labels": jax.device_put(labels.astype(np.int32)),
        "train": jax.device_put(train),
        "checked": jax.device_put(checked),
        "folds": jax.device_put(folds.astype(np.int32)),
    }


def taken(data):
    """The arguments of a detector."""
    parts = (data[name] for name in ("features", "matrix", "labels", "train", "checked"))
    return data["scores"], GeeniProblem(*parts, CLASSES), data["folds"]


scored = jax.jit(error_scores)


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return (powers / powers.sum(-1, keepdims=True)).astype(np.float32)


learned = jax.jit(lambda data: learned_correctness(*taken(data), fold_count=FOLDS))
held_out = jax.jit(lambda data: held_out_correctness(*taken(data), fold_count=FOLDS))


def test_parity_with_the_reference():
    core, detector = np.load(REFERENCE / "geeni_core.npz"), np.load(REFERENCE / "detector.npz")
    with jax.enable_x64(True):
        scores = error_scores(jnp.asarray(core["member_probs"]))
        names = {"probabilities": "ensemble_probs", "label": "ensemble_label"}
        for name in scores._fields:
            expected = core[names.get(name, name)]
            np.testing.assert_allclose(getattr(scores, name), expected, rtol=0, atol=1e-14)
        rows, columns = np.nonzero(core["S"])
        matrix = sparse_matrix(rows, columns, core["S"][rows, columns], core["S"].shape)
        agreement = neighbour_agreement(matrix, scores.label)
        np.testing.assert_allclose(agreement, core["neighbour_agreement"], rtol=0, atol=1e-15)
        errors = ~active_nodes(scores.score, float(core["isolate_fraction"]), jnp.asarray(core["known_mask"]))
        np.testing.assert_array_equal(errors, core["error_mask"])
        test, wrong = jnp.asarray(detector["test_mask"]), jnp.asarray(detector["wrong"])
        auc = error_auc(scores.score, wrong, test)
        assert float(auc) == pytest.approx(float(detector["auc_low_score_means_error"]), abs=1e-12)
        precision = np.mean(detector["wrong"][np.asarray(errors & test)])
        recall = np.sum(np.asarray(errors & test & wrong)) / np.sum(np.asarray(test & wrong))
        assert (precision, recall) == pytest.approx((float(detector["precision"]), float(detector["recall"])))


def test_identical_members_agree_and_scores_are_bounded():
    one = softmax(np.random.default_rng(0).normal(size=(1, 50, 4)))
    scores = jax.tree.map(np.asarray, scored(np.repeat(one, 5, axis=0)))
    assert (scores.vote_share == 1).all()
    np.testing.assert_allclose(scores.mutual_information, 0, atol=1e-6)
    several = softmax(np.random.default_rng(1).normal(size=(5, 50, 4)))
    scores = jax.tree.map(np.asarray, scored(several))
    assert (scores.score > -1).all()
    assert (scores.score <= 1).all()
    assert (scores.mutual_information >= -1e-6).all()
    certain = scored(np.eye(3, dtype=np.float32)[None])
    assert certain.entropy.tolist() == [0, 0, 0]  # and not NaN


def test_the_order_of_members_does_not_matter_and_nodes_may_be_renumbered():
    p = softmax(np.random.default_rng(1).normal(size=(5, 50, 4)))
    scores, shuffled = scored(p), scored(p[[3, 0, 4, 1, 2]])
    for left, right in zip(scores, shuffled, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)
    data, order = world(), np.random.default_rng(2).permutation(NODES)
    rows, columns = (np.asarray(part) for part in (data["matrix"].pattern.rows, data["matrix"].pattern.columns))
    place = np.argsort(order)
    off = rows != columns
    moved = {
        "scores": jax.tree.map(lambda leaf: np.asarray(leaf)[order], data["scores"]),
        "matrix": gcn_adjacency(place[columns[off]], place[rows[off]], NODES),
        **{name: np.asarray(data[name])[order] for name in ("features", "labels", "train", "checked", "folds")},
    }
    np.testing.assert_allclose(learned(moved), np.asarray(learned(data))[order], atol=1e-4)


def test_active_nodes():
    correctness = jax.device_put(np.array([0.3, 0.1, 0.1, 0.9, 0.2], np.float32))
    known = jax.device_put(np.array([False, True, False, False, False]))
    assert active_nodes(correctness, 0.6, known).tolist() == [True, True, False, True, False]
    assert active_nodes(correctness, 0.0, known).all()
    assert active_nodes(correctness, 1.0, known).tolist() == known.tolist()
    assert jax.jit(active_nodes)(correctness, 0.6, known).tolist() == [True, True, False, True, False]


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    scores, wrong, mask = rng.integers(0, 5, 60), rng.random(60) < 0.3, rng.random(60) < 0.7
    bad, right = scores[wrong & mask], scores[~wrong & mask]
    expected = np.mean((bad[:, None] < right) + 0.5 * (bad[:, None] == right))
    found = jax.jit(error_auc)(jnp.asarray(scores, jnp.float32), jnp.asarray(wrong), jnp.asarray(mask))
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_fit_detector_is_at_the_optimum():
    rng = np.random.default_rng(0)
    inputs, mask = rng.normal(size=(80, 3)).astype(np.float32), rng.random(80) < 0.8
    right = rng.random(80) < 1 / (1 + np.exp(inputs[:, 1] - inputs[:, 0]))
    fit = jax.jit(fit_detector, static_argnames="ridge")
    detector = fit(inputs, right, mask, ridge=2.0)

    def objective(weights, bias):
        z = (inputs - detector.mean) / detector.scale @ weights + bias
        losses = jnp.logaddexp(0, jnp.where(right, -z, z))
        return jnp.sum(jnp.where(mask, losses, 0)) + 1.0 * jnp.sum(weights**2) + 0.5e-2 * bias**2

    for slope in jax.jit(jax.grad(objective, argnums=(0, 1)))(detector.weights, detector.bias):
        np.testing.assert_allclose(slope, 0, atol=1e-3)
    other = fit(inputs, right ^ ~mask, mask, ridge=2.0)  # outside the mask nothing is read
    np.testing.assert_array_equal(other.weights, detector.weights)
    always = jax.jit(Detector.__call__)(fit(inputs, np.ones(80, bool), mask), inputs)
    assert (np.asarray(always) > 0.9).all()  # one class only: still finite


def test_views_see_only_known_labels_and_their_own_side():
    data = world()
    known = data["train"]
    hidden, labels = np.where(known, data["labels"], np.int32(7)), np.asarray(data["labels"])
    by_edges, by_features = (jax.jit(view, static_argnums=3) for view in (label_view, feature_view))
    edges = np.asarray(by_edges(data["matrix"], labels, known, CLASSES))
    np.testing.assert_array_equal(edges, by_edges(data["matrix"], hidden, known, CLASSES))
    features = np.asarray(by_features(data["features"], labels, known, CLASSES))
    np.testing.assert_array_equal(features, by_features(data["features"], hidden, known, CLASSES))
    assert (features.argmax(1) == labels).mean() > 0.95
    assert (edges.argmax(1) == labels).mean() > 0.8
    rows, columns = np.nonzero(np.asarray(data["features"]))
    values = np.asarray(data["features"])[rows, columns]
    sparse = sparse_matrix(rows, columns, values, data["features"].shape)
    np.testing.assert_allclose(by_features(sparse, labels, known, CLASSES), features, atol=1e-6)


def test_the_detector_finds_the_errors_that_all_members_share():
    data = world()
    wrong = np.asarray(data["scores"].label) != np.asarray(data["labels"])
    test = ~(np.asarray(data["train"]) | np.asarray(data["checked"]))
    auc = jax.jit(error_auc)
    alone = float(auc(data["scores"].score, wrong, test))
    found = float(auc(learned(data), wrong, test))
    assert alone < 0.7
    assert found > 0.95
    near = float(auc(jax.jit(spread_errors)(data["matrix"], wrong, data["checked"]), wrong, test))
    assert near > 0.8


def test_no_label_leaks():
    data = world()
    train, checked, folds, labels = (np.asarray(data[name]) for name in ("train", "checked", "folds", "labels"))
    hidden = data | {"labels": np.where(train | checked, labels, np.int32(-1))}
    np.testing.assert_array_equal(learned(hidden), learned(data))
    np.testing.assert_array_equal(held_out(hidden), held_out(data))
    first = np.asarray(held_out(data))
    for fold in range(FOLDS):  # what judges a fold does not depend on its labels
        mine = checked & (folds == fold)
        other = np.asarray(held_out(data | {"labels": np.where(mine, (labels + 1) % CLASSES, labels)}))
        np.testing.assert_array_equal(other[fold], first[fold])
        assert (other[(fold + 1) % FOLDS] != first[(fold + 1) % FOLDS]).any()


def test_bad_input():
    data = world()
    with pytest.raises(ValueError, match=r"fold_count=1 must be an integer in \[2"):
        learned_correctness(*taken(data), fold_count=1)
    with pytest.raises(ValueError, match=r"fold_count=2 must be an integer in \[3"):
        held_out_correctness(*taken(data), fold_count=2)
    with pytest.raises(ValueError, match=r"ridge=0 must be a number in \(0, inf\)"):
        fit_detector(data["features"], data["train"], data["checked"], ridge=0)
    with pytest.raises(ValueError, match=r"fraction=2 must be a number in \[0, 1\]"):
        active_nodes(jnp.ones(3), 2, jnp.zeros(3, bool))
