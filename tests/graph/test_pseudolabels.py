"""Self-training: the plain loop, the rivals' selections and the guards."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.graph.pseudolabels import (
    cluster_labels,
    guard_pseudolabels,
    most_confident,
    pseudolabel_weights,
    self_training,
)
from effjax.graph.stages import select_pseudolabels

KEY = jax.random.key(0)


def random_probabilities(nodes=50, classes=3, seed=0):
    powers = np.exp(3 * np.random.default_rng(seed).normal(size=(nodes, classes)))
    return jax.device_put((powers / powers.sum(1, keepdims=True)).astype(np.float32))


NODES = np.arange(50, dtype=np.int32)
LABELS, MASK = jax.device_put((NODES % 3, NODES < 6))


def test_labels_grow_and_never_change():
    labels, mask = LABELS, MASK
    seen = []

    def train(labels, mask, stage):
        seen.append((np.asarray(labels), np.asarray(mask)))
        return stage

    found = self_training(train, lambda stage: random_probabilities(seed=stage), labels, mask, stages=4)
    assert len(seen) == 4
    for (before, inside), (after, later) in itertools.pairwise(seen):
        assert inside.sum() < later.sum()
        assert (later | ~inside).all()
        np.testing.assert_array_equal(before[inside], after[inside])
    np.testing.assert_array_equal(found.mask, seen[-1][1])
    added = np.asarray(found.added)
    np.testing.assert_array_equal(added >= 0, found.mask)
    np.testing.assert_array_equal(added == 0, mask)
    np.testing.assert_array_equal(np.asarray(found.labels)[:6], NODES[:6] % 3)


def test_hidden_labels_do_not_matter():
    train = lambda labels, mask, stage: np.where(mask, labels, 0).sum()
    predict = lambda params: random_probabilities(seed=int(params) % 7)
    hidden = jax.device_put(np.where(MASK, NODES % 3, np.int32(-99)))
    runs = (self_training(train, predict, labels, MASK, stages=3) for labels in (LABELS, hidden))
    one, other = (jax.tree.map(np.asarray, run) for run in runs)
    np.testing.assert_array_equal(one.mask, other.mask)
    np.testing.assert_array_equal(one.labels[one.mask], other.labels[other.mask])


def test_another_selection():
    labels, mask = jnp.zeros(50, int), MASK
    select = lambda confidence, predictions, mask: most_confident(~mask, confidence, predictions, 3, 2)
    found = self_training(lambda *_: 0, lambda _: random_probabilities(), labels, mask, stages=3, select=select)
    for stage in (1, 2):
        chosen = np.asarray(found.labels)[np.asarray(found.added) == stage]
        np.testing.assert_array_equal(np.bincount(chosen, minlength=3), [2, 2, 2])


def test_without_a_label_it_is_refused():
    with pytest.raises(ValueError, match="labelled nodes=0"):
        self_training(lambda *_: 0, lambda _: random_probabilities(), jnp.zeros(50, int), jnp.zeros(50, bool))


@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_the_most_confident_of_each_class(count):
    rng = np.random.default_rng(1)
    candidates, confidence = rng.random(80) < 0.5, rng.random(80).astype(np.float32)
    predictions = rng.integers(0, 4, 80)
    found = np.asarray(most_confident(*jax.device_put((candidates, confidence, predictions)), 4, count))
    for label in range(4):
        group = np.flatnonzero(candidates & (predictions == label))
        best = group[np.argsort(-confidence[group], kind="stable")[:count]]
        np.testing.assert_array_equal(np.flatnonzero(found & (predictions == label)), np.sort(best))


def test_ties_go_to_the_first_node_and_counts_may_be_traced():
    choose = jax.jit(lambda count: most_confident(jnp.ones(4, bool), jnp.ones(4), jnp.zeros(4, int), 1, count))
    assert choose(1).tolist() == [True, False, False, False]
    assert choose(3).tolist() == [True, True, True, False]


def test_clusters_take_the_class_of_the_nearest_labelled_mean():
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [8, 0], [0, 8]])
    truth = rng.integers(0, 3, 120)
    points = jax.device_put((centres[truth] + rng.normal(size=(120, 2))).astype(np.float32))
    mask = np.zeros(120, bool)
    mask[[np.flatnonzero(truth == label)[0] for label in range(3)]] = True
    hidden = np.where(mask, truth, -1).astype(np.int32)
    by_clusters = jax.jit(functools.partial(cluster_labels, classes=3, clusters=12))
    found = by_clusters(KEY, points, hidden, mask)
    assert (np.asarray(found) == truth).mean() > 0.95
    # Without the labels of a class nothing is of that class.
    few = mask & (truth != 2)
    assert set(np.asarray(by_clusters(KEY, points, hidden, few))) == {0, 1}


def test_weights_of_pseudolabels():
    confidence, predictions = jnp.array([0.9, 0.8]), jnp.array([1, 0])
    samples = jnp.array([[1, 0], [1, 1], [1, 1], [1, 0]])
    np.testing.assert_allclose(pseudolabel_weights(confidence, predictions, samples), [0.9, 0.4], rtol=1e-6)
    np.testing.assert_array_equal(pseudolabel_weights(confidence, predictions), confidence)


def test_the_guard_lets_all_or_nothing_through():
    sampled = jnp.array([[0, 1, 0, 1], [0, 1, 1, 0]])  # of the first three nodes, two agree
    candidates = jnp.array([True, True, True, False])
    confidence = jnp.where(candidates, 0.9, 0.1)
    new = select_pseudolabels(confidence, jnp.zeros(4, bool), 0.5, sampled)
    assert new.tolist() == [True, True, False, False]
    given = jnp.array([False, False, False, True])
    guard = lambda agreement: guard_pseudolabels(
        new, candidates, confidence, sampled[0], given, classes=2, sampled=sampled, agreement=agreement, growth=9.0
    )
    assert guard(0.6).tolist() == new.tolist()
    assert not guard(0.7).any()


def test_the_guard_lets_labels_grow_slowly():
    rng = np.random.default_rng(0)
    mask = np.arange(60) < 4  # two labels of each class
    confidence, predictions = rng.random(60).astype(np.float32), rng.integers(0, 2, 60).astype(np.int32)
    samples = np.stack([predictions] * 3)
    new = ~mask & (confidence > 0.3)
    guard = functools.partial(jax.jit(guard_pseudolabels, static_argnames=("classes", "growth")), classes=2)
    for growth, most in ((0, 0), (1.5, 3), (5, 10), (100, 60)):
        found = np.asarray(guard(new, new, confidence, predictions, mask, sampled=samples, growth=growth))
        assert not (found & ~new).any()
        for each in range(2):
            own = new & (predictions == each)
            chosen = confidence[found & own]
            expected = np.sort(confidence[own])[::-1][:most]
            np.testing.assert_array_equal(np.sort(chosen)[::-1], expected)
    disagreeing = np.stack([1 - predictions, *samples[1:]])
    assert not np.asarray(guard(new, new, confidence, predictions, mask, sampled=disagreeing)).any()
    assert np.asarray(guard(new, new, confidence, predictions, mask)).any()  # no samples, no veto
    with pytest.raises(ValueError, match="growth=-1"):
        guard(new, new, confidence, predictions, mask, growth=-1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: most_confident(jnp.ones(2, bool), jnp.ones(2), jnp.zeros(2, int), 0, 1), "classes=0"),
        (lambda: cluster_labels(KEY, jnp.ones((3, 1)), jnp.zeros(3, int), jnp.ones(3, bool), 1), "clusters=200"),
        (
            lambda: guard_pseudolabels(
                *[jnp.ones(1, bool)] * 2, jnp.ones(1), jnp.ones(1, int), jnp.ones(1, bool), classes=2, agreement=2.0
            ),
            r"agreement=2\.0",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
