"""Isolation: parity in float64, one matrix in three forms, what stays bit-equal, prunings, bad input."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.graph.isolation import (
    MODES,
    active_entries,
    alike_edges,
    edge_jaccard,
    isolate,
    isolated_values,
    random_edges,
    strongest_edges,
    top_entries,
)
from effjax.graph.members import ensemble_logits, init_members
from effjax.graph.sparse.adjacency_matrices import gcn_adjacency, gcn_normalize
from effjax.graph.sparse.matrix import SparseMatrix, select_entries, sparse_matrix
from effjax.graph.sparse.products import row_sums

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "geeni" / "geeni_core.npz"
NODES = 40


@functools.cache
def graph(seed=0, nodes=NODES, capacity=None):
    upper = np.triu(np.random.default_rng(seed).random((nodes, nodes)) < 0.12, 1)
    upper[:, -1] = False  # a node without neighbours
    rows, columns = np.nonzero(upper | upper.T)
    return gcn_adjacency(columns, rows, nodes, capacity=capacity)


def some(seed, share=0.2):
    return np.random.default_rng(seed).random(NODES) < share


def affected(matrix, errors, layers):
    """Nodes whose outputs isolation can change: those that lose a message, and for each layer their receivers."""
    dense = np.asarray(matrix.todense()) != 0
    lost = dense & errors & ~np.eye(len(errors), dtype=bool)
    first = found = lost.any(1)
    for _ in range(layers - 1):
        found = first | ((dense & ~lost) @ found)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_parity_with_the_reference(mode):
    reference = np.load(REFERENCE)
    with jax.enable_x64(True):
        rows, columns = np.nonzero(reference["S"])
        matrix = sparse_matrix(rows, columns, reference["S"][rows, columns], reference["S"].shape)
        isolated = isolate(matrix, ~reference["error_mask"], mode=mode)
        np.testing.assert_allclose(isolated.todense(), reference[f"S_iso_{mode}"], rtol=0, atol=1e-15)
        np.testing.assert_array_equal(isolated.pattern.indptr, reference[f"csr_indptr_{mode}"])
        np.testing.assert_array_equal(isolated.pattern.columns, reference[f"csr_indices_{mode}"])
        np.testing.assert_allclose(isolated.values, reference[f"csr_data_{mode}"], rtol=0, atol=1e-15)
        assert (matrix.nnz, isolated.nnz) == (reference["nnz_before"], reference["nnz_after"])
        for layers in (1, 2):
            expected = reference[f"affected_{layers}hop"]
            np.testing.assert_array_equal(affected(matrix, reference["error_mask"], layers), expected)


@pytest.mark.parametrize("mode", MODES)
def test_masked_compacted_and_dense_are_one(mode):
    matrix, errors = graph(), some(1)
    members = init_members(jax.random.key(0), 2, 5, 4, 3)
    x = jax.device_put(np.random.default_rng(2).normal(size=(NODES, 5)).astype(np.float32))
    small = isolate(matrix, ~errors, mode=mode)
    padded = isolate(matrix, ~errors, mode=mode, capacity=matrix.nnz)
    masked = matrix._replace(values=isolated_values(matrix, ~errors, mode=mode))
    dense = np.asarray(masked.todense())
    kernel_0, bias_0, kernel_1, bias_1 = map(np.asarray, members)
    hidden = np.maximum(dense @ (np.asarray(x) @ kernel_0) + bias_0[:, None], 0)
    expected = dense @ (hidden @ kernel_1) + bias_1[:, None]
    for form in (small, padded, masked):
        np.testing.assert_allclose(ensemble_logits(members, x, form), expected, rtol=0, atol=1e-5)
    sent = np.asarray(matrix.pattern.rows) != np.asarray(matrix.pattern.columns)
    sent &= errors[np.asarray(matrix.pattern.columns)]
    assert small.nnz == matrix.nnz - sent.sum() < matrix.nnz == padded.nnz


@pytest.mark.parametrize("mode", MODES)
def test_without_error_nodes_nothing_changes_by_a_bit(mode):
    matrix = graph()
    same = isolate(matrix, np.ones(NODES, bool), mode=mode)
    np.testing.assert_array_equal(same.values, matrix.values)
    np.testing.assert_array_equal(same.pattern.columns, matrix.pattern.columns)


def test_only_nodes_near_an_error_node_change():
    matrix, errors = graph(), np.zeros(NODES, bool)
    errors[0] = True
    members = init_members(jax.random.key(0), 3, 5, 4, 3)
    x = jax.device_put(np.random.default_rng(2).normal(size=(NODES, 5)).astype(np.float32))
    run = jax.jit(ensemble_logits)
    before, after = run(members, x, matrix), run(members, x, isolate(matrix, ~errors, mode="none"))
    changed = np.any(np.asarray(before) != np.asarray(after), axis=(0, 2))
    near = affected(matrix, errors, 2)
    assert not changed[~near].any()
    assert changed.any()
    assert (~near).any()


def test_row_sums_and_degrees():
    matrix, errors = graph(), some(4)
    pattern = matrix.pattern
    values = isolated_values(matrix, ~errors, mode="rowscale")
    np.testing.assert_allclose(row_sums(pattern, values), row_sums(pattern, matrix.values), rtol=1e-6)
    full = isolate(matrix, ~errors, mode="full")
    degree = np.bincount(np.asarray(pattern.rows), minlength=NODES)
    received = np.bincount(np.asarray(full.pattern.rows), minlength=NODES)
    expected = 1 / np.sqrt(received[np.asarray(full.pattern.rows)] * degree[np.asarray(full.pattern.columns)])
    np.testing.assert_allclose(full.values, expected, rtol=1e-6)
    assert np.asarray(full.todense()).diagonal().all()  # error nodes still see themselves


def test_weights_and_graphs_of_several_members():
    matrix, errors = graph(), some(5)
    pattern = matrix.pattern
    keep = np.asarray(random_edges(jax.random.key(0), pattern, 0.5)).astype(np.float32)
    own = gcn_normalize(SparseMatrix(pattern, jax.device_put(keep)))
    both = SparseMatrix(pattern, jax.device_put(np.stack([matrix.values, own.values])))
    weights = jax.device_put(np.stack([np.ones(pattern.nnz, np.float32), keep]))
    for mode in MODES:
        found = np.asarray(isolated_values(both, ~errors, mode=mode, weights=weights))
        np.testing.assert_allclose(found[0], isolated_values(matrix, ~errors, mode=mode), atol=1e-6)
        small = select_entries(own, keep > 0)
        np.testing.assert_allclose(found[1][keep > 0], isolated_values(small, ~errors, mode=mode), atol=1e-6)


def test_soft_isolation_lies_between_and_is_differentiable():
    matrix, errors = graph(), some(6)
    soft = jax.jit(lambda p: isolated_values(matrix, jnp.where(errors, p, 1.0), mode="rowscale"))
    np.testing.assert_allclose(soft(0.0), isolated_values(matrix, ~errors, mode="rowscale"), atol=1e-7)
    np.testing.assert_allclose(soft(1.0), matrix.values, atol=1e-7)
    slope = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(soft(p)))))(0.5)
    step = 1e-2
    total = lambda p: np.sum(np.square(np.asarray(soft(p), np.float64)))
    assert slope == pytest.approx((total(0.5 + step) - total(0.5 - step)) / (2 * step), rel=1e-2)


def test_padding_is_inert():
    matrix = graph(capacity=400)
    assert matrix.nnz == 400 > int(matrix.pattern.size)
    errors = some(7)
    for mode in MODES:
        expected = isolate(graph(), ~errors, mode=mode)
        found = isolate(matrix, ~errors, mode=mode)
        np.testing.assert_allclose(found.todense(), expected.todense(), atol=1e-6)
        assert found.nnz == expected.nnz
    assert not strongest_edges(matrix, 0.0)[int(matrix.pattern.size) :].any()
    assert not np.asarray(random_edges(jax.random.key(0), matrix.pattern, 1.0))[int(matrix.pattern.size) :].any()


def test_random_edges_go_in_both_directions():
    matrix = graph()
    keep = np.asarray(random_edges(jax.random.key(1), matrix.pattern, 0.5))
    dense = np.asarray(SparseMatrix(matrix.pattern, jax.device_put(keep.astype(np.float32))).todense())
    np.testing.assert_array_equal(dense, dense.T)
    assert dense.diagonal().all()
    off = np.asarray(matrix.pattern.rows) != np.asarray(matrix.pattern.columns)
    assert 0.3 < keep[off].mean() < 0.7


def test_prunings():
    matrix = graph()
    off = np.asarray(matrix.pattern.rows) != np.asarray(matrix.pattern.columns)
    keep = strongest_edges(matrix, 0.3)
    assert keep[~off].all()
    assert (~keep).sum() == int(0.3 * off.sum())
    assert np.asarray(matrix.values)[~keep].max() <= np.asarray(matrix.values)[keep & off].min()


def test_jaccard_equals_its_definition():
    matrix = graph()
    support = np.random.default_rng(0).random((NODES, 19)) < 0.2
    support[1] = support[2] = False
    found = edge_jaccard(matrix.pattern, support)
    rows, columns = np.asarray(matrix.pattern.rows), np.asarray(matrix.pattern.columns)
    for row, column, value in zip(rows, columns, found, strict=True):
        union = (support[row] | support[column]).sum()
        expected = 1 if row == column else (support[row] & support[column]).sum() / max(union, 1)
        assert value == np.float32(expected)


@pytest.mark.parametrize("surplus", [-7, 0, 9])
def test_top_entries_are_the_compacted_matrix_inside_jit(surplus):
    matrix, errors = graph(), some(8)
    expected = isolate(matrix, ~errors, mode="none")
    capacity = expected.nnz + surplus
    run = jax.jit(lambda values: top_entries(matrix._replace(values=values), capacity))
    found = run(isolated_values(matrix, ~errors, mode="none"))
    assert found.nnz == capacity
    if surplus < 0:
        keep = np.ones(expected.nnz, bool)
        keep[np.argsort(-np.asarray(expected.values), kind="stable")[capacity:]] = False
        expected = select_entries(expected, keep)
    x = np.random.default_rng(0).normal(size=(NODES, 3)).astype(np.float32)
    both = jax.jit(lambda matrix, x: (matrix @ x, jax.grad(lambda x: jnp.sum(jnp.square(matrix @ x)))(x)))
    for one, other, atol in zip(both(found, x), both(expected, x), (1e-6, 1e-5), strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


def test_bad_input():
    matrix = graph()
    with pytest.raises(ValueError, match=r"active is float32\[40\]; bool \[40\]"):
        isolate(matrix, np.zeros(NODES, np.float32))
    with pytest.raises(ValueError, match=r"active is bool\[3\]"):
        isolate(matrix, np.zeros(3, bool))
    with pytest.raises(ValueError, match=r"mode='ful' is not one of .*Did you mean 'full'"):
        isolate(matrix, np.zeros(NODES, bool), mode="ful")
    with pytest.raises(ValueError, match=r"active is float32\[3\]; bool or floating \[40\]"):
        isolated_values(matrix, jnp.ones(3))
    with pytest.raises(ValueError, match=r"capacity=5 is less than"):
        isolate(matrix, np.zeros(NODES, bool), capacity=5)
    with pytest.raises(ValueError, match=r"capacity=0 must be an integer in \[1"):
        top_entries(matrix, 0)
    with pytest.raises(ValueError, match=r"features has shape \(3, 2\); \[40, F\]"):
        alike_edges(jnp.zeros((3, 2)), matrix.pattern)
    with pytest.raises(ValueError, match=r"fraction=1.5 must be a number in \[0, 1\]"):
        strongest_edges(matrix, 1.5)


def test_a_graph_without_edges_keeps_its_diagonal():
    bare = gcn_adjacency(np.zeros(0, int), np.zeros(0, int), 4)
    for mode in MODES:
        found = isolate(bare, np.zeros(4, bool), mode=mode)
        np.testing.assert_array_equal(found.todense(), np.eye(4))
    assert active_entries(bare.pattern, np.zeros(4, bool)).all()
