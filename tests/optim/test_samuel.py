"""SAMUEL: the invariants of the method, parity with the authors' program, bad input, devices."""

import functools
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.core.errors import NoEffectWarning
from effjax.optim.expert_weights import draw, fold_in_bits
from effjax.optim.samuel import (
    SamuelState,
    samuel,
    samuel_eval_params,
    samuel_init,
    samuel_probabilities,
    samuel_sync,
    samuel_value_and_grad,
)

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "samuel"
RATES = (0.3, 0.1, 0.03)
OFFICIAL = {"eta_scale": 1.0, "normalize": False, "loss_clip": None, "prior_odds": 1.0}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(0, 40, 16, 4)
Y = np.tanh(X @ normal(1, 4, 2))
PARAMS = {"w": normal(2, 4, 2), "b": np.zeros(2, np.float32)}


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"][None]) - y) ** 2)


LOSSES_AND_GRADS = samuel_value_and_grad(loss_fn, loop="vmap")
probabilities = jax.jit(samuel_probabilities)


@functools.lru_cache(maxsize=8)
def stepper(tx, sync, tamper):
    """One program for the runs of a test: what tampers with the losses takes a number, which each run gives."""

    @jax.jit
    def step(params, state, batch, draw, number):
        losses, grads = LOSSES_AND_GRADS(params, batch)
        if tamper is not None:
            losses = tamper(losses, state.count, number)
        updates, state = tx.update(grads, state, params, value=losses, sampled=draw)
        params = optax.apply_updates(params, updates)
        return losses, state, samuel_sync(state, params) if sync else params

    return step


