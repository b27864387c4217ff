"""FPTT: parity with the authors' programs, the facts of the method, the training steps and their memory, bad input."""

import dataclasses
import functools
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core.errors import NoEffectWarning
from effjax.recurrent.fptt import (
    FpttState,
    fptt,
    fptt_epoch_end,
    fptt_eval_params,
    fptt_terminal_loss,
    qbar_first_errors,
    qbar_init,
    qbar_means,
    qbar_sums,
)
from effjax.recurrent.ltc_spiking import LeakyReadoutCell, LTCSpikingCell, surrogate_spike
from effjax.recurrent.sequence_problem import SequencePart, SequenceProblem
from effjax.recurrent.through_time import bptt_step, fptt_online, fptt_step, tbptt_step

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "fptt"


class Vectors:
    """One reference file."""

    def __init__(self, name):
        with np.load(REFERENCE / f"{name}.npz") as file:
            self.arrays = dict(file)

    def __getitem__(self, key):
        value = self.arrays[key]
        return value if value.ndim else value.item()

    def tree(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}


def record():
    """Passes gradients on; its state is the last one."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (grads, grads)
    )


def torch_clip(threshold):
    def clip(grads, params=None):
        return jax.tree.map(lambda g: g * jnp.minimum(1, threshold / (optax.tree.norm(grads) + 1e-6)), grads)

    return optax.stateless(clip)


def torch_lstm(prefix):
    def cell(params, carry, x):
        h, c = carry
        gates = x @ params[f"{prefix}weight_ih_l0"].T + params[f"{prefix}bias_ih_l0"][None]
        gates += h @ params[f"{prefix}weight_hh_l0"].T + params[f"{prefix}bias_hh_l0"][None]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return cell


def assert_near(got, want, atol):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=atol, err_msg=name)


def assert_state(vectors, key, state, params, atol):
    assert_near(params, vectors.tree(f"{key}/w/"), atol)
    assert_near(state.wbar, vectors.tree(f"{key}/wbar/"), atol)
    assert_near(state.lam, vectors.tree(f"{key}/lam/"), atol)


def updater(tx):
    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize(("name", "atol"), [("quadratic_sgd", 1e-12), ("quadratic_adam_lmbda2", 1e-10)])
def test_parity_of_the_transformation(name, atol):
    v = Vectors(name)
    base = {"sgd": optax.sgd, "adam": optax.adam}[v["opt"]](v["lr"])
    with jax.enable_x64(True):
        tx = fptt(optax.chain(record(), base), v["alpha"], beta=v["beta"], lmbda=v["lmbda"])
        params = v.tree("init/w/")
        state = jax.jit(tx.init)(params)
        step = updater(tx)
        for t in range(len(v["H"])):
            at = np.concatenate([params["a"], np.ravel(params["b"])]) - v["C"][t]
            g = v["H"][t] @ at
            params, state = step({"a": g[:3], "b": g[3:].reshape(2, 2)}, state, params)
            assert_near(state.inner[0], v.tree(f"s{t}/grad/"), atol)
            assert_state(v, f"s{t}", state, params, atol)
        assert_state(v, "after_reset", *jax.jit(fptt_epoch_end)(state, params), atol)


def terminal_setup(v):
    def loss(params, h, targets, part):
        hidden = h @ params["linear1.weight"].T + params["linear1.bias"][None]
        logits = hidden @ params["linear2.weight"].T + params["linear2.bias"][None]
        keywords = {} if v["epoch"] < 20 else {"auxiliary": "qbar", "qbar": targets["qbar"]}
        return fptt_terminal_loss(logits, targets["y"], part, **keywords), logits

    base = {"Adam": optax.adam, "SGD": optax.sgd}[v["opt"]](v["lr"])
    base = optax.chain(record(), torch_clip(v["clip"]), base)
    return torch_lstm("network.0.rnn."), loss, fptt(base, v["alpha"], beta=v["beta"])


def terminal_batch(v, batch):
    zeros = np.zeros_like(v["c0/h"])
    return (zeros, zeros), np.moveaxis(v[f"b{batch}/x"], 2, 0), v[f"b{batch}/y"]


def test_parity_of_the_terminal_program_part_by_part():
    v = Vectors("terminal_lstm_adam")
    with jax.enable_x64(True):
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10)
        cell, loss, tx = terminal_setup(v)
        learn = jax.jit(fptt_online(SequenceProblem(cell, loss, terminal=True, has_aux=True), tx))
        count, whole = math.ceil(v["T"] / v["step"]), v["parts"]
        params, qbar = v.tree("init/w/"), v["class_dist_init"]
        state = jax.jit(tx.init)(params)
        for batch in range(v["n_chunks"] // count):
            carry, xs, y = terminal_batch(v, batch)
            logits = []
            for p in range(count):
                key = f"c{batch * count + p}"
                start, end = v[f"{key}/start_end"]
                part = SequencePart(np.asarray(p), count, whole)
                state, params, carry, metrics = learn(state, params, carry, xs[start:end], {"y": y}, part=part)
                close(metrics.loss, v[f"{key}/clf"] + v[f"{key}/oracle"])
                close(metrics.aux, v[f"{key}/logits"])
                close(carry[0], v[f"{key}/h"])
                close(carry[1], v[f"{key}/cell"])
                assert_near(state.inner[0], v.tree(f"{key}/grad/"), 1e-10)
                assert_state(v, key, state, params, 1e-10)
                logits.append(metrics.aux)
            qbar = jax.jit(qbar_first_errors)(qbar, np.stack(logits), y)
        close(qbar, v["class_dist_final"])
        assert_state(v, "after_reset", *jax.jit(fptt_epoch_end)(state, params), 1e-10)


def test_parity_of_the_terminal_program_in_one_scan():
    v = Vectors("terminal_lstm_oracle_sgd")
    with jax.enable_x64(True):
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
        cell, loss, tx = terminal_setup(v)
        train = jax.jit(fptt_step(SequenceProblem(cell, loss, terminal=True, has_aux=True), tx, parts=v["parts"]))
        params, qbar = v.tree("init/w/"), v["class_dist_init"]
        state = jax.jit(tx.init)(params)
        for batch in range(2):
            carry, xs, y = terminal_batch(v, batch)
            state, params, carry, metrics = train(state, params, carry, xs, {"y": y, "qbar": qbar})
            keys = [f"c{batch * 4 + p}" for p in range(4)]
            close(metrics.loss, [v[f"{key}/clf"] + v[f"{key}/oracle"] for key in keys])
            close(metrics.aux, [v[f"{key}/logits"] for key in keys])
            close(carry[0], v[f"{keys[-1]}/h"])
            assert_state(v, keys[-1], state, params, 1e-12)
            qbar = jax.jit(qbar_first_errors)(qbar, metrics.aux, y)
        close(qbar, v["class_dist_final"])


def test_parity_of_the_language_program():
    v = Vectors("seq2seq_lstm_sgdm")
    atol = 1e-12
    with jax.enable_x64(True):

        def loss(params, outs, targets, part):
            logits = outs @ params["decoder.weight"].T + params["decoder.bias"][None, None]
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        tx = fptt(optax.sgd(v["lr"], v["momentum"]), v["alpha"], beta=v["beta"], lmbda=v["lmbda"])
        encode = lambda params, tokens: params["encoder.weight"][tokens]
        language = SequenceProblem(torch_lstm("rnn."), loss, encode=encode)
        train = jax.jit(fptt_step(language, tx, parts=v["parts"], recompute_state=True))
        params = v.tree("init/w/")
        state = jax.jit(tx.init)(params)
        zeros = np.zeros_like(v["w0/h_next"])
        carry, count = (zeros, zeros), 4
        for window in range(2):
            tokens = v["tokens"][14 * window : 14 * window + 15]
            state, params, carry, metrics = train(state, params, carry, tokens[:-1], tokens[1:])
            keys = [f"c{window * count + p}" for p in range(count)]
            np.testing.assert_allclose(metrics.loss, [v[f"{key}/loss"] for key in keys], rtol=0, atol=atol)
            assert_state(v, keys[-1], state, params, atol)
            np.testing.assert_allclose(carry[0], v[f"w{window}/h_next"], rtol=0, atol=atol)
            np.testing.assert_allclose(carry[1], v[f"w{window}/c_next"], rtol=0, atol=atol)
        close = jax.jit(functools.partial(fptt_epoch_end, reset_lam=False))
        assert_state(v, "after_reset", *close(state, params), atol)


@pytest.mark.parametrize("name", ["addtask_as_shipped", "addtask_with_regulariser"])
def test_parity_of_the_add_task(name):
    v = Vectors(name)
    atol = 1e-10
    with jax.enable_x64(True):

        def loss(params, h, y, part):
            mse = jnp.mean((h @ params["lin.weight"].T + params["lin.bias"][None] - y) ** 2)
            return (part.index + 1 / v["parts"]) * mse, mse  # the authors' slip, meant is part.progress

        base = optax.chain(record(), torch_clip(v["clip"]), optax.adam(v["lr"]))
        tx = fptt(base, v["alpha"], beta=v["beta"]) if v["with_reg"] else base
        length = v["T"] // v["parts"]
        adding = SequenceProblem(torch_lstm("rnn."), loss, terminal=True, has_aux=True)
        train = jax.jit(fptt_step(adding, tx, part_length=length))
        params = v.tree("init/w/")
        state = jax.jit(tx.init)(params)
        for i in range(2):
            xs = np.moveaxis(v[f"i{i}/x"], 1, 0)[:-length]  # nor do they train the last part
            zeros = np.zeros((xs.shape[1], 6))
            state, params, _, metrics = train(state, params, (zeros, zeros), xs, v[f"i{i}/y"])
            last = 4 * i + 3
            np.testing.assert_allclose(metrics.aux, [v[f"c{c}/mse"] for c in range(4 * i, last + 1)], atol=atol)
            assert_near((state.inner if v["with_reg"] else state)[0], v.tree(f"c{last}/grad/"), atol)
            assert_near(params, v.tree(f"c{last}/w/"), atol)
            if v["with_reg"]:
                assert_state(v, f"c{last}", state, params, atol)


SPIKING = {
    "layer1_x": ("W", "b"),
    "layer1_r": ("U", "c"),
    "layer1_tauM": ("Wm", "bm"),
    "layer1_tauAdp": ("Wa", "ba"),
    "bn1a": ("scale_x", "shift_x"),
    "bn1b": ("scale_s", "shift_s"),
}
READOUT = {"layer3_x": ("W", "b"), "layer3_tauM": ("Wo", "bo"), "bn2": ("scale", "shift")}


def spiking_params(tree):
    """The authors' names and layout -> ours."""

    def layer(names, slopes):
        found = {ours: tree[f"{theirs}.alpha"].reshape(()) for ours, theirs in slopes.items()}
        for theirs, (kernel, bias) in names.items():
            found |= {kernel: tree[f"{theirs}.weight"].T, bias: tree[f"{theirs}.bias"]}
        return found

    return {"neurons": layer(SPIKING, {"km": "act1", "ka": "act2"}), "readout": layer(READOUT, {"ko": "act3"})}


