"""The parts of FASTRAIN: parity with the authors' program, and the facts of each."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.graph.measures import masked_cross_entropy
from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
from effjax.graph.sparse.matrix import SparseMatrix, select_entries, sparse_matrix
from effjax.graph.stages import (
    adam_l2,
    drop_count,
    drop_edges,
    drop_edges_exactly,
    edge_pool,
    evaluate_stages,
    nnz_ladder,
    pick_subset,
    prune_edges,
    select_pseudolabels,
    select_to_ladder,
    stage_plan,
    train_stage,
    unanimous,
)

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "fastrain_gnn"
KEY = jax.random.key(0)


@functools.cache
def vectors(name):
    with np.load(REFERENCE / f"{name}.npz") as file:
        return dict(file)


def matrix_of(found):
    return sparse_matrix(found["adj_row"], found["adj_col"], found["adj_val"], (40, 40))


def gcn_params(found, prefix):
    layer = lambda name: {part: found[f"{prefix}{name}__{part}"] for part in ("weight", "bias")}
    return {name: layer(name) for name in ("gc1", "gc2")}


def gcn(params, features, adjacency, *, key=None):
    del key
    first, second = params["gc1"], params["gc2"]
    hidden = jax.nn.relu(adjacency @ (features @ first["weight"]) + first["bias"][None])
    return adjacency @ (hidden @ second["weight"]) + second["bias"][None]


def zeroed(matrix, entries):
    """The reference's entries are in row-major order, as ours."""
    values = np.array(matrix.values)
    values[entries] = 0
    return matrix._replace(values=jax.device_put(values))


def random_graph(nodes, edges, seed):
    rng = np.random.default_rng(seed)
    pairs = np.unique(np.sort(rng.integers(0, nodes, (edges, 2)), axis=1), axis=0)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    both = np.concatenate([pairs, pairs[:, ::-1]])
    return gcn_adjacency(both[:, 0], both[:, 1], nodes)


def dense(matrix):
    found = np.zeros(matrix.shape, np.float32)
    np.add.at(found, (np.asarray(matrix.pattern.rows), np.asarray(matrix.pattern.columns)), np.asarray(matrix.values))
    return found


network, jitted_loss = jax.jit(gcn), jax.jit(masked_cross_entropy)


# Parity


def test_six_training_steps_are_the_authors():
    found = vectors("train_trace")
    matrix, tx = matrix_of(found), adam_l2(0.01, 5e-4)
    params = gcn_params(found, "p0__")
    state = tx.init(params)
    data = {
        "features": found["X"],
        "labels": jax.device_put(found["y"]),
        "weights": jax.device_put(found["train_mask"].astype(np.float32)),
    }
    stage = jax.jit(
        lambda state, params, sampled: train_stage(
            KEY, gcn, tx, state, params, sample=lambda key: sampled, epochs=1, **data
        )[:2]
    )
    for number in range(6):
        entries = found[f"zeroed_{number}"]
        assert len(entries) == drop_count(matrix.nnz, float(found["edge_keep_fraction"]))
        state, params = stage(state, params, zeroed(matrix, entries))
        expected = gcn_params(found, f"p{number + 1}__")
        # Adam divides by the root of tiny second moments, so the last digits of the gradient show.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), params, expected)
        logits = network(params, found["X"], matrix)
        others = (~found["train_mask"]).astype(np.float32)
        loss = jitted_loss(logits, found["y"], others)
        np.testing.assert_allclose(loss, found[f"test_loss_{number}"], rtol=1e-5)


def test_filtering_and_pruning_are_the_authors():
    found = vectors("spf_pgp")
    matrix = matrix_of(found)
    samples = jax.device_put(found["sampled_pred"])
    assert found["zeroed"].shape == (10, drop_count(matrix.nnz, 0.9))
    np.testing.assert_array_equal(unanimous(samples), found["robust"])
    mask, threshold = jax.device_put(found["train_mask"]), float(found["threshold"])
    new = select_pseudolabels(jax.device_put(found["confidence"]), mask, threshold, samples)
    assert int(new.sum()) > 0
    np.testing.assert_array_equal(mask | new, found["new_train_mask"])
    predictions = jax.device_put(found["pred"])
    np.testing.assert_array_equal(jnp.where(new, predictions, found["y"]), found["pseudo_labels"])
    keep = prune_edges(matrix.pattern, jnp.ones(matrix.nnz, bool), predictions, mask | new)
    assert int(keep.sum()) == found["pgp_nnz_after"] < found["pgp_nnz_before"] == matrix.nnz
    np.testing.assert_array_equal(dense(select_entries(matrix, np.asarray(keep))), found["pgp_adj_dense"])


