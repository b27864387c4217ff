"""Multiply-accumulates: against hand counts, XLA's own flops, and the invariants of differentiation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental import sparse

from effjax.core.macs import MacCount, count_macs, holds_loop, register_macs

X, W = jnp.ones((8, 4)), jnp.ones((4, 16))
SQUARE = jnp.ones((4, 4))


def exactly(macs: int) -> MacCount:
    return MacCount(macs, macs, macs)


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("ij,jk->ik", [(2, 3), (3, 5)], 2 * 3 * 5),
        ("bij,bjk->bik", [(7, 2, 3), (7, 3, 5)], 7 * 2 * 3 * 5),
        ("ij,ij->", [(2, 3), (2, 3)], 6),
        ("bhqd,bhkd->bhqk", [(2, 3, 4, 5), (2, 3, 6, 5)], 2 * 3 * 4 * 6 * 5),
    ],
)
def test_dot(equation, shapes, macs):
    arrays = [jnp.ones(shape) for shape in shapes]
    assert count_macs(lambda *xs: jnp.einsum(equation, *xs), *arrays) == exactly(macs)


def conv(x, kernel, **kwargs):
    kwargs = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")} | kwargs
    return lax.conv_general_dilated(x, kernel, **kwargs)


@pytest.mark.parametrize(
    ("kernel", "kwargs", "macs"),
    [
        ((3, 3, 4, 6), {}, 2 * 8 * 8 * 6 * 4 * 9),
        ((3, 3, 4, 6), {"window_strides": (2, 2)}, 2 * 4 * 4 * 6 * 4 * 9),
        ((3, 3, 4, 6), {"padding": "VALID", "rhs_dilation": (2, 2)}, 2 * 4 * 4 * 6 * 4 * 9),
        ((3, 3, 2, 6), {"feature_group_count": 2}, 2 * 8 * 8 * 6 * 2 * 9),
        ((3, 3, 1, 4), {"feature_group_count": 4}, 2 * 8 * 8 * 4 * 9),
        ((3, 3, 4, 6), {"batch_group_count": 2}, 1 * 8 * 8 * 6 * 4 * 9),
    ],
)
def test_conv(kernel, kwargs, macs):
    assert count_macs(lambda x, k: conv(x, k, **kwargs), jnp.ones((2, 8, 8, 4)), jnp.ones(kernel)) == exactly(macs)


def test_transposed_conv_does_not_pay_for_inserted_zeros():
    # Stride 2 upsampling: each of the 8 x 8 inputs meets each of the 4 x 4 taps once, but for the cropped border.
    count = count_macs(
        lambda x, k: lax.conv_transpose(x, k, (2, 2), "VALID"), jnp.ones((1, 8, 8, 3)), jnp.ones((4, 4, 3, 5))
    )
    full = 8 * 8 * 16 * 3 * 5
    assert full <= count.most <= 1.35 * full  # the border's padding is counted, as in any other convolution
    assert count.most < 18 * 18 * 16 * 3 * 5 / 3.9


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 6), inner=st.integers(1, 6), columns=st.integers(1, 6), channels=st.integers(1, 4),
    size=st.integers(3, 7), kernel=st.integers(1, 3), stride=st.integers(1, 2), dilation=st.integers(1, 2),
)  # fmt: skip
def test_twice_the_macs_are_the_flops_of_xla(rows, inner, columns, channels, size, kernel, stride, dilation):
    def flops(function, *args):
        return jax.jit(function).lower(*args).cost_analysis()["flops"]

    dot = (lambda a, b: a @ b, jnp.ones((rows, inner)), jnp.ones((inner, columns)))
    assert flops(*dot) == 2 * count_macs(*dot).most
    if dilation * (kernel - 1) < size:
        valid = {"padding": "VALID", "window_strides": (stride, stride), "rhs_dilation": (dilation, dilation)}
        args = (jnp.ones((rows, size, size, channels)), jnp.ones((kernel, kernel, channels, columns)))
        convolve = lambda x, k: conv(x, k, **valid)
        assert flops(convolve, *args) == 2 * count_macs(convolve, *args).most


def test_backward_pass_costs_twice_the_forward_pass():
    kernel, x = jnp.ones((1, 1, 4, 6)), jnp.ones((2, 8, 8, 4))
    loss = lambda k, x: jnp.sum(jnp.sin(conv(x, k)))
    forward = count_macs(loss, kernel, x).most
    assert count_macs(jax.value_and_grad(loss, argnums=(0, 1)), kernel, x) == exactly(3 * forward)
    assert count_macs(jax.grad(loss), kernel, x) == exactly(2 * forward)


def test_dead_code_costs_nothing():
    def step(x):
        unused = x @ W @ W.T
        return jnp.sum(x), jax.jit(lambda x: (x, x @ W))(x)[0], unused.shape[0]

    assert count_macs(step, X) == exactly(0)


def test_calls_are_looked_into():
    @jax.custom_vjp
    def product(x):
        return x @ W

    product.defvjp(lambda x: (product(x), None), lambda _, g: (g @ W.T,))

    @jax.custom_jvp
    def other(x):
        return x @ W

    other.defjvp(lambda primals, tangents: (other(*primals), tangents[0] @ W))
    one = 8 * 4 * 16
    for function in (product, other, jax.jit(lambda x: x @ W), jax.checkpoint(lambda x: x @ W)):
        assert count_macs(function, X) == exactly(one)
    assert count_macs(jax.grad(lambda x: jnp.sum(product(x) ** 2)), X) == exactly(2 * one)
    deep = lambda x: jnp.sum(jnp.sin(jnp.sin(x @ SQUARE) @ SQUARE))
    # Two products forward and two backward; with remat the forward pass runs a second time.
    assert count_macs(jax.value_and_grad(deep), X) == exactly(4 * 8 * 4 * 4)
    assert count_macs(jax.value_and_grad(jax.checkpoint(deep)), X) == exactly(6 * 8 * 4 * 4)


def test_scan_multiplies_by_its_length():
    body = lambda x, _: (x @ SQUARE, None)
    one = 8 * 4 * 4
    assert count_macs(lambda x: lax.scan(body, x, None, length=5)[0], X) == exactly(5 * one)
    assert count_macs(lambda x: lax.fori_loop(0, 5, lambda i, x: x @ SQUARE, x), X) == exactly(5 * one)
    assert count_macs(lambda x: lax.map(lambda row: row @ W, x), X) == exactly(8 * 4 * 16)
    nested = lambda x: lax.scan(lambda x, _: (lax.scan(body, x, None, length=3)[0], None), x, None, length=5)[0]
    assert count_macs(nested, X) == exactly(15 * one)
    assert count_macs(lambda x: lax.scan(body, x, None, length=0)[0], X) == exactly(0)


def test_while_is_reported_not_guessed():
    def loop(x):
        with jax.named_scope("solver"):
            return lax.while_loop(lambda x: jnp.sum(x @ W) < 3, lambda x: x @ SQUARE, x @ SQUARE)

    count = count_macs(loop, X)
    assert count.least == 8 * 4 * 4 + 8 * 4 * 16  # before the loop, and its test at least once
    assert count.most is None
    assert count.expected is None
    assert count.unknown == (f"while in solver: {8 * 4 * 4 + 8 * 4 * 16} MACs a trip",)
    harmless = lambda x: lax.while_loop(lambda i: i < 3, lambda i: i + x.astype(int), 0)
    assert count_macs(harmless, jnp.float32(1)) == exactly(0)


def gated(x):
    with jax.named_scope("gate"):
        return lax.cond(x[0, 0] > 0, lambda x: x @ SQUARE @ SQUARE, lambda x: x, x)


def test_cond_gives_least_most_and_the_measured_expectation():
    one = 8 * 4 * 4
    assert count_macs(gated, X) == MacCount(0, 2 * one, None)
    measured = {"gate": (0.75, 0.25)}
    assert count_macs(gated, X, branch_probabilities=measured) == MacCount(0, 2 * one, 0.5 * one)
    scanned = lambda x: lax.scan(lambda x, _: (gated(x), None), x @ SQUARE, None, length=4)[0]
    assert count_macs(scanned, X, branch_probabilities=measured) == MacCount(one, 9 * one, 3 * one)
    # A vmapped condition computes both branches, and is counted so.
    assert count_macs(jax.vmap(gated), X[None]) == exactly(2 * one)


def test_probabilities_reach_flax_modules_and_their_gradients_by_scope():
    class Skip(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (4, 4))
            return lax.cond(x[0, 0] > 0, lambda: x @ kernel, lambda: x)

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Skip(name="second")(Skip(name="first")(x))

    model = Two()
    params = model.init(jax.random.key(0), X)
    one = 8 * 4 * 4
    measured = {"first": (0.5, 0.5), ".*": (1.0, 0.0)}
    assert count_macs(model.apply, params, X, branch_probabilities=measured) == MacCount(0, 2 * one, 0.5 * one)
    grad = jax.grad(lambda p, x: jnp.sum(model.apply(p, x) ** 2))
    count = count_macs(grad, params, X, branch_probabilities=measured)
    assert count.expected == pytest.approx(0.5 * 2 * one)  # the input's gradient of the first layer is dead


def test_switch_has_one_probability_a_branch():
    branches = [lambda x: x, lambda x: x @ SQUARE, lambda x: x @ SQUARE @ SQUARE]
    function = lambda x: lax.switch(x[0, 0].astype(int), branches, x)
    count = count_macs(function, X, branch_probabilities={"": (0.5, 0.25, 0.25)})
    assert count == MacCount(0, 2 * 128, 96)


def test_a_branch_never_taken_may_be_unknown():
    endless = lambda x: lax.while_loop(lambda x: jnp.sum(x) < 3, lambda x: x @ SQUARE, x)
    function = lambda x: lax.cond(x[0, 0] > 0, endless, lambda x: x @ SQUARE, x)
    assert count_macs(function, X, branch_probabilities={"": (0.5, 0.5)}).expected is None
    count = count_macs(function, X, branch_probabilities={"": (1.0, 0.0)})
    assert (count.least, count.most, count.expected) == (0, None, 128)
    assert count.unknown == ("while: 128 MACs a trip",)


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        ({"gate": (0.5, 0.25, 0.25)}, r"holds 3 numbers, but the condition in 'gate' has 2 branches.*\(false, true\)"),
        ({"gate": (0.5, 0.4)}, r"must sum to 1, not 0\.9"),
        ({"gate": (1.5, -0.5)}, r"branch_probabilities\['gate'\]=1\.5 must be a number in \[0, 1\]"),
        ({"gte": (0.5, 0.5)}, r"'gte' claims none of the 1 conditions.*Did you mean 'gate'"),
    ],
)
def test_probabilities_that_do_not_fit_are_refused(probabilities, message):
    with pytest.raises(ValueError, match=message):
        count_macs(gated, X, branch_probabilities=probabilities)


def test_ragged_dot_pays_for_one_group_a_row():
    args = (jnp.ones((8, 4)), jnp.ones((3, 4, 5)), jnp.asarray([2, 2, 4]))
    assert count_macs(lax.ragged_dot, *args) == exactly(8 * 4 * 5)
    grad = jax.grad(lambda l, r, g: jnp.sum(lax.ragged_dot(l, r, g) ** 2), argnums=(0, 1))
    assert count_macs(grad, *args) == exactly(3 * 8 * 4 * 5)


def test_sparse_products_pay_for_stored_elements_times_columns():
    dense = np.zeros((6, 4), np.float32)
    dense[[0, 2, 5], [1, 3, 0]] = 1
    bcoo = sparse.BCOO.fromdense(dense)
    bcsr = sparse.BCSR.fromdense(dense)
    right = jnp.ones((4, 10))
    assert count_macs(lambda m, x: m @ x, bcoo, right) == exactly(3 * 10)
    assert count_macs(lambda m, x: m @ x, bcsr, right) == exactly(3 * 10)
    assert count_macs(lambda m, x: m @ x, bcoo, right[:, 0]) == exactly(3)
    stacked = jnp.ones((7, 4, 10))
    assert count_macs(jax.vmap(lambda x: bcoo @ x), stacked) == exactly(7 * 3 * 10)
    assert count_macs(jax.vmap(lambda x: bcsr @ x), stacked) == exactly(7 * 3 * 10)

    def loss(data, x):
        return jnp.sum((sparse.BCOO((data, bcoo.indices), shape=bcoo.shape) @ x) ** 2)

    assert count_macs(jax.grad(loss, argnums=(0, 1)), bcoo.data, right) == exactly(3 * 3 * 10)


def test_shard_map_counts_all_devices():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    function = jax.shard_map(lambda x: x @ W, mesh=mesh, in_specs=spec, out_specs=spec)
    assert count_macs(function, X) == exactly(8 * 4 * 16)
    # Abstractly on four devices: the body sees a quarter of the rows.
    four = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    function = jax.shard_map(lambda x: x @ W, mesh=four, in_specs=spec, out_specs=spec)
    assert count_macs(function, jax.ShapeDtypeStruct(X.shape, X.dtype)) == exactly(8 * 4 * 16)


def test_pallas_grid_multiplies_its_kernel():
    pl = pytest.importorskip("jax.experimental.pallas")

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    product = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 16), jnp.float32),
        grid=(4,),
        in_specs=[pl.BlockSpec((2, 4), lambda i: (i, 0)), pl.BlockSpec((4, 16), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((2, 16), lambda i: (i, 0)),
        interpret=True,
    )
    assert count_macs(product, X, W) == exactly(8 * 4 * 16)


def test_what_cannot_be_counted_is_named():
    def solve(a):
        with jax.named_scope("newton"):
            return jnp.linalg.cholesky(a) @ a

    count = count_macs(solve, SQUARE)
    assert count.least == 4 * 4 * 4
    assert count.most is None
    assert len(count.unknown) == 1
    assert count.unknown[0].startswith("cholesky in newton")
    # A foreign primitive that runs a jaxpr nobody knows how often.
    root = lambda b: lax.custom_linear_solve(lambda v: SQUARE @ v, b, lambda _, b: b)
    assert count_macs(root, jnp.ones(4)).unknown == ("custom_linear_solve",)
    assert count_macs(lambda x: lax.reduce(x, 0.0, lambda a, b: a * b, (0,)), X) == exactly(0)


def test_register_macs_counts_a_custom_kernel(monkeypatch):
    monkeypatch.setattr("effjax.core.macs._CUSTOM", {})
    shape = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    kernel = lambda x: jax.pure_callback(lambda x: x @ np.asarray(W), shape, x)
    assert count_macs(kernel, X).unknown == ("pure_callback",)
    register_macs("pure_callback", lambda eqn: eqn.outvars[0].aval.size * eqn.invars[0].aval.shape[-1])
    assert count_macs(kernel, X) == exactly(8 * 4 * 16)
    register_macs("dot_general", lambda eqn: None)  # leaves it to the built-in rule
    assert count_macs(lambda x: x @ W, X) == exactly(8 * 4 * 16)
    with pytest.raises(TypeError, match="rule=3 must be a function"):
        register_macs("pure_callback", 3)


def test_arguments_may_be_abstract():
    assert count_macs(lambda x: x @ W, jax.ShapeDtypeStruct((8, 4), jnp.float32)) == exactly(8 * 4 * 16)


def test_holds_loop():
    scan = lambda length: jax.jit(lambda x: lax.scan(lambda x, _: (x + 1, None), x, None, length=length)[0])
    assert holds_loop(jax.make_jaxpr(scan(3))(X))
    assert not holds_loop(jax.make_jaxpr(scan(1))(X))
    assert holds_loop(jax.make_jaxpr(lambda x: lax.while_loop(lambda x: x < 3, lambda x: x + 1, x))(0))
    assert not holds_loop(jax.make_jaxpr(gated)(X))
