"""Recurrent baselines: parity, parallel scans equal their steps, Chrono biases, bad input."""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models.linear_recurrence import (
    LRU,
    LRUCell,
    MinGRU,
    MinGRUCell,
    _associative,
    _sequential,
    linear_scan,
    lru,
    min_gru,
)
from effjax.models.sequence import GRUCell, LSTMCell, Recurrent, RNNCell, chrono_bias
from effjax.models.sequence_rivals import AntisymmetricRNNCell, CoRNNCell, FastGRNNCell, FastRNNCell
from effjax.recurrent.dual import DualODE
from effjax.recurrent.fixed_point import EquilibriumRNN
from effjax.recurrent.irnn import IncrementalRNN, IncrementalRNNCell
from effjax.recurrent.tarnn import TARNN, TARNNCell

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "irnn" / "baseline_cells.npz"
KEY = jax.random.key(0, impl="rbg")  # quicker to compile than the default
X = np.random.default_rng(0).normal(size=(4, 10, 3)).astype(np.float32)  # batch, time, features


@functools.cache
def stored():
    return dict(np.load(REFERENCE))


def group(prefix):
    return {key.removeprefix(prefix): value for key, value in stored().items() if key.startswith(prefix)}


def filled(module, seed=1):
    """Variables of a module, all random, without compiling its initialisation."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, KEY, X)
    return jax.tree.map(lambda leaf: jnp.asarray(np.float32(rng.normal(0, 0.4, leaf.shape))), shapes)


def assert_close(left, right, atol=1e-12):
    np.testing.assert_allclose(left, right, rtol=0, atol=atol)


def fastgrnn_params(tree):
    shape = lambda name, leaf: leaf.shape if name in "WU" else (5,) if "bias" in name else ()
    return {name: leaf.reshape(shape(name, leaf)) for name, leaf in tree.items()}


def fastrnn_params(tree):
    scalars = {name: tree[name].reshape(()) for name in ("alpha", "beta")}
    return {"W": tree["W"], "U": tree["U"], "b": tree["bias_update"][0], **scalars}


def cornn_params(tree):
    W, U = np.split(tree["i2h.weight"].T, [4])
    return {"W": W, "U": U, "b": tree["i2h.bias"]}


def antisymmetric_params(tree):
    pairs = [("V", "b"), ("Vz", "bz")][: 2 if "Vz" in tree else 1]
    return {
        "U": tree["Wh"],
        "W": np.concatenate([tree[kernel].T for kernel, _ in pairs], -1),
        "b": np.concatenate([tree[bias] for _, bias in pairs]),
    }


GATED = functools.partial(AntisymmetricRNNCell, gated=True)
PARITY = {
    "fastrnn": (FastRNNCell, fastrnn_params, {}),
    "fastgrnn": (FastGRNNCell, fastgrnn_params, {}),
    "cornn": (CoRNNCell, cornn_params, {"dt": "dt", "gamma": "gamma", "epsilon": "epsilon"}),
    "antisym": (AntisymmetricRNNCell, antisymmetric_params, {"epsilon": "eps", "gamma": "gamma"}),
    "antisym_gated": (GATED, antisymmetric_params, {"epsilon": "eps", "gamma": "gamma"}),
}


@pytest.mark.parametrize("name", PARITY)
def test_parity(name):
    make, convert, constants = PARITY[name]
    data = group(f"{name}/")
    carry = data["h0"] if "h0" in data else (data["s0_0"], data["s1_0"])
    width = jax.tree.leaves(carry)[0].shape[-1]
    cell = make(width, **{argument: float(data[key]) for argument, key in constants.items()})

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(params, x):
        def body(carry, projected):
            carry, _ = cell.advance(params, carry, projected)
            return carry, jnp.concatenate(jax.tree.leaves(carry), -1)

        _, outputs = jax.lax.scan(body, jax.tree.map(jnp.asarray, carry), cell.project(params, x))
        return jnp.sum(outputs * data["cotangent"]), outputs

    with jax.enable_x64(True):
        (_, outputs), (gradients, grad_x) = loss(convert(group(f"{name}/param/")), data["x"])
        assert_close(outputs, data["outputs"])
        jax.tree.map(functools.partial(assert_close, atol=1e-11), gradients, convert(group(f"{name}/grad/")))
        assert_close(grad_x, data["grad_x"], 1e-11)


def test_linear_scan_parity():
    data = group("linear_scan/")
    with jax.enable_x64(True):
        a, u = (data[name].swapaxes(0, 1) for name in "au")
        scan = jax.jit(linear_scan)
        whole, half = scan(a, u), scan(a[:3], u[:3])
        assert_close(whole, data["outputs"].swapaxes(0, 1))
        assert_close(scan(a[3:], u[3:], np.asarray(half)[-1]), np.asarray(whole)[3:])


@pytest.mark.parametrize("dtype", [float, complex])
def test_linear_scan_in_both_forms(dtype):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape) + (1j * rng.normal(size=shape) if dtype is complex else 0)
    with jax.enable_x64(True):
        # Decays are the same for all rows, and one of them is 0.
        a, u, weights = draw(7, 1, 4), draw(7, 3, 4), draw(7, 3, 4)
        a[3, 0, 2] = 0

        def states_and_gradients(form, a, u):
            loss = lambda a, u: jnp.sum((weights * form(a, u)).real)
            return form(a, u), jax.grad(loss, (0, 1))(a, u)

        both = jax.jit(lambda a, u: [states_and_gradients(form, a, u) for form in (_sequential, _associative)])
        jax.tree.map(assert_close, *both(a, u))


def test_fastrnn_with_gates_of_every_time_step():
    cell = FastRNNCell(5, length=12)
    params = filled(nn.RNN(cell))["params"]["cell"]
    sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x)))
    h, states = np.zeros((4, 5)), []
    for t in range(10):
        new = np.tanh(X[:, t] @ params["W"] + h @ params["U"] + params["b"][None])
        h = sigmoid(params["alpha"][t]) * new + sigmoid(params["beta"][t]) * h
        states.append(h)
    layer = Recurrent(cell)
    variables = {"params": {"cell": params}}
    assert_close(jax.jit(layer.apply)(variables, X), np.stack(states, 1), 1e-6)
    carry = (states[3].astype(np.float32), np.full(4, 4, np.int32))
    assert_close(jax.jit(layer.apply)(variables, X[:, 4:], carry), np.stack(states[4:], 1), 1e-6)
    beyond = np.asarray(jax.jit(nn.RNN(cell).apply)(variables, np.tile(X, (1, 2, 1))))
    np.testing.assert_array_equal(np.isfinite(beyond).all((0, 2)), np.arange(20) < 12)


def test_lstm_equals_flax():
    cell, theirs = LSTMCell(5), nn.OptimizedLSTMCell(5)
    params = jax.jit(lambda x: cell.init(KEY, cell.initialize_carry(KEY, (4, 3)), x))(X[:, 0])["params"]
    parts = {name: np.split(np.asarray(leaf), 4, -1) for name, leaf in params.items()}
    flax = {f"i{gate}": {"kernel": kernel} for gate, kernel in zip("ifgo", parts["W"], strict=True)}
    for gate, kernel, bias in zip("ifgo", parts["U"], parts["b"], strict=True):
        flax[f"h{gate}"] = {"kernel": kernel, "bias": bias}
    carry = tuple(np.random.default_rng(1).normal(size=(2, 4, 5)).astype(np.float32))
    ours, expected = (
        jax.jit(one.apply)({"params": own}, carry, X[:, 0]) for one, own in ((cell, params), (theirs, flax))
    )
    jax.tree.map(functools.partial(assert_close, atol=1e-6), ours, expected)
    for block in parts["U"]:
        assert_close(block @ block.T, np.eye(5), 1e-5)


def test_gru_and_plain_rnn_equal_flax():
    h = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), jnp.float32)
    params = filled(nn.RNN(GRUCell(5)))["params"]["cell"]
    parts = {name: np.split(np.asarray(leaf), 3, -1) for name, leaf in params.items() if name != "c"}
    flax = {f"i{gate}": {"kernel": w, "bias": b} for gate, w, b in zip("rzn", parts["W"], parts["b"], strict=True)}
    flax |= {f"h{gate}": {"kernel": kernel} for gate, kernel in zip("rzn", parts["U"], strict=True)}
    flax["hn"]["bias"] = params["c"]
    ours, expected = (
        jax.jit(c.apply)({"params": p}, h, X[:, 0])[1] for c, p in ((GRUCell(5), params), (nn.GRUCell(5), flax))
    )
    assert_close(ours, expected, 1e-6)
    params = filled(nn.RNN(RNNCell(5)))["params"]["cell"]
    flax = {"i": {"kernel": params["W"], "bias": params["b"]}, "h": {"kernel": params["U"]}}
    assert_close(
        jax.jit(RNNCell(5).apply)({"params": params}, h, X[:, 0])[1],
        jax.jit(nn.SimpleCell(5).apply)({"params": flax}, h, X[:, 0])[1],
        1e-6,
    )


def test_chrono_biases_cover_the_times():
    bias = np.asarray(chrono_bias(KEY, 20000, 100))
    times = np.exp(bias)
    assert 1 <= times.min() <= 1.1
    assert 98 <= times.max() <= 99.001
    np.testing.assert_allclose(times.mean(), 50, rtol=0.02)
    cell = LSTMCell(6, chrono_length=50)
    start = jax.jit(lambda x: cell.init(KEY, cell.initialize_carry(KEY, (1, 3)), x))
    i, f, g, o = np.split(start(X[:1, 0])["params"]["b"], 4)
    np.testing.assert_array_equal(i, -f)
    assert (f >= 0).all()
    assert f.std() > 0
    assert not np.any([g, o])
    one, *_ = np.split(np.asarray(jax.jit(MinGRU(6, chrono_length=50).init)(KEY, X)["params"]["b"]), 2)
    assert (one <= 0).all()
    assert one.std() > 0


def test_lru_starts_on_the_ring():
    params = jax.jit(LRU(2, state=4000, r_min=0.5, r_max=0.9, max_phase=1.0).init)(KEY, X[:, :2])["params"]
    params = jax.tree.map(np.asarray, params)
    modulus = np.exp(-np.exp(params["nu"]))
    assert modulus.min() >= 0.5 - 1e-6
    assert modulus.max() <= 0.9 + 1e-6
    np.testing.assert_allclose(np.mean(modulus**2), (0.5**2 + 0.9**2) / 2, rtol=0.02)  # uniform over the area
    phase = np.exp(params["theta"])
    assert phase.max() <= 1
    np.testing.assert_allclose(phase.mean(), 0.5, rtol=0.05)


@pytest.mark.parametrize(("layer", "cell"), [(LRU, LRUCell), (MinGRU, MinGRUCell)])
def test_parallel_layer_equals_cell_in_nn_rnn(layer, cell):
    options = {"state": 7} if layer is LRU else {"chrono_length": 9}
    rnn = nn.RNN(cell(5, **options), return_carry=True)
    variables = filled(rnn)
    whole = {LRU: lru, MinGRU: min_gru}[layer]

    @jax.jit
    def run(variables, x):
        inner = {"params": variables["params"]["cell"]}
        half, _ = rnn.apply(variables, x[:, :4])
        apply = layer(5, **options).apply
        return (
            rnn.apply(variables, x),
            apply(inner, x),
            apply(inner, x[:, 4:], half),
            whole(inner["params"], jnp.swapaxes(x, 0, 1))[0],
        )

    (carry, states), found, rest, last = jax.tree.map(np.asarray, run(variables, X))
    assert_close(found, states, 1e-5)
    assert_close(rest, states[:, 4:], 1e-5)
    assert_close(last, carry, 1e-5)


def test_parallel_layers_have_no_loop_on_accelerators(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for layer in (LRU(5), MinGRU(5)):
        variables = jax.eval_shape(layer.init, KEY, X)
        text = str(jax.make_jaxpr(layer.apply)(variables, X))
        assert "scan[" not in text
        assert "while[" not in text


CELLS = {
    "rnn": RNNCell(5),
    "lstm": LSTMCell(5),
    "gru": GRUCell(5),
    "fastrnn": FastRNNCell(5),
    "fastrnn_per_time": FastRNNCell(5, length=10),
    "fastgrnn": FastGRNNCell(5),
    "antisymmetric": AntisymmetricRNNCell(5),
    "cornn": CoRNNCell(5),
    "lru": LRUCell(5),
    "min_gru": MinGRUCell(5),
    "irnn": IncrementalRNNCell(5, length=10, K=2),
    "irnn_shared": IncrementalRNNCell(5, eta_mode="shared"),
    "tarnn": TARNNCell(5, length=10),
    "tarnn_input": TARNNCell(5, eta_mode="input", variant="euler", first_prev="zero"),
}


@pytest.mark.parametrize("name", CELLS)
def test_carry_of_another_size_is_refused(name):
    cell = CELLS[name]
    zeros = lambda leaf: np.zeros(leaf.shape, leaf.dtype)
    first = lambda shape: jax.tree.map(zeros, jax.eval_shape(lambda: cell.initialize_carry(KEY, shape)))
    carry = first((4, 3))
    variables = jax.eval_shape(cell.init, KEY, carry, X[:, 0])
    step = lambda carry: jax.eval_shape(cell.apply, variables, carry, X[:, 0])
    same, _ = step(carry)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), same) == jax.tree.map(lambda a: (a.shape, a.dtype), carry)
    for other in ((3, 3), (1, 3)):
        with pytest.raises(ValueError, match=r"carry.*has shape.*another batch size"):
            step(first(other))
    with pytest.raises(ValueError, match=r"carry.*has shape.*another width"):
        step(jax.tree.map(lambda leaf: leaf[..., :4], carry))


def products_in_loop(layer, variables):
    equations = jax.make_jaxpr(layer.apply)(variables, X).eqns
    (loop,) = [equation for equation in equations if equation.primitive.name == "scan"]
    return str(loop.params["jaxpr"]).count("dot_general")


@pytest.mark.parametrize("name", CELLS)
def test_recurrent_equals_nn_rnn_and_hoists_the_inputs(name):
    cell = CELLS[name]
    variables = filled(nn.RNN(cell))
    layer = Recurrent(cell, chunk=4, unroll=2)
    both = jax.jit(lambda variables, x: (layer.apply(variables, x), nn.RNN(cell).apply(variables, x)))
    assert_close(*both(variables, X), 1e-5)
    assert jax.tree.structure(jax.eval_shape(layer.init, KEY, X)) == jax.tree.structure(variables)
    assert products_in_loop(Recurrent(cell), variables) < products_in_loop(nn.RNN(cell), variables)


def test_recurrent_carries_on_and_refuses_other_cells():
    layer = Recurrent(GRUCell(5))
    variables = filled(layer)
    apply = jax.jit(layer.apply)
    states = np.asarray(apply(variables, X))
    assert_close(apply(variables, X[:, 4:], states[:, 3]), states[:, 4:], 1e-6)
    with pytest.raises(TypeError, match=r"cell=GRUCell cannot be taken apart. Use nn.RNN"):
        Recurrent(nn.GRUCell(5)).init(KEY, X)


BAD = {
    "chrono": (lambda: chrono_bias(KEY, 4, 2), r"length=2 must be an integer in \[3"),
    "scan": (lambda: linear_scan(jnp.ones(3), jnp.ones(4)), r"a holds 3 time steps and u 4"),
    "ring": (lambda: jax.eval_shape(LRU(5, r_min=0.9, r_max=0.8).init, KEY, X), r"r_max=0.8 must be a number in \(0.9"),
    "h0": (lambda: min_gru({"W": jnp.ones((3, 4)), "b": jnp.ones(4)}, X, jnp.ones((10, 3))), r"\(10, 2\)"),
    "dt": (lambda: jax.eval_shape(nn.RNN(CoRNNCell(5, dt=0.0)).init, KEY, X), r"dt=0.0 must be a number in \(0"),
    "steps": (
        lambda: jax.eval_shape(Recurrent(FastRNNCell(5, length=9)).init, KEY, X),
        r"length=9, but the sequence has 10 steps",
    ),
    "irnn's steps": (
        lambda: jax.eval_shape(Recurrent(IncrementalRNNCell(5, length=9)).init, KEY, X),
        r"length=9.* has 10 steps",
    ),
    "tarnn's steps": (
        lambda: jax.eval_shape(Recurrent(TARNNCell(5, length=9)).init, KEY, X),
        r"length=9.* has 10 steps",
    ),
    "length": (
        lambda: jax.eval_shape(nn.RNN(FastRNNCell(5, length=0)).init, KEY, X),
        r"length=0 must be an integer in \[1",
    ),
    "epsilon": (lambda: jax.eval_shape(nn.RNN(AntisymmetricRNNCell(5, epsilon=-1.0)).init, KEY, X), r"epsilon=-1.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_lstm_as_a_pure_function():
    cell, zeros = LSTMCell(2), lambda *shape: np.zeros(shape, np.float32)
    params, carry = {"W": zeros(3, 8), "U": zeros(2, 8), "b": zeros(8)}, (zeros(1, 2) + 1, zeros(1, 2))
    step = jax.jit(lambda params, carry, x: cell.advance(params, carry, cell.project(params, x)))
    (c, h), y = step(params, carry, zeros(1, 3) + 1)
    assert_close(c, 0.5, 1e-6)
    assert_close(h, 0.5 * np.tanh(0.5), 1e-6)
    np.testing.assert_array_equal(h, y)


@pytest.mark.parametrize(
    "layer",
    [
        Recurrent(GRUCell(5)),
        LRU(5),
        MinGRU(5),
        IncrementalRNN(5),
        TARNN(5),
        EquilibriumRNN(5, iterations=2),
        DualODE(5, length=6),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_one_series_is_no_batch(layer):
    with pytest.raises(ValueError, match=r"x has shape \(20, 3\); expected \[batch, time, features\].*x\[None\]"):
        jax.eval_shape(layer.init, KEY, np.ones((20, 3), np.float32))