def test_sampled_predictions_are_the_authors():
    found = vectors("spf_pgp")
    params = gcn_params(found, "p__base_model__")
    for entries, expected in zip(found["zeroed"], found["sampled_pred"], strict=True):
        # The calibration head never changes a prediction.
        logits = network(params, found["X"], zeroed(matrix_of(found), entries))
        np.testing.assert_array_equal(np.asarray(logits).argmax(1), expected)


def test_stages_are_planned_as_by_the_authors():
    for nodes, classes, labelled, deep, keep in vectors("stage_rule")["rows"]:
        assert stage_plan(int(nodes), int(classes), int(labelled)) == (bool(deep), keep)


# Stages


@pytest.mark.parametrize(("nodes", "classes", "least"), [(2708, 7, 10), (3327, 6, 14), (19717, 3, 165)])
def test_shallow_from_the_known_label_rates(nodes, classes, least):
    assert stage_plan(nodes, classes, (least - 1) * classes).deep
    assert not stage_plan(nodes, classes, least * classes).deep


def test_the_limit_itself_is_shallow_and_one_label_a_class_keeps_all_edges():
    assert not stage_plan(1000, 7, 25).deep
    assert stage_plan(1000, 7, 7).keep_rate == 1.0
    assert stage_plan(1000, 7, 8).keep_rate == 0.9
    assert stage_plan(1000, 7, 7, deep_below=0).keep_rate == 0.8


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((10, 2, 0), "labelled=0"), ((10, 2, 11), "labelled=11"), ((10, 1, 1), "classes=1"), ((0, 2, 1), "nodes=0")],
)
def test_plans_of_nothing_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        stage_plan(*numbers)


# Dropping edges


def test_drop_counts_are_those_of_double_precision():
    assert drop_count(190, 0.9) == 18
    assert drop_count(190, 0.8) == 37
    assert drop_count(13264, 0.9) == 1326
    assert drop_count(7, 1.0) == 0


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.8, 0.123, 0.0])
def test_exactly_so_many_real_entries_are_dropped(keep):
    matrix = random_graph(30, 90, 0)
    whole = matrix.nnz
    padded = select_entries(matrix, np.ones(whole, bool), capacity=whole + 5)
    count = drop_count(whole, keep)
    drop = jax.jit(jax.vmap(lambda key: drop_edges_exactly(key, padded, count).values))
    for values in np.asarray(drop(jax.random.split(KEY, 20))):
        assert (values[:whole] == 0).sum() == count
        np.testing.assert_array_equal(values[values != 0], np.asarray(padded.values)[values != 0])


def test_a_random_share_is_dropped_without_scaling_up():
    matrix = random_graph(300, 3000, 0)
    draw = lambda key: drop_edges(key, matrix, 0.8).values
    values = np.asarray(jax.jit(lambda key: jax.vmap(draw)(jax.random.split(key, 50)))(KEY))
    stayed = values != 0
    np.testing.assert_array_equal(np.where(stayed, matrix.values, 0), values)
    # Binomial: six standard errors, over all draws and for each entry.
    count = values.size
    assert abs(float(stayed.mean()) - 0.8) < 6 * (0.16 / count) ** 0.5
    assert np.abs(stayed.mean(0) - 0.8).max() < 6 * (0.16 / 50) ** 0.5
    assert not np.asarray(drop_edges(KEY, matrix, 0.0).values).any()


def test_a_pool_holds_compact_subsets():
    matrix = random_graph(60, 200, 1)
    pool = edge_pool(np.random.default_rng(0), matrix, 0.8, 6)
    kept = matrix.nnz - drop_count(matrix.nnz, 0.8)
    assert pool.values.shape == (6, kept)
    whole = dense(matrix)
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    both = jax.jit(lambda one, x: (one @ x, jax.vjp(lambda x: one @ x, x)[1](x)[0]))
    seen = set()
    for number in range(6):
        one = jax.tree.map(lambda leaf: np.asarray(leaf)[number], pool)  # noqa: B023
        full = dense(one)
        assert (full != 0).sum() == kept
        np.testing.assert_array_equal(full[full != 0], whole[full != 0])
        product, pulled = both(one, x)
        np.testing.assert_allclose(product, full @ x, atol=1e-5)
        np.testing.assert_allclose(pulled, full.T @ x, atol=1e-5)
        seen.add(full.tobytes())
    assert len(seen) == 6
    pick = jax.jit(pick_subset)
    picked = {dense(pick(key, pool)).tobytes() for key in jax.random.split(KEY, 40)}
    assert picked <= seen
    assert len(picked) > 3


def test_a_pool_of_nothing_is_refused():
    with pytest.raises(ValueError, match="leaves none"):
        edge_pool(np.random.default_rng(0), random_graph(5, 5, 0), 0.0, 2)


# Pseudolabels


