"""TARNN: parity with the authors' cells, the invariants of the gate, the forms agree, bad input."""

import functools
import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.recurrent.irnn import irnn
from effjax.recurrent.tarnn import TARNN, TARNNCell, tarnn

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "tarnn"
AUTHORS = runpy.run_path(str(REFERENCE / "authors_cells.py"))
ACTIVATIONS = {"relu": nn.relu, "tanh": jnp.tanh}
KEY = jax.random.key(0, impl="rbg")  # quicker to compile than the default
X = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)  # batch, time, features
XS = jnp.asarray(X.swapaxes(0, 1))
FIRST = X.swapaxes(0, 1)[:1]
NAMES = {"W1", "W2", "B1", "Wg", "U1", "U2", "B2", "Ug", "b1", "bg", "A1"}


def filled(module, seed=1):
    """Variables of a module, all random, without compiling its initialisation."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, KEY, X)
    return jax.tree.map(lambda leaf: jnp.asarray(np.float32(rng.normal(0, 0.4, leaf.shape))), shapes)


def assert_close(left, right, atol=1e-12):
    np.testing.assert_allclose(left, right, rtol=0, atol=atol)


def stored(data, kind):
    """The authors' parameters or gradients; their step sizes are [K, time]."""
    tree = {name: data[f"{kind}/{name}"] for name in NAMES}
    tree["eta"] = tree.pop("A1").T
    return {name: jnp.asarray(leaf) for name, leaf in tree.items()}


@functools.cache
def small(mode="per_time", K=2):
    return filled(TARNN(5, K=K, eta_mode=mode, length=6 if mode == "per_time" else None))["params"]


@functools.partial(jax.jit, static_argnames=("variant", "K", "chunk", "unroll", "first_prev"))
def run(params, xs=XS, h0=None, **options):
    return tarnn(params, xs, h0, **options)[1]


FILES = [path.stem for path in sorted(REFERENCE.glob("tarnn_*.npz"))]


def loss_of(cell, data):
    """The stored loss: outputs against a cotangent, and the last states."""

    def loss(params, x, carry):
        last, outputs = cell(params, x, carry)
        ends = jax.tree.leaves(last)
        return jnp.sum(outputs * data["cotangent"]) + sum(
            factor * jnp.sum(end**2) for factor, end in zip((0.1, 0.2), ends, strict=False)
        ), (last, outputs)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize("name", FILES)
def test_parity(name):
    data = dict(np.load(REFERENCE / f"{name}.npz"))
    options = {
        "variant": "convex" if data["opt_b_variant"] else "euler",
        "activation": ACTIVATIONS[str(data["opt_sigma"])],
    }
    with jax.enable_x64(True):
        step = loss_of(functools.partial(tarnn, **options), data)
        (value, (last, outputs)), (gradients, grad_x, grad_h0) = step(stored(data, "param"), data["x"], data["h0"][0])
        assert_close(outputs, data["outputs"])
        assert_close(last, data["final_h"][0])
        np.testing.assert_allclose(value, data["loss"], rtol=1e-12)
        jax.tree.map(functools.partial(assert_close, atol=1e-11), gradients, stored(data, "grad"))
        assert_close(grad_x, data["grad_x"], 1e-11)
        assert_close(grad_h0, data["grad_h0"][0], 1e-11)


def test_there_are_vectors_of_both_variants():
    assert len(FILES) == 7
    assert {name.split("_")[1] for name in FILES} == {"convex", "euler"}


def test_float32_parity():
    data = dict(np.load(REFERENCE / "tarnn_convex_K3_tanh.npz"))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), stored(data, "param"))
    x, h0 = jnp.asarray(data["x"], jnp.float32), jnp.asarray(data["h0"][0], jnp.float32)
    states = jax.jit(functools.partial(tarnn, activation=jnp.tanh))(params, x, h0)[1]
    assert_close(states, data["outputs"], 2e-5)


def lstm_params(tree):
    names = {"W": "weight_ih", "Wp": "weight_tp_ih", "U": "weight_hh", "Bx": "weight_bx", "Bh": "weight_bh"}
    return {name: jnp.asarray(tree[key].T) for name, key in names.items()}


