"""No array of a wrong length or shape gets through a public function: none is broadcast, clipped or read past.

Every public function is in ``CASES`` with arguments that fit, or in ``NO_ARRAYS``. Each array in turn is given longer,
shorter, cut to one row and with one more axis; the call must then fail with an error that names it. Arguments that fit
are traced, or used where the function runs on the host (``"host"``); not where that takes long (``"slow"``).
"""

import ast
import dataclasses
import functools
import re
from pathlib import Path

import jax
import jraph
import numpy as np
import optax
import pytest

from effjax.data.graphs import GraphData
from effjax.graph.calibration import calibrate, calibration_init, fit_calibration
from effjax.graph.error_nodes import (
    active_nodes,
    error_auc,
    error_scores,
    held_out_correctness,
    learned_correctness,
)
from effjax.graph.fastrain import fastrain, fastrain_init
from effjax.graph.fastrain_config import FastrainConfig
from effjax.graph.geeni import geeni, geeni_init
from effjax.graph.geeni_config import GeeniConfig
from effjax.graph.geeni_serving import inductive_probabilities, serve_ensemble
from effjax.graph.isolation import alike_edges, isolate, isolated_values, strongest_edges
from effjax.graph.measures import brier_score, expected_calibration_error, masked_accuracy, masked_cross_entropy
from effjax.graph.members import (
    ensemble_logits,
    ensemble_macs,
    fastest_members_loop,
    init_members,
    mask_features,
    members_loss,
)
from effjax.graph.problems import GeeniProblem, NodeProblem
from effjax.graph.pseudolabels import most_confident, self_training
from effjax.graph.sparse.adjacency_matrices import (
    adjacency,
    gcn_adjacency,
    gcn_normalize,
    loopless_adjacency,
    row_normalize,
)
from effjax.graph.sparse.attention import edge_dot, edge_softmax, gat, gatv2, supergat, weighted_sums
from effjax.graph.sparse.jraph_graphs import (
    from_graphs_tuple,
    get_fully_connected_graph,
    to_graphs_tuple,
    zero_out_padding,
)
from effjax.graph.sparse.layers import appnp, gcn, gcnii, neighbour_max, sage, sgc
from effjax.graph.sparse.matrix import SparseMatrix, select_entries, sparse_matrix
from effjax.graph.sparse.products import column_sums, fastest_spmm, row_sums, spmm, take_columns, take_rows
from effjax.graph.sparse.propagation import correct_and_smooth, label_propagation
from effjax.graph.sparse.sampling import NeighbourSampler, block_mean, block_sum
from effjax.graph.sparse.sharding import shard_matrix, shard_rows, sharded_spmm
from effjax.graph.stages import drop_edges, prune_edges, select_pseudolabels, train_stage
from effjax.tasks.graph import node_data

N, F, C, K, H = 5, 6, 3, 2, 4


def full(shape, number):
    return jax.device_put(np.full(shape, number, np.int32 if isinstance(number, int) else np.float32))


def ones(shape, dtype=np.float32):
    return jax.device_put(np.ones(shape, dtype))


KEY = jax.random.key(0)
SENDERS, RECEIVERS = np.array([0, 1, 1, 2, 3]), np.array([1, 0, 2, 1, 3])
GRAPH = gcn_adjacency(SENDERS, RECEIVERS, N)
PATTERN, NNZ = GRAPH.pattern, GRAPH.nnz
X, LOGITS = ones((N, F)), ones((N, C))
LABELS, MASK = jax.device_put((np.array([0, 1, 2, 0, 1], np.int32), np.array([True, True, True, False, False])))
CONFIDENCE, FOLDS = jax.device_put((np.linspace(0.1, 0.9, N, dtype=np.float32), np.arange(N, dtype=np.int32) % 3))
MEMBERS = init_members(KEY, K, F, H, C)
MESH = jax.make_mesh((1,), ("data",))
SHARDED = shard_matrix(GRAPH, MESH, "data")
BATCH = next(NeighbourSampler(GRAPH, [0, 1], (2,), batch_size=2, seed=0))
JRAPH = get_fully_connected_graph(2, 1, node_features={"a": ones(2), "b": ones(2)})
PADDED = jraph.pad_with_graphs(JRAPH, 4, 8)
SCORES = error_scores(full((K, N, C), 1 / C))
NODE = {"adjacency": GRAPH, "labels": LABELS, "mask": MASK}
GEENI = {"features": X, "adjacency": GRAPH, "labels": LABELS, "train": MASK & (LABELS < 2), "val": ~MASK}
GEENI |= {"weights": ones(NNZ), "alike": ones(NNZ, bool)}
QUICK = FastrainConfig(stages=1, epochs=1, epochs_per_step=1, calibration_epochs=1)
ONE = GeeniConfig(epochs=1, epochs_per_step=1, folds=3)


