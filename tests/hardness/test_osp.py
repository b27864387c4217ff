"""One-sided prediction: parity of the saddle form, identities, batch statistics, devices, bad input."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.hardness.osp import OspTerms, osp_loss, osp_terms
from effjax.hardness.osp_saddle import OspSaddleConfig, osp_saddle_init, osp_saddle_loss, osp_saddle_step
from effjax.optim.dcl import dcl_update

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "selective_classification"
RNG = np.random.default_rng(0)
Z = (2 * RNG.normal(size=(24, 4))).astype(np.float32)
Y = RNG.integers(0, 4, 24)


LOSS = jax.jit(lambda z, y, mu, weights=None: osp_loss(z, y, mu, weights=weights))
SADDLE = jax.jit(osp_saddle_loss, static_argnums=3)
SLOPE = jax.jit(jax.grad(osp_loss))
TERMS = jax.jit(lambda z, y, weights=None: osp_terms(z, y, weights=weights))


def by_hand(z, y, weights=None):
    """L and C in float64, one class at a time."""
    z = np.asarray(z, np.float64)
    f = np.exp(z - z.max(1, keepdims=True))
    f /= f.sum(1, keepdims=True)
    w = np.ones(len(y)) if weights is None else weights
    w = w * (y >= 0)
    mean = lambda value, at: (w * value)[at].sum() / w[at].sum() if w[at].sum() else 0.0
    classes = range(z.shape[1])
    return (
        np.array([mean(-np.log(f[:, k]), y == k) for k in classes]),
        np.array([mean(-np.log(1 - f[:, k]), y != k) for k in classes]),
    )


def released_terms(logits, labels):
    """The authors' terms, which clip the probabilities and add a small number inside the logarithms."""
    f = jnp.clip(jax.nn.softmax(logits), 1e-7, 1 - 1e-7)
    hot = jax.nn.one_hot(labels, logits.shape[1], dtype=f.dtype)
    cover = (hot * -jnp.log(f + 1e-8)).sum(0) / hot.sum(0)
    return OspTerms(cover, ((1 - hot) * -jnp.log(1 - f + 1e-8)).sum(0) / (1 - hot).sum(0))


@pytest.mark.parametrize(("terms", "rtol"), [(released_terms, 1e-9), (osp_terms, 1e-6)])
def test_saddle_parity(terms, rtol):
    """Forty steps of the first program: losses, levels, multipliers, and the order of the updates."""
    with np.load(REFERENCE / "osp_saddle_reference.npz") as file, jax.enable_x64():
        ref = dict(file)
        x, y, alpha, mu = ref["X"], ref["y"], float(ref["alpha"]), float(ref["mu"])
        config = OspSaddleConfig(mu=mu, classes=5, dual=_tf_adam(float(ref["max_lr"])))
        tx = _tf_adam(float(ref["lr"]))
        heads = {"W": ref["W0"], "b": ref["b0"], "Wa": ref["Wa0"], "ba": ref["ba0"]}
        state = osp_saddle_init(heads, tx=tx, config=config)
        logits = lambda heads: x @ heads["W"] + heads["b"][None, :]

        def total(both, dual):
            heads, levels = both
            found = terms(logits(heads), y)
            saddle = osp_saddle_loss(dual, found, levels, config)
            other = jax.nn.log_softmax(x @ heads["Wa"] + heads["ba"][None, :])
            auxiliary = -jnp.take_along_axis(other, y[:, None], 1).sum()
            return alpha * saddle + (1 - alpha) * 0.125 * auxiliary, (saddle, found)

        @jax.jit
        def step(state):
            both = (state.params, state.levels)
            (value, (saddle, found)), grads = jax.value_and_grad(total, has_aux=True)(both, state.dual)
            updates, opt = tx.update(grads, state.opt, both)
            heads, levels = optax.apply_updates(both, updates)
            levels = jnp.maximum(levels, 0)
            dual = dcl_update(state.dual, {"exclude": terms(logits(heads), y).exclude - levels}, config.constraints)
            constant = 0.1 * mu  # their M has mu (sum of phi - 0.1)
            told = {"loss": value - alpha * constant, "saddle": saddle - constant, "L": found.cover, "C": found.exclude}
            told |= {"lambda": state.dual.multipliers["exclude"], "phi": state.levels}
            return state._replace(params=heads, levels=levels, opt=opt, dual=dual), told, grads

        history = []
        for t in range(int(ref["steps"])):
            state, told, grads = step(state)
            history.append(jax.device_get(told))
            if t == 0:
                for name, grad in (*grads[0].items(), ("phi", grads[1])):
                    np.testing.assert_allclose(grad, ref[f"grad_{name}"], rtol=rtol, atol=rtol)
                found, levels = OspTerms(told["L"], told["C"]), told["phi"]
                slope = jax.jit(jax.grad(osp_saddle_loss, allow_int=True), static_argnums=3)
                start = osp_saddle_init(heads, tx=tx, config=config).dual
                np.testing.assert_allclose(
                    slope(start, found, levels, config).multipliers["exclude"],
                    ref["grad_lambda_of_saddle"],
                    rtol=rtol,
                    atol=rtol,
                )
        for name in history[0]:
            found = np.stack([told[name] for told in history])
            np.testing.assert_allclose(found, ref[f"traj_{name}"], rtol=10 * rtol, atol=10 * rtol, err_msg=name)
        for name in heads:
            np.testing.assert_allclose(state.params[name], ref[f"{name}_end"], rtol=10 * rtol, atol=10 * rtol)
        np.testing.assert_allclose(state.dual.multipliers["exclude"], ref["lambda_end"], rtol=10 * rtol)
        np.testing.assert_allclose(state.levels, ref["phi_end"], rtol=10 * rtol, atol=10 * rtol)


