import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.graph.sparse.adjacency_matrices import adjacency, gcn_adjacency, gcn_normalize, row_normalize
from effjax.graph.sparse.matrix import SparseMatrix, select_entries, sparse_matrix
from effjax.graph.sparse.products import (
    KERNELS,
    column_sums,
    fastest_spmm,
    matmul,
    row_sums,
    spmm,
    take_columns,
    take_rows,
)

KERNEL = "cpu_csr_sparse_dense_ffi"


def entries(rows=9, columns=7, share=0.3, seed=0):
    """A random matrix with an empty row and an empty column, as (rows, columns, values, dense)."""
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(rows, columns)) * (rng.uniform(size=(rows, columns)) < share)
    dense[rows // 2], dense[:, columns // 2] = 0, 0
    at = np.nonzero(dense)
    return *at, dense[at].astype(np.float32), dense


def matrix(**options):
    rows, columns, values, dense = entries()
    order = np.random.default_rng(1).permutation(len(rows))  # the order of the entries is free
    made = sparse_matrix(rows[order], columns[order], values[order], dense.shape, buckets=True, **options)
    return made, dense


@functools.partial(jax.jit, static_argnums=0)
def product_and_pull(kernel, a, x, g):
    """The product, and a cotangent of it pulled back to the values and to ``x``."""
    product, pull = jax.vjp(lambda values, x: spmm(SparseMatrix(a.pattern, values), x, kernel=kernel), a.values, x)
    return product, *pull(g)


def test_the_product_outside_of_jit():
    a, dense = matrix()
    x = np.random.default_rng(2).normal(size=(7, 5)).astype(np.float32)
    product, pull = jax.vjp(lambda x: a @ x, x)
    np.testing.assert_allclose(product, dense @ x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pull(product)[0], dense.T @ np.asarray(product), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capacity", [None, 40])
@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
def test_every_kernel_is_the_dense_product(kernel, capacity):
    a, dense = matrix(capacity=capacity)
    x = np.random.default_rng(2).normal(size=(7, 5)).astype(np.float32)
    g = np.random.default_rng(3).normal(size=(9, 5)).astype(np.float32)
    product, to_values, to_x = product_and_pull(kernel, a, x, g)
    np.testing.assert_allclose(product, dense @ x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_x, dense.T @ g, rtol=1e-5, atol=1e-6)
    wanted = (g @ x.T)[np.asarray(a.pattern.rows), np.asarray(a.pattern.columns)]
    real = np.asarray(a.pattern.valid)
    np.testing.assert_allclose(np.asarray(to_values)[real], wanted[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_second_derivatives(kernel):
    a, dense = matrix()
    rng = np.random.default_rng(2)
    x, direction = (rng.normal(size=size).astype(np.float32) for size in ((7, 2), a.values.shape))

    def loss(values, x):
        return jnp.sum(jnp.tanh(spmm(SparseMatrix(a.pattern, values), x, kernel=kernel)))

    def dense_loss(values, x):
        return jnp.sum(jnp.tanh(jnp.zeros(dense.shape).at[a.pattern.rows, a.pattern.columns].set(values) @ x))

    @jax.jit
    def curvatures(values):
        one = lambda f: jax.grad(lambda v: jnp.vdot(jax.grad(f)(v, x), direction))(values)
        return one(loss), one(dense_loss)

    found, wanted = curvatures(a.values)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_padding_is_inert_and_capacity_is_checked():
    plain, _ = matrix()
    padded, _ = matrix(capacity=plain.nnz + 5)
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    loss = lambda x, a, kernel: jnp.sum(spmm(a, x, kernel=kernel) ** 2)
    grads = jax.jit(lambda a: [jax.grad(loss)(x, a, kernel) for kernel in KERNELS])
    for one, other in zip(grads(plain), grads(padded), strict=True):
        np.testing.assert_array_equal(one, other)
    assert padded.nnz == plain.nnz + 5
    assert int(padded.pattern.valid.sum()) == plain.nnz
    with pytest.raises(ValueError, match=rf"capacity=3 is less than the {plain.nnz} entries"):
        matrix(capacity=3)


def test_messages_and_their_gradients():
    a, _ = matrix()
    pattern = a.pattern
    rows, columns = np.asarray(pattern.rows), np.asarray(pattern.columns)
    rng = np.random.default_rng(0)
    e = rng.normal(size=(a.nnz, 2, 3)).astype(np.float32)
    summed = np.zeros((9, 2, 3))
    np.add.at(summed, rows, e)
    both = jax.jit(lambda function, x, g: (lambda out, pull: (out, *pull(g)))(*jax.vjp(function, x)), static_argnums=0)
    found, pulled = both(functools.partial(row_sums, pattern), e, summed.astype(np.float32))
    np.testing.assert_allclose(found, summed, atol=1e-5)
    np.testing.assert_array_equal(pulled, summed.astype(np.float32)[rows])
    summed = np.zeros((7, 2, 3))
    np.add.at(summed, columns, e)
    np.testing.assert_allclose(column_sums(pattern, jax.device_put(e)), summed, atol=1e-5)
    x = rng.normal(size=(7, 2, 3)).astype(np.float32)
    taken, pulled = both(functools.partial(take_columns, pattern), x, e)
    np.testing.assert_array_equal(taken, x[columns])
    np.testing.assert_allclose(pulled, summed, atol=1e-5)
    x = rng.normal(size=9).astype(np.float32)
    np.testing.assert_array_equal(take_rows(pattern, jax.device_put(x)), x[rows])


def test_half_precision_sums_in_float32():
    ones = sparse_matrix(np.zeros(300, int), np.arange(300), None, (1, 300))
    x = np.ones((300, 1), jnp.bfloat16)
    for kernel in ("csr", "segment", "dense"):
        product = spmm(ones, x, kernel=kernel)
        assert product.dtype == jnp.bfloat16
        assert float(np.asarray(product)[0, 0]) == 300.0
    assert float(np.asarray(row_sums(ones.pattern, jax.device_put(np.ones(300, jnp.bfloat16))))[0]) == 300.0


def kernels(function, *args):
    """Calls of the CSR kernel in a compiled function, which must hold no scatter."""
    text = jax.jit(function).lower(*args).compile().as_text()
    assert "scatter(" not in text
    return text.count(f'custom_call_target="{KERNEL}"')


def test_the_kernel_stays_in_derivatives_and_under_vmap():
    a, _ = matrix()
    x = np.ones((7, 4), np.float32)
    grad = jax.grad(lambda x, a: jnp.sum(jnp.sin(a @ x)))
    assert kernels(grad, x, a) == 2  # one product each way
    assert (
        kernels(jax.vmap(grad, (0, None)), np.ones((3, 7, 4), np.float32), a) == 2
    )  # the members are columns of one product
    messages = jax.grad(lambda x, a: jnp.sum(jnp.sin(row_sums(a.pattern, take_columns(a.pattern, x)))))
    assert kernels(messages, x, a) == 2


def slopes(pattern, values, x):
    loss = lambda values, x: jnp.sum(jnp.sin(spmm(SparseMatrix(pattern, values), x)))
    return jax.grad(loss, (0, 1))(values, x)


jitted_slopes = jax.jit(slopes)


@pytest.mark.parametrize("size", [3, 20])
@pytest.mark.parametrize("which", [(0, None), (None, 0), (0, 0)])
def test_vmap_is_a_loop(which, size):
    a, _ = matrix()
    rng = np.random.default_rng(0)
    values = rng.normal(size=(size, a.nnz)).astype(np.float32) if which[0] == 0 else np.asarray(a.values)
    x = rng.normal(size=(size, 7, 4)).astype(np.float32) if which[1] == 0 else np.ones((7, 4), np.float32)
    found = [np.asarray(part) for part in jax.jit(jax.vmap(slopes, (None, *which)))(a.pattern, values, x)]
    for i in range(size):
        pick = lambda part, axis: part[i] if axis == 0 else part  # noqa: B023
        wanted = jitted_slopes(a.pattern, pick(values, which[0]), pick(x, which[1]))
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one[i], other, rtol=1e-5, atol=1e-6)


@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=20))
@settings(max_examples=15, deadline=None)
def test_any_pattern(places):
    r, c = [p[0] for p in places], [p[1] for p in places]
    values = np.arange(1.0, len(places) + 1, dtype=np.float32)
    a = sparse_matrix(r, c, values, (6, 5), capacity=20)  # one shape, so that the examples compile once
    dense = np.zeros((6, 5), np.float32)
    dense[r, c] = values
    np.testing.assert_array_equal(a.todense(), dense)
    np.testing.assert_array_equal(a.transpose.todense(), dense.T)
    x = np.arange(5, dtype=np.float32)
    for kernel in ("csr", "segment", "dense"):
        np.testing.assert_allclose(spmm(a, x, kernel=kernel), dense @ x, rtol=1e-6)
        np.testing.assert_allclose(spmm(a.transpose, np.ones(6, np.float32), kernel=kernel), dense.sum(0), rtol=1e-6)


def test_selection_drops_entries_and_padding():
    a, dense = matrix(capacity=40)
    keep = np.asarray(a.values) > 0
    small = select_entries(a, keep, capacity=30)
    assert small.nnz == 30
    assert int(small.pattern.size) == keep.sum()
    np.testing.assert_allclose(small.todense(), np.maximum(dense, 0), rtol=1e-6)
    with pytest.raises(ValueError, match=r"keep is bool\[3\]; bool \[40\]"):
        select_entries(a, np.ones(3, bool))


def test_an_empty_matrix():
    empty = sparse_matrix([], [], [], (3, 2), buckets=True)
    for kernel in KERNELS:
        np.testing.assert_array_equal(spmm(empty, np.ones((2, 4), np.float32), kernel=kernel), np.zeros((3, 4)))
    assert row_sums(empty.pattern, jnp.zeros((0, 2))).shape == (3, 2)


def test_fastest_is_one_of_the_kernels():
    a, _ = matrix()
    assert fastest_spmm(a, 4) in KERNELS
    assert matmul(jnp.ones((2, 7)), jnp.ones((7, 3))).shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [0, 9]}, r"rows holds 9 and 0 more numbers outside 0\.\.8"),
        ({"columns": [-1, 0]}, r"columns holds -1"),
        ({"rows": [0.5, 1]}, r"rows has shape \(2,\) and dtype float64"),
        ({"rows": [1, 1]}, r"1 entries stand twice, the first at row 1, column 2"),
        ({"values": [1.0]}, r"shapes \(2,\), \(2,\) and \(1,\)"),
        ({"capacity": 0}, "capacity=0"),
    ],
)
def test_bad_entries(change, message):
    given = {"rows": [0, 1], "columns": [2, 2], "values": [1.0, 1.0], "shape": (9, 7)} | change
    capacity = given.pop("capacity", None)
    with pytest.raises(ValueError, match=message):
        sparse_matrix(*given.values(), capacity=capacity)