def run(tx, size, steps=8, params=None, sampled=None, sync=True, tamper=None, number=0.0):
    """Train; returns the history of (losses, state, params), each after its step."""
    params, step = samuel_init(PARAMS, size) if params is None else params, stepper(tx, sync, tamper)
    state, history = tx.init(params), []
    for t in range(steps):
        draw = None if sampled is None else np.int32(sampled[t])
        losses, state, params = step(params, state, (X[t], Y[t]), draw, np.float32(number))
        history.append(jax.device_get((losses, state, params)))
    return history


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(left, right):
    for a, b in zip(leaves(left), leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def all_experts_equal(tree):
    return all((leaf == leaf[:1]).all() for leaf in leaves(tree))


def test_one_expert_is_the_base_optimizer():
    with pytest.warns(NoEffectWarning, match="two learning rates"):
        tx = samuel(optax.adam, (0.1,), period=5)
    (*_, (_, _, got)) = run(tx, 1)
    base = optax.adam(0.1)

    @jax.jit
    def step(params, state, batch):
        updates, state = base.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, base.init(PARAMS)
    for t in range(8):
        params, state = step(params, state, (X[t], Y[t]))
        if t == 4:
            state = base.init(params)
    for a, b in zip(leaves(got), leaves(params), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_losses_keep_the_probabilities_uniform(normalize):
    tx = samuel(optax.sgd, RATES, normalize=normalize)
    for _, state, _ in run(tx, 3, tamper=lambda losses, *_: jnp.full_like(losses, 0.7)):
        np.testing.assert_allclose(probabilities(state), 1 / 3, rtol=1e-6)


def test_equal_experts_stay_bitwise_equal():
    for losses, state, params in run(samuel([optax.adam(0.1)] * 3, period=3), 3):
        assert all_experts_equal(params)
        assert (losses == losses[0]).all()
        np.testing.assert_allclose(probabilities(state).sum(), 1.0, rtol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_one_meta_rate_ignores_what_was_drawn(normalize):
    tx = samuel(optax.sgd, RATES, meta_rates=(0.5,), eta_scale=1.0, normalize=normalize)
    histories = [run(tx, 3, sampled=draws) for draws in ([0] * 8, [2, 1, 0, 2, 1, 1, 0, 2])]
    odds = [np.log(probabilities(history[-1][1])) for history in histories]
    np.testing.assert_allclose(odds[0], odds[1], rtol=1e-5, atol=1e-5)
    if not normalize:
        total = np.sum([losses for losses, _, _ in histories[0]], axis=0)
        np.testing.assert_allclose(odds[0] - odds[0][0], -0.5 * (total - total[0]), rtol=1e-4, atol=1e-5)


MOMENTUM, FREE = lambda lr: optax.sgd(lr, 0.9), optax.contrib.schedule_free_sgd
# The rest of the nine pairs meets no other code.
PAIRS = (("sample", FREE), ("argmax", MOMENTUM), ("average", optax.adam), ("average", FREE))


@pytest.mark.parametrize(
    ("select", "base"),
    [
        pytest.param(*pair, marks=[pytest.mark.nightly] * (pair not in PAIRS))
        for pair in itertools.product(("sample", "argmax", "average"), (MOMENTUM, optax.adam, FREE))
    ],
)
def test_sync_makes_all_experts_one_and_starts_afresh(select, base):
    tx = samuel(base, RATES, period=4, select=select, prior_odds=1.0)
    history, init = run(tx, 3), jax.jit(tx.init)
    for t, (_, state, params) in enumerate(history):
        assert bool(state.synced) == (t % 4 == 3)
        assert all_experts_equal(params) == bool(state.synced)
        if state.synced:
            # Anchors such as schedule_free's are taken at the new parameters.
            assert_same(state.inner, init(params).inner)
            np.testing.assert_allclose(probabilities(state), 1 / 3, rtol=1e-6)
    np.testing.assert_array_equal(history[3][1].key, init(history[3][2]).key)


def test_dead_expert_begins_again_after_a_sync():
    tx = samuel(optax.sgd, RATES, period=2, prior_odds=5.0, eta_scale=1e4, normalize=False)
    _, (_, state, _) = run(tx, 3, steps=2, tamper=lambda *_: jnp.array([0.1, 0.2, jnp.nan]))
    p = np.asarray(probabilities(state))
    np.testing.assert_allclose(p, [5 / 7, 1 / 7, 1 / 7], rtol=1e-5)


def test_prior_odds_bound_what_a_segment_may_hand_on():
    history = run(samuel(optax.sgd, RATES, period=4, prior_odds=5.0), 3)
    for previous, (_, state, _) in itertools.pairwise(history):
        if state.synced:
            p = np.asarray(probabilities(state))
            assert p.max() / p.min() <= 5.0 * (1 + 1e-5)
            assert p.argmax() == np.argmax(probabilities(previous[1]))
            assert p.max() > 0.5
    gone = run(samuel(optax.sgd, (*RATES[:2], 1e30), period=4, prior_odds=5.0), 3, steps=4)
    assert np.isfinite(probabilities(gone[-1][1])).all()  # an expert that died comes back
    with pytest.raises(ValueError, match=r"prior_odds=0\.5 .*equal weights"):
        samuel(optax.sgd, RATES, prior_odds=0.5)


def test_copy_keeps_the_drawn_experts_momentum():
    tx = samuel(lambda lr: optax.sgd(lr, 0.9), RATES, period=4, inner_state="copy")
    _, _, before, at = run(tx, 3, steps=4, sampled=[1] * 4)
    momentum = optax.tree.get(at[1].inner, "trace")
    assert all_experts_equal(momentum)
    grads = jax.jit(LOSSES_AND_GRADS)(before[2], (X[3], Y[3]))[1]
    expected = 0.9 * optax.tree.get(before[1].inner, "trace")["w"][1] + np.asarray(grads["w"])[1]
    np.testing.assert_allclose(momentum["w"][1], expected, rtol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_permuting_the_experts_permutes_everything(normalize):
    order = np.array([2, 0, 1])
    draws = np.array([0, 1, 2, 2, 1, 0, 0, 1])
    straight = run(samuel(optax.adam, RATES, period=3, normalize=normalize), 3, sampled=draws)
    turned_tx = samuel(optax.adam, tuple(np.array(RATES)[order]), period=3, normalize=normalize)
    turned = run(turned_tx, 3, sampled=np.argsort(order)[draws])
    for (losses, state, params), (losses2, state2, params2) in zip(straight, turned, strict=True):
        np.testing.assert_allclose(losses[order], losses2, rtol=1e-5)
        np.testing.assert_allclose(np.asarray(probabilities(state))[order], probabilities(state2), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(params["w"][order], params2["w"], rtol=1e-5, atol=1e-6)


def test_eta_from_nothing_to_everything():
    still = run(samuel(optax.sgd, RATES, eta_scale=0.0), 3)
    np.testing.assert_allclose(probabilities(still[-1][1]), 1 / 3, rtol=1e-6)
    decided = run(samuel(optax.sgd, RATES, eta_scale=1e6, normalize=False), 3)
    total = np.sum([losses for losses, _, _ in decided], axis=0)
    assert np.asarray(probabilities(decided[-1][1]))[np.argmin(total)] > 0.999


@pytest.mark.parametrize("normalize", [True, False])
def test_common_shift_of_the_losses_changes_nothing(normalize):
    tx = samuel(optax.sgd, RATES, period=20, normalize=normalize)
    shift = lambda losses, count, size: losses + size * count
    plain, shifted = (run(tx, 3, tamper=shift, number=size) for size in (0.0, 0.25))
    for (_, state, params), (_, state2, params2) in zip(plain, shifted, strict=True):
        np.testing.assert_allclose(probabilities(state), probabilities(state2), rtol=1e-3, atol=1e-5)
        assert_same(params, params2)


def test_scale_of_the_losses_changes_nothing_when_normalised():
    tx = samuel(optax.sgd, RATES)
    scale = lambda losses, count, size: size * losses
    plain, scaled = (run(tx, 3, tamper=scale, number=size) for size in (1.0, 1e4))
    np.testing.assert_allclose(probabilities(plain[-1][1]), probabilities(scaled[-1][1]), rtol=1e-3, atol=1e-6)


DIVERGED = (("sample", np.nan), ("argmax", np.inf), ("average", 1e30), ("sample", 1e30))


@pytest.mark.parametrize(
    ("select", "bad"),
    [
        pytest.param(*pair, marks=[pytest.mark.nightly] * (pair not in DIVERGED))
        for pair in itertools.product(("sample", "argmax", "average"), (np.nan, np.inf, 1e30))
    ],
)
def test_diverged_expert_harms_nobody(select, bad):
    tx = samuel(optax.sgd, RATES, period=20, select=select)
    spoil = lambda losses, count, first: losses.at[0].set(jnp.where(count >= first, bad, losses[0]))
    well, sick = (run(tx, 3, tamper=spoil, number=first) for first in (100, 2))
    for t, ((_, _, params), (_, state, params2)) in enumerate(zip(well, sick, strict=True)):
        assert_same(jax.tree.map(lambda p: p[1:], params), jax.tree.map(lambda p: p[1:], params2))
        p = np.asarray(probabilities(state))
        assert np.isfinite(p).all()
        if t >= 2:
            assert p[0] < 1e-6
        if t >= (3 if bad == 1e30 else 2):
            assert state.current_expert != 0


@pytest.mark.parametrize(
    ("select", "sampled"),
    [
        ("sample", None),
        ("sample", 0),
        ("argmax", 0),
        ("average", None),
        pytest.param("argmax", None, marks=pytest.mark.nightly),
        pytest.param("average", 0, marks=pytest.mark.nightly),
    ],
)
def test_not_finite_parameters_never_spread(select, sampled):
    tx = samuel(lambda lr: optax.sgd(lr, 0.9), RATES, period=1, select=select)
    params = samuel_init(PARAMS, 3)
    # The loss is still finite, the update of expert 0 is not.
    grads = jax.tree.map(lambda p: np.concatenate([np.full_like(p[:1], np.nan), np.ones_like(p[1:])]), params)

    @jax.jit
    def step(seed):
        state = tx.init(params)._replace(key=jax.random.key_data(jax.random.key(seed)))
        updates, state = tx.update(grads, state, params, value=jnp.ones(3), sampled=sampled)
        return samuel_sync(state, optax.apply_updates(params, updates)), state

    for seed in range(8):
        synced, state = step(seed)
        assert state.current_expert != 0
        assert all(np.isfinite(leaf).all() for leaf in leaves((synced, state)))
        assert all_experts_equal(synced)


def test_batch_that_breaks_every_loss_moves_no_weight():
    tx = samuel(optax.sgd, RATES)
    params = samuel_init(PARAMS, 3)
    update = jax.jit(lambda state, value: tx.update(params, state, params, value=value)[1])
    state = update(tx.init(params), np.array([0.1, 0.2, 0.3], np.float32))
    after = update(state, np.full(3, np.nan, np.float32))
    np.testing.assert_array_equal(state.log_weights, after.log_weights)
    dead = state._replace(log_weights=np.full_like(state.log_weights, -np.inf))
    np.testing.assert_allclose(probabilities(dead), 1 / 3)


def test_weights_are_those_of_the_written_out_rule():
    """Losses over their running spread (median minus least), clipped at ten of it."""
    rng = np.random.default_rng(0)
    table = rng.uniform(1, 3, (8, 3)) * np.linspace(1, 4, 8)[:, None]
    table[5, 1] = 500.0
    drawn, decay, clip, metas, scale = rng.integers(0, 3, 8), 0.6, 10.0, np.array([0.5, 0.125]), 4.0
    tx = samuel(optax.sgd, RATES, period=100, meta_rates=metas.tolist(), eta_scale=scale, spread_decay=decay)
    history = run(tx, 3, sampled=drawn, tamper=lambda _, count, __: jnp.asarray(table, jnp.float32)[count])
    squares = (np.median(table, axis=1) - table.min(axis=1)) ** 2
    wanted = np.log(metas)[:, None] + np.zeros(3)
    for t in range(8):
        ages = decay ** np.arange(t, -1.0, -1.0)
        spread = np.sqrt(np.sum(ages * squares[: t + 1]) / np.sum(ages))
        losses = np.minimum(table[t] - table[t].min(), clip * spread) / spread
        assert (losses.max() == clip) == (t == 5)
        wanted += scale * metas[:, None] * (losses[drawn[t]] - losses)
        np.testing.assert_allclose(history[t][1].log_weights, wanted, rtol=1e-4, atol=1e-4)


def test_after_a_sync_the_others_are_forgotten():
    tx = samuel(optax.adam, RATES, period=2, select="argmax")
    params = samuel_init(PARAMS, 3)
    state = tx.init(params)
    ends, others = [], np.array([1.0, 0.0, 1.0], np.float32)

    @jax.jit
    def two_steps(other):
        _, middle = tx.update(params, state, other, value=jnp.array([2.0, 1.0, 3.0]))
        updates, end = tx.update(params, middle, other, value=jnp.array([2.0, 1.0, 3.0]), sampled=1)
        return samuel_sync(end, optax.apply_updates(other, updates)), end.log_weights, end.current_expert

    for noise in (0.0, 5.0):
        # Same losses, gradients and chosen expert; the other experts' parameters are disturbed before the sync.
        noise = np.float32(noise) * others
        other = {name: np.asarray(p) + noise.reshape(-1, *[1] * (p.ndim - 1)) for name, p in params.items()}
        ends.append(two_steps(other))
    assert_same(*ends)


def test_other_state_is_synchronised_too():
    tx = samuel(optax.sgd, RATES, period=1)
    params = samuel_init(PARAMS, 3)

    @jax.jit
    def step(state, stats):
        updates, state = tx.update(params, state, params, value=jnp.ones(3), sampled=2)
        return samuel_sync(state, optax.apply_updates(params, updates), stats)

    _, stats = step(tx.init(params), {"mean": np.arange(3, dtype=np.float32), "count": np.arange(3, dtype=np.int32)})
    assert stats["mean"].tolist() == [2.0, 2.0, 2.0]
    assert stats["count"].tolist() == [2, 2, 2]
    assert stats["count"].dtype == jnp.int32


def test_last_step_ends_by_argmax():
    tx = samuel(optax.sgd, RATES, period=100, total_steps=3)
    params = samuel_init(PARAMS, 3)

    @jax.jit
    def last_step(seed):
        state = tx.init(params)._replace(
            key=jax.random.key_data(jax.random.key(seed)),
            count=jnp.int32(2),
            log_weights=jnp.log(jnp.array([[0.3, 0.36, 0.34]] * 4)),
        )
        return tx.update(params, state, params, value=jnp.ones(3))[1]

    for seed in range(10):
        state = last_step(seed)
        assert state.synced
        assert state.current_expert == 1


def test_evaluation_takes_the_most_probable_expert_or_the_average():
    tx = samuel(optax.sgd, RATES)
    params = {"w": np.array([1.0, 2.0, 4.0], np.float32)}
    state = tx.init(params)._replace(log_weights=np.log(np.array([[0.2, 0.2, 0.6]] * 4, np.float32)))
    evaluate = jax.jit(samuel_eval_params, static_argnames="average")
    assert float(evaluate((optax.EmptyState(), state), params)["w"]) == 4.0
    np.testing.assert_allclose(evaluate(state, params, average=True)["w"], 3.0, rtol=1e-6)
    with pytest.raises(ValueError, match="holds 0 SamuelState"):
        samuel_eval_params(optax.sgd(0.1).init(params), params)


@pytest.mark.parametrize("name", ["mw_sgd_3experts", "mw_adam_mixed_shift", "mw_large_eta_noreset"])
def test_parity_with_the_official_program(name):
    ref = np.load(REFERENCE / f"{name}.npz")
    with jax.enable_x64(True):
        makers = {"sgd": optax.sgd, "adam": optax.adam, "adagrad": optax.adagrad}
        bases = [makers[str(o)](float(lr)) for o, lr in zip(ref["optimizers"], ref["learning_rates"], strict=True)]
        steps = [int(step) for step in ref["reinit_steps"]]
        tx = samuel(bases, period=steps, meta_rates=tuple(ref["mw_etas"]), **OFFICIAL)
        losses_and_grads = samuel_value_and_grad(
            lambda w, x, target: 0.5 * jnp.mean((x @ w - x @ target) ** 2), loop="vmap"
        )

        @jax.jit
        def step(w, state, x, target, sampled):
            losses, grads = losses_and_grads(w, x, target)
            updates, new_state = tx.update(grads, state, w, value=losses, sampled=sampled)
            # Before a sync resets them, the weights of this step are those of a run that never syncs.
            _, unsynced = never.update(grads, state, w, value=losses, sampled=sampled)
            return losses, samuel_sync(new_state, optax.apply_updates(w, updates)), new_state, unsynced

        never = samuel(bases, period=[], meta_rates=tuple(ref["mw_etas"]), **OFFICIAL)
        w = samuel_init(jnp.asarray(ref["params_init"]), len(bases))
        state = tx.init(w)
        shift = int(ref["shift_step"])
        for t, rows in enumerate(ref["batch_index"]):
            target = ref["w_target_2"] if 0 <= shift <= t else ref["w_target_1"]
            np.testing.assert_allclose(probabilities(state), ref["prob"][t], rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(np.exp(state.log_weights), ref["weights_before"][t], rtol=1e-10)
            losses, w, state, unsynced = step(w, state, ref["X"][rows], target, ref["current_expert"][t])
            np.testing.assert_allclose(losses, ref["losses"][t], rtol=1e-10)
            np.testing.assert_allclose(np.exp(unsynced.log_weights), ref["weights_after"][t], rtol=1e-10)
            np.testing.assert_allclose(w, ref["params_after"][t], rtol=1e-10, atol=1e-10)
            assert bool(state.synced) == ref["synced"][t]


def test_official_key_restart_is_not_reproduced():
    histories = run(samuel(optax.sgd, RATES, period=8, eta_scale=0.0), 3, steps=40)
    draws = np.array([int(state.current_expert) for _, state, _ in histories]).reshape(5, 8)
    assert len({tuple(row) for row in draws}) > 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_stay_wide_whatever_the_parameters(dtype):
    tx = samuel(optax.sgd, RATES, period=2)
    params = samuel_init(jax.tree.map(lambda p: p.astype(dtype), PARAMS), 3)
    state = tx.init(params)
    update = jax.jit(lambda state: tx.update(params, state, params, value=jnp.arange(3.0).astype(dtype)))
    for _ in range(4):
        updates, state = update(state)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert state.log_weights.dtype == state.spread.dtype == state.learning_rate.dtype == jnp.float32


def noisy(params, key, stats, batch):
    mask = jax.random.bernoulli(key, 0.5, (4, 1))
    loss = loss_fn({"w": params["w"] * mask, "b": params["b"] + stats}, batch)
    return loss, stats + 1


alone = jax.jit(jax.value_and_grad(noisy, has_aux=True))


@pytest.mark.parametrize("loop", ["auto", "vmap", "map", "unroll"])
def test_losses_and_grads_in_every_loop_with_stacked_and_shared_arguments(loop):
    params = {name: p + normal(3, *p.shape) for name, p in samuel_init(PARAMS, 3).items()}
    keys, stats = jax.random.split(jax.random.key(2), 3), np.arange(3, dtype=np.float32)
    f = samuel_value_and_grad(noisy, has_aux=True, in_axes=(0, 0, 0, None), loop=loop)
    (losses, aux), grads = jax.device_get(jax.jit(f)(params, keys, stats, (X[0], Y[0])))
    assert aux.tolist() == [1.0, 2.0, 3.0]
    for e in range(3):
        own = {name: np.asarray(p)[e] for name, p in params.items()}
        (loss, _), grad = alone(own, keys[e], stats[e], (X[0], Y[0]))
        np.testing.assert_allclose(losses[e], loss, rtol=1e-5)
        np.testing.assert_allclose(grads["w"][e], grad["w"], rtol=1e-4, atol=1e-6)


BAD = [
    (lambda: samuel(optax.sgd, (0.1, -0.1)), ValueError, r"learning_rates=-0.1 must be a number in \(0"),
    (lambda: samuel(optax.sgd, (0.1, 0.1)), ValueError, r"repeats \[0.1\]"),
    (lambda: samuel(optax.sgd, (0.1, float("nan"))), ValueError, "learning_rates"),
    (lambda: samuel([optax.sgd(0.1), optax.adam(0.1)], RATES), ValueError, "learning_rates must be None"),
    (lambda: samuel([0.1, 0.2]), TypeError, "function of the learning rate"),
    (lambda: samuel(optax.sgd, RATES, period=0), ValueError, "period=0"),
    (lambda: samuel(optax.sgd, RATES, period=[3, -1]), ValueError, "period=-1"),
    (lambda: samuel(optax.sgd, RATES, total_steps=0), ValueError, "total_steps=0"),
    (lambda: samuel(optax.sgd, RATES, select="arg_max"), ValueError, "Did you mean 'argmax'"),
    (lambda: samuel(optax.sgd, RATES, inner_state="keep"), ValueError, "inner_state='keep'"),
    (lambda: samuel([optax.sgd(0.1)] * 2, inner_state="copy"), ValueError, "inner_state='copy'"),
    (lambda: samuel(optax.sgd, RATES, meta_rates=()), ValueError, "meta_rates"),
    (lambda: samuel(optax.sgd, RATES, meta_rates=(0.0,)), ValueError, "meta_rates=0.0"),
    (lambda: samuel(optax.sgd, RATES, eta_scale=-1), ValueError, "eta_scale=-1"),
    (lambda: samuel(optax.sgd, RATES, spread_decay=1.0), ValueError, "spread_decay=1.0"),
    (lambda: samuel(optax.sgd, RATES, loss_clip=0.0), ValueError, "loss_clip=0.0"),
    (lambda: samuel(optax.sgd, RATES, prior_odds=0.5), ValueError, "prior_odds=0.5"),
    (lambda: samuel_value_and_grad(loss_fn, loop="scan"), ValueError, "loop='scan'"),
    (lambda: samuel_value_and_grad(loss_fn, in_axes=(None, 0)), ValueError, "in_axes"),
    (lambda: samuel_init(PARAMS, 0), ValueError, "experts=0"),
]


@pytest.mark.parametrize(("make", "error", "text"), BAD)
def test_bad_arguments_are_named(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_bad_calls_are_named():
    tx, params = samuel(optax.sgd, RATES), samuel_init(PARAMS, 3)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"samuel_init\(params, 3\)"):
        tx.init(PARAMS)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state, value=jnp.ones(3))
    with pytest.raises(ValueError, match="needs value, the losses"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match=r"value has shape \(\), but must hold one loss per expert: \(3,\)"):
        tx.update(params, state, params, value=jnp.ones(()))
    with pytest.raises(ValueError, match=r"value has shape \(4,\)"):
        tx.update(params, state, params, value=np.ones(4, np.float32))
    with pytest.raises(ValueError, match="updates"):
        tx.update(PARAMS, state, params, value=jnp.ones(3))
    injected = samuel(lambda lr: optax.inject_hyperparams(optax.sgd)(learning_rate=lr), RATES, inner_state="copy")
    with pytest.raises(ValueError, match="inject_hyperparams"):
        injected.init(params)


def test_state_is_a_plain_tree_of_arrays():
    state = samuel(optax.sgd, RATES).init(samuel_init(PARAMS, 3))
    assert isinstance(state, SamuelState)
    assert all(isinstance(np.asarray(leaf), np.ndarray) for leaf in jax.tree.leaves(state))
    np.testing.assert_allclose(optax.tree.get(state, "learning_rate"), 0.3)


def test_experts_on_a_mesh_axis():
    params = {"w": normal(0, 16, 32), "v": normal(1, 32, 4)}
    batch = (normal(2, 64, 16), normal(3, 64, 4))
    tx = samuel(optax.adam, (0.1, 0.03, 0.01, 0.003), period=3)

    def loss(p, batch):
        return jnp.mean((jnp.tanh(batch[0] @ p["w"]) @ p["v"] - batch[1]) ** 2)

    def train(mesh, p, batch):
        losses_and_grads = samuel_value_and_grad(loss, mesh=mesh, loop="vmap")

        @jax.jit
        def step(p, state, batch):
            losses, grads = losses_and_grads(p, batch)
            updates, state = tx.update(grads, state, p, value=losses)
            return losses, samuel_sync(state, optax.apply_updates(p, updates)), state

        state, history = jax.jit(tx.init)(p), []
        for t in range(7):
            losses, p, state = step(p, state, batch)
            history.append(np.asarray(losses))
            if t == 2:
                w = np.asarray(p["w"])
                assert (w == w[:1]).all()
            if t == 0:
                types = jax.tree.map(jax.typeof, (p, state))
                shardings = jax.tree.map(lambda x: x.sharding, (p, state))
            if t == 1:
                warm = step._cache_size()
        assert jax.tree.map(jax.typeof, (p, state)) == types
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), (p, state), shardings)
        assert all(jax.tree.leaves(same)), same
        assert step._cache_size() == warm
        return np.stack(history), step.lower(p, state, batch).compile().as_text()

    one, _ = train(None, samuel_init(params, 4), batch)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("expert", "data"), axis_types=(kind,) * 2)
        with jax.set_mesh(mesh):
            stacked = jax.device_put(samuel_init(params, 4), NamedSharding(mesh, P("expert")))
            many, text = train(mesh, stacked, jax.device_put(batch, NamedSharding(mesh, P("data"))))
        np.testing.assert_allclose(many, one, rtol=2e-4, atol=1e-6)
        # Outside the branch of the sync, nothing as large as a parameter crosses the expert axis: gathers hold E
        # scalars, and the gradients' all-reduce runs over the data axis, between neighbours.
        for line in text.splitlines():
            if gather := re.search(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", line):
                size = np.prod([int(n) for n in gather[2].split(",") if n])
                assert size <= 4 or "[64," in line, line
        with pytest.raises(ValueError, match="6 experts do not divide among the 4 devices"):
            samuel_value_and_grad(loss, mesh=mesh)(samuel_init(params, 6), batch)


def test_draws_follow_the_probabilities_and_never_hit_a_dead_expert():
    logits = jnp.log(jnp.array([0.0, 0.5, 0.2, 0.0, 0.3, 0.0]))
    key, steps = jax.random.key_data(jax.random.key(0)), np.arange(40_000, dtype=np.int32)
    counts = np.bincount(jax.jit(jax.vmap(lambda step: draw(key, step, logits)))(steps), minlength=6) / 40_000
    np.testing.assert_allclose(counts, [0, 0.5, 0.2, 0, 0.3, 0], atol=0.01)
    assert (counts[[0, 3, 5]] == 0).all()


bits_of = jax.jit(fold_in_bits)


def test_bits_of_a_draw_are_those_of_fold_in():
    for seed, count in itertools.product((0, 7, 2**31), (0, 1, 12_345)):
        key = jax.random.key(seed)
        wanted = jax.random.key_data(jax.random.fold_in(key, count)).tolist()[0]
        assert int(bits_of(jax.random.key_data(key), np.int32(count))) == wanted