def spiking_cell(params, carry, x):
    layer = LTCSpikingCell(len(params["neurons"]["b"]))
    readout = LeakyReadoutCell(len(params["readout"]["b"]))
    neurons, spikes = layer.advance(params["neurons"], carry[:3], layer.project(params["neurons"], x))
    o, _ = readout.advance(params["readout"], carry[3], readout.project(params["readout"], spikes))
    return (*neurons, o), o


def test_parity_of_a_spiking_cell():
    v = Vectors("sfptt_ltc_cell")
    with jax.enable_x64(True):
        table = jax.jit(jax.vmap(jax.grad(surrogate_spike)))(v["surrogate/v"])
        np.testing.assert_allclose(table, v["surrogate/dspike_dv"], rtol=0, atol=1e-12)

        def loss(params, o, y, part):
            return part.progress * optax.softmax_cross_entropy_with_integer_labels(o, y).mean()

        frozen = optax.chain(record(), optax.set_to_zero())
        learn = jax.jit(fptt_online(SequenceProblem(spiking_cell, loss, terminal=True), frozen))
        params = spiking_params(v.tree("param/"))
        state = jax.jit(frozen.init)(params)
        carry = tuple(v[f"state0/{i}"] for i in range(4))
        for t in range(v["T"]):
            part = SequencePart(t, v["T"], v["T"])
            x, y = v["x"][None, :, :, t], v["y"]
            state, params, carry, metrics = learn(state, params, carry, x, y, part=part)
            np.testing.assert_allclose(metrics.loss, v[f"t{t}/loss"], rtol=0, atol=1e-12)
            for i, value in enumerate(carry):
                np.testing.assert_allclose(value, v[f"t{t}/state/{i}"], rtol=0, atol=1e-12)
            want = spiking_params(v.tree(f"t{t}/grad/"))
            for layer in want:
                assert_near(state[0][layer], want[layer], 1e-12)