def kernel(inputs):
    return {"kernel": ones((inputs, C)), "root": ones((inputs, C))}


def attention():
    return {"kernel": ones((F, K * H)), "source": ones((K, H)), "target": ones((K, H))}


def node_problem(call, **parts):
    return call(NodeProblem(X, **parts, classes=C))


def geeni_problem(call, **parts):
    return call(GeeniProblem(**parts, classes=C))


def trained(labels, weights):
    tx, start = optax.sgd(0.1), ones((F, C))
    apply = lambda params, features, matrix, *, key=None: matrix @ (features @ params)
    data = {"features": X, "sample": lambda key: GRAPH, "labels": labels, "weights": weights}
    return train_stage(KEY, apply, tx, tx.init(start), start, epochs=1, **data)


def nodes_of_two(a, b):
    return zero_out_padding(PADDED._replace(nodes={"a": a, "b": b}))


init = lambda key, deep: ones((F, C))
apply = lambda params, features, matrix, *, key=None: matrix @ (features @ params)
measured = {"labels": LABELS, "mask": MASK}
learn = {"folds": FOLDS, **{name: GEENI[name] for name in ("features", "adjacency", "labels", "train", "val")}}


def learned(call, folds, **parts):
    return call(SCORES, GeeniProblem(**parts, classes=C), folds, fold_count=3)


