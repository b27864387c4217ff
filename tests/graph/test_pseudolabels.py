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
    return jax.nn.softmax(3 * jax.random.normal(jax.random.key(seed), (nodes, classes)))


def test_labels_grow_and_never_change():
    labels = jnp.arange(50) % 3
    mask = jnp.arange(50) < 6
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
    np.testing.assert_array_equal(found.added >= 0, found.mask)
    np.testing.assert_array_equal(found.added == 0, mask)
    np.testing.assert_array_equal(found.labels[:6], labels[:6])


def test_hidden_labels_do_not_matter():
    mask = jnp.arange(50) < 6
    train = lambda labels, mask, stage: jnp.where(mask, labels, 0).sum()
    predict = lambda params: random_probabilities(seed=int(params) % 7)
    true, hidden = jnp.arange(50) % 3, jnp.where(mask, jnp.arange(50) % 3, -99)
    one, other = (self_training(train, predict, labels, mask, stages=3) for labels in (true, hidden))
    np.testing.assert_array_equal(one.mask, other.mask)
    np.testing.assert_array_equal(one.labels[one.mask], other.labels[other.mask])


def test_another_selection():
    labels, mask = jnp.zeros(50, int), jnp.arange(50) < 6
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
    found = np.asarray(most_confident(*map(jnp.asarray, (candidates, confidence, predictions)), 4, count))
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
    points = jnp.asarray(centres[truth] + rng.normal(size=(120, 2)), jnp.float32)
    mask = np.zeros(120, bool)
    mask[[np.flatnonzero(truth == label)[0] for label in range(3)]] = True
    hidden = jnp.where(mask, truth, -1)
    found = jax.jit(functools.partial(cluster_labels, classes=3, clusters=12))(KEY, points, hidden, mask)
    assert (np.asarray(found) == truth).mean() > 0.95
    # Without the labels of a class nothing is of that class.
    few = mask & (truth != 2)
    assert set(np.asarray(cluster_labels(KEY, points, hidden, jnp.asarray(few), 3, clusters=12))) == {0, 1}


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
    mask = jnp.arange(60) < 4  # two labels of each class
    confidence, predictions = jnp.asarray(rng.random(60)), jnp.asarray(rng.integers(0, 2, 60))
    samples = jnp.stack([predictions] * 3)
    new = ~mask & (confidence > 0.3)
    for growth, most in ((0, 0), (1.5, 3), (5, 10), (100, 60)):
        found = guard_pseudolabels(new, new, confidence, predictions, mask, classes=2, sampled=samples, growth=growth)
        assert not (found & ~new).any()
        for each in range(2):
            own = new & (predictions == each)
            chosen = np.asarray(confidence)[found & own]
            expected = np.sort(np.asarray(confidence)[own])[::-1][:most]
            np.testing.assert_array_equal(np.sort(chosen)[::-1], expected)
    disagreeing = samples.at[0].set(1 - predictions)
    assert not guard_pseudolabels(new, new, confidence, predictions, mask, classes=2, sampled=disagreeing).any()
    assert guard_pseudolabels(new, new, confidence, predictions, mask, classes=2).any()  # no samples, no veto
    with pytest.raises(ValueError, match="growth=-1"):
        guard_pseudolabels(new, new, confidence, predictions, mask, classes=2, growth=-1)


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