# The facts of the method.


def linear_map(tx, curvature, size):
    """The matrix of one update on (w, wbar, lam) for the loss curvature w^2 / 2."""

    def once(vector):
        w, wbar, lam = vector
        updates, state = tx.update(curvature * w, tx.init(w)._replace(wbar=wbar, lam=lam), w)
        return jnp.stack([optax.apply_updates(w, updates), state.wbar, state.lam])

    return np.asarray(jax.jit(jax.vmap(once, out_axes=1))(np.eye(3)))[-size:, -size:]


def radius(matrix):
    return np.abs(np.linalg.eigvals(matrix)).max()


def test_fixed_points():
    tx = fptt(optax.sgd(0.3), 0.5)
    with jax.enable_x64(True):
        # Nothing but (w, w, 0) at a point without gradient comes back to itself.
        kernel = np.linalg.svd(linear_map(tx, 0.0, 3) - np.eye(3))
        assert (kernel.S > 1e-6).sum() == 2
        np.testing.assert_allclose(kernel.Vh[-1] / kernel.Vh[-1, 0], [1, 1, 0], atol=1e-12)
        assert (np.linalg.svd(linear_map(tx, 1.0, 3) - np.eye(3)).S > 1e-6).all()


def test_lambda_is_the_gradient_where_each_part_is_minimised_exactly():
    alpha, rng = 0.5, np.random.default_rng(0)
    with jax.enable_x64(True):
        hessian = np.zeros((3, 3))  # of the part at hand
        exact = optax.stateless(lambda g, _: jnp.asarray(-np.linalg.solve(hessian + alpha * np.eye(3), g)))
        tx = fptt(exact, alpha)
        w = jnp.ones(3)
        state = tx.init(w)
        for _ in range(4):
            root, centre = rng.normal(size=(3, 3)), rng.normal(size=3)
            hessian = root @ root.T
            updates, state = tx.update(jnp.asarray(hessian @ (w - centre)), state, w)
            w = optax.apply_updates(w, updates)
            np.testing.assert_allclose(state.lam, hessian @ (w - centre), atol=1e-10)


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.5), (2.0, 0.5), (0.2, 0.7)])
def test_averages_forget_at_a_rate_that_beta_alone_decides(alpha, beta):
    with jax.enable_x64(True):
        still = fptt(optax.set_to_zero(), alpha, beta=beta)
        assert radius(linear_map(still, 0.0, 2)) == pytest.approx(math.sqrt(1 - beta), rel=1e-9)


