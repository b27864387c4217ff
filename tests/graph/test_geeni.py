"""GEENI: parity in float64, four loops of one computation, kernel calls, the one call, serving, cost, bad input."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.cost import Executables
from effjax.core.macs import count_macs
from effjax.graph.error_nodes import active_nodes, error_scores
from effjax.graph.geeni import choose_isolation, distil_loss, geeni, geeni_init, geeni_next, geeni_step, geeni_views
from effjax.graph.geeni_config import GeeniConfig
from effjax.graph.geeni_serving import inductive_probabilities, serve_ensemble
from effjax.graph.isolation import isolate, isolate_to_ladder, random_edges
from effjax.graph.members import (
    LOOPS,
    GcnMembers,
    ensemble_logits,
    ensemble_macs,
    ensemble_probabilities,
    fastest_members_loop,
    fold_members,
    init_members,
    mask_features,
    member_probabilities,
    members_loss,
    prune_width,
)
from effjax.graph.problems import GeeniProblem
from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
from effjax.graph.sparse.matrix import SparseMatrix, sparse_matrix

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "geeni" / "geeni_core.npz"
# Even numbers of columns: odd ones are padded for the kernel, which would count as work.
NODES, FEATURES, HIDDEN, CLASSES, COUNT = 30, 6, 6, 4, 4
KERNEL = "cpu_csr_sparse_dense_ffi"


@functools.cache
def world():
    rng = np.random.default_rng(0)
    joined = np.triu(rng.random((NODES, NODES)) < 0.15, 1)
    rows, columns = np.nonzero(joined | joined.T)
    matrix = gcn_adjacency(columns, rows, NODES)
    x = (rng.random((NODES, FEATURES)) < 0.4) * rng.random((NODES, FEATURES))
    at = np.nonzero(x)
    sparse = sparse_matrix(*at, x[at].astype(np.float32), x.shape)
    members = init_members(jax.random.key(1), COUNT, FEATURES, HIDDEN, CLASSES)
    biases, labels = rng.normal(size=(COUNT, HIDDEN)), rng.integers(0, CLASSES, NODES)
    arrays = biases.astype(np.float32), x.astype(np.float32), labels.astype(np.int32)
    biases, x, labels = jax.device_put(arrays)
    return members._replace(bias_0=biases), x, sparse, matrix, labels


def own_graphs(matrix):
    keep = np.stack([random_edges(jax.random.key(k), matrix.pattern, 0.6) for k in range(COUNT)])
    return matrix._replace(values=jax.device_put(np.asarray(matrix.values) * keep.astype(np.float32)))


def loss(members, features, matrix, labels, loop, dropout=0.0):
    logits = ensemble_logits(members, features, matrix, dropout=dropout, key=jax.random.key(0), loop=loop)
    return members_loss(logits, labels, jnp.arange(NODES) < 12)


value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnames=("loop", "dropout"))


@pytest.mark.parametrize("loop", LOOPS)
def test_parity_with_the_reference(loop):
    reference = np.load(REFERENCE)
    with jax.enable_x64(True):
        at = np.nonzero(reference["S"])
        matrix = sparse_matrix(*at, reference["S"][at], reference["S"].shape)
        members = GcnMembers(*(jax.device_put(reference[name]) for name in ("W1", "b1", "W2", "b2")))
        x = jax.device_put(reference["X"])
        run = jax.jit(lambda *a, **k: member_probabilities(ensemble_logits(*a, loop=loop, **k)))
        found = run(members, x, matrix)
        np.testing.assert_allclose(found, reference["member_probs"], rtol=0, atol=1e-14)
        before = ensemble_macs(members, x, matrix).aggregate
        for mode in ("none", "full", "rowscale"):
            isolated = isolate(matrix, ~reference["error_mask"], mode=mode)
            both = run(members, x, isolated)
            np.testing.assert_allclose(both, reference[f"member_probs_iso_{mode}_both_layers"], rtol=0, atol=1e-14)
            last = run(members, x, matrix, last=isolated)
            np.testing.assert_allclose(last, reference[f"member_probs_iso_{mode}_last_layer"], rtol=0, atol=1e-14)
        after = ensemble_macs(members, x, isolated).aggregate
        assert (before, after) == (reference["macs_before"], reference["macs_after"])


@pytest.mark.parametrize(("own", "sparse"), [(False, False), (True, True)], ids=["one graph, dense", "own, sparse"])
def test_all_loops_compute_the_same_with_their_gradients(own, sparse):
    members, x, x_sparse, matrix, labels = world()
    matrix = own_graphs(matrix) if own else matrix
    results = [
        value_and_grad(members, x_sparse if sparse else x, matrix, labels, loop=loop, dropout=0.5) for loop in LOOPS
    ]
    for value, grads in results[1:]:
        np.testing.assert_allclose(value, results[0][0], rtol=1e-5)
        for left, right in zip(grads, results[0][1], strict=True):
            np.testing.assert_allclose(left, right, atol=1e-5)


def test_members_train_as_if_they_were_alone():
    members, x, _, matrix, labels = world()
    matrix = own_graphs(matrix)
    _, grads = value_and_grad(members, x, matrix, labels, loop="columns")
    for k in range(COUNT):
        one = jax.tree.map(lambda leaf, k=k: np.asarray(leaf)[k : k + 1], members)
        own = matrix._replace(values=np.asarray(matrix.values)[k : k + 1])
        alone = value_and_grad(one, x, own, labels, loop="columns")[1]
        for left, right in zip(alone, grads, strict=True):
            np.testing.assert_allclose(np.asarray(left)[0], np.asarray(right)[k], atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the kernel is the CPU's")
@pytest.mark.parametrize(
    ("loop", "own", "calls"),
    [
        # One product a layer forward and one backward, and X forward and backward: 6; every member for itself: x K.
        ("columns", False, 6),
        ("columns", True, 4 * COUNT + 2),
        ("vmap", False, 6),
        ("vmap", True, 4 * COUNT + 2),
        ("map", False, 6),
        ("map", True, 6),
        ("unroll", False, 6 * COUNT),
        ("unroll", True, 6 * COUNT),
    ],
)
def test_kernel_calls_of_the_lowered_training_step(loop, own, calls):
    members, _, sparse, matrix, labels = world()
    matrix = own_graphs(matrix) if own else matrix
    traced = value_and_grad.trace(members, sparse, matrix, labels, loop=loop)
    assert "scatter-add" not in str(traced.jaxpr)
    assert products(traced.lower().as_text()) == calls


def products(text):
    """Kernel calls of a lowered module, functions counted as often as they are called."""
    bodies, name = {}, None
    for line in text.splitlines():
        if "func.func" in line:
            name = line.split("@")[1].split("(")[0]
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    @functools.cache
    def count(function):
        total = 0
        for line in bodies[function]:
            total += line.count(f"@{KERNEL}")
            if "call @" in line and KERNEL not in line:
                total += count(line.split("call @")[1].split("(")[0])
        return total

    return count("main")


def test_order_of_members_and_nodes():
    members, x, _, matrix, _ = world()
    mean = np.asarray(ensemble_probabilities(ensemble_logits(members, x, matrix)))
    other = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[[2, 0, 3, 1]]), members)
    np.testing.assert_allclose(ensemble_probabilities(ensemble_logits(other, x, matrix)), mean, atol=1e-6)
    order = np.random.default_rng(1).permutation(NODES)
    place = np.argsort(order)
    rows, columns = np.asarray(matrix.pattern.rows), np.asarray(matrix.pattern.columns)
    moved = sparse_matrix(place[rows], place[columns], np.asarray(matrix.values), matrix.shape)
    found = ensemble_probabilities(ensemble_logits(members, jax.device_put(np.asarray(x)[order]), moved))
    np.testing.assert_allclose(found, mean[order], atol=1e-6)


def test_masked_features_are_not_seen_and_not_trained():
    members, x, _, matrix, labels = world()
    keep = np.ones((COUNT, FEATURES), bool)
    keep[1, 2] = False
    keep = jax.device_put(keep)
    masked = lambda members, x: loss(mask_features(members, keep), x, matrix, labels, "columns")
    grads = jax.jit(jax.grad(masked))(members, x)
    slopes = np.asarray(grads.kernel_0)
    assert not slopes[1, 2].any()
    assert slopes[0, 2].any()


def test_pruned_width_keeps_what_matters():
    members, x, _, matrix, _ = world()
    dead = np.array(members.kernel_1)
    dead[:, 1] = 0
    members = members._replace(kernel_1=jax.device_put(dead))
    narrow = prune_width(members, HIDDEN - 1)
    assert narrow.kernel_0.shape == (COUNT, FEATURES, HIDDEN - 1)
    left, right = ensemble_logits(narrow, x, matrix), ensemble_logits(members, x, matrix)
    np.testing.assert_allclose(left, right, atol=1e-6)


def test_folded_members_give_the_mean_of_the_logits_at_the_cost_of_one():
    members, x, sparse, matrix, _ = world()
    biases = np.asarray(members.bias_1) + np.arange(COUNT, dtype=np.float32)[:, None]
    members = members._replace(bias_1=jax.device_put(biases))
    folded = fold_members(members)
    for features in (x, sparse):
        expected = np.asarray(ensemble_logits(members, features, matrix)).mean(0)
        found = np.asarray(ensemble_logits(folded, features, matrix))[0]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    powers = np.exp(expected)
    np.testing.assert_allclose(serve_ensemble(folded, x, matrix)(), powers / powers.sum(1, keepdims=True), atol=1e-6)
    one = init_members(jax.random.key(0), 1, FEATURES, COUNT * HIDDEN, CLASSES)
    assert ensemble_macs(folded, x, matrix) == ensemble_macs(one, x, matrix)


def test_served_with_and_without_the_first_aggregation():
    members, x, sparse, matrix, _ = world()
    errors = np.zeros(NODES, bool)
    errors[:4] = True
    isolated = isolate(matrix, ~errors)
    expected = ensemble_probabilities(ensemble_logits(members, x, isolated))
    for features, precompute, propagated in (
        (x, True, True),
        (x, "auto", True),
        (x, False, False),
        (sparse, "auto", False),
    ):
        served = serve_ensemble(members, features, isolated, precompute=precompute)
        assert served.propagated == propagated
        np.testing.assert_allclose(served(), expected, atol=1e-6)
    with pytest.raises(ValueError, match="precompute=True with sparse features"):
        serve_ensemble(members, sparse, isolated, precompute=True)
    own = own_graphs(isolated)
    expected = ensemble_probabilities(ensemble_logits(members, x, own))
    for features, precompute in ((x, "auto"), (sparse, False)):
        served = serve_ensemble(members, features, own, precompute=precompute)
        assert not served.propagated
        np.testing.assert_allclose(served(), expected, atol=1e-6)
    with pytest.raises(ValueError, match="precompute=True with a graph per member"):
        serve_ensemble(members, x, own, precompute=True)
    with pytest.raises(ValueError, match="2 graphs for 4 members"):
        serve_ensemble(members, x, own._replace(values=jax.device_put(np.asarray(own.values)[:2])))


@pytest.mark.parametrize("mode", ["none", "full", "rowscale"])
def test_isolated_to_a_ladder_is_isolated(mode):
    _, _, _, matrix, _ = world()
    errors = np.arange(NODES) % 3 == 0
    expected = isolate(matrix, ~errors, mode=mode)
    active = jax.device_put(np.where(errors, 0, 1).astype(np.float32))
    found = isolate_to_ladder(matrix, active, mode=mode)
    assert expected.nnz == int(found.pattern.size) <= found.nnz < matrix.nnz
    np.testing.assert_array_equal(found.todense(), expected.todense())
    values = np.asarray(matrix.values)
    both = matrix._replace(values=jax.device_put(np.stack([values, 2 * values])))
    found = isolate_to_ladder(both, active, mode=mode, weights=jnp.ones(both.values.shape))
    first = found._replace(values=jax.device_put(np.asarray(found.values)[0]))
    np.testing.assert_array_equal(first.todense(), expected.todense())


probabilities_of = jax.jit(lambda *inputs: member_probabilities(ensemble_logits(*inputs)))


@pytest.mark.parametrize("capacity", [None, "exact", "less"])
def test_inductive_serving_is_the_host_form_inside_jit(capacity):
    members, x, _, matrix, _ = world()
    known = np.arange(NODES) < 5
    part = lambda which: jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[which]), members)
    scorer = np.asarray(probabilities_of(part(slice(1)), x, matrix))
    active = active_nodes(jax.device_put(scorer[0].max(1)), 0.2, jax.device_put(known))
    isolated = isolate(matrix, np.asarray(active))
    rest = probabilities_of(part(slice(1, None)), x, isolated)
    expected = np.concatenate([scorer, rest]).mean(0)
    size = {None: None, "exact": isolated.nnz, "less": isolated.nnz - 5}[capacity]
    run = jax.jit(inductive_probabilities, static_argnames=("fraction", "mode", "capacity"))
    found = run(members, x, matrix, known, fraction=0.2, capacity=size)
    if capacity == "less":
        assert 1e-6 < np.abs(found - expected).max() < 0.2
        np.testing.assert_array_equal(found, run(members, x, matrix, known, fraction=0.2, capacity=size))
    else:
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_macs_agree_with_the_jaxpr_and_with_xla():
    members, x, sparse, matrix, _ = world()
    for features in (x, sparse):
        counted = count_macs(ensemble_logits, members, features, matrix)
        assert counted.expected == ensemble_macs(members, features, matrix).total
    run = Executables(lambda members, x: ensemble_logits(members, x, matrix), donate_argnums=())
    run.compile(members, x)
    macs = ensemble_macs(members, x, matrix)
    dense = 2 * (macs.features + macs.classes)  # XLA does not see into the kernel, but counts relu, bias and moves
    assert dense <= run.analysis(members, x).flops <= dense + 8 * NODES * COUNT * (HIDDEN + CLASSES)


def test_scores_of_members_with_one_graph_come_from_one_program():
    members, x, _, matrix, _ = world()
    scores = jax.jit(lambda *a: error_scores(member_probabilities(ensemble_logits(*a))))(members, x, matrix)
    np.testing.assert_allclose(np.asarray(scores.probabilities).sum(1), 1, atol=1e-6)


def test_measured_loop():
    members, x, _, matrix, _ = world()
    assert fastest_members_loop(members, x, matrix, training=False) in LOOPS


def problem_of(**changes):
    _, _, sparse, matrix, labels = world()
    nodes = np.arange(NODES)
    train, val = jax.device_put((nodes < 12, (nodes >= 12) & (nodes < 24)))
    return dataclasses.replace(GeeniProblem(sparse, matrix, labels, train, val, CLASSES), **changes)


FEW = {"members": 2, "width": 4, "epochs": 4, "epochs_per_step": 2, "folds": 3, "fractions": (0.2,), "modes": ("full",)}


@pytest.mark.nightly
@pytest.mark.promotes  # Adam's powers of its rates
def test_one_call_is_its_parts_and_gives_probabilities():
    problem, config = problem_of(), GeeniConfig(**FEW, students=2, student_width=3, folded=True)
    assert config.stages == ("members", "students")
    served = geeni(jax.random.key(3), problem, config)
    assert served.kernel_0.shape == (FEATURES, 2 * 3)
    probabilities = np.asarray(served())
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    # The first step trains the members only, the students' step the students only, and shapes stay.
    state = geeni_init(jax.random.key(3), problem, config=config)
    views = geeni_views(state, problem, config=config)
    step = jax.jit(geeni_step, static_argnames=("config", "stage"))
    first, metrics = step(state, problem, views, config=config, stage="members")
    assert set(metrics) == {"loss"}
    assert first.epoch == 2
    assert (first.members.kernel_0 != state.members.kernel_0).any()
    np.testing.assert_array_equal(first.students.kernel_0, state.students.kernel_0)
    left = geeni_next(first, problem, config=config, stage="members")
    np.testing.assert_allclose(left.targets.sum(1), 1, atol=1e-5)
    second, _ = step(left, problem, views, config=config, stage="students")
    np.testing.assert_array_equal(second.members.kernel_0, first.members.kernel_0)
    assert (second.students.kernel_0 != first.students.kernel_0).any()
    shape = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shape(second) == shape(state)
    with pytest.raises(ValueError, match="stage='students' is not one of 'members'"):
        geeni_step(state, problem, views, config=GeeniConfig(**FEW), stage="students")


@pytest.mark.promotes  # Adam
def test_training_lowers_the_loss_of_all_members():
    _, x, _, matrix, _ = world()
    learnable = np.argmax(np.asarray(matrix @ x)[:, :CLASSES], axis=1)
    config = GeeniConfig(**FEW | {"learning_rate": 0.05, "dropout": 0.0, "edge_keep_rate": 1.0})
    problem = problem_of(labels=jax.device_put(learnable.astype(np.int32)))
    state = geeni_init(jax.random.key(0), problem, config=config)
    views = geeni_views(state, problem, config=config)
    step = jax.jit(geeni_step, static_argnames=("config", "stage"))
    losses = []
    for _ in range(20):
        state, metrics = step(state, problem, views, config=config)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(CLASSES), abs=0.3)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.promotes  # Adam
def test_weighted_edges_are_trained_on():
    rows, columns = np.asarray(world()[3].pattern.rows), np.asarray(world()[3].pattern.columns)
    edges = rows != columns
    weights = 0.5 + (rows + columns) % 3
    matrix = gcn_adjacency(columns[edges], rows[edges], NODES, weights=weights[edges].astype(np.float32))
    assert np.array_equal(matrix.pattern.rows, rows)
    raw = jax.device_put(np.where(edges, weights, 1).astype(np.float32))
    with pytest.raises(ValueError, match=r"not gcn_normalize of problem.weights=1.*pass weights="):
        geeni(jax.random.key(0), problem_of(adjacency=matrix), GeeniConfig(**FEW))
    weighted = problem_of(adjacency=matrix, weights=raw)
    served = geeni(jax.random.key(0), weighted, GeeniConfig(**FEW, isolate=None))
    np.testing.assert_allclose(served.matrix.todense(), matrix.todense(), atol=1e-6)
    state = geeni_init(jax.random.key(0), weighted, config=GeeniConfig(**FEW))
    views = geeni_views(state, weighted, config=GeeniConfig(**FEW))
    first = np.asarray(views.matrix.values)[0]  # which sees all
    np.testing.assert_allclose(first, matrix.values, atol=1e-6)


def test_students_imitate_by_cross_entropy():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 5, 3)), rng.dirichlet(np.ones(3), 5)
    log_p = logits - np.log(np.exp(logits).sum(2, keepdims=True))
    expected = sum(-(targets * log_p[k]).sum(1).mean() for k in range(2))
    found = jax.jit(distil_loss)(logits.astype(np.float32), targets.astype(np.float32))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_bad_problems_and_configs():
    key, config = jax.random.key(0), GeeniConfig(**FEW)
    first = jnp.arange(NODES) < 12
    one_way = gcn_adjacency([0], [1], NODES)
    for changes, message in (
        ({"val": first}, "12 nodes are in problem.train and in problem.val"),
        ({"train": jnp.zeros(NODES, bool)}, "problem.train has no node"),
        ({"val": jnp.zeros(NODES, bool)}, "problem.val has no node, by which isolate='learned' could be judged"),
        ({"val": jnp.zeros(3, bool)}, r"problem.val is bool\[3\]; bool \[30\]"),
        ({"train": jnp.zeros(NODES)}, r"problem.train is float32\[30\]"),
        ({"labels": jnp.full(NODES, CLASSES)}, r"lie in \[4, 4\]; classes=4 allows \[0, 3\]"),
        ({"labels": jnp.zeros(7, jnp.int32)}, r"problem.labels is int32\[7\]; integers \[30\]"),
        ({"features": jnp.ones((7, 2))}, r"problem.features has shape \(7, 2\); \[30, F\]"),
        ({"adjacency": one_way}, "edges in one direction only"),
    ):
        with pytest.raises(ValueError, match=message):
            geeni(key, problem_of(**changes), config)
    with pytest.raises(ValueError, match=r"denoised=0.5 needs problem.alike.*alike_edges"):
        geeni(key, problem_of(), GeeniConfig(**FEW, denoised=0.5))
    with pytest.raises(ValueError, match="isolate=None chooses nothing"):
        choose_isolation(key, world()[0], problem_of(), config=GeeniConfig(**FEW, isolate=None))
    for options, message in (
        ({"soft": True, "isolate": "score"}, "soft=True needs probabilities"),
        ({"denoised": 0.5, "folded": True}, "graphs of their own"),
        ({"isolate": "learnt"}, "isolate='learnt' is not one of .*Did you mean 'learned'"),
        ({"modes": ()}, r"modes=\(\) leaves no candidate"),
        ({"folds": 2}, "folds=2 must be"),
    ):
        with pytest.raises(ValueError, match=message):
            GeeniConfig(**FEW | options)


def test_bad_input():
    members, x, _, matrix, _ = world()
    with pytest.raises(ValueError, match=r"loop='column' is not one of .*Did you mean 'columns'"):
        ensemble_logits(members, x, matrix, loop="column")
    with pytest.raises(ValueError, match=r"dropout=0.5 needs a key"):
        ensemble_logits(members, x, matrix, dropout=0.5)
    two = SparseMatrix(matrix.pattern, jnp.stack([matrix.values] * 2))
    with pytest.raises(ValueError, match="2 graphs for 4 members"):
        ensemble_logits(members, x, two)
    with pytest.raises(ValueError, match=r"features has shape \(29, 6\); the graph and the members need \[30, 6\]"):
        ensemble_logits(members, x[1:], matrix)
    with pytest.raises(ValueError, match=r"width=9 must be an integer in \[1, 6\]"):
        prune_width(members, 9)
    with pytest.raises(ValueError, match=r"members\.size=1"):
        inductive_probabilities(jax.tree.map(lambda leaf: leaf[:1], members), x, matrix, jnp.zeros(NODES, bool))
    with pytest.raises(ValueError, match=r"count=0 must be an integer"):
        init_members(jax.random.key(0), 0, 1, 1, 1)