def test_filtering_chooses_a_subset_of_plain_self_training():
    rng = np.random.default_rng(0)
    confidence, mask = jax.device_put((rng.random(500).astype(np.float32), rng.random(500) < 0.1))
    samples = jax.device_put(rng.integers(0, 2, (3, 500)))
    plain = select_pseudolabels(confidence, mask, 0.5)
    np.testing.assert_array_equal(plain, (np.asarray(confidence) > 0.5) & ~np.asarray(mask))
    filtered = select_pseudolabels(confidence, mask, 0.5, samples)
    assert 0 < int(filtered.sum()) < int(plain.sum())
    assert bool((plain | ~filtered).all())
    np.testing.assert_array_equal(select_pseudolabels(confidence, mask, 0.5, samples[:1]), plain)


def test_the_threshold_is_exceeded_strictly():
    confidence = jnp.array([0.5, jnp.nextafter(jnp.float32(0.5), jnp.float32(1))])
    assert select_pseudolabels(confidence, jnp.zeros(2, bool), 0.5).tolist() == [False, True]
    with pytest.raises(ValueError, match=r"threshold=1\.5"):
        select_pseudolabels(confidence, jnp.zeros(2, bool), 1.5)


# Pruning


@pytest.mark.parametrize("seed", range(10))
def test_what_pruning_may_and_may_not_do(seed):
    rng = np.random.default_rng(seed)
    matrix = random_graph(30, 90, 0)
    rows, columns = np.asarray(matrix.pattern.rows), np.asarray(matrix.pattern.columns)
    predictions, mask = jnp.asarray(rng.integers(0, 3, 30)), jnp.asarray(rng.random(30) < 0.6)
    before = jnp.ones(matrix.nnz, bool)
    keep = prune_edges(matrix.pattern, before, predictions, mask)
    after, whole = dense(select_entries(matrix, np.asarray(keep))), dense(matrix)
    np.testing.assert_array_equal(after[after != 0], whole[after != 0])
    np.testing.assert_array_equal(after != 0, after.T != 0)
    assert bool(keep[rows == columns].all())
    outside = ~(np.asarray(mask)[rows] & np.asarray(mask)[columns])
    assert bool(keep[outside].all())
    np.testing.assert_array_equal(prune_edges(matrix.pattern, keep, predictions, mask), keep)
    later = prune_edges(matrix.pattern, keep, jnp.asarray(rng.integers(0, 3, 30)), mask)
    assert bool((keep | ~later).all())


def test_nodes_may_be_renamed():
    matrix, rng = random_graph(40, 120, 2), np.random.default_rng(0)
    new = rng.permutation(40)
    rows, columns = np.asarray(matrix.pattern.rows), np.asarray(matrix.pattern.columns)
    renamed = sparse_matrix(new[rows], new[columns], np.asarray(matrix.values), (40, 40))
    predictions, mask = rng.integers(0, 3, 40), rng.random(40) < 0.7
    confidence, samples = rng.random(40).astype(np.float32), rng.integers(0, 2, (2, 40))
    back = np.argsort(new)
    pruned = lambda m, p, t: dense(select_entries(m, np.asarray(prune_edges(m.pattern, jnp.ones(m.nnz, bool), p, t))))
    here = pruned(matrix, jnp.asarray(predictions), jnp.asarray(mask))
    there = pruned(renamed, jnp.asarray(predictions[back]), jnp.asarray(mask[back]))
    np.testing.assert_array_equal(there[new][:, new], here)
    chosen = select_pseudolabels(jnp.asarray(confidence), jnp.asarray(mask), 0.3, jnp.asarray(samples))
    other = select_pseudolabels(
        jnp.asarray(confidence[back]), jnp.asarray(mask[back]), 0.3, jnp.asarray(samples[:, back])
    )
    np.testing.assert_array_equal(np.asarray(other)[new], chosen)


def test_masked_compacted_and_dense_graphs_give_the_same_logits():
    found = vectors("spf_pgp")
    matrix, params = matrix_of(found), gcn_params(found, "p__base_model__")
    keep = np.random.default_rng(0).random(matrix.nnz) < 0.93
    masked = matrix._replace(values=jax.device_put(np.where(keep, matrix.values, np.float32(0))))
    small = select_to_ladder(matrix, keep)
    assert small.nnz in nnz_ladder(matrix.nnz)
    assert small.nnz < matrix.nnz
    expected = network(params, found["X"], masked.todense())
    for adjacency in (masked, small, select_entries(matrix, keep)):
        np.testing.assert_allclose(network(params, found["X"], adjacency), expected, rtol=1e-5, atol=1e-6)


def test_the_ladder_starts_at_the_whole_and_ends_where_it_should():
    rungs = nnz_ladder(13264)
    assert rungs[-1] == 13264
    assert rungs[0] >= 0.85 * 13264
    assert all(0.949 < low / high < 0.951 for low, high in itertools.pairwise(rungs))
    tiny = select_to_ladder(random_graph(20, 30, 0), np.zeros(random_graph(20, 30, 0).nnz, bool))
    assert tiny.nnz == nnz_ladder(random_graph(20, 30, 0).nnz)[0]