@pytest.mark.parametrize(("lmbda", "beta"), [(1.0, 0.5), (2.0, 0.5), (1.0, 0.7)])
def test_velocity_under_a_constant_gradient(lmbda, beta):
    eta, alpha, g = 0.4, 0.5, 3.0
    with jax.enable_x64(True):
        tx = fptt(optax.sgd(eta), alpha, beta=beta, lmbda=lmbda)
        w = np.zeros(())
        state, step = jax.jit(tx.init)(w), updater(tx)
        for _ in range(120):
            before, average = np.asarray(w), state.wbar
            w, state = step(np.asarray(g), state, w)
        velocity = -eta * g / (1 + eta * alpha * (1 / beta - lmbda))
        np.testing.assert_allclose(w - before, velocity, rtol=1e-9)
        np.testing.assert_allclose(state.lam, -(alpha / beta) * velocity, rtol=1e-9)
        if lmbda == 1 and beta == 0.5:
            np.testing.assert_allclose(average, w, rtol=1e-9)  # one step ahead


def test_small_steps_are_plain_sgd_to_first_order():
    def end(tx):
        def step(t, carry):
            w, state = carry
            sign = jnp.where(t % 2 == 0, 1.0, -1.0)
            updates, state = tx.update(jnp.asarray([1.0, 0.2]) * (w - sign), state, w)
            return optax.apply_updates(w, updates), state

        w = np.ones(2, np.float32)
        return np.asarray(jax.jit(lambda w: jax.lax.fori_loop(0, 200, step, (w, tx.init(w))))(w)[0])

    gaps = [np.abs(end(fptt(optax.sgd(1e-2), alpha)) - end(optax.sgd(1e-2))).max() for alpha in (0.2, 0.1)]
    assert gaps[0] < 0.2 * 1e-2
    assert 1.8 < gaps[0] / gaps[1] < 2.2


@pytest.mark.parametrize("g", [0.01, 1.0])
def test_lambda_under_adam_ignores_the_gradient(g):
    lr, alpha = 1e-3, 0.1
    tx = fptt(optax.adam(lr), alpha)
    w = np.zeros((), np.float32)
    state, step = jax.jit(tx.init)(w), updater(tx)
    for _ in range(40):
        w, state = step(np.asarray(g, np.float32), state, w)
    np.testing.assert_allclose(state.lam, 2 * alpha * lr, rtol=0.02)


@pytest.mark.parametrize(("alpha", "curvature", "limit"), [(0.5, 1.0, 1.25), (0.1, 1.0, 1.79), (0.01, 1.0, 1.98)])
def test_stability_limit(alpha, curvature, limit):
    with jax.enable_x64(True):
        inside, outside = (
            radius(linear_map(fptt(optax.sgd(limit / curvature + d), alpha), curvature, 3)) for d in (-0.03, 0.03)
        )
    assert inside < 1 < outside


def test_correction_of_the_papers_formula():
    w, zeros = np.array([1, 2], np.float32), np.zeros(2, np.float32)
    lam = np.array([0.4, -0.2], np.float32)
    state = FpttState(wbar=zeros, lam=lam, inner=(zeros, optax.EmptyState()))
    for correction in (1.0, 0.5):
        base = optax.chain(record(), optax.set_to_zero())
        _, new = jax.jit(fptt(base, 0.3, lmbda=2.0, correction=correction).update)(zeros, state, w)
        # The gradient of -correction * w . lam + lmbda * alpha / 2 * |w - wbar|^2, with wbar = 0.
        np.testing.assert_allclose(new.inner[0], -correction * lam + 2.0 * 0.3 * w, rtol=1e-6)


