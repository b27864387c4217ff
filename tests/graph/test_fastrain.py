"""FASTRAIN in one call, against the parts put together by hand, and what each setting must and must not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_graph import write_small_cora

from effjax.graph.calibration import calibrate, fit_calibration
from effjax.graph.fastrain import fastrain, fastrain_init, fastrain_params, fastrain_scores
from effjax.graph.fastrain_config import FastrainConfig
from effjax.graph.problems import NodeProblem
from effjax.graph.pseudolabels import self_training
from effjax.graph.sparse.adjacency_matrices import adjacency, gcn_normalize, loopless_adjacency
from effjax.graph.stages import adam_l2, drop_edges, select_to_ladder, train_stage
from effjax.models.gnn import NodeClassifier
from effjax.tasks.graph import draw_labelled, node_data

pytestmark = pytest.mark.promotes  # Adam

KEY = jax.random.key(1)
SMALL = {
    "stages": 2,
    "epochs": 40,
    "epochs_per_step": 20,
    "calibration_epochs": 10,
    "samples": 3,
    "threshold": 0.25,
    "deep_below": 0.08,
    "tx": adam_l2(0.05),
}


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return node_data(write_small_cora(tmp_path_factory.mktemp("graph") / "small.npz"))


@pytest.fixture(scope="module")
def problem(graph):
    mask = draw_labelled(jax.random.key(0), graph.labels, graph.classes, 3)
    return NodeProblem(graph.features, graph.adjacency, graph.labels, mask, graph.classes)


@pytest.fixture(scope="module")
def network(graph):
    module = lambda depth: NodeClassifier(classes=graph.classes, hidden=8, depth=depth)

    def init(key, deep):
        return module(3 if deep else 2).init(key, graph.features, graph.adjacency)["params"]

    def apply(params, features, adjacency, *, key=None):
        rngs = None if key is None else {"dropout": key}
        return module(len(params)).apply({"params": params}, features, adjacency, train=key is not None, rngs=rngs)

    return init, apply


def run(problem, network, **changes):
    return fastrain(KEY, *network, problem, FastrainConfig(**(SMALL | changes)))


def by_hand(problem, network, deep, keep):
    """Two stages written out: the labels, the stage that gave them, the remaining entries and the last parameters."""
    init, apply = network
    _, start, rest = jax.random.split(KEY, 3)
    features, whole, given, tx = problem.features, problem.adjacency, np.asarray(problem.mask), SMALL["tx"]
    rows, columns = np.asarray(whole.pattern.rows), np.asarray(whole.pattern.columns)

    def trained(stage, labels, mask, edges):
        matrix = select_to_ladder(whole, edges)
        params = init(start, deep[stage])
        data = {"features": features, "sample": lambda key: drop_edges(key, matrix, keep[stage]), "epochs": 40}
        data |= {"labels": jnp.asarray(labels), "weights": jnp.asarray(mask, jnp.float32)}
        key = jax.random.fold_in(rest, stage)
        return jax.jit(lambda params: train_stage(key, apply, tx, tx.init(params), params, **data))(params)[1]

    labels, everything = np.where(given, problem.labels, -1).astype(np.int32), np.ones(whole.nnz, bool)
    params = trained(0, labels, given, everything)
    fit_key, sample_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(rest, 0), 2))
    logits = apply(params, features, whole)
    known = (jnp.asarray(labels), jnp.asarray(given, jnp.float32))
    head, _ = jax.jit(lambda: fit_calibration(fit_key, logits, whole, *known, epochs=10, dropout=0.5))()
    confidence = np.asarray(jax.nn.softmax(calibrate(head, logits, whole)).max(-1))
    predictions = np.asarray(logits.argmax(-1))
    drawn = [drop_edges(key, whole, 0.9) for key in jax.random.split(sample_key, 3)]
    samples = np.stack([apply(params, features, matrix).argmax(-1) for matrix in drawn])
    new = (confidence > 0.25) & (samples == samples[0]).all(0) & ~given
    labels, mask = np.where(new, predictions, labels), given | new
    edges = ~(mask[rows] & mask[columns] & (predictions[rows] != predictions[columns]))
    return labels, np.where(new, 1, np.where(given, 0, -1)), edges, trained(1, labels, mask, edges)


@pytest.mark.nightly
def test_it_is_its_parts_put_together_by_hand(problem, network):
    found = run(problem, network)
    # 21 of 300 labels are fewer than 8 %: deep at first, shallow later.
    labels, added, edges, params = by_hand(problem, network, deep=(True, False), keep=(0.9, 0.8))
    assert (added == 1).sum() > 20
    assert (~edges).any()
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.added, added)
    assert int(found.adjacency.pattern.size) == edges.sum()
    assert not found.deep
    assert found.epochs == (40, 40)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found.params, params)


def test_without_its_parts_it_is_plain_self_training(problem, network):
    init, apply = network
    found = run(problem, network, depth="shallow", keep_rate=1.0, samples=0, pruned=False)
    _, start, rest = jax.random.split(KEY, 3)
    features, adjacency, tx, history = problem.features, problem.adjacency, SMALL["tx"], []

    @jax.jit
    def trained(labels, weights, key):
        params = init(start, False)
        data = {"features": features, "sample": lambda key: adjacency, "labels": labels, "weights": weights}
        return train_stage(key, apply, tx, tx.init(params), params, epochs=40, **data)[1]

    @jax.jit
    def probabilities(params, labels, weights, key):
        logits = apply(params, features, adjacency)
        head, _ = fit_calibration(jax.random.split(key)[0], logits, adjacency, labels, weights, epochs=10, dropout=0.5)
        return jax.nn.softmax(calibrate(head, logits, adjacency))

    def train(labels, mask, stage):
        key = jax.random.fold_in(rest, stage)
        history.append((labels, mask.astype(jnp.float32), key))
        return trained(*history[-1])

    def predict(params):
        labels, weights, key = history[-1]
        return probabilities(params, labels, weights, jax.random.fold_in(key, 2))

    given = jnp.where(problem.mask, problem.labels, -1)
    plain = self_training(train, predict, given, problem.mask, stages=2, threshold=0.25)
    np.testing.assert_array_equal(found.labels, plain.labels)
    np.testing.assert_array_equal(found.added, plain.added)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found.params, plain.params)


def test_hidden_labels_are_not_read(problem, network):
    scrambled = problem._replace(labels=jnp.where(problem.mask, problem.labels, 10**6))
    jax.tree.map(np.testing.assert_array_equal, run(scrambled, network), run(problem, network))


def test_filtering_and_the_guard_only_take_away(problem, network):
    added = lambda **changes: run(problem, network, epochs=20, pruned=False, **changes)
    everything, kept, few = (
        added(samples=0),
        added(samples=5, sample_keep_rate=0.5),
        added(samples=0, growth=1),
    )
    plain, filtered, guarded = (np.asarray(found.added) == 1 for found in (everything, kept, few))
    assert (plain | ~filtered).all()
    assert plain.sum() > filtered.sum() > 0
    assert (plain | ~guarded).all()
    # Three labels per class, and as many new ones at most.
    assert np.bincount(np.asarray(few.labels)[guarded], minlength=7).max() == 3
    assert everything.adjacency.nnz == problem.adjacency.nnz


def test_a_plateau_ends_a_stage_and_nothing_runs_after_it(problem, network):
    options = {"epochs": 60, "samples": 0, "stages": 1, "depth": "shallow"}
    whole, falling, ended = (run(problem, network, plateau=share, **options) for share in (None, 0.0, 1.0))
    assert whole.epochs == falling.epochs == (60,)
    jax.tree.map(np.testing.assert_array_equal, falling.params, whole.params)
    assert ended.epochs == (40,)  # no loss falls by all of itself
    jax.tree.map(np.testing.assert_array_equal, ended.params, run(problem, network, **options | {"epochs": 40}).params)


def test_starts_are_the_same_draw_a_fresh_one_or_the_last_parameters(problem, network):
    options = {"depth": "shallow", "epochs": 20, "samples": 0, "pruned": False}
    # A rate of 0 leaves the parameters as each stage found them.
    still = options | {"tx": adam_l2(0.0)}
    one = fastrain_params(fastrain_init(KEY, network[0], problem, FastrainConfig(**(SMALL | still))))
    two = {start: run(problem, network, start=start, **still).params for start in ("same", "fresh", "warm")}
    jax.tree.map(np.testing.assert_array_equal, two["same"], one)
    jax.tree.map(np.testing.assert_array_equal, two["warm"], one)
    assert not np.array_equal(two["fresh"]["conv_0"]["kernel"], one["conv_0"]["kernel"])
    moved = run(problem, network, **options | {"stages": 1}).params
    warm = run(problem, network, start="warm", **options).params
    assert np.abs(np.asarray(moved["conv_0"]["kernel"]) - np.asarray(one["conv_0"]["kernel"])).max() > 0.1
    assert not np.array_equal(warm["conv_0"]["kernel"], moved["conv_0"]["kernel"])


def test_smoothing_spreads_along_the_edges_alone(graph, problem, network):
    expected = gcn_normalize(adjacency(graph.data.senders, graph.data.receivers, graph.data.nodes))
    jax.tree.map(np.testing.assert_array_equal, loopless_adjacency(graph.adjacency), expected)
    config = FastrainConfig(**(SMALL | {"stages": 1, "smoothed": True}))
    state = fastrain_init(KEY, network[0], problem, config)
    raw, smooth = (
        fastrain_scores(state, network[1], problem, FastrainConfig(**(SMALL | {"stages": 1, "smoothed": smoothed})))
        for smoothed in (False, True)
    )
    given = np.asarray(problem.mask)
    right = lambda scores: (np.asarray(scores.argmax(1)) == np.asarray(problem.labels))[given].mean()
    assert right(smooth) > right(raw)  # an untrained network, and given labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.full(300, 7, np.int32)}, "labels holds 7 inside the mask"),
        ({"labels": np.zeros(300, np.int32)}, r"no node of the classes \[1, 2, 3, 4, 5, 6\]"),
        ({"labels": np.zeros(300, np.float32)}, r"labels is float32\[300\]"),
        ({"mask": np.ones(5, bool)}, r"problem.mask is bool\[5\]"),
    ],
)
def test_bad_problems(problem, network, change, message):
    with pytest.raises(ValueError, match=message):
        run(problem._replace(**change), network)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": 0}, "stages=0"),
        ({"samples": -1}, "samples=-1"),
        ({"threshold": 1.5}, r"threshold=1\.5"),
        ({"plateau": -0.1}, r"plateau=-0\.1"),
        ({"growth": -1}, "growth=-1"),
        ({"growth": 2, "select": "top-k"}, "limits select='threshold' only"),
        ({"epochs": 70}, "no multiple of epochs_per_step=50. Take epochs=50, or epochs_per_step=70"),
        ({"depth": "thick"}, "depth='thick'"),
        ({"keep_rate": 0.0}, r"keep_rate=0\.0"),
        ({"pool": 4, "exact_drop": True}, "Leave out one of them"),
        ({"pool": 4, "keep_rate": 1.0}, "Leave out one of them"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        FastrainConfig(**change)
