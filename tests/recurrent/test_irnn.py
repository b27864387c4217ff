"""iRNN: parity, the invariants of its equilibrium, the forms agree, devices, memory, bad input."""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.core.errors import NoEffectWarning
from effjax.core.time_scan import scan_time
from effjax.recurrent.dual import DualODE, dual_ode
from effjax.recurrent.fixed_point import EquilibriumRNN, equilibrium, irnn_equilibrium, limit_norm
from effjax.recurrent.irnn import IncrementalRNN, IncrementalRNNCell, irnn
from effjax.recurrent.tarnn import TARNN

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "irnn"
ACTIVATIONS = {"relu": nn.relu, "tanh": jnp.tanh}
KEY = jax.random.key(0, impl="rbg")  # quicker to compile than the default
X = np.random.default_rng(0).normal(size=(4, 10, 3)).astype(np.float32)  # batch, time, features
XS = jnp.asarray(X.swapaxes(0, 1))


def vectors(name):
    return dict(np.load(REFERENCE / f"{name}.npz"))


def weights(data, *names):
    """Parameters in our convention: the stored U and W act from the left."""
    return {name: jnp.asarray(data[name].T if name in "UW" else data[name]) for name in names}


def filled(module, seed=1):
    """Variables of a module, all random, without compiling its initialisation."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, KEY, X)
    return jax.tree.map(lambda leaf: jnp.asarray(np.float32(rng.normal(0, 0.4, leaf.shape))), shapes)


def assert_close(left, right, atol=1e-12):
    np.testing.assert_allclose(left, right, rtol=0, atol=atol)


@functools.partial(jax.jit, static_argnames=("chunk", "unroll", "start", "dtype"))
def run(params, x=X, h0=None, **options):
    return irnn(params, jnp.swapaxes(x, 0, 1), h0, **options)[1]


@functools.cache
def small(K=2, length=10):
    return filled(IncrementalRNN(5, K=K, length=length))["params"] | {"alpha": jnp.float32(1.0)}


@pytest.mark.parametrize(
    ("name", "x64"),
    [
        ("kstep_prev_K1_relu", True),
        ("kstep_prev_K3_tanh", True),
        ("kstep_zero_K1_relu", True),
        ("kstep_zero_K5_relu", True),
        ("kstep_prev_K3_tanh", False),
    ],
)
def test_euler_parity(name, x64):
    atol = 1e-12 if x64 else 2e-5
    data = vectors(name)
    with jax.enable_x64(x64):
        params = weights(data, "U", "W", "b", "alpha", "eta")
        options = {"start": str(data["init"]), "activation": ACTIVATIONS[str(data["sigma"])]}

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
        def loss(params, x, h0):
            _, states = irnn(params, x, h0, **options)
            return jnp.sum(states * data["cotangent"]), states

        (_, states), (gradients, grad_x, grad_h0) = loss(params, jnp.asarray(data["x"]), jnp.asarray(data["h0"]))
        assert states.dtype == (jnp.float64 if x64 else jnp.float32)
        assert_close(states, data["outputs"], atol)
        scale = 1 if x64 else max(1.0, np.abs(data["grad_U"]).max())
        for key, value in weights(data, "grad_b", "grad_alpha", "grad_eta").items():
            assert_close(gradients[key.removeprefix("grad_")], value, atol * scale)
        for key in "UW":
            assert_close(gradients[key], data[f"grad_{key}"].T, atol * scale)
        assert_close(grad_x, data["grad_x"], atol * scale)
        assert_close(grad_h0, data["grad_h0"], atol * scale)


@pytest.mark.parametrize(
    ("name", "parallel"), [("equilibrium_relu", True), ("equilibrium_tanh", True), ("equilibrium_tanh", False)]
)
def test_equilibrium_parity_and_invariants(name, parallel):
    data = vectors(name)
    activation = ACTIVATIONS[str(data["sigma"])]
    solve = functools.partial(irnn_equilibrium, iterations=400, activation=activation, parallel=parallel)

    @jax.jit
    def everything(params, x, h0):
        def loss(params, x, h0):
            _, states = solve(params, x, h0)
            return jnp.sum(states * data["cotangent"]), states

        gradients, states = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, x, h0)
        return gradients, states, jax.jacrev(lambda h: solve(params, x[:, :1], h)[0][0])(h0[:1])[:, 0]

    with jax.enable_x64(True):
        params, x, h0 = weights(data, "U", "W", "b", "alpha"), jnp.asarray(data["x"]), jnp.asarray(data["h0"])
        (gradients, grad_x, grad_h0), states, jacobian = everything(params, x, h0)
        assert_close(states, data["outputs"])
        for key, value in gradients.items():
            assert_close(value, data[f"grad_{key}"].T, 1e-11)
        assert_close(grad_x, data["grad_x"], 1e-11)
        assert_close(grad_h0, data["grad_h0"], 1e-11)
        # The residual of the ODE, and the identity Jacobian up to sign.
        states = np.asarray(states)
        y = states + np.concatenate([data["h0"][None], states[:-1]])
        phi = {"relu": lambda z: np.maximum(z, 0), "tanh": np.tanh}[str(data["sigma"])]
        pre = y @ data["U"].T + data["x"] @ data["W"].T + data["b"]
        assert np.abs(phi(pre) - data["alpha"] * y).max() < 1e-10
        assert_close(jacobian, data["jac_hT_h0"])
        np.testing.assert_array_equal(data["jac_hT_h0"], (-1) ** len(x) * np.eye(5))


def test_equilibrium_is_additive_over_time():
    data = vectors("equilibrium_tanh")
    with jax.enable_x64(True):
        params = weights(data, "U", "W", "b", "alpha")
        last = jax.jit(lambda x: irnn_equilibrium(params, x, iterations=300, activation=jnp.tanh)[0])
        x, first, second = data["x"], np.zeros_like(data["x"]), np.zeros_like(data["x"])
        first[1], second[4] = 0.5, -0.3
        euler = jax.jit(lambda x: irnn({**params, "eta": jnp.full(2, 0.5)}, x, activation=jnp.tanh)[0])

        def mixed(function):
            both, one, other, neither = (
                np.asarray(function(at)) for at in (x + first + second, x + first, x + second, x)
            )
            return both - one - other + neither

        assert_close(mixed(last), 0, 1e-12)
        assert np.abs(mixed(euler)).max() > 1e-4  # a few steps are not


def test_many_euler_steps_reach_the_equilibrium_and_its_gradient_from_both_starts():
    data = vectors("equilibrium_relu")
    x, h0 = data["x"][:3], data["h0"]
    loss = lambda states: jnp.sum(states * data["cotangent"][:3])

    @jax.jit
    def gradients(params):
        steps = {"eta": jnp.full(1000, 0.5)}
        long = [
            jax.grad(lambda p: loss(irnn(p | steps, x, h0, start=start)[1]))(params)  # noqa: B023
            for start in ("prev", "zero")
        ]
        return jax.grad(lambda p: loss(irnn_equilibrium(p, x, h0, iterations=400)[1]))(params), *long

    with jax.enable_x64(True):
        exact, *long = gradients(weights(data, "U", "W", "b", "alpha"))
        for one in long:
            jax.tree.map(functools.partial(assert_close, atol=1e-9), one, exact)


def test_error_falls_at_the_promised_rate():
    data = vectors("equilibrium_relu")
    x, h0, eta = data["x"][:1], data["h0"], 0.5

    @jax.jit
    def errors(params):
        exact = irnn_equilibrium(params, x, h0, iterations=400)[0]
        return [jnp.linalg.norm(irnn(params | {"eta": jnp.full(K, eta)}, x, h0)[0] - exact, axis=-1) for K in (9, 30)]

    with jax.enable_x64(True):
        few, many = errors(weights(data, "U", "W", "b", "alpha"))
        rate = 1 - eta * (float(data["alpha"]) - np.linalg.norm(data["U"], 2))
        assert (many <= few * rate**21 + 1e-12).all()


@pytest.mark.parametrize("name", ["dual_ode_K2_relu", "dual_ode_K3_tanh_nogate"])
def test_dual_ode_parity(name):
    data = vectors(name)
    with jax.enable_x64(True):
        names = ["W1", "W3", "U1", "U2", "U4", "b1", "b2"] + ["Wg", "Ug", "bg"] * bool(data["gating"])
        params = {key: data[key] for key in names} | {key: data[key].T for key in ("alpha1", "alpha2", "beta2")}
        activation = ACTIVATIONS[str(data["sigma"])]
        run = jax.jit(functools.partial(dual_ode, activation=activation))
        last, states = run(params, data["x"], (data["g1_0"], data["g2_0"]))
        assert_close(states, data["outputs"])
        assert_close(np.concatenate(last, -1), np.asarray(states)[-1])


def test_steps_of_size_zero():
    h0 = np.random.default_rng(2).normal(size=(4, 5)).astype(np.float32)
    params = small() | {"eta": np.zeros(2, np.float32)}
    np.testing.assert_array_equal(np.asarray(run(params, X, h0))[-1], h0)
    jacobian = jax.jit(jax.jacrev(lambda h: run(params, X[:1], h)[-1, 0]))(h0[:1])
    assert_close(np.asarray(jacobian)[:, 0], np.eye(5))
    np.testing.assert_array_equal(run(params, X, h0, start="zero"), 0)


def test_first_state_ignores_the_future_and_other_examples():
    states = lambda x: np.asarray(run(small(), x))
    base = states(X)
    np.testing.assert_array_equal(states(np.concatenate([X[:, :5], X[:, 5:] + 1], 1))[:5], base[:5])
    assert np.abs(states(np.concatenate([X[:, :4], X[:, 4:] + 1], 1))[4] - base[4]).max() > 0
    assert_close(states(X[::-1]), base[:, ::-1], 1e-6)
    early = np.asarray(jax.jit(jax.grad(lambda eta: jnp.sum(run(small() | {"eta": eta})[3])))(small()["eta"]))
    assert not early[4:].any()
    assert early[:4].all()


def test_chunks_and_unrolling_change_nothing():
    @jax.jit
    def all_ways(params):
        value = lambda params, **options: jnp.sum(jnp.sin(run(params, **options)))
        ways = ({}, {"chunk": 4, "unroll": 2}, {"chunk": 1})
        return [jax.value_and_grad(functools.partial(value, **way))(params) for way in ways]

    plain, *others = all_ways(small())
    for other in others:
        jax.tree.map(functools.partial(assert_close, atol=1e-5), other, plain)


def test_chunks_save_memory():
    def peak(chunk):
        loss = lambda params, x: jnp.sum(irnn(params, x, chunk=chunk)[0])
        x = jax.ShapeDtypeStruct((400, 8, 3), jnp.float32)
        compiled = jax.jit(jax.grad(loss)).lower(small(length=400), x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(20) < 0.6 * peak(None)


def test_one_recurrent_product_a_step_and_none_for_the_inputs():
    jaxpr = jax.make_jaxpr(lambda params, x: irnn(params, x))(small(K=1), jnp.ones((10, 4, 3)))
    outer = [eqn.primitive.name for eqn in jaxpr.eqns]
    scan = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    assert outer.count("dot_general") == 1
    assert str(scan.params["jaxpr"]).count("dot_general") == 1


@pytest.mark.parametrize(
    "options", [{"length": 12, "K": 2}, {"eta_mode": "shared", "start": "zero", "eta": 0.4, "K": 3}]
)
def test_layer_equals_cell_in_nn_rnn(options):
    cell, layer = nn.RNN(IncrementalRNNCell(5, **options), return_carry=True), IncrementalRNN(5, **options, chunk=4)
    lengths = np.array([10, 3, 7, 1])

    @jax.jit
    def both(variables):
        (h, time), states = cell.apply(variables, X, seq_lengths=lengths)
        return h, time, states, layer.apply({"params": variables["params"]["cell"]}, X)

    h, time, states, hoisted = jax.tree.map(np.asarray, both(filled(cell)))
    assert_close(hoisted, states, 1e-6)
    assert_close(h, np.stack([states[i, n - 1] for i, n in enumerate(lengths)]), 1e-6)
    np.testing.assert_array_equal(time, lengths)


def test_cell_carries_on_where_it_stopped_and_is_nan_beyond_its_length():
    cell = nn.RNN(IncrementalRNNCell(5, length=10), return_carry=True)

    @jax.jit
    def parts(variables):
        carry, states = cell.apply(variables, X)
        half, first = cell.apply(variables, X[:, :6])
        _, second = cell.apply(variables, X[:, 6:], initial_carry=half)
        _, beyond = cell.apply(variables, X[:, :1], initial_carry=carry)
        return states, jnp.concatenate([first, second], 1), beyond

    states, joined, beyond = parts(filled(cell))
    assert_close(joined, states, 1e-6)
    assert np.isnan(beyond).all()


@pytest.mark.promotes  # bfloat16 inputs with float32 parameters
def test_bfloat16_keeps_states_and_steps_wide():
    half = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), small())
    assert jax.eval_shape(irnn, half, np.asarray(XS).astype(jnp.bfloat16))[1].dtype == jnp.float32
    exact, low = np.asarray(run(small())), np.asarray(run(small(), dtype=jnp.bfloat16))
    assert low.dtype == jnp.float32
    assert 0 < np.abs(low - exact).max() < 0.03 * np.abs(exact).max()


def test_limit_norm():
    U = small()["U"]
    norm, limited = float(np.linalg.norm(U, 2)), jax.jit(limit_norm)
    np.testing.assert_allclose(np.linalg.norm(limited(U, 0.5), 2), 0.5, rtol=1e-5)
    np.testing.assert_array_equal(limited(U, 1.01 * norm), U)


def test_trains_through_the_equilibrium():
    layer = EquilibriumRNN(5, iterations=30)
    variables = filled(layer)["params"] | {"alpha": jnp.float32(1.0)}
    loss = jax.jit(jax.value_and_grad(lambda params: jnp.mean((layer.apply({"params": params}, X)[:, -1] - 1) ** 2)))
    first, gradient = loss(variables)
    for _ in range(20):
        variables = jax.tree.map(
            lambda leaf, g: np.asarray(leaf) - np.float32(0.05) * np.asarray(g), variables, gradient
        )
        last, gradient = loss(variables)
    assert last < 0.9 * first


def test_explicit_mesh_keeps_the_batch_sharded():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6, 3)), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        layers = IncrementalRNN(4, length=6, K=2, chunk=4), EquilibriumRNN(4, norm_limit=None), TARNN(4, length=6)
        variables = [jax.eval_shape(layer.init, jax.random.key(0), x) for layer in layers]
        variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1 if leaf.shape else 1.0, leaf.dtype), variables)

        @jax.jit
        @functools.partial(jax.grad, has_aux=True)
        def run(variables, x):
            states = [layer.apply(one, x) for layer, one in zip(layers, variables, strict=True)]
            return sum(jnp.sum(one) for one in states), states

        grads, states = run(variables, x)
        sharded = jax.device_put(variables, NamedSharding(mesh, P())), jax.device_put(x, NamedSharding(mesh, P("data")))
        spread_grads, spread = run(*sharded)
        for one in spread:
            assert jax.typeof(one).sharding.spec[0] == "data", jax.typeof(one)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), spread_grads, grads)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), spread, states)


def holed(place):
    """The inputs with one NaN."""
    xs = np.array(XS)
    xs[place] = np.nan
    return jnp.asarray(xs)


BAD = {
    "eta shorter than T": (lambda: irnn(small(length=6), XS), r"eta has 6 rows.*10 steps.*length=10"),
    "layer shorter than T": (lambda: jax.eval_shape(IncrementalRNN(5, length=9).init, KEY, X), r"eta has 9 rows"),
    "K=0": (lambda: jax.eval_shape(IncrementalRNN(5, K=0, length=10).init, KEY, X), r"K=0 must be an integer in \[1"),
    "no inner step": (
        lambda: irnn(small() | {"eta": jnp.asarray(np.zeros((10, 0), np.float32))}, XS),
        r"shape \(10, 0\).*K of 1 or more",
    ),
    "NaN": (lambda: irnn(small(), holed((2, 1, 0))), r"xs holds 1 NaN of 120"),
    "h0 width": (lambda: irnn(small(), XS, np.zeros((4, 6), np.float32)), r"h0 has shape \(4, 6\).*\(4, 5\)"),
    "h0 would broadcast": (lambda: irnn(small(), XS, np.zeros(5, np.float32)), r"h0 has shape \(5,\)"),
    "carried batch": (
        lambda: IncrementalRNNCell(5, length=10).advance(
            small(), (jnp.zeros((3, 5)), jnp.zeros(4, jnp.int32)), jnp.zeros((4, 5))
        ),
        r"carry\[0\] has shape",
    ),
    "start": (lambda: irnn(small(), XS, start="previous"), r"start='previous'.*Did you mean 'prev'"),
    "mode": (lambda: jax.eval_shape(IncrementalRNN(5, eta_mode="per-time").init, KEY, X), r"Did you mean 'per_time'"),
    "no length": (lambda: jax.eval_shape(IncrementalRNN(5).init, KEY, X), r"length=None"),
    "idle length": (
        lambda: jax.eval_shape(IncrementalRNN(5, eta_mode="shared", length=10).init, KEY, X),
        r"length=10 would do nothing",
    ),
    "iterations": (lambda: equilibrium(jnp.eye(2), 1.0, jnp.ones(2), iterations=0), r"iterations=0"),
    "norm limit": (lambda: jax.eval_shape(EquilibriumRNN(5, norm_limit=1.5).init, KEY, X), r"norm_limit=1.5"),
    "odd": (lambda: jax.eval_shape(DualODE(5, length=10).init, KEY, X), r"features=5 must be even"),
    "chunk": (lambda: irnn(small(), XS, chunk=0), r"chunk=0"),
    "unroll": (lambda: irnn(small(), XS, unroll=0), r"unroll=0"),
    "empty": (lambda: scan_time(lambda p, c, x: (c, x), None, 0, jnp.zeros((0, 2))), r"0 time steps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_chunk_that_saves_nothing_warns():
    with pytest.warns(NoEffectWarning, match="chunk=10 is not below the 10 steps"):
        irnn(small(), XS, chunk=10)
