import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.core.depthwise import depthwise_conv
from effjax.core.macs import count_macs


def by_loops(x, kernel, s, pads):
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    taps = kernel.shape[:2]
    rows, columns = ((size - tap) // s + 1 for size, tap in zip(x.shape[1:3], taps, strict=True))
    y = np.zeros((x.shape[0], rows, columns, x.shape[3]))
    for i, j in np.ndindex(rows, columns):
        window = x[:, i * s : i * s + taps[0], j * s : j * s + taps[1]]
        y[:, i, j] = (window * kernel[None, :, :, 0]).sum((1, 2))
    return y


def draws(shape, taps, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape).astype(np.float32), rng.normal(size=(*taps, 1, shape[3])).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def gradients(x, kernel, strides, padding, impl):
    y, pull = jax.vjp(
        lambda x, kernel: depthwise_conv(x, kernel, strides=strides, padding=padding, impl=impl), x, kernel
    )
    return y, *pull(jnp.sin(y))


CASES = [
    ((2, 7, 6, 3), (3, 3), 1, "SAME"),
    ((2, 7, 6, 3), (3, 3), 2, "SAME"),
    ((1, 9, 5, 2), (5, 3), 2, ((2, 1), (0, 3))),
    ((3, 8, 8, 1), (1, 2), 3, "VALID"),
    ((2, 4, 4, 2), (2, 2), 3, 1),
    ((1, 1, 1, 4), (3, 3), 1, 1),
]


@pytest.mark.parametrize(("shape", "taps", "strides", "padding"), CASES)
def test_shifts_equal_the_grouped_convolution_and_its_gradients(shape, taps, strides, padding):
    x, kernel = draws(shape, taps)
    found, expected = (gradients(x, kernel, strides, padding, impl) for impl in ("shift", "conv"))
    pads = padding
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(shape[1:3], taps, (strides, strides), padding)
    elif isinstance(padding, int):
        pads = ((padding, padding), (padding, padding))
    np.testing.assert_allclose(found[0], by_loops(x, kernel, strides, pads), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2), st.integers(3, 6))
@settings(max_examples=6)
def test_any_size(strides, taps, pad, size):
    x, kernel = draws((1, size, size + 1, 2), (taps, taps), seed=size)
    if size + 2 * pad < taps:
        return
    y = jax.jit(lambda x, k: depthwise_conv(x, k, strides=strides, padding=pad))(x, kernel)
    np.testing.assert_allclose(y, by_loops(x, kernel, strides, ((pad, pad), (pad, pad))), rtol=1e-5, atol=1e-5)


def test_narrow_dtypes_sum_in_float32():
    x = jnp.asarray(np.full((1, 16, 16, 1), 1 / 3), jnp.bfloat16)
    y, _, dkernel = gradients(x, jnp.ones((3, 3, 1, 1), jnp.bfloat16), 1, "SAME", "shift")
    third = float(x[0, 0, 0, 0])
    assert y.dtype == dkernel.dtype == jnp.bfloat16
    assert float(y[0, 5, 5, 0]) == float(jnp.asarray(9 * third, jnp.bfloat16))
    # 196 inner outputs and some at the borders: a sum in bfloat16 stops growing near 256 * 0.004.
    exact = np.convolve(np.ones(16), np.ones(3), "same")
    exact = np.sin(np.float32(jnp.asarray(np.outer(exact, exact) * third, jnp.bfloat16)))
    np.testing.assert_allclose(float(dkernel[1, 1, 0, 0]), third * exact.sum(), rtol=0.01)


def test_multiply_accumulates_are_those_of_the_convolution():
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 8, 8, 3), (3, 3, 1, 3)))
    assert count_macs(lambda x, k: depthwise_conv(x, k, impl="shift"), x, kernel).most == 2 * 8 * 8 * 3 * 9
    loss = lambda x, k: depthwise_conv(x, k, impl="shift").sum()
    assert count_macs(jax.value_and_grad(loss, (0, 1)), x, kernel).most == 3 * 2 * 8 * 8 * 3 * 9
    many = jax.vmap(lambda x, k: depthwise_conv(x, k, impl="shift"), (None, 0))
    assert count_macs(many, x, jax.ShapeDtypeStruct((5, 3, 3, 1, 3), jnp.float32)).most == 5 * 2 * 8 * 8 * 3 * 9


def test_shards_of_the_batch_stay_where_they_are():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    x, kernel = draws((8, 6, 6, 2), (3, 3))
    expected = gradients(x, kernel, 1, "SAME", "shift")
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    found = gradients(sharded, kernel, 1, "SAME", "shift")
    assert found[0].sharding.spec == found[1].sharding.spec == PartitionSpec("data")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": np.ones((3, 3, 1, 2), np.float32)}, "one filter per channel"),
        ({"x": np.ones((1, 4, 4, 3), np.uint8)}, "uint8"),
        ({"strides": 0}, "strides=0"),
        ({"padding": "CAUSAL"}, "padding='CAUSAL'"),
        ({"padding": -1}, "padding=-1"),
        ({"padding": "VALID", "kernel": np.ones((5, 5, 1, 3), np.float32)}, "5 taps is larger than the 4"),
        ({"impl": "fft"}, "impl='fft'"),
    ],
)
def test_bad_input(changes, message):
    arguments = {"x": np.ones((1, 4, 4, 3), np.float32), "kernel": np.ones((3, 3, 1, 3), np.float32), **changes}
    with pytest.raises(ValueError, match=message):
        depthwise_conv(**arguments)