# By name: the function, arrays that fit, and whether the call that fits is too slow to make.
CASES = {
    "spmm": (spmm, {"matrix": GRAPH, "x": X}),
    "fastest_spmm": (lambda matrix: fastest_spmm(matrix, 2), {"matrix": GRAPH}, "slow"),
    "row_sums": (functools.partial(row_sums, PATTERN), {"entries": ones((NNZ, 2))}),
    "column_sums": (functools.partial(column_sums, PATTERN), {"entries": ones(NNZ)}),
    "take_rows": (functools.partial(take_rows, PATTERN), {"x": X}),
    "take_columns": (functools.partial(take_columns, PATTERN), {"x": LABELS}),
    "select_entries": (select_entries, {"matrix": GRAPH, "keep": np.ones(NNZ, bool)}),
    "sparse_matrix": (
        lambda rows, columns, values: sparse_matrix(rows, columns, values, (N, N)),
        {"rows": RECEIVERS, "columns": SENDERS, "values": np.ones(5)},
    ),
    "adjacency": (
        lambda senders, receivers, weights: adjacency(senders, receivers, N, weights=weights, self_loops=True),
        {"senders": SENDERS, "receivers": RECEIVERS, "weights": np.ones(5)},
    ),
    "gcn_adjacency": (
        lambda senders, receivers, weights: gcn_adjacency(senders, receivers, N, weights=weights),
        {"senders": SENDERS, "receivers": RECEIVERS, "weights": np.ones(5)},
    ),
    "gcn_normalize": (gcn_normalize, {"matrix": GRAPH}),
    "loopless_adjacency": (loopless_adjacency, {"matrix": GRAPH}),
    "row_normalize": (row_normalize, {"matrix": GRAPH}),
    "gcn": (lambda x, matrix: gcn(kernel(F), x, matrix), {"x": X, "matrix": GRAPH}),
    "sage": (lambda x, matrix: sage(kernel(F), x, matrix), {"x": X, "matrix": GRAPH}),
    "sage-max": (lambda x, matrix: sage(kernel(F), x, matrix, reduce="max"), {"x": X, "matrix": GRAPH}),
    "neighbour_max": (lambda x, matrix: neighbour_max(matrix, x), {"x": X, "matrix": GRAPH}),
    "appnp": (appnp, {"h": LOGITS, "matrix": GRAPH}),
    "sgc": (lambda x, matrix: sgc(kernel(F), x, matrix), {"x": X, "matrix": GRAPH}),
    "gcnii": (
        lambda x, first, matrix: gcnii({"kernel": ones((F, F))}, x, first, matrix, layer=1),
        {"x": X, "first": X, "matrix": GRAPH},
    ),
    "gat": (lambda x, matrix: gat(attention(), x, matrix), {"x": X, "matrix": GRAPH}),
    "gatv2": (
        lambda x, matrix: gatv2(
            {
                "source_kernel": ones((F, K * H)),
                "target_kernel": ones((F, K * H)),
                "source_bias": ones(K * H),
                "target_bias": ones(K * H),
                "attention": ones((K, H)),
            },
            x,
            matrix,
        ),
        {"x": X, "matrix": GRAPH},
    ),
    "supergat": (lambda x, matrix: supergat(attention(), x, matrix), {"x": X, "matrix": GRAPH}),
    "edge_softmax": (
        functools.partial(edge_softmax, PATTERN),
        {"logits": ones((NNZ, K)), "edge": ones(NNZ, bool)},
    ),
    "weighted_sums": (
        functools.partial(weighted_sums, PATTERN),
        {"weights": ones((NNZ, K)), "x": ones((N, K, H))},
    ),
    "edge_dot": (functools.partial(edge_dot, PATTERN), {"left": ones((N, K, H)), "right": ones((N, K, H))}),
    "label_propagation": (
        lambda matrix, labels, mask: label_propagation(matrix, labels, mask, C),
        {"matrix": GRAPH, **measured},
    ),
    "correct_and_smooth": (
        correct_and_smooth,
        {"matrix": GRAPH, "probabilities": full((N, C), 1 / C), **measured},
    ),
    "from_graphs_tuple": (lambda weights: from_graphs_tuple(JRAPH, weights=weights), {"weights": np.ones(4)}),
    "to_graphs_tuple": (to_graphs_tuple, {"matrix": GRAPH, "nodes": X, "edges": ones(NNZ)}),
    "get_fully_connected_graph": (
        lambda node_features: get_fully_connected_graph(2, 1, node_features),
        {"node_features": ones((2, 3))},
    ),
    "zero_out_padding": (nodes_of_two, {"b": ones(4), "a": ones(4)}),
    "NeighbourSampler": (
        lambda matrix: NeighbourSampler(matrix, [0, 1], (2,), batch_size=2, seed=0),
        {"matrix": GRAPH},
    ),
    "block_mean": (functools.partial(block_mean, BATCH.blocks[0]), {"x": ones((BATCH.blocks[0].sources, 2))}),
    "block_sum": (functools.partial(block_sum, BATCH.blocks[0]), {"x": ones((BATCH.blocks[0].sources, 2))}),
    "shard_matrix": (lambda matrix: shard_matrix(matrix, MESH, "data"), {"matrix": GRAPH}, "host"),
    "sharded_spmm": (functools.partial(sharded_spmm, SHARDED), {"x": shard_rows(X, MESH, "data")}),
    "masked_cross_entropy": (functools.partial(masked_cross_entropy, LOGITS), measured),
    "masked_accuracy": (functools.partial(masked_accuracy, LOGITS), measured),
    "brier_score": (functools.partial(brier_score, LOGITS), measured),
    "expected_calibration_error": (functools.partial(expected_calibration_error, LOGITS), measured),
    "members_loss": (functools.partial(members_loss, ones((K, N, C))), measured),
    "drop_edges": (lambda matrix: drop_edges(KEY, matrix, 0.5), {"matrix": GRAPH}),
    "prune_edges": (
        functools.partial(prune_edges, PATTERN),
        {"keep": ones(NNZ, bool), "predictions": LABELS, "mask": MASK},
    ),
    "select_pseudolabels": (
        lambda confidence, mask, sampled: select_pseudolabels(confidence, mask, 0.5, sampled),
        {"mask": MASK, "confidence": CONFIDENCE, "sampled": LABELS[None]},
    ),
    "most_confident": (
        lambda candidates, confidence, predictions: most_confident(candidates, confidence, predictions, C, 1),
        {"candidates": MASK, "confidence": CONFIDENCE, "predictions": LABELS},
    ),
    "self_training": (
        lambda labels, mask: self_training(lambda *_: 0, lambda _: LOGITS, labels, mask, stages=1),
        {"mask": MASK, "labels": LABELS},
        "host",
    ),
    "train_stage": (trained, {"labels": LABELS, "weights": ones(N)}),
    "calibrate": (functools.partial(calibrate, calibration_init(KEY, C)), {"logits": LOGITS, "adjacency": GRAPH}),
    "fit_calibration": (
        lambda adjacency, labels, weights: fit_calibration(KEY, LOGITS, adjacency, labels, weights, epochs=1),
        {"adjacency": GRAPH, "labels": LABELS, "weights": ones(N)},
    ),
    "fastrain": (functools.partial(node_problem, lambda p: fastrain(KEY, init, apply, p, QUICK)), NODE, "slow"),
    "fastrain_init": (functools.partial(node_problem, lambda p: fastrain_init(KEY, init, p, QUICK)), NODE, "host"),
    "geeni": (functools.partial(geeni_problem, lambda p: geeni(KEY, p, ONE)), GEENI, "slow"),
    "geeni_init": (functools.partial(geeni_problem, lambda p: geeni_init(KEY, p, config=ONE)), GEENI),
    "ensemble_logits": (functools.partial(ensemble_logits, MEMBERS), {"features": X, "adjacency": GRAPH}),
    "ensemble_macs": (functools.partial(ensemble_macs, MEMBERS, X), {"adjacency": GRAPH}),
    "fastest_members_loop": (
        functools.partial(fastest_members_loop, MEMBERS),
        {"features": X, "adjacency": GRAPH},
        "slow",
    ),
    "mask_features": (functools.partial(mask_features, MEMBERS), {"keep": ones((K, F), bool)}),
    "serve_ensemble": (functools.partial(serve_ensemble, MEMBERS), {"features": X, "adjacency": GRAPH}),
    "inductive_probabilities": (
        functools.partial(inductive_probabilities, MEMBERS),
        {"features": X, "adjacency": GRAPH, "known": MASK},
    ),
    "isolate": (isolate, {"matrix": GRAPH, "active": np.asarray(MASK)}, "host"),
    "isolated_values": (isolated_values, {"matrix": GRAPH, "active": MASK, "weights": ones(NNZ)}),
    "strongest_edges": (lambda matrix: strongest_edges(matrix, 0.5), {"matrix": GRAPH}, "host"),
    "alike_edges": (lambda features: alike_edges(features, PATTERN), {"features": X}),
    "active_nodes": (
        lambda correctness, known: active_nodes(correctness, 0.5, known),
        {"known": MASK, "correctness": CONFIDENCE},
    ),
    "error_auc": (error_auc, {"wrong": MASK, "mask": MASK}),
    "error_scores": (error_scores, {"probabilities": full((K, N, C), 1 / C)}),
    "learned_correctness": (functools.partial(learned, learned_correctness), learn, "slow"),
    "held_out_correctness": (functools.partial(learned, held_out_correctness), learn, "slow"),
}
CASES["error_auc"] = (functools.partial(error_auc, CONFIDENCE), {"wrong": MASK, "mask": MASK})
# A leading axis may have any length here: only more axes are wrong.
ANY_LENGTH = {("error_scores", "probabilities"), ("select_pseudolabels", "sampled")}
ANY_AXES = {"spmm x", "row_sums entries", "column_sums entries", "take_rows x", "take_columns x", "sharded_spmm x"}
ANY_AXES |= {"get_fully_connected_graph node_features", "to_graphs_tuple nodes", "to_graphs_tuple edges"}
ANY_AXES |= {"zero_out_padding a", "zero_out_padding b"}
NO_ARRAYS = {
    *("FastrainConfig", "GeeniConfig", "GcnMembers", "GeeniProblem", "NodeProblem", "ServedEnsemble", "SparseMatrix"),
    *("SparsePattern", "ShapeGate", "GraphBatches", "GATConv", "GCNConv", "GCNIIConv", "SAGEConv", "SGCConv"),
    *("adam_l2", "stage_plan", "init_members", "graph_ladder"),
    # Their arguments are states and graphs that other functions made and checked.
    *("fastrain_graph", "fastrain_next", "fastrain_params", "fastrain_scores", "fastrain_step"),
    *("geeni_next", "geeni_serve", "geeni_step", "geeni_views", "pad_graphs", "padding_masks"),
    # One array each, of any length.
    *("ensemble_probabilities", "member_probabilities", "fold_members", "prune_width", "shard_rows"),
}


