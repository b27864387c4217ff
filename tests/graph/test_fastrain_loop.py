import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.graph.fastrain_loop import fastrain
from effjax.models.gnn import NodeClassifier
from effjax.tasks.graph import draw_labelled, masked_accuracy, node_task


@pytest.fixture(scope="module")
def cora():
    return node_task("cora")


def network(task):
    model = lambda depth: NodeClassifier(classes=task.classes, hidden=64, depth=depth)

    def init(key, deep):
        return model(3 if deep else 2).init(key, task.features, task.adjacency)["params"]

    def apply(params, features, adjacency, key):
        return model(len(params)).apply(
            {"params": params},
            features,
            adjacency,
            train=key is not None,
            rngs=None if key is None else {"dropout": key},
        )

    return init, apply


def run(task, init, apply, labels, mask, **options):
    options = {"stages": 2, "epochs": 60, "calibration_epochs": 20} | options
    return fastrain(
        jax.random.key(1), init, apply, task.features, task.adjacency, labels, mask, task.classes, **options
    )


def test_cora_with_eight_labels_a_class(cora):
    init, apply = network(cora)
    mask = draw_labelled(jax.random.key(0), cora.labels, cora.classes, 8)
    found = run(cora, init, apply, cora.labels, mask)
    hidden = ~mask & (cora.labels >= 0)
    assert float(masked_accuracy(found.logits, cora.labels, hidden)) > 0.65
    given = np.asarray(mask)
    np.testing.assert_array_equal(np.asarray(found.labels)[given], np.asarray(cora.labels)[given])
    np.testing.assert_array_equal(np.asarray(found.added) == 0, given)
    assert (np.asarray(found.added) == 1).sum() > 100
    assert ((np.asarray(found.labels) >= 0) == (np.asarray(found.added) >= 0)).all()
    assert int(found.adjacency.pattern.size) < cora.adjacency.nnz
    assert len(found.params) == 2  # the second stage is shallow
    # Hidden labels are not read: scrambled ones give the same bits.
    scrambled = jnp.where(mask, cora.labels, 10**6)
    again = run(cora, init, apply, scrambled, mask)
    jax.tree.map(np.testing.assert_array_equal, again, found)


def test_without_sampling_and_pruning(cora):
    init, apply = network(cora)
    mask = draw_labelled(jax.random.key(0), cora.labels, cora.classes, 8)
    some = run(cora, init, apply, cora.labels, mask, epochs=20, threshold=0.25, prune=False)
    more = run(cora, init, apply, cora.labels, mask, epochs=20, threshold=0.25, samples=0, prune=False)
    assert some.adjacency.nnz == more.adjacency.nnz == cora.adjacency.nnz
    kept, all_of_them = (np.asarray(found.added) == 1 for found in (some, more))
    assert (all_of_them | ~kept).all()  # filtering only takes away
    assert all_of_them.sum() > kept.sum()
    few = run(cora, init, apply, cora.labels, mask, epochs=20, threshold=0.25, samples=0, prune=False, growth=1)
    guarded = np.asarray(few.added) == 1
    assert (all_of_them | ~guarded).all()
    assert np.bincount(np.asarray(few.labels)[guarded], minlength=cora.classes).max() == 8


def test_a_plateau_ends_a_stage(cora):
    init, apply = network(cora)
    mask = draw_labelled(jax.random.key(0), cora.labels, cora.classes, 8)
    options = {"epochs": 120, "samples": 0, "stages": 1}
    whole = run(cora, init, apply, cora.labels, mask, **options)
    falling = run(cora, init, apply, cora.labels, mask, plateau=0.0, **options)
    assert whole.epochs == falling.epochs == (120,)
    np.testing.assert_allclose(falling.logits, whole.logits, rtol=1e-3, atol=1e-3)  # trained in pieces, the same
    ended = run(cora, init, apply, cora.labels, mask, plateau=1.0, **options)  # no loss falls by all of itself
    assert ended.epochs == (100,)
    assert np.abs(np.asarray(ended.logits - whole.logits)).max() > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": jnp.full(2708, 7)}, "labels holds 7 inside the mask"),
        ({"labels": jnp.zeros(2708, int)}, r"no node of the classes \[1, 2, 3, 4, 5, 6\]"),
        ({"mask": jnp.ones(5, bool)}, r"mask bool\[5\]"),
        ({"stages": 0}, "stages=0"),
        ({"samples": -1}, "samples=-1"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"plateau": -0.1}, "plateau=-0.1"),
        ({"growth": -1}, "growth=-1"),
    ],
)
def test_bad_input(cora, change, message):
    init, apply = network(cora)
    mask = draw_labelled(jax.random.key(0), cora.labels, cora.classes, 8)
    given = {"labels": cora.labels, "mask": mask, "epochs": 1, "calibration_epochs": 1} | change
    with pytest.raises(ValueError, match=message):
        run(cora, init, apply, **given)
