import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.graph.sparse.adjacency_matrices import adjacency, gcn_adjacency
from effjax.graph.sparse.products import spmm
from effjax.graph.sparse.sharding import shard_matrix, shard_rows, sharded_spmm


def test_eight_devices_equal_one():
    rng = np.random.default_rng(0)
    N, F, C = 90, 7, 3  # 90 is no multiple of 8
    pairs = np.unique(rng.integers(0, N - 2, (600, 2)), axis=0)
    whole = gcn_adjacency(*pairs.T, N, capacity=900)
    x, labels = rng.normal(size=(N, F)).astype(np.float32), rng.integers(0, C, N)
    mask = rng.random(N) < 0.5
    params = {"w0": rng.normal(size=(F, 8)), "b0": np.zeros(8), "w1": rng.normal(size=(8, C)), "b1": np.zeros(C)}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    tx = optax.sgd(0.3)

    def loss(params, matrix, x, labels, mask, product):
        h = jax.nn.relu(product(matrix, x @ params["w0"]) + params["b0"][None])
        logits = product(matrix, h @ params["w1"]) + params["b1"][None]
        each = -jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, C), axis=-1)
        return jnp.sum(jnp.where(mask, each, 0)) / jnp.sum(mask)

    def train(product, params, *data, steps=5, replicated=None):
        @functools.partial(jax.jit, out_shardings=replicated)
        def step(params, state, *data):
            value, grads = jax.value_and_grad(loss)(params, *data, product)
            updates, state = tx.update(grads, state)
            return optax.apply_updates(params, updates), state, value

        state, losses = jax.jit(tx.init, out_shardings=replicated)(params), []
        for _ in range(steps):
            params, state, value = step(params, state, *data)
            losses.append(float(value))
        return params, losses, step._cache_size()

    right, right_losses, _ = train(spmm, params, whole, x, labels, mask)
    assert right_losses[-1] < right_losses[0]

    def place(mesh, axis):
        matrix = shard_matrix(whole, mesh, axis)
        devices = mesh.shape[axis]
        assert matrix.blocks.values.shape[0] == devices
        assert matrix.shape == (-(-N // devices) * devices,) * 2
        assert 0.5 < matrix.fill <= 1  # and the padding of the whole matrix is gone
        xs, ys, ms = shard_rows((x, labels, mask), mesh, axis)
        assert xs.sharding.spec == P(axis)
        assert not np.asarray(ms)[N:].any()
        return matrix, xs, ys, ms

    matrix, xs, ys, ms = place(jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,)), "rows")
    assert {s.data.shape[0] for s in matrix.blocks.values.addressable_shards} == {1}
    replicated = NamedSharding(matrix.mesh, P())
    start = jax.device_put(params, replicated)
    ours, losses, compiles = train(sharded_spmm, start, matrix, xs, ys, ms, replicated=replicated)
    np.testing.assert_allclose(losses, right_losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert compiles == 1

    # One product: values, collectives, gradients to the rows and to the entries, whatever the mesh.
    NAMES = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"
    collectives = lambda text: sorted(re.findall(f" ({NAMES})[(]", text))

    whole_out, pull = jax.vjp(lambda values, x: spmm(whole._replace(values=values), x), whole.values, jnp.asarray(x))
    to_values, to_x = pull(jnp.sin(whole_out))

    @functools.partial(jax.jit, static_argnames="entries")
    def both_ways(matrix, x, entries=False):
        with_values = lambda v: dataclasses.replace(matrix, blocks=matrix.blocks._replace(values=v))
        out, pull = jax.vjp(lambda values, x: sharded_spmm(with_values(values), x), matrix.blocks.values, x)
        return (out, *pull(jnp.sin(out))) if entries else (out, pull(jnp.sin(out))[1])

    meshes = (
        jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Explicit,)),
        jax.make_mesh((4, 2), ("rows", "model"), axis_types=(AxisType.Auto,) * 2),
    )
    for mesh in meshes:
        matrix, xs, _, _ = place(mesh, "rows")
        np.testing.assert_allclose(np.asarray(matrix @ xs)[:N], whole_out, rtol=1e-5, atol=1e-6)  # not under jit
        compiled = both_ways.lower(matrix, xs).compile()
        text = compiled.as_text()
        assert collectives(text) == ["all-gather", "reduce-scatter"], collectives(text)
        assert text.count("cpu_csr_sparse_dense_ffi") == 2
        assert " scatter(" not in text
        out, ours = compiled(matrix, xs)
        assert out.sharding.spec[0] == ours.sharding.spec[0] == "rows"
        np.testing.assert_allclose(np.asarray(out)[:N], whole_out, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.asarray(ours)[:N], to_x, rtol=1e-4, atol=1e-5)
        assert not np.asarray(out)[N:].any()

    ours = np.asarray(both_ways(matrix, xs, entries=True)[1])
    real = np.concatenate([row[:size] for row, size in zip(ours, np.asarray(matrix.blocks.pattern.size), strict=True)])
    np.testing.assert_allclose(real, to_values[: len(real)], rtol=1e-4, atol=1e-5)

    # More devices than nodes, and no edges.
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    few = adjacency([0, 1], [1, 2], 3)
    np.testing.assert_array_equal(
        np.asarray(shard_matrix(few, mesh, "rows") @ shard_rows(np.eye(3, dtype=np.float32), mesh, "rows"))[:3],
        few.todense(),
    )
    empty = shard_matrix(adjacency([], [], 3), mesh, "rows") @ jnp.ones((8, 2))
    assert empty.shape == (8, 2)
    assert not np.asarray(empty).any()


RING = adjacency([0, 1, 2], [1, 2, 0], 3)
MESH = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))


def test_one_device_and_bad_input():
    matrix = shard_matrix(RING, MESH, "data")
    assert matrix.fill == 1
    np.testing.assert_array_equal(matrix @ jnp.eye(3), RING.todense())
    with pytest.raises(ValueError, match=r"axis='date' is not one of 'data'. Did you mean 'data'"):
        shard_matrix(RING, MESH, "date")
    with pytest.raises(ValueError, match="axis='x'"):
        shard_rows(np.ones(3), MESH, "x")
    with pytest.raises(ValueError, match=r"x has shape \(4, 2\).*needs 3 rows. Pad and place x with shard_rows"):
        sharded_spmm(matrix, jnp.ones((4, 2)))