def public_names():
    found = set()
    for path in (Path(__file__).parents[2] / "effjax" / "graph").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                found |= set(ast.literal_eval(node.value))
    return found


def damaged(name, argument, array):
    """The array with wrong shapes, and the matrix with values of wrong lengths or of another kind."""
    if isinstance(array, SparseMatrix):
        values = np.asarray(array.values)
        for wrong in (np.concatenate([values, values[:1]]), values[:-1], values[:1], values[:, None]):
            yield array._replace(values=jax.device_put(wrong))
        yield array.todense()
        return
    array = np.asarray(array)
    if (name, argument) not in ANY_LENGTH:
        yield np.concatenate([array, array[:1]])
        yield array[:-1]
        yield array[:1]
    if f"{name} {argument}" not in ANY_AXES:
        yield array[..., None]
        yield array[0] if array.ndim > 1 else array[:, None].T


def test_every_public_function_is_tried():
    assert public_names() <= set(CASES) | NO_ARRAYS
    assert not set(CASES) & NO_ARRAYS


@pytest.mark.parametrize("name", CASES)
def test_arrays_that_do_not_fit_are_refused_by_name(name):
    function, arrays, *how = CASES[name]
    if "host" in how:
        function(**arrays)
    elif not how:
        jax.eval_shape(lambda: (function(**arrays), None)[1])
    for argument, array in arrays.items():
        for wrong in damaged(name, argument, array):
            with pytest.raises((ValueError, TypeError)) as error:
                function(**(arrays | {argument: wrong}))
            names = "|".join(arrays)
            assert re.search(rf"\b(problem\.|graph\.)?({names})\b", str(error.value)), (
                argument,
                np.shape(wrong),
                error,
            )
            assert "XLA" not in str(error.value)
            assert "dot_general" not in str(error.value)