def _tf_adam(rate):
    """Adam whose epsilon stands where TensorFlow 1 puts it: outside of the bias correction."""

    def init(params):
        return jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)

    def update(grads, state, params=None):
        t, m, v = state[0] + 1, *state[1:]
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, grads)
        now = rate * jnp.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        return jax.tree.map(lambda m, v: -now * m / (jnp.sqrt(v) + 1e-8), m, v), (t, m, v)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("weights", [None, np.linspace(0, 2, 24, dtype=np.float32)])
def test_terms_as_by_hand(weights):
    labels = np.where(np.arange(24) % 7 == 0, -1, Y)
    found = TERMS(Z, labels, weights=weights)
    cover, exclude = by_hand(Z, labels, weights)
    np.testing.assert_allclose(found.cover, cover, rtol=2e-5)
    np.testing.assert_allclose(found.exclude, exclude, rtol=2e-5)
    mu = np.array([0.0, 1.0, 3.0, 30.0], np.float32)
    np.testing.assert_allclose(LOSS(Z, labels, mu, weights=weights), (cover + mu * exclude).sum(), rtol=2e-5)


@pytest.mark.parametrize("mu", range(3))
@pytest.mark.parametrize("case", range(2))
def test_parity_with_the_released_loss(mu, case):
    """Theirs adds 0.1 to every count, and no multiplier weighs the false positives."""
    with np.load(REFERENCE / "osp_release_loss.npz") as file:
        ref = {name.removeprefix(f"mu{mu}_case{case}_"): file[name] for name in file}
    inside = np.bincount(ref["targets"], minlength=10).astype(np.float32)
    outside, alpha, price = len(ref["targets"]) - inside, float(ref["alpha"]), float(ref["mus"][mu])
    assert inside.min() == 0  # a class that is absent from the batch

    def released(logits, aux, multipliers, levels):
        terms = osp_terms(logits, ref["targets"])
        parts = terms.cover * inside / (inside + 0.1) + terms.exclude * outside / (outside + 0.1)
        multipliers, levels = jax.nn.relu(multipliers), jax.nn.relu(levels)
        found = parts.sum() - (multipliers * levels).sum() + price * levels.sum()
        other = optax.softmax_cross_entropy_with_integer_labels(aux, ref["targets"]).mean()
        return alpha * found + (1 - alpha) * other

    given = [jnp.asarray(ref[name]) for name in ("logits", "aux_logits", "lambdas", "epsilons")]
    value, grads = jax.value_and_grad(released, (0, 1, 2, 3))(*given)
    np.testing.assert_allclose(value, ref["loss"], rtol=2e-6)
    for grad, name in zip(grads, ("logits", "aux_logits", "lambdas", "epsilons"), strict=True):
        np.testing.assert_allclose(grad, ref[f"grad_{name}"], rtol=2e-5, atol=1e-5)


def test_two_classes_have_one_term_each():
    cover, _ = by_hand(Z[:, :2], Y % 2)
    for mu in (0.0, 10.0):
        np.testing.assert_allclose(LOSS(Z[:, :2], Y % 2, mu), (1 + mu) * cover.sum(), rtol=2e-5)