def test_b_tarnn_lstm_parity():
    data = dict(np.load(REFERENCE / "b_tarnn_lstm.npz"))
    group = lambda kind: {key.removeprefix(kind): value for key, value in data.items() if key.startswith(kind)}
    values, expected = group("param/"), group("grad/")
    with jax.enable_x64(True):
        params = lstm_params(values) | {"b": jnp.asarray(values["bias_ih"] + values["bias_hh"])}
        step = loss_of(AUTHORS["b_tarnn_lstm"], data)
        carry = (data["h0"][0], data["c0"][0])
        (value, (last, outputs)), (gradients, grad_x, grad_carry) = step(params, data["x"], carry)
        assert_close(outputs, data["outputs"])
        assert_close(last[0], data["final_h"][0])
        assert_close(last[1], data["final_c"][0])
        np.testing.assert_allclose(value, data["loss"], rtol=1e-12)
        for name, gradient in (lstm_params(expected) | {"b": expected["bias_ih"]}).items():
            assert_close(gradients[name], gradient, 1e-11)
        assert_close(grad_x, data["grad_x"], 1e-11)
        assert_close(grad_carry[0], data["grad_h0"][0], 1e-11)
        assert_close(grad_carry[1], data["grad_c0"][0], 1e-11)


def old_params(tree):
    """Blocks of the authors' stacked kernels, in their order."""
    order = {
        "weight_ih": ("W1", "Wg", "Bx", "Wo"),
        "weight_hh": ("Bh", "Ug", "U1", "U2", "U3", "Uo"),
        "weight_tp_ih": ("W2", "Bp", "Wp"),
    }
    params = {
        name: jnp.asarray(block.T)
        for key, names in order.items()
        for name, block in zip(names, np.split(tree[key], len(names)), strict=True)
    }
    biases = {"b1": "weight_b1", "b2": "weight_b2", "bg": "weight_bg", "bo": "weight_outb"}
    return params | {name: jnp.asarray(tree[key]) for name, key in biases.items()}


def test_old_b_tarnn_parity():
    data = dict(np.load(REFERENCE / "old_b_tarnn.npz"))
    group = lambda kind: {key.removeprefix(kind): value for key, value in data.items() if key.startswith(kind)}
    with jax.enable_x64(True):
        step = loss_of(AUTHORS["old_b_tarnn"], data)
        (value, (last, outputs)), (gradients, grad_x, grad_h0) = step(
            old_params(group("param/")), data["x"], data["h0"][0]
        )
        assert_close(outputs, data["outputs"])
        assert_close(last, data["final_h"][0])
        np.testing.assert_allclose(value, data["loss"], rtol=1e-12)
        jax.tree.map(functools.partial(assert_close, atol=1e-11), gradients, old_params(group("grad/")))
        assert_close(grad_x, data["grad_x"], 1e-11)
        assert_close(grad_h0, data["grad_h0"][0], 1e-11)


def naive(params, xs, h, variant, K):
    """The equations as they are written, one product each."""
    states, before = [], xs[0]
    for t, x in enumerate(xs):
        s = z = h
        g = jax.nn.sigmoid(s @ params["Ug"] + x @ params["Wg"] + params["bg"][None])
        if "eta" in params:
            eta = params["eta"][t] if params["eta"].ndim == 2 else params["eta"]
        else:
            largest = 1 if variant == "euler" else 2 / 3
            eta = [largest * jax.nn.sigmoid(s @ params["Ue"] + before @ params["We"] + params["be"][None])] * K
        for a in eta:
            inner = z @ params["U1"] + s @ params["U2"] + x @ params["W1"] + before @ params["W2"] + params["b1"][None]
            F = jax.nn.relu(inner) - z - s + x @ params["B1"] + s @ params["B2"]
            z = z + a * g * F if variant == "euler" else (1 - a) * z + a * F
        h = z if variant == "euler" else (1 - g) * s + g * z
        states.append(h)
        before = x
    return jnp.stack(states)


@pytest.mark.promotes  # a float32 cell is drawn with float64 on
@pytest.mark.parametrize("variant", ["euler", "convex"])
@pytest.mark.parametrize("mode", ["per_time", "shared", "input"])
def test_fused_form_equals_the_naive_one(variant, mode):
    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, small(mode))
        xs, h0 = np.float64(XS), np.random.default_rng(3).normal(size=(4, 5))
        both = jax.jit(lambda *a: (tarnn(*a, variant=variant, K=2)[1], naive(*a, variant, 2)))
        assert_close(*both(params, xs, h0))