# Training


def toy():
    matrix = random_graph(30, 60, 3)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    features, labels = draw(30, 5), np.arange(30, dtype=np.int32) % 3
    params = {
        "gc1": {"weight": draw(5, 8), "bias": np.zeros(8, np.float32)},
        "gc2": {"weight": draw(8, 3), "bias": np.zeros(3, np.float32)},
    }
    return jax.device_put((matrix, features, labels, params))


def stage_of(params, labels, weights, key, epochs, first=0, tx=None):
    matrix, features, *_ = toy()
    tx = tx or adam_l2()
    sample = lambda key: drop_edges(key, matrix, 0.8)
    data = {"features": features, "sample": sample, "labels": labels, "weights": weights}
    return train_stage(key, gcn, tx, tx.init(params), params, epochs=epochs, first=first, **data)


def test_labels_outside_the_training_set_are_not_read():
    _, _, labels, params = toy()
    weights = jax.device_put((np.arange(30) < 9).astype(np.float32))
    hidden = np.where(weights > 0, labels, np.array([-1, 99, -(2**31)], np.int32)[np.arange(30) % 3])
    run = jax.jit(lambda labels: stage_of(params, labels, weights, KEY, 5))
    jax.tree.map(np.testing.assert_array_equal, run(labels), run(hidden))


def test_a_stage_in_pieces_is_the_stage():
    _, _, labels, params = toy()
    weights = jax.device_put((np.arange(30) < 9).astype(np.float32))
    tx = optax.sgd(0.1)
    _, whole, losses = jax.jit(lambda p: stage_of(p, labels, weights, KEY, 6, tx=tx))(params)
    piece = jax.jit(lambda p, first: stage_of(p, labels, weights, KEY, 3, first, tx))
    _, half, early = piece(params, 0)
    _, half, late = piece(half, 3)
    jax.tree.map(np.testing.assert_array_equal, whole, half)
    np.testing.assert_array_equal(losses, np.concatenate([early, late]))


def test_labelled_sets_can_be_batched():
    _, _, labels, params = toy()
    weights = (np.random.default_rng(0).random((3, 30)) < 0.4).astype(np.float32)
    keys = jax.random.split(KEY, 3)
    one = lambda weights, key: stage_of(params, labels, weights, key, 4)[2]
    together = jax.jit(jax.vmap(one))(weights, keys)
    alone = jax.jit(one)
    apart = np.stack([alone(w, k) for w, k in zip(weights, keys, strict=True)])
    np.testing.assert_allclose(together, apart, rtol=1e-5)


def test_weights_scale_the_nodes():
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    labels, weights = np.array([0, 1, 2, 0], np.int32), np.array([1.0, 0.5, 0.0, 0.25], np.float32)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(4), labels]
    expected = np.average(losses, weights=weights)
    np.testing.assert_allclose(jitted_loss(logits, labels, weights), expected, rtol=1e-6)


def test_the_training_step_holds_the_csr_kernel_and_no_scatter_of_entries():
    matrix, features, labels, params = toy()
    x = sparse_matrix(*np.nonzero(np.asarray(features) > 0), None, features.shape)
    tx = adam_l2()

    def run(params, matrix: SparseMatrix, x: SparseMatrix):
        data = {"features": x, "sample": lambda key: drop_edges(key, matrix, 0.8), "labels": labels}
        return train_stage(KEY, gcn, tx, tx.init(params), params, weights=jnp.ones(30), epochs=2, **data)[1]

    text = jax.jit(run).lower(params, matrix, x).compile().as_text()
    # Forward: X W, A H, A H; backward: the transposes of the same.
    assert text.count("cpu_csr_sparse_dense_ffi") >= 6 or jax.default_backend() != "cpu"
    assert f"f32[{matrix.nnz},8]" not in text


# Evaluation


def test_stages_are_evaluated_on_the_nodes_without_a_label():
    truth, labels, added = jnp.array([0, 1, 0, 1, -1]), jnp.array([0, 1, 1, -1, 0]), jnp.array([0, 1, 1, -1, 1])
    predictions = jnp.array([[1, 1, 1, 0, 0], [0, 1, 0, 1, 0]])
    assert evaluate_stages(truth, labels, added, predictions) == pytest.approx(
        {"accuracy": 1.0, "accuracy_1": 1 / 3, "precision_1": 0.5, "added_1": 0.4}
    )
    nothing = jnp.array([0, -1, -1, -1, -1])
    assert evaluate_stages(truth, labels, nothing, predictions)["precision_1"] == 1.0
    assert evaluate_stages(truth, labels, added, predictions[:1]) == pytest.approx({"accuracy": 1 / 3})
