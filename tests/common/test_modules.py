"""What every module must satisfy, whatever it computes."""

import functools

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from module_cases import CASES, start

from effjax.core.cost import count_compiles
from effjax.core.tree import leaf_paths

BATCH = 4
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@functools.cache
def started(name):
    return start(CASES[name])


@functools.cache
def evaluator(name):
    module, _ = started(name)
    return jax.jit(lambda variables, *inputs: module.apply(variables, *inputs, **CASES[name].evaluate))


def outputs(name, *inputs):
    return evaluator(name)(started(name)[1], *inputs)


def assert_close(left, right, **tolerance):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, **{**TOLERANCE, **tolerance})


@pytest.fixture(params=CASES)
def name(request):
    return request.param


def test_shapes_known_before_running(name):
    case, (module, variables) = CASES[name], started(name)
    assert set(variables) == set(case.collections)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}
    abstract = jax.eval_shape(module.init, jax.random.key(0), *case.inputs(1))
    real = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == real
    promised = jax.eval_shape(evaluator(name), variables, *case.inputs(BATCH))
    result = outputs(name, *case.inputs(BATCH))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), promised) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), result
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


def test_second_call_is_equal_and_compiles_nothing(name):
    inputs = CASES[name].inputs(BATCH)
    first = outputs(name, *inputs)
    with count_compiles() as log:
        second = outputs(name, *inputs)
    assert log.names == []
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_compute_keeps_float32_parameters(name):
    case, (_, variables) = CASES[name], started(name)
    half = case.make(jnp.bfloat16)
    abstract = jax.eval_shape(half.init, jax.random.key(0), *case.inputs(1))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract["params"])} == {jnp.dtype("float32")}
    inputs = case.inputs(BATCH)
    low = jax.jit(lambda v, *x: half.apply(v, *x, **case.evaluate))(variables, *inputs)
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(outputs(name, *inputs)), strict=True):
        error = np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()
        assert 0 < error < case.bfloat16_error


@pytest.mark.once
def test_nnx_wrapped_module_gives_equal_outputs(name):
    case, (module, variables) = CASES[name], started(name)
    inputs = case.inputs(BATCH)
    wrapped = nnx.bridge.ToNNX(module)
    for attribute, value in nnx.bridge.variables.linen_vars_to_nnx_attrs(variables).items():
        setattr(wrapped, attribute, nnx.data(value))
    result = nnx.jit(lambda model, *x: model(*x, **case.evaluate))(wrapped, *inputs)
    assert_close(result, outputs(name, *inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.once
def test_every_parameter_gets_a_finite_gradient(name):
    case, (module, variables) = CASES[name], started(name)
    state = {kind: value for kind, value in variables.items() if kind != "params"}

    @jax.jit
    @jax.grad
    def gradient(params):
        result, _ = module.apply(
            {"params": params, **state},
            *case.inputs(BATCH),
            **case.train,
            rngs={"dropout": jax.random.key(1, impl="rbg")},
            mutable=list(state),
        )
        return sum(
            jnp.sum(leaf * jnp.arange(1.0, leaf.size + 1).reshape(leaf.shape)) for leaf in jax.tree.leaves(result)
        )

    gradients = gradient(variables["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    dead = [
        path
        for path, leaf in zip(leaf_paths(gradients), jax.tree.leaves(gradients), strict=True)
        if not np.abs(leaf).max() > 0
    ]
    assert dead == []


@pytest.mark.once
def test_examples_are_independent_in_evaluation(name):
    inputs = CASES[name].inputs(BATCH)
    batch = outputs(name, *inputs)
    one = jax.tree.map(lambda leaf: leaf[:1], inputs)
    assert_close(outputs(name, *one), jax.tree.map(lambda leaf: leaf[:1], batch))
    changed = jax.tree.map(lambda leaf: leaf.at[0].set(leaf[1]), inputs)
    result = outputs(name, *changed)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(a[1:], b[1:])
        assert np.abs(a[0] - b[0]).max() > 0


@pytest.mark.once
def test_vmap_over_examples_equals_the_batch(name):
    _, variables = started(name)
    inputs = CASES[name].inputs(BATCH)
    alone = lambda *x: jax.tree.map(
        lambda leaf: leaf[0], evaluator(name)(variables, *jax.tree.map(lambda leaf: leaf[None], x))
    )
    assert_close(jax.jit(jax.vmap(alone))(*inputs), outputs(name, *inputs))


@pytest.mark.once
def test_mesh_of_eight_devices_gives_the_same_outputs(name):
    case, (module, variables) = CASES[name], started(name)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    kinds = [kind for kind in variables if kind != "params"]

    @jax.jit
    def both(variables, *inputs):
        train = {**case.train, "rngs": {"dropout": jax.random.key(1)}, "mutable": kinds}
        return module.apply(variables, *inputs, **case.evaluate), module.apply(variables, *inputs, **train)

    inputs = case.inputs(16)
    spread = jax.device_put(inputs, NamedSharding(mesh, P("data")))
    result = both(jax.device_put(variables, NamedSharding(mesh, P())), *spread)
    assert len(jax.tree.leaves(result)[0].sharding.device_set) == 8
    assert_close(result, both(variables, *inputs))