def test_weights_of_the_state_wherever_it_sits():
    w = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(3)}
    labels = {"a": "ours", "b": "other"}
    tx = optax.MultiSteps(optax.partition({"ours": fptt(optax.sgd(0.1), 0.5), "other": optax.sgd(0.1)}, labels), 1)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, w), tx.init(w), w)
    moved = optax.apply_updates(w, updates)
    shown = fptt_eval_params(state, moved)
    assert shown["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(shown["b"], moved["b"])  # not FPTT's
    np.testing.assert_allclose(np.float32(shown["a"]), 0.9, atol=0.01)
    for reset_lam in (True, False):
        after, _ = fptt_epoch_end(state, moved, reset_lam=reset_lam)
        assert (np.abs(optax.tree.get(after, "lam")["a"]).max() == 0) == reset_lam
    with pytest.raises(ValueError, match="holds 0 FpttState"):
        fptt_eval_params(optax.sgd(0.1).init(w), w)


def test_buffers_may_be_donated_after_an_epoch_ends():
    tx = fptt(optax.adam(0.1))
    w = jnp.ones(3)
    state, w = fptt_epoch_end(tx.init(w), w)
    jax.jit(tx.update, donate_argnums=(1, 2))(jnp.ones(3), state, w)


# The auxiliary loss.


def test_terminal_loss_sums_to_one():
    logits, labels = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), np.array([0, 1, 2, 1])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ce, uniform = -log_p[np.arange(4), labels].mean(), -log_p.mean()
    variants = ({"auxiliary": "none"}, {}, {"auxiliary": "qbar", "qbar": qbar_init(3, 4)}, {"class_mean": False})
    losses = jax.jit(lambda *args: [fptt_terminal_loss(*args, **keywords) for keywords in variants])
    for p in range(5):
        none, code, qbar, paper = losses(logits, labels, SequencePart(np.asarray(p), 5, 4))
        b = (p + 1) / 5
        second = uniform if p < 3 else ce
        np.testing.assert_allclose(none, b * ce, rtol=1e-6)
        np.testing.assert_allclose(paper, b * ce + (1 - b) * second, rtol=1e-6)
        np.testing.assert_allclose([code, qbar], b * ce + (1 - b) * second / 3, rtol=1e-6)


def test_qbar_of_the_paper_is_the_epochs_mean():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 8, 4)).astype(np.float32)  # a short last part beyond the two full ones
    labels = np.asarray([0, 1, 1, 2, 0, 1, 2, 2])
    add = jax.jit(qbar_sums)
    sums = add(add(np.zeros((4, 2, 4), np.float32), logits[:, :4], labels[:4]), logits[:, 4:], labels[4:])
    means = np.asarray(jax.jit(qbar_means)(sums, qbar_init(4, 2)))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for c in range(3):
        np.testing.assert_allclose(means[c], p[:2, labels == c].mean(1), rtol=1e-5)
    np.testing.assert_array_equal(means[3], 0.25)  # does not occur


# Training steps.

T, B, D, H = 5, 3, 2, 4


def plain_cell(params, h, x):
    h = jnp.tanh(h @ params["u"] + x @ params["w"])
    return h, h


def per_step_loss(params, outs, targets, part):
    return jnp.mean((outs @ params["v"] - targets) ** 2)


def terminal_loss(params, h, y, part):
    return part.progress * jnp.mean((h @ params["v"] - y) ** 2)


PLAIN = SequenceProblem(plain_cell, per_step_loss)


@functools.cache
def given():
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"w": draw(D, H), "u": np.float32(0.5) * draw(H, H), "v": draw(H, D)}
    return jax.tree.map(jnp.asarray, (params, np.zeros((B, H), np.float32), draw(T, B, D), draw(T, B, D)))