def test_problems_are_checked_while_tracing():
    with pytest.raises(ValueError, match=r"problem.labels is int32\[5, 1\]"):
        jax.eval_shape(
            lambda labels: geeni_init(KEY, GeeniProblem(**GEENI | {"labels": labels}, classes=C), config=ONE),
            LABELS[:, None],
        )
    assert dataclasses.is_dataclass(GeeniProblem)


def test_shard_rows_takes_rows_only():
    assert shard_rows(X, MESH, "data").shape == X.shape


def test_counts_and_sums_of_integers_are_exact():
    entries = full(NNZ, 2**24 + 1)
    np.testing.assert_array_equal(row_sums(PATTERN, entries), np.bincount(PATTERN.rows, minlength=N) * (2**24 + 1))


@pytest.mark.parametrize("weights", [[-2.0, 1, 1, 1, 1], [np.nan, 1, 1, 1, 1], [np.inf, 1, 1, 1, 1]])
def test_weights_without_a_degree_are_refused(weights):
    with pytest.raises(ValueError, match=r"weights: 1 of 5 are negative or not finite, the first is weights\[0\]"):
        gcn_adjacency(SENDERS, RECEIVERS, N, weights=weights)
    bare = SparseMatrix(PATTERN, ones(NNZ).at[1].set(weights[0]))
    for normalize in (gcn_normalize, row_normalize):
        with pytest.raises(ValueError, match=r"first is matrix.values\[1\]"):
            normalize(bare)


def test_integer_weights_are_numbers():
    weights = np.array([3, 3, 2, 2, 4])
    dense = np.eye(N)
    dense[RECEIVERS, SENDERS] = weights
    scale = 1 / np.sqrt(dense.sum(1))
    expected = scale[:, None] * dense * scale
    for given in (weights, weights.astype(np.uint8)):
        np.testing.assert_allclose(gcn_adjacency(SENDERS, RECEIVERS, N, weights=given).todense(), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="values of int64 do not fit into int32"):
        sparse_matrix(SENDERS, RECEIVERS, weights.astype(np.int64) << 40, (N, N))


def test_integers_times_a_matrix_are_not_cut_to_integers():
    np.testing.assert_allclose(spmm(GRAPH, LABELS), np.asarray(GRAPH.todense()) @ np.asarray(LABELS), rtol=1e-6)


def test_signed_features_are_left_as_they_are():
    data = GraphData("signed", "made", SENDERS, RECEIVERS, np.eye(N, dtype=np.float32) * -2, np.asarray(LABELS), C)
    np.testing.assert_array_equal(node_data(data, sparse_below=1.0).features.values, np.full(N, -2.0))
    with pytest.raises(ValueError, match="no measure of a row"):
        node_data(data, row_normalize=True)