@pytest.mark.parametrize("variant", ["euler", "convex"])
def test_a_closed_gate_and_steps_of_zero_keep_the_state(variant):
    h0 = np.random.default_rng(2).normal(size=(4, 5)).astype(np.float32)

    @jax.jit
    def last_and_jacobian(params):
        last = lambda xs, h: tarnn(params, xs, h, variant=variant)[0]
        return last(XS, h0), jax.jacrev(lambda h: last(XS[:, :1], h)[0])(h0[:1])[:, 0]

    for change in ({"bg": np.full(5, -200, np.float32)}, {"eta": np.zeros((6, 2), np.float32)}):
        last, jacobian = last_and_jacobian(small() | change)
        assert_close(last, h0, 1e-6)
        assert_close(jacobian, np.eye(5), 1e-6)
    assert np.abs(np.asarray(last_and_jacobian(small())[0]) - h0).max() > 1e-2


def test_an_open_gate_and_one_step_tell_the_variants_apart():
    a = 0.3
    params = small(K=1) | {"bg": np.full(5, 200, np.float32), "eta": np.full((6, 1), a, np.float32)}
    h0 = np.random.default_rng(2).normal(size=(4, 5)).astype(np.float32)
    euler, convex = (np.asarray(run(params, FIRST, h0, variant=variant))[0] for variant in ("euler", "convex"))
    assert_close(convex, euler - a * h0, 1e-5)


def test_reduces_to_irnn():
    other = {name: np.zeros_like(leaf) for name, leaf in small().items() if name in ("W2", "B1", "B2")}
    params = small() | other | {"U2": small()["U1"], "bg": np.full(5, 200, np.float32)}
    same = {"W": params["W1"], "U": params["U1"], "b": params["b1"], "alpha": 1.0, "eta": params["eta"]}
    assert_close(run(params, variant="euler"), jax.jit(irnn)(same, XS)[1], 1e-5)


def test_first_step():
    only = {"W1": np.asarray(small()["W1"]) + np.asarray(small()["W2"]), "W2": np.zeros((3, 5), np.float32)}
    repeated, merged = np.asarray(run(small())), np.asarray(run(small() | only))
    assert_close(repeated[0], merged[0], 1e-6)
    assert np.abs(repeated[1] - merged[1]).max() > 1e-3
    zero = np.asarray(run(small(), first_prev="zero"))
    given = jax.jit(lambda first: tarnn(small(), XS, first_prev=first)[1])(np.zeros((4, 3), np.float32))
    assert_close(zero, given, 1e-6)
    assert np.abs(zero[0] - repeated[0]).max() > 1e-4


def test_causal_and_independent_of_the_batch():
    states = lambda xs: np.asarray(run(small(), xs))
    base, later = states(XS), np.array(XS)
    later[3:] += 1
    np.testing.assert_array_equal(states(later)[:3], base[:3])
    assert np.abs(states(later)[3] - base[3]).max() > 0
    assert_close(states(np.asarray(XS)[:, ::-1]), base[:, ::-1], 1e-6)
    early = np.asarray(jax.jit(jax.grad(lambda eta: jnp.sum(run(small() | {"eta": eta})[2])))(small()["eta"]))
    assert not early[3:].any()
    assert early[:3].all()


def test_chunks_and_unrolling_change_nothing():
    @jax.jit
    def both(params):
        value = lambda params, **options: jnp.sum(jnp.sin(run(params, **options)))
        return [jax.value_and_grad(functools.partial(value, **way))(params) for way in ({}, {"chunk": 4, "unroll": 2})]

    jax.tree.map(functools.partial(assert_close, atol=1e-5), *both(small()))


def test_one_recurrent_product_a_step_and_two_for_the_inputs():
    jaxpr = jax.make_jaxpr(tarnn)(small(K=1), XS)
    outer = [eqn.primitive.name for eqn in jaxpr.eqns]
    scan = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    assert outer.count("dot_general") == 2
    assert str(scan.params["jaxpr"]).count("dot_general") == 1


