"""The one-gradient variant: what it scores, when, and whom it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effjax.optim.batch_size import scale_by_batch_size
from effjax.optim.one_gradient import samuel_one_gradient

RATES = (0.3, 0.1, 0.03)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 16, 4)).astype(np.float32)
Y = X @ RNG.normal(size=4).astype(np.float32)


def loss_fn(w, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


slope_of = jax.jit(jax.value_and_grad(loss_fn))


def run(tx, steps=12, dtype=jnp.float32, loss=loss_fn):
    @jax.jit
    def step(w, state, batch):
        grads = jax.grad(loss_fn)(w, batch)
        updates, state = tx.update(grads, state, w, value_fn=lambda p: loss(p, batch))
        return optax.apply_updates(w, updates), state

    w = jnp.zeros(4, dtype)
    state, history = jax.jit(tx.init)(w), []
    for t in range(steps):
        w, state = step(w, state, (X[t], Y[t]))
        history.append((w, state))
    assert step._cache_size() == 1
    return jax.device_get(history)


@pytest.mark.parametrize("base", [lambda lr: optax.sgd(lr, 0.9), lambda lr: optax.adamw(lr, weight_decay=0.1)])
def test_between_evaluations_it_is_the_base_optimizer(base):
    got = run(samuel_one_gradient(base, RATES, every=100))[-1][0]
    tx = base(0.1)

    @jax.jit
    def step(w, state, batch):
        updates, state = tx.update(jax.grad(loss_fn)(w, batch), state, w)
        return optax.apply_updates(w, updates), state

    w = jnp.zeros(4)
    state = tx.init(w)
    for t in range(12):
        w, state = step(w, state, (X[t], Y[t]))
    np.testing.assert_allclose(got, w, rtol=1e-5)


def test_candidates_are_where_each_rate_would_have_led_on_the_next_batch():
    tx = samuel_one_gradient(
        optax.sgd, RATES, every=3, meta_rates=(1.0,), eta_scale=1.0, normalize=False, loss_clip=None
    )
    history = run(tx, 4)
    w, directions = np.zeros((2, 4), np.float32)
    slope = lambda w, t: np.asarray(slope_of(w, (X[t], Y[t]))[1])
    for t in range(3):
        d = -slope(w, t)
        w, directions = w + np.float32(0.1) * d, directions + d
    ends = [w + np.float32(rate - 0.1) * directions for rate in RATES]
    losses = np.array([float(slope_of(end, (X[3], Y[3]))[0]) for end in ends])
    state = history[3][1]
    np.testing.assert_allclose(state.log_weights[0] - state.log_weights[0, 0], losses[0] - losses, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(optax.tree.get(state, "learning_rate"), RATES[np.argmin(losses)])
    assert [int(state.evaluations) for _, state in history] == [0, 0, 0, 1]
    # The buffer starts again with the step that follows the evaluation.
    np.testing.assert_allclose(state.displacement, -slope(w, 3), rtol=1e-4)


def test_it_leaves_a_bad_rate():
    rates = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    picked = [float(state.learning_rate) for _, state in run(samuel_one_gradient(optax.sgd, rates, every=5), 30)]
    assert picked[0] == pytest.approx(1e-3)
    assert picked[-1] == pytest.approx(1e-1)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_candidate_without_finite_loss_dies_and_may_return(bad):
    tx = samuel_one_gradient(optax.sgd, (0.3, 0.05, 0.02), every=1)

    def loss(w):
        return -w

    @jax.jit
    def step(w, state, limit):
        # The large rate leads furthest, and is the best wherever the loss is defined.
        value_fn = lambda p: jnp.where(p > limit, bad, loss(p))
        updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=value_fn)
        return optax.apply_updates(w, updates), state

    w = jnp.zeros(())
    state, rates = tx.init(w), []
    for t in range(40):
        w, state = step(w, state, 0.2 if t < 2 else -1.0 if t == 2 else jnp.inf)
        rates.append(round(float(state.learning_rate), 2))
        assert np.isfinite(w)
    # Evaluations begin at t = 1; at t = 2 no loss is finite, and nothing changes.
    assert rates[0] == rates[1] == rates[2] == 0.05
    assert rates[-1] == 0.3


@pytest.mark.parametrize("select", ["argmax", "sample"])
def test_bfloat16_parameters_keep_float32_weights(select):
    tx = samuel_one_gradient(optax.adam, RATES, every=3, select=select)
    w, state = run(tx, dtype=jnp.bfloat16)[-1]
    assert w.dtype == state.displacement.dtype == jnp.bfloat16
    assert state.learning_rate.dtype == state.log_weights.dtype == jnp.float32
    assert np.isfinite(np.asarray(w, np.float32)).all()


def test_discount_forgets():
    old = run(samuel_one_gradient(optax.sgd, RATES, every=3))[-1][1].log_weights
    new = run(samuel_one_gradient(optax.sgd, RATES, every=3, discount=0.1))[-1][1].log_weights
    assert np.ptp(new) < np.ptp(old)


@pytest.mark.parametrize("rates", [(0.1, -0.1), (0.1, 0.1), (0.1,), (0.0, 0.1)])
def test_bad_rates_are_named(rates):
    with pytest.raises(ValueError, match="learning_rates"):
        samuel_one_gradient(optax.sgd, rates)


@pytest.mark.parametrize(
    ("keywords", "text"),
    [({"every": 0}, "every=0"), ({"select": "average"}, "select='average'"), ({"discount": 0.0}, "discount=0.0")],
)
def test_bad_arguments_are_named(keywords, text):
    with pytest.raises(ValueError, match=text):
        samuel_one_gradient(optax.sgd, RATES, **keywords)


@pytest.mark.parametrize("base", [optax.contrib.schedule_free_sgd, optax.contrib.prodigy, lambda lr: optax.sgd(lr**2)])
def test_base_that_is_not_proportional_is_refused(base):
    with pytest.raises(ValueError, match="not proportional"):
        samuel_one_gradient(base, RATES).init(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="not proportional"):
        jax.eval_shape(samuel_one_gradient(base, RATES).init, jnp.zeros(4))


@pytest.mark.parametrize(
    "base", [optax.lion, optax.adamw, optax.contrib.muon, lambda lr: optax.chain(optax.clip(0.1), optax.adagrad(lr))]
)
def test_proportional_bases_are_accepted(base):
    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3), "n": jnp.zeros(())}
    jax.eval_shape(samuel_one_gradient(base, RATES).init, params)


def test_a_finished_transformation_is_refused_as_its_rate_would_multiply_every_candidate():
    with pytest.raises(TypeError, match=r"must be a function of the learning rate, such as optax.adam or lambda rate"):
        samuel_one_gradient(optax.adam(1e-3), RATES)


@pytest.mark.parametrize(
    ("base", "moved"),
    [
        (lambda lr: optax.chain(optax.adam(lr), scale_by_batch_size(8)), 0.2),  # sqrt(32 / 8) times Adam's first step
        (lambda lr: optax.chain(optax.adam(lr), optax.contrib.reduce_on_plateau()), 0.1),
    ],
)
def test_bases_that_ask_the_loop_for_more_are_given_it(base, moved):
    tx = samuel_one_gradient(base, (0.4, 0.1))
    loss = lambda w: ((w - 3) ** 2).sum()

    @jax.jit
    def step(w):
        value, grads = jax.value_and_grad(loss)(w)
        return tx.update(grads, tx.init(w), w, value_fn=loss, value=value, batch_size=32)[0]

    np.testing.assert_allclose(step(np.ones(3, np.float32)), moved, rtol=1e-4)


@pytest.mark.parametrize("base", [optax.sgd, optax.adam])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_follows_in_the_chain_is_noticed(base, dtype):
    alone = samuel_one_gradient(base, RATES, every=3)
    assert [float(state.followed) for _, state in run(alone, 12, dtype)] == [1.0] * 12
    history = run(optax.chain(alone, optax.scale(0.25)), 12)
    assert float(history[-1][1][0].followed) == pytest.approx(0.25, rel=1e-2)
    w, state = jnp.zeros(4), (tx := optax.chain(alone, optax.scale(0.25))).init(jnp.zeros(4))

    @jax.jit
    def step(w, state, batch):
        updates, state = tx.update(jax.grad(loss_fn)(w, batch), state, w, value_fn=jnp.sum)  # not asked yet
        return optax.apply_updates(w, updates), state

    for batch in zip(X[:3], Y[:3], strict=True):
        w, state = step(w, state, batch)
    with pytest.warns(UserWarning, match=r"moved 0\.25 times as far.*It must stand outermost"):
        tx.update(slope_of(w, batch)[1], state, w, value_fn=lambda p: loss_fn(p, batch))


def test_missing_value_fn_shows_the_line_to_write():
    tx = samuel_one_gradient(optax.sgd, RATES)
    w = jnp.zeros(4)
    with pytest.raises(ValueError, match=r"value_fn=lambda p: loss\(p, batch\)"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(w, tx.init(w), value_fn=jnp.sum)
    with pytest.raises(ValueError, match=r"one loss, not an array of shape \(4,\)"):
        tx.update(w, tx.init(w), w, value_fn=lambda p: p)


def test_nnx_optimizer_forwards_value_fn():
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, samuel_one_gradient(optax.adam, RATES, every=2), wrt=nnx.Param)

    def loss(model, batch):
        return jnp.mean((model(batch[0])[:, 0] - batch[1]) ** 2)

    @nnx.jit
    def step(model, optimizer, batch):
        value, grads = nnx.value_and_grad(loss)(model, batch)
        graph, _, rest = nnx.split(model, nnx.Param, ...)
        optimizer.update(model, grads, value_fn=lambda params: loss(nnx.merge(graph, params, rest), batch))
        return value

    values = [float(step(model, optimizer, (X[t], Y[t]))) for t in range(30)]
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:5])
    assert int(optax.tree.get(nnx.as_pure(optimizer.opt_state), "evaluations")) == 14


def test_a_vmapped_state_is_refused_also_inside_jit():
    tx = samuel_one_gradient(optax.sgd, RATES)
    w = jnp.zeros((2, 4))
    state = jax.vmap(tx.init)(w)
    for update in (tx.update, jax.jit(tx.update, static_argnames="value_fn")):
        with pytest.raises(ValueError, match="cannot run under vmap"):
            jax.vmap(lambda g, s, p, u=update: u(g, s, p, value_fn=jnp.sum))(w, state, w)