def by_hand(params, h, xs, targets, length, terminal, detach):
    """Sum of the weighted losses of all parts, in Python loops."""
    total, count = 0.0, math.ceil(T / length)
    for p in range(count):
        outs = []
        h = jax.lax.stop_gradient(h) if detach else h
        for t in range(p * length, min((p + 1) * length, T)):
            h, out = plain_cell(params, h, xs[t])
            outs.append(out)
        part = SequencePart(p, count, T // length)
        if terminal:
            value = terminal_loss(params, outs[-1], targets, part)
        else:
            value = per_step_loss(params, jnp.stack(outs), targets[p * length : p * length + len(outs)], part)
        total += len(outs) / T * value
    return total


@pytest.mark.parametrize(
    ("makes", "terminal"),
    [((bptt_step, functools.partial(bptt_step, remat=True)), False), ((tbptt_step,), True)],
)
def test_gradients_of_bptt_and_truncated_bptt(makes, terminal):
    params, h, xs, targets = given()
    loss, targets = (terminal_loss, targets[0]) if terminal else (per_step_loss, targets)
    hand = lambda w: by_hand(w, h, xs, targets, 2, terminal, detach=makes == (tbptt_step,))
    value, want = jax.jit(jax.value_and_grad(hand))(params)
    for make in makes:
        step = jax.jit(make(SequenceProblem(plain_cell, loss, terminal=terminal), record(), part_length=2))
        got, _, _, metrics = step(params, params, h, xs, targets)
        assert_near(got, want, 1e-5)
        np.testing.assert_allclose(np.dot([0.4, 0.4, 0.2], metrics.loss), value, rtol=1e-5)


def test_truncation_is_real():
    # The input speaks in the first part only, the loss in the last one only.
    cell = lambda w, h, x: (h + w * x, h + w * x)
    loss = lambda w, h, y, part: jnp.where(part.index == 2, h.sum(), 0.0)
    xs, number = np.array([1, 0, 0, 0, 0, 0], np.float32), np.float32
    for make, want in ((bptt_step, 1 / 3), (tbptt_step, 0.0), (fptt_step, 0.0)):
        step = jax.jit(make(SequenceProblem(cell, loss, terminal=True), record(), parts=3))
        grad = step(number(0), number(1), number(0), xs, None)[0]
        np.testing.assert_allclose(grad, want, rtol=1e-6)


def test_one_part_of_fptt_is_bptt():
    params, h, xs, targets = given()
    ends = []
    for make, tx in ((fptt_step, fptt(optax.sgd(0.1))), (bptt_step, optax.sgd(0.1))):
        ends.append(jax.jit(make(PLAIN, tx, parts=1))(tx.init(params), params, h, xs, targets)[1])
    assert_near(*ends, 1e-6)


def test_every_step_its_own_part_and_state_kept_from_old_parameters():
    params, h, xs, targets = given()
    tx = fptt(optax.sgd(0.05))
    train = jax.jit(fptt_step(PLAIN, tx, part_length=1))
    *got, _ = train(tx.init(params), params, h, xs, targets)
    state = tx.init(params)

    @jax.jit
    def once(params, state, h, x, y):
        def loss(params):
            new, out = plain_cell(params, h, x)
            return per_step_loss(params, out, y, None), new

        grads, new = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, new

    for x, y in zip(xs, targets, strict=True):
        params, state, h = once(params, state, h, x, y)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves([state, params, h]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_recomputed_state_is_that_of_the_final_parameters():
    params, h, xs, targets = given()
    tx = optax.sgd(0.1)
    step = tbptt_step(PLAIN, tx, part_length=2, recompute_state=True)
    _, new, last, _ = jax.jit(step)(tx.init(params), params, h, xs, targets)
    want, hosted = np.asarray(h), jax.tree.map(np.asarray, new)
    for x in np.asarray(xs):
        want = np.tanh(want @ hosted["u"] + x @ hosted["w"])
    np.testing.assert_allclose(last, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [fptt_step, bptt_step])
def test_time_may_stand_behind_the_batch(make):
    params, h, xs, targets = given()
    turned = [np.moveaxis(np.asarray(leaf), 0, 1) for leaf in (xs, targets)]
    tx = optax.sgd(0.1)
    ends = [
        jax.jit(make(dataclasses.replace(PLAIN, time_axis=axis), tx, part_length=2))(tx.init(params), params, h, *data)
        for axis, data in ((0, (xs, targets)), (1, turned))
    ]
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_stream_may_stand_behind_the_batch():
    params, h, xs, targets = given()
    tx = optax.sgd(0.1)
    ends = [
        jax.jit(fptt_online(SequenceProblem(plain_cell, terminal_loss, terminal=True, time_axis=axis), tx))(
            tx.init(params), params, h, data, np.asarray(targets)[0]
        )
        for axis, data in ((0, xs), (1, np.asarray(xs).swapaxes(0, 1)))
    ]
    assert_near(ends[0][1], ends[1][1], 1e-6)


def test_a_linen_cell_in_bfloat16():
    cell = nn.GRUCell(H, dtype=jnp.bfloat16, recurrent_kernel_init=nn.initializers.lecun_normal())
    _, _, xs, targets = given()
    h = jnp.zeros((B, H), jnp.bfloat16)
    params = optax.tree.cast(jax.jit(cell.init)(jax.random.key(0), h, xs[0]), jnp.bfloat16)
    tx = fptt(optax.sgd(0.1))
    loss = lambda params, outs, targets, part: jnp.mean((outs[..., :D] - targets) ** 2)
    train = jax.jit(fptt_step(SequenceProblem(cell.apply, loss, unroll=2), tx, parts=2), donate_argnums=(0, 1, 2))
    state, params, h, metrics = train(tx.init(params), params, h, xs, targets)
    assert metrics.loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves((state.wbar, state.lam))} == {jnp.dtype(jnp.float32)}
    assert np.isfinite(metrics.loss).all()


def temporary_bytes(make, length, time_axis=0, **split):
    cell = lambda params, h, x: (jnp.tanh(h @ params["u"] + x @ params["w"]),) * 2
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    params = {"w": shape(D, 32), "u": shape(32, 32), "v": shape(32, D)}
    tx = fptt(optax.adam(1e-3))
    arguments = jax.eval_shape(tx.init, params), params, shape(8, 32), *[shape(length, 8, D)] * 2
    if time_axis:
        arguments = *arguments[:3], *[shape(8, length, D)] * 2
    step = jax.jit(make(SequenceProblem(cell, per_step_loss, time_axis=time_axis), tx, **split))
    return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_time():
    for axis in (0, 1):
        long, short = (temporary_bytes(fptt_step, length, axis, part_length=20) for length in (10_000, 100))
        assert long <= 1.05 * short
    exact = temporary_bytes(bptt_step, 10_000)
    assert exact >= 10_000 * 8 * 32 * 4  # every hidden state
    assert temporary_bytes(bptt_step, 10_000, parts=100, remat=True) <= 0.1 * exact


@pytest.mark.slow
def test_memory_does_not_grow_with_time_where_a_rest_is_left():
    for make in (fptt_step, tbptt_step):
        of = functools.partial(temporary_bytes, make, part_length=20)
        assert of(10_013) <= 1.05 * of(113)


# Bad input.


def poisoned():
    params, h, xs, targets = given()
    xs = np.array(xs)[:4]
    xs[0] = np.nan  # in the first of two parts
    return params, h, xs, np.asarray(targets)[:4]


def test_a_nan_spreads_by_default_and_shows():
    params, h, xs, targets = poisoned()
    tx = fptt(optax.sgd(0.05))
    train = jax.jit(fptt_step(PLAIN, tx, parts=2))
    _, end, _, metrics = train(tx.init(params), params, h, xs, targets)
    assert np.isnan(metrics.loss).all()
    assert np.isnan(end["w"]).all()
    assert metrics.skipped is None


def test_a_part_with_a_nan_may_be_skipped():
    params, h, xs, targets = poisoned()
    tx = fptt(optax.adam(0.05))
    # The recomputed state, not finite either, gives way to the last part's.
    step = fptt_step(PLAIN, tx, parts=2, skip_nonfinite=True, recompute_state=True)
    *got, metrics = jax.jit(step)(tx.init(params), params, h, xs, targets)
    np.testing.assert_array_equal(metrics.skipped, [True, False])
    # As if that part had never been.
    learn = jax.jit(fptt_online(PLAIN, tx))
    *want, _ = learn(tx.init(params), params, h, xs[2:], targets[2:])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_sequence_with_a_nan_may_be_skipped():
    params, h, xs, targets = poisoned()
    step = bptt_step(PLAIN, optax.sgd(0.1), skip_nonfinite=True)
    *end, metrics = jax.jit(step)(optax.sgd(0.1).init(params), params, h, xs, targets)
    assert metrics.skipped
    assert_near(end[1], params, 0)
    np.testing.assert_array_equal(end[2], h)


def test_an_optimizer_that_skips_leaves_the_averages_sound():
    w = np.ones(2, np.float32)
    tx = optax.apply_if_finite(fptt(optax.adam(0.1)), 3)
    _, state = jax.jit(lambda grads, w: tx.update(grads, tx.init(w), w))(np.full(2, np.nan, np.float32), w)
    np.testing.assert_array_equal(optax.tree.get(state, "wbar"), w)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({}, "give one of the two"),
        ({"parts": 2, "part_length": 3}, "parts=2 and part_length=3: give one of the two"),
        ({"parts": 0}, "parts=0 must be an integer in"),
        ({"part_length": 0}, "part_length=0 must be an integer in"),
    ],
)
def test_bad_arguments_of_the_training_steps(keywords, words):
    for make in (fptt_step, tbptt_step):
        with pytest.raises(ValueError, match=words):
            make(PLAIN, optax.sgd(0.1), **keywords)
    with pytest.raises(TypeError, match="must be an integer"):
        fptt_step(PLAIN, optax.sgd(0.1), parts=2.5)
    with pytest.raises(ValueError, match="save nothing"):
        bptt_step(PLAIN, optax.sgd(0.1), remat=True)
    with pytest.raises(ValueError, match="unroll=0"):
        SequenceProblem(plain_cell, per_step_loss, unroll=0)
    with pytest.raises(ValueError, match="time_axis=2 is not one of 0, 1"):
        SequenceProblem(plain_cell, per_step_loss, time_axis=2)