def test_bad_products():
    a, _ = matrix()
    with pytest.raises(ValueError, match=r"x has shape \(6, 2\), but the matrix \(9, 7\) needs 7 rows"):
        a @ jnp.ones((6, 2))
    with pytest.raises(ValueError, match=r"kernel='csc' is not one of"):
        spmm(a, jnp.ones(7), kernel="csc")
    bare = sparse_matrix([0], [0], None, (9, 7))
    with pytest.raises(ValueError, match=r"buckets=True"):
        spmm(bare, jnp.ones(7), kernel="buckets")


def test_adjacency_receives_by_row():
    a = adjacency([0, 1, 2], [1, 2, 2], 4, weights=[2.0, 3.0, 5.0], self_loops=True)
    np.testing.assert_array_equal(a.todense(), [[1, 0, 0, 0], [2, 1, 0, 0], [0, 3, 5, 0], [0, 0, 0, 1]])
    with pytest.raises(ValueError, match=r"rows holds 4"):
        adjacency([0], [4], 4)


def test_normalisations():
    senders, receivers = [0, 1, 1, 2], [1, 0, 2, 1]
    s = np.asarray(gcn_adjacency(senders, receivers, 4, capacity=12).todense())
    plain = np.eye(4)
    plain[receivers, senders] = 1
    scale = plain.sum(1) ** -0.5
    np.testing.assert_allclose(s, scale[:, None] * plain * scale, rtol=1e-6)
    bare = gcn_normalize(adjacency(senders, receivers, 4))  # node 3 has no edge
    assert np.isfinite(np.asarray(bare.values)).all()
    mean = row_normalize(adjacency(senders, receivers, 4))
    np.testing.assert_allclose(np.asarray(mean.todense()).sum(1), [1, 1, 1, 0], rtol=1e-6)


def test_weights_of_edges():
    senders, receivers = [0, 1, 1, 2], [1, 0, 2, 1]
    for weights in ([3, 3, 2, 2], [0.5, 0.5, 2.0, 2.0]):  # counts, and numbers
        dense = np.eye(3)
        dense[receivers, senders] = weights
        degree = dense.sum(1)
        found = gcn_adjacency(senders, receivers, 3, weights=np.array(weights)).todense()
        np.testing.assert_allclose(found, dense / np.sqrt(np.outer(degree, degree)), rtol=1e-6)
    for weights, value in (([1.0, -2.0, 1.0, 1.0], "-2"), ([1.0, np.nan, 1.0, 1.0], "nan")):
        with pytest.raises(ValueError, match=rf"weights: 1 of 4 are negative or not finite, .*weights\[1\]={value}"):
            gcn_adjacency(senders, receivers, 3, weights=np.array(weights))