@pytest.mark.parametrize(
    "options",
    [
        {"length": 9, "K": 2},
        {"eta_mode": "shared", "variant": "euler", "first_prev": "zero"},
        {"eta_mode": "input", "K": 2, "variant": "euler"},
    ],
)
def test_layer_equals_cell_in_nn_rnn(options):
    rnn, layer = nn.RNN(TARNNCell(5, **options), return_carry=True), TARNN(5, **options, chunk=4)

    @jax.jit
    def parts(variables):
        carry, states = rnn.apply(variables, X)
        half, first = rnn.apply(variables, X[:, :4])
        _, second = rnn.apply(variables, X[:, 4:], initial_carry=half)
        _, beyond = rnn.apply(variables, X, initial_carry=carry)
        hoisted = layer.apply({"params": variables["params"]["cell"]}, X)
        return states, jnp.concatenate([first, second], 1), hoisted, beyond[:, -1]

    states, joined, hoisted, beyond = jax.tree.map(np.asarray, parts(filled(rnn)))
    assert_close(hoisted, states, 1e-6)
    assert_close(joined, states, 1e-6)
    assert np.isnan(beyond).all() == ("length" in options)


@pytest.mark.parametrize(("variant", "largest"), [("euler", 1), ("convex", 2 / 3)])
def test_steps_from_the_input_start_at_eta_and_stay_where_states_are_bounded(variant, largest):
    layer = TARNN(5, variant=variant, eta_mode="input", eta=0.2, activation=jnp.tanh)
    params = jax.jit(layer.init)(KEY, X)["params"]
    np.testing.assert_allclose(largest / (1 + np.exp(-np.asarray(params["be"]))), 0.2, rtol=1e-6)
    assert "eta" not in params
    open_ = np.full(5, 60, np.float32)
    wild = {**params, "be": open_, "bg": open_, "B2": np.zeros((5, 5), np.float32)}
    states = jax.jit(layer.apply)({"params": wild}, np.tile(X, (1, 40, 1)))
    assert np.abs(np.asarray(states)).max() < 240  # at most a step of 1 at each of 240 inputs; 2^240 with steps up to 1


HOLED = jnp.asarray(np.where(np.arange(6)[:, None, None] + np.arange(4)[:, None] == 0, np.nan, np.asarray(XS)))

BAD = {
    "eta shorter than T": (
        lambda: jax.eval_shape(TARNN(5, length=5).init, KEY, X),
        r"eta has 5 rows.*6 steps.*length=6",
    ),
    "K=0": (lambda: jax.eval_shape(TARNN(5, K=0, length=6).init, KEY, X), r"K=0 must be an integer in \[1"),
    "K=0 from input": (lambda: tarnn(small("input"), XS, K=0), r"K=0"),
    "NaN": (lambda: tarnn(small(), HOLED), r"xs holds 3 NaN of 72"),
    "h0": (lambda: tarnn(small(), XS, np.zeros((4, 4), np.float32)), r"h0 has shape \(4, 4\).*\(4, 5\)"),
    "first_prev": (lambda: tarnn(small(), XS, first_prev=np.zeros(3, np.float32)), r"first_prev has shape \(3,\)"),
    "first word": (lambda: tarnn(small(), XS, first_prev="zeros"), r"Did you mean 'zero'"),
    "variant": (lambda: tarnn(small(), XS, variant="Euler"), r"variant='Euler'"),
    "mode": (lambda: jax.eval_shape(TARNN(5, eta_mode="inputs").init, KEY, X), r"Did you mean 'input'"),
    "idle length": (
        lambda: jax.eval_shape(TARNN(5, eta_mode="input", length=6).init, KEY, X),
        r"length=6 would do nothing",
    ),
    "cell's batch": (
        lambda: TARNNCell(5, eta_mode="shared").init(
            KEY, (jnp.zeros((3, 5)), jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32)), XS[0]
        ),
        r"carry\[0\] has shape \(3, 5\)",
    ),
    "cell's carry": (
        lambda: TARNNCell(5, eta_mode="shared").init(
            KEY, (jnp.zeros((4, 5)), jnp.zeros((4, 2)), jnp.zeros(4, jnp.int32)), XS[0]
        ),
        r"carry\[1\] has shape \(4, 2\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