def call(make=fptt_step, loss=per_step_loss, carry=None, xs=None, targets=None, has_aux=False, time_axis=0, **split):
    params, h, inputs, outputs = given()
    carry, xs, targets = (
        own if own is not None else default for own, default in ((carry, h), (xs, inputs), (targets, outputs))
    )
    tx = record()
    asked = SequenceProblem(plain_cell, loss, has_aux=has_aux, time_axis=time_axis)
    step = make(asked, tx, **(split or {"parts": 2}))
    return jax.eval_shape(lambda params: step(tx.init(params), params, carry, xs, targets), params)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"parts": 6}, r"parts=6 must be an integer in \[1, 5\]"),
        ({"xs": np.zeros((0, B, D))}, "at least one step"),
        ({"targets": np.zeros((7, B, D))}, "xs 5, targets 7"),
        ({"targets": np.zeros(())}, "terminal=True"),
        ({"time_axis": 1, "part_length": 2, "targets": np.zeros((T, 4))}, "Axis 1 must be time.*xs 3, targets 4"),
        ({"carry": np.zeros((1, H), np.float32)}, r"carry is float32\[1, 4\], but the cell returns float32\[3, 4\]"),
        ({"carry": np.zeros((B, H), jnp.bfloat16)}, "dtype"),
        ({"carry": {"h": np.zeros((B, H), np.float32)}}, "carry"),
        ({"loss": lambda params, outs, targets, part: outs}, "must be one number"),
    ],
)
def test_bad_calls_of_the_training_steps(keywords, words):
    for make in (fptt_step, tbptt_step, bptt_step):
        with pytest.raises((ValueError, TypeError), match=words):
            call(make, **keywords)