def test_rows_in_any_order_and_twice_give_the_same():
    order = RNG.permutation(24)
    wanted = LOSS(Z, Y, 3.0)
    np.testing.assert_allclose(LOSS(Z[order], Y[order], 3.0), wanted, rtol=1e-6)
    np.testing.assert_allclose(LOSS(np.tile(Z, (2, 1)), np.tile(Y, 2), 3.0), wanted, rtol=1e-6)
    padded = np.concatenate([Z, np.full((8, 4), 50.0, np.float32)]), np.concatenate([Y, np.zeros(8, int)])
    weights = np.repeat([1.0, 0.0], [24, 8]).astype(np.float32)
    np.testing.assert_allclose(LOSS(*padded, 3.0, weights=weights), wanted, rtol=1e-6)


def test_absent_classes_and_empty_batches():
    labels = np.zeros(24, int)
    found = TERMS(Z, labels)
    cover, exclude = np.asarray(found.cover), np.asarray(found.exclude)
    np.testing.assert_array_equal(cover[1:], 0)
    assert exclude[0] == 0
    assert (exclude[1:] > 0).all()
    for z, y in ((Z[:0], Y[:0]), (Z, np.full(24, -1))):
        assert float(LOSS(z, y, 3.0)) == 0
        assert np.isfinite(SLOPE(z, y, 3.0)).all()
    assert np.isfinite(LOSS(Z[:1], Y[:1], 3.0))


def test_sure_predictions_have_exact_losses_and_gradients():
    """Where 1 - f is below what float32 tells from 0."""
    z = np.array([[40.0, 0.0, 1.0], [60.0, 0.0, 0.0]], np.float32)
    y = np.array([1, 0])
    found = TERMS(z, y)
    rest = np.log(np.exp(-40.0) + np.exp(-39.0))
    np.testing.assert_allclose(np.asarray(found.exclude)[0], -rest, rtol=1e-6)
    with jax.enable_x64():
        wanted = jax.jit(jax.grad(lambda z: -jnp.log((jax.nn.softmax(z))[0, 1:].sum())))(z.astype(float))
    slope = jax.jit(jax.grad(lambda z: osp_terms(z, y).exclude[0]))(z)
    np.testing.assert_allclose(np.asarray(slope)[0], np.asarray(wanted)[0], rtol=1e-4, atol=1e-6)


def test_half_precision_is_computed_in_full():
    half = Z.astype(jnp.bfloat16)
    found = LOSS(half, Y, 3.0)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, LOSS(half.astype(np.float32), Y, 3.0))
    assert jax.eval_shape(SLOPE, half, Y, 3.0).dtype == jnp.bfloat16


def test_eight_devices_count_the_whole_batch():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = RNG.normal(size=(24, 6)).astype(np.float32)
    w = RNG.normal(size=(6, 4)).astype(np.float32)
    loss = lambda w, x, y: osp_loss(x @ w, y, 3.0)
    wanted = jax.jit(jax.value_and_grad(loss))(w, x, Y)
    spread = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (x, Y)]
    by_compiler = jax.jit(jax.value_and_grad(loss))(w, *spread)
    inside = lambda w, x, y: osp_loss(x @ w, y, 3.0, axis_name="data")
    by_hand = jax.shard_map(inside, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    for found in (by_compiler, jax.jit(jax.value_and_grad(by_hand))(w, *spread)):
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)
    local = jax.shard_map(
        lambda w, x, y: jax.lax.pmean(loss(w, x, y), "data"),
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    assert abs(float(jax.jit(local)(w, *spread)) - float(wanted[0])) > 0.1  # local counts are another loss


def test_explicit_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    wanted = jax.jit(jax.value_and_grad(osp_loss))(Z, Y, 3.0)
    with jax.set_mesh(mesh):
        spread = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (Z, Y)]
        value, grad = jax.jit(jax.value_and_grad(lambda z, y: osp_loss(z, y, 3.0)))(*spread)
    np.testing.assert_allclose(value, wanted[0], rtol=1e-6)
    np.testing.assert_allclose(grad, wanted[1], rtol=1e-5, atol=1e-7)


def test_saddle_identities():
    terms = jax.device_get(TERMS(Z, Y))
    levels = np.array([0.3, 0.0, 1.0, 0.7], np.float32)
    for multiplier, mu, wanted in ((0.0, 0.0, terms.cover.sum()), (2.0, 2.0, LOSS(Z, Y, 2.0))):
        config = OspSaddleConfig(mu=mu, classes=4, multiplier=multiplier)
        state = osp_saddle_init(Z, tx=optax.adam(1e-3), config=config)
        np.testing.assert_allclose(SADDLE(state.dual, terms, levels, config), wanted, rtol=1e-5)
    config = OspSaddleConfig(mu=2.0, classes=4, multiplier=0.5)
    dual = osp_saddle_init(Z, tx=optax.adam(1e-3), config=config).dual
    np.testing.assert_allclose(SADDLE(dual, terms, terms.exclude, config), LOSS(Z, Y, 2.0), rtol=1e-5)
    slopes = jax.jit(jax.grad(osp_saddle_loss, (2, 0), allow_int=True), static_argnums=3)
    by_level, by_dual = slopes(dual, terms, levels, config)
    np.testing.assert_allclose(by_level, 2.0 - 0.5)
    np.testing.assert_allclose(by_dual.multipliers["exclude"], terms.exclude - levels, rtol=1e-5)