def test_a_carry_of_another_hidden_size_is_named():
    with pytest.raises(TypeError) as caught:
        call(carry=np.zeros((B, H + 1), np.float32))
    assert "with carry float32[3, 5] and xs float32[5, 3, 2]" in "".join(caught.value.__notes__)


def test_one_part_by_length_is_warned_about():
    with pytest.warns(NoEffectWarning, match=r"Choose part_length in \[1, 4\]"):
        call(part_length=T)


def test_aux_must_not_depend_on_the_number_of_steps():
    loss = lambda params, outs, targets, part: (outs.sum(), {"outs": outs})
    with pytest.raises(ValueError, match="aux/outs has shape"):
        call(loss=loss, has_aux=True, part_length=2)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"alpha": 0.0}, "use the base optimizer alone"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"beta": 0.0}, r"beta=0.0 must be a number in \(0.0, 1.0\]"),
        ({"beta": 1.5}, "beta=1.5"),
        ({"lmbda": -1.0}, "lmbda=-1.0"),
        ({"correction": -0.5}, "correction=-0.5"),
    ],
)
def test_bad_arguments_of_the_transformation(keywords, words):
    with pytest.raises(ValueError, match=words):
        fptt(optax.sgd(0.1), **keywords)


def test_misuse_of_the_transformation():
    with pytest.raises(TypeError, match="must be an optax transformation"):
        fptt(0.1)
    tx = fptt(optax.sgd(0.1))
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(np.ones(2, np.float32), None)
    logits, labels = np.zeros((2, 3), np.float32), np.zeros(2, int)
    with pytest.raises(ValueError, match="qbar missing"):
        fptt_terminal_loss(logits, labels, SequencePart(), auxiliary="qbar")
    with pytest.raises(ValueError, match="qbar given"):
        fptt_terminal_loss(logits, labels, SequencePart(), qbar=qbar_init(3, 1))
    with pytest.raises(ValueError, match=r"qbar has shape \(3, 2, 3\)"):
        fptt_terminal_loss(logits, labels, SequencePart(), auxiliary="qbar", qbar=qbar_init(3, 2))
    with pytest.raises(ValueError, match="not one of"):
        fptt_terminal_loss(logits, labels, SequencePart(), auxiliary="unifrom")


@pytest.mark.parametrize("keywords", [{"auxiliary": "none"}, {}, {"auxiliary": "qbar"}])
def test_unknown_labels_count_nowhere(keywords):
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(4, 3)).astype(np.float32), np.array([2, -1, 0, -1])
    rows = jnp.asarray(draw.uniform(size=(3, 4, 3)).astype(np.float32))
    keywords = keywords | ({"qbar": rows} if "auxiliary" in keywords and keywords["auxiliary"] == "qbar" else {})
    loss = jax.jit(jax.value_and_grad(functools.partial(fptt_terminal_loss, **keywords)))
    for p in (0, 3):
        part = SequencePart(np.asarray(p), 4, 4)
        (found, gradient), (right, _) = loss(logits, labels, part), loss(logits[::2], labels[::2], part)
        np.testing.assert_allclose(found, right, rtol=1e-6)
        assert (np.asarray(gradient)[1::2] == 0).all()
        assert np.isfinite(loss(logits, np.full(4, -1), part)[0])


def test_labels_of_another_shape_are_refused():
    zeros = lambda *shape: np.zeros(shape, np.float32)
    logits, labels = zeros(4, 3), np.zeros((4, 1), int)
    for call in (
        lambda: fptt_terminal_loss(logits, labels, SequencePart(0, 2, 2)),
        lambda: qbar_first_errors(qbar_init(3, 4), zeros(4, 4, 3), labels),
        lambda: qbar_sums(zeros(3, 4, 3), zeros(4, 4, 3), labels),
    ):
        with pytest.raises(ValueError, match=r"labels have shape \(4, 1\); expected \(4,\)"):
            call()