@pytest.mark.optimized
def test_saddle_ends_at_the_minimum_of_the_direct_form():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 5)).astype(np.float32)
    y = np.argmax(x @ rng.normal(size=(5, 4)) + rng.normal(size=(200, 4)), 1)
    terms = lambda w: osp_terms(x @ w, y)
    # Momentum would make levels and multipliers turn around each other.
    adam = optax.adam(optax.cosine_decay_schedule(0.02, 4000), b1=0.0)
    config = OspSaddleConfig(mu=1.0, classes=4, dual=adam)

    @jax.jit
    def saddle(state):
        return jax.lax.scan(lambda s, _: osp_saddle_step(s, terms, tx=adam, config=config), state, length=4000)[0]

    @jax.jit
    def descend(w):
        """Plain descent on the direct form, which is convex here."""
        slope = jax.grad(lambda w: osp_loss(x @ w, y, 1.0))
        return jax.lax.scan(lambda w, _: (w - 0.1 * slope(w), None), w, length=2000)[0]

    start = np.zeros((5, 4), np.float32)
    state, w = saddle(osp_saddle_init(start, tx=adam, config=config)), descend(start)
    loss = jax.jit(lambda w: osp_loss(x @ w, y, 1.0))
    least = float(loss(w))
    assert float(loss(start)) > least + 1
    found = jax.jit(terms)(state.params)
    np.testing.assert_allclose(SADDLE(state.dual, found, state.levels, config), least, rtol=1e-3)
    np.testing.assert_allclose(loss(state.params), least, rtol=1e-3)
    np.testing.assert_allclose(state.dual.multipliers["exclude"], 1.0, atol=0.05)
    np.testing.assert_allclose(state.levels, found.exclude, atol=0.05)


@pytest.mark.parametrize("order", ["alternating", "simultaneous"])
def test_where_the_multipliers_look(order):
    config = OspSaddleConfig(mu=2.0, classes=4, dual=optax.sgd(0.1), order=order)
    tx = optax.sgd(0.5)
    state = osp_saddle_init(Z, tx=tx, config=config)
    after, value = jax.jit(lambda s: osp_saddle_step(s, lambda z: osp_terms(z, Y), tx=tx, config=config))(state)
    cover, exclude = by_hand(Z, Y)
    np.testing.assert_allclose(value, (cover + 1.5 * (exclude - 0.5) + 2.0 * 0.5).sum(), rtol=1e-5)
    np.testing.assert_allclose(after.levels, 0.5 - 0.5 * (2.0 - 1.5), rtol=1e-5)
    z, levels = (np.asarray(after.params), np.asarray(after.levels)) if order == "alternating" else (Z, 0.5)
    wanted = np.maximum(1.5 + 0.1 * (by_hand(z, Y)[1] - levels), 0)
    np.testing.assert_allclose(after.dual.multipliers["exclude"], wanted, rtol=1e-5)


WRONG = {
    "labels [n, 1]": (lambda: osp_loss(Z, Y[:, None], 1.0), r"labels have shape \(24, 1\); expected \(24,\)"),
    "labels beyond": (lambda: osp_loss(Z, Y + 1, 1.0), r"labels go from 1 to 4, but must be classes in \[0, 3\]"),
    "weights": (lambda: osp_loss(Z, Y, 1.0, weights=Z[:, :1]), r"weights have shape \(24, 1\)"),
    "mu": (lambda: osp_loss(Z, Y, -1.0), r"mu=-1\.0 must be a number in \[0"),
    "mu of classes": (lambda: osp_loss(Z, Y, np.ones(3, np.float32)), r"mu has shape \(3,\); expected \(4,\)"),
    "logits": (lambda: osp_loss(Z[0], Y[:1], 1.0), r"logits have shape \(4,\); expected \[batch, classes\]"),
    "config": (lambda: OspSaddleConfig(mu=-1.0, classes=4), r"mu=-1\.0"),
    "order": (lambda: OspSaddleConfig(mu=1.0, classes=4, order="both"), "order='both' is not one of"),
    "levels": (
        lambda: osp_saddle_loss(None, TERMS(Z, Y), np.ones(3, np.float32), OspSaddleConfig(mu=1.0, classes=4)),
        r"levels have shape \(3,\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name):
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        call()
